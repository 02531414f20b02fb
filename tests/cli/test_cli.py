"""The command line as a person meets it: one-line errors, exit codes, fast help, previews and dry runs that cost nothing."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dagr_ray.cli import inspect, main, results, run
from dagr_ray.core.config import ConfigError
from dagr_ray.study.job import load_job
from tests.conftest import tiny_beir

ROOT = Path(__file__).parents[2]
DAGR = [sys.executable, "-m", "dagr_ray.cli.main"]


def dagr(*words: str, cwd: Path = ROOT, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    return subprocess.run([*DAGR, *words], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def test_every_verb_has_a_command() -> None:
    for verb in main.VERBS:
        homes = [module for module in (run, inspect, results) if callable(getattr(module, verb, None))]
        assert homes, verb


def test_help_imports_nothing_heavy() -> None:
    for verb in ([], *([v] for v in main.VERBS)):
        code = (
            "import sys\nfrom dagr_ray.cli import main as cli\n"
            f"try: cli.main({[*verb, '--help']!r})\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'ray', 'vllm', 'mlflow', 'pyarrow', 'pydantic', 'numpy'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        if verb in ([], ["study"]):
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_what_is_taken_down_after_a_verb_cannot_abort_it(tmp_path: Path) -> None:
    code = (
        "import atexit, builtins, os\nfrom dagr_ray.cli import main as cli\n"
        "class Abort:\n    def __del__(self, abort=os.abort): abort()\n"
        "builtins.left = Abort()\natexit.register(os.mkdir, 'tidied')\n"
        f"cli.main(['ls', '--runs', {str(tmp_path / 'runs')!r}])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "tidied").is_dir(), "what Python itself tidies up is still done"


def test_help_is_at_once_there() -> None:
    fastest = min(_seconds("study", "--help") for _ in range(5))
    assert fastest < 0.5


def _seconds(*words: str) -> float:
    started = time.perf_counter()
    assert dagr(*words).returncode == 0
    return time.perf_counter() - started


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "jobs/quickstart.py", "volum=3"], ["'volum'", "allowed", "volume"]),
        (["run", "jobs/quickstart.py", "volume=many"], ["volume = 'many'", "integer"]),
        (["run", "jobs/quickstart.py", "generator=gpt"], ["generator = 'gpt'", "smollm2", "crop"]),
        (["run", "jobs/quickstart.py", "passages=0"], ["n = 0", "greater than or equal to 1"]),
        (["run", "jobs/quickstart.py", "coverage=1.5"], ["coverage = 1.5", "less than or equal to 1"]),
        (["run", "jobs/quickstart.py", "volume"], ["'volume'", "NAME=VALUE"]),
        (["run", "jobs/none.py"], ["jobs/none.py", "jobs/quickstart.py"]),
        (["run", "jobs/beir.py"], ["data=VALUE"]),
        (["check", "jobs/beir.py", "data=/no/such/folder"], ["/no/such/folder", "BEIR folder"]),
        (["study", "jobs/quickstart.py", "--placement", "huge"], ["'huge'", "local"]),
        (["show", "nothing-here"], ["'nothing-here'", "dagr ls"]),
        (["report", "--runs", "/no/runs"], ["/no/runs", "dagr study"]),
        (["trace", "no-such-id"], ["no-such-id"]),
        (["preview", "jobs/quickstart.py", "volume=0"], ["generates nothing"]),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, words, expected) -> None:
    where = [] if "--runs" in words or words[0] == "preview" else ["--runs", str(tmp_path)]
    done = dagr(*words, *where)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("dagr: error: ")
    for word in expected:
        assert word in lines[0]
    assert not any(tmp_path.iterdir())


def test_a_missing_model_is_named_before_anything_starts(tmp_path) -> None:
    data = tiny_beir(tmp_path / "set")
    words = [f"data={data}", "generator=llm", "model=/no/model", "--runs", str(tmp_path / "runs")]
    done = dagr("run", "jobs/beir.py", *words)
    assert done.returncode == 2
    assert "/no/model" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_placement_errors_name_the_key(tmp_path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[generate]\nworkres = 3\n")
    done = dagr("check", "jobs/quickstart.py", "--placement", str(bad))
    assert done.returncode == 2
    assert "workres" in done.stderr


def test_check_as_json_lists_every_stage_to_do(tmp_path) -> None:
    done = dagr("check", "jobs/quickstart.py", "--runs", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert {stage["state"] for stage in stages} == {"to do"}
    generate = [stage for stage in stages if stage["type"] == "generate"]
    assert len(generate) == 2, "one generation for each generator, whatever the volumes"
    assert max(stage["estimate"]["tokens"] or 0 for stage in generate) > 10_000
    assert not any(tmp_path.iterdir())


def test_preview_shows_prompt_and_outcome_and_writes_nothing(tmp_path) -> None:
    data = tiny_beir(tmp_path / "set")
    before = sorted(tmp_path.rglob("*"))
    done = dagr("preview", str(ROOT / "jobs/beir.py"), f"data={data}", "generator=crop", "--rows", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("=== ") == 2
    assert "->" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


CATALOGUE = {
    "strategy": "promptagator inpars typed persona multi-hop task-triple hyde hard-negative prefix crop paraphrase "
    "counterfactual simplify translate translate-passage noisy critique retry",
    "teacher": "llm-judge cross-encoder hybrid attention-rerank",
    "stage": "aggregate relabel expand leak-gate mix-queries generate-until",
    "filter": "format length language repetition refusal template copied duplicate round-trip teacher-score logprob pii "
    "diversity",
}


def test_plugins_are_listed_with_one_line_each() -> None:
    done = dagr("plugins")
    assert done.returncode == 0
    told = {tuple(line.split()[:2]): line.split(maxsplit=2)[2] for line in done.stdout.splitlines()[1:]}
    for kind, names in CATALOGUE.items():
        for name in names.split():
            assert len(told.get((kind, name), "")) > 20, f"{kind} {name}"
    assert {("engine", "vllm"), ("miner", "bm25"), ("miner", "dense")} <= set(told)


def test_ls_of_an_empty_folder(tmp_path) -> None:
    assert dagr("ls", "--runs", str(tmp_path)).stdout == f"nothing in {tmp_path}\n"
    assert json.loads(dagr("ls", "--runs", str(tmp_path), "--json").stdout) == []


def test_version_and_no_verb() -> None:
    assert dagr("--version").stdout.strip()
    assert dagr().returncode == 2


def test_values_may_follow_options(tmp_path) -> None:
    data = tiny_beir(tmp_path / "set")
    words = ("jobs/beir.py", f"data={data}", "--one", "volume=4", "--runs", str(tmp_path), "generator=crop")
    done = dagr("check", *words)
    assert done.returncode == 0, done.stderr
    assert "take-n4-" in done.stdout
    assert "generate-crop-" in done.stdout
    assert "unrecognized arguments: --wrong" in dagr("check", "jobs/beir.py", "--wrong", "volume=4").stderr
    assert dagr("ls", "volume=4").returncode == 2


WITHOUT = """
import os, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == os.environ["WITHOUT"] else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def without(package: str, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line in a Python, and with Ray workers, where a package is not installed."""
    (place / "sitecustomize.py").write_text(WITHOUT)
    paths = os.pathsep.join([str(place), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    env = os.environ | {"PYTHONPATH": paths, "WITHOUT": package}
    return subprocess.run([*DAGR, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=env)


INDEX = """
from dagr_ray.miners.dense import Dense
from dagr_ray.quickstart.models import minilm
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.sources import Beir
from dagr_ray.stages.retrieve import Index

def index(data: str) -> Index:
    return Index(corpus=Beir(path=data), miner=Dense(encoder=Encoder(model=str(minilm()), layers=1)))
"""


@pytest.mark.parametrize(
    ("package", "words", "command"),
    [
        ("ray", ["run", "jobs/beir.py", "generator=crop", "volume=8"], "install 'ray[data,default,train,tune]==2.60.0'"),
        # in a worker
        ("sentence_transformers", ["run", "INDEX", "--placement", "POOL"], "install 'sentence-transformers[train]==6.2.0'"),
        ("mlflow", ["track"], "install mlflow==3.17.2"),
        ("pyarrow", ["run", "jobs/beir.py"], "install pyarrow"),
    ],
)  # fmt: skip
def test_a_package_that_is_missing_is_named_with_its_command(tmp_path, package, words, command) -> None:
    data, runs = tiny_beir(tmp_path / "set", docs=20), tmp_path / "runs"
    (tmp_path / "index.py").write_text(INDEX)
    (tmp_path / "pool.toml").write_text("[retrieve]\nworkers = 1\ncpus = 0.5\n")
    (runs / "study-one").mkdir(parents=True)
    files = {"INDEX": str(tmp_path / "index.py"), "POOL": str(tmp_path / "pool.toml")}
    words = [files.get(word, word) for word in words]
    more = [str(runs)] if words == ["track"] else [f"data={data}", "--runs", str(runs)]
    done = without(package, tmp_path, *words, *more)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert lines[-1].startswith(f"dagr: error: {package} is not installed; run: ") and lines[-1].endswith(command)
    assert "Traceback" not in done.stderr


def test_a_missing_import_of_a_job_names_the_install_command(tmp_path) -> None:
    job = tmp_path / "mine.py"
    for text, said in [
        (
            "import no_such_package.inner",
            f"{job} imports 'no_such_package', which is neither installed nor a file in the job's folder; ",
        ),
        ("import dagr_ray.nothing", f"{job}: No module named 'dagr_ray.nothing'; correct the job file"),
    ]:
        job.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(said)):
            load_job(str(job))


def test_a_search_for_another_package_is_not_the_fault(capsys) -> None:
    try:
        try:
            import no_such_package  # noqa: F401
        except ImportError:
            raise ValueError("the true fault")  # noqa: B904
    except ValueError as error:
        assert main._explain(error) == 1
    assert "the true fault" in capsys.readouterr().err
