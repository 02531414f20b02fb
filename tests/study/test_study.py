"""A study on a small collection, with Ray Tune and Train, Lucene and MLflow: killed, resumed, run twice, submitted."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.study.job import load_job, parse_axes
from dagr_ray.study.plan import plan_study
from tests.conftest import tiny_beir
from tests.support.ray_head import local_head

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
DAGR = [sys.executable, "-m", "dagr_ray.cli.main"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A collection, and the runs folder of one finished study over it."""
    root = tmp_path_factory.mktemp("study")
    tiny_beir(root / "set")
    done = _dagr(root, "study", "jobs/beir.py", *_axes(root))
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "first.txt").write_text(done.stdout)
    return root


def _axes(root: Path) -> list[str]:
    return [f"data={root / 'set'}", "volume=0,8,16", "generator=crop", "passages=40", "max_rank=50"]


def _dagr(root: Path, *words: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    words = (*words, "--runs", str(root / "runs"))
    return subprocess.run([*DAGR, *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def _study_folder(root: Path) -> Artifact:
    names = [p.name for p in (root / "runs").iterdir() if p.name.startswith("study-")]
    assert len(names) == 1
    return Artifact(str(root / "runs"), names[0])


def test_study_holds_baselines_and_arms(place) -> None:
    study = _study_folder(place).read_json("study.json")
    assert [t["kind"] for t in study["trials"]] == ["bm25", "frozen", "augmented", "augmented"]
    assert {t["state"] for t in study["trials"]} == {"done"}
    assert re.fullmatch(r"no GPU|\d+ x .+", study["machine"]["device"])
    text = (place / "first.txt").read_text()
    for word in ("bm25", "frozen", "nDCG@10"):
        assert word.lower() in text.lower()
    page = (Path(_study_folder(place).path) / "report.html").read_text()
    assert len(page) > 5000 and "BM25 reads set as English words, Porter stems" in page


def test_smaller_volumes_lie_inside_larger_ones(place) -> None:
    taken = sorted(p.name for p in (place / "runs").iterdir() if p.name.startswith("take-"))
    small, large = (
        set(
            Artifact(str(place / "runs"), next(n for n in taken if f"n{n_}-" in n))
            .read("examples")["query_id"]
            .to_pylist()
        )
        for n_ in (8, 16)
    )
    assert len(small) == 8
    assert len(large) == 16
    assert small < large


def test_generation_ran_once_for_all_volumes(place) -> None:
    assert sum(p.name.startswith("generate-") for p in (place / "runs").iterdir()) == 1


def test_the_second_time_nothing_is_built(place) -> None:
    before = {p: p.stat().st_mtime_ns for p in (place / "runs").rglob("manifest.json")}
    started = time.time()
    done = _dagr(place, "study", "jobs/beir.py", *_axes(place))
    assert done.returncode == 0, done.stderr
    assert time.time() - started < 40
    assert {p: p.stat().st_mtime_ns for p in (place / "runs").rglob("manifest.json")} == before


def test_mlflow_has_one_parent_and_a_child_for_each_trial(place) -> None:
    code = (
        "import mlflow, sys\n"
        "c = mlflow.MlflowClient(tracking_uri=sys.argv[1])\n"
        "ids = [e.experiment_id for e in c.search_experiments()]\n"
        "runs = c.search_runs(ids)\n"
        "print(sum('mlflow.parentRunId' in r.data.tags for r in runs), len(runs))"
    )
    uri = f"sqlite:///{place / 'runs' / 'mlflow.db'}"
    done = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "5"]


def test_trace_leads_from_a_training_row_to_its_passage(place) -> None:
    take = next(p.name for p in (place / "runs").iterdir() if p.name.startswith("take-n8"))
    query_id = Artifact(str(place / "runs"), take).read("examples")["query_id"][0].as_py()
    done = _dagr(place, "trace", query_id, "--json")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for word in ("passage", "prompt", "raw", "price"):
        assert word in text
    assert _dagr(place, "trace", "f" * 24).returncode == 2


@pytest.mark.parametrize("form", ["beir", "sentence-transformers", "trec"])
def test_export(place, tmp_path, form) -> None:
    runs = place / "runs"
    start = "evaluate-" if form == "trec" else "take-n16"
    folder = next(p.name for p in runs.iterdir() if p.name.startswith(start))
    target = tmp_path / ("out" if form == "beir" else "out.txt")
    done = _dagr(place, "export", folder, str(target), "--format", form)
    assert done.returncode == 0, done.stderr
    if form == "beir":
        from dagr_ray.formats import beir

        data = beir.read(str(target))
        assert data.tables["qrels.train"].num_rows == 16
        assert data.tables["corpus"].num_rows == 60
        assert not data.problems
    elif form == "trec":
        assert all(len(line.split()) == 6 for line in target.read_text().splitlines())
    else:
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        assert len(rows) == 16
        assert {"anchor", "positive", "negative_1"} <= set(rows[0])


def test_flipped_bit_is_found_by_check_deep_and_rebuilt(place) -> None:
    runs = place / "runs"
    parsed = next(p for p in runs.iterdir() if p.name.startswith("parse-"))
    part = next((parsed / "queries").iterdir())
    whole = part.read_bytes()
    part.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    found = _dagr(place, "check", "jobs/beir.py", *_axes(place), "--deep")
    assert found.returncode == 1
    assert part.name in found.stdout
    assert _dagr(place, "study", "jobs/beir.py", *_axes(place)).returncode == 0
    assert part.read_bytes() == whole


@pytest.mark.parametrize(
    ("sent", "code", "message"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM")]
)
def test_an_interrupt_ends_within_ten_seconds(place, tmp_path, sent, code, message) -> None:
    shutil.copytree(place / "runs", tmp_path, dirs_exist_ok=True)  # all but the trainings is there
    trained = {path.name for path in tmp_path.iterdir()}
    words = [*DAGR, "study", "jobs/beir.py", *_axes(place), "seed=7", "--runs", str(tmp_path)]
    errors = tmp_path / "errors.txt"
    with errors.open("w") as sink:
        driver = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=sink)
    while (
        not any(p.name.startswith("train-") and p.name not in trained for p in tmp_path.iterdir())
        and driver.poll() is None
    ):
        time.sleep(0.2)
    family = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, sent)
    started = time.time()
    time.sleep(0.3)
    driver.send_signal(sent)  # whoever asks is not always patient
    driver.wait(timeout=60)
    assert time.time() - started < 10
    assert driver.returncode == code, errors.read_text()
    assert f"{message}; finished work is kept. Resume with: dagr study jobs/beir.py" in errors.read_text()
    assert "Traceback" not in errors.read_text()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_two_studies_at_once_on_one_runs_folder(place, tmp_path) -> None:
    words = [*DAGR, "study", "jobs/beir.py", f"data={place / 'set'}", "volume=0", "--runs", str(tmp_path)]
    both = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for driver in both:
        _, errors = driver.communicate(timeout=200)
        assert driver.returncode == 0, errors[-2000:]
        assert "not tracked" not in errors
    plain = [*DAGR, "check", "jobs/beir.py", f"data={place / 'set'}", "volume=0", "--deep", "--runs", str(tmp_path)]
    checked = subprocess.run(plain, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    for path in tmp_path.glob("*/attempts"):
        done = [line for f in path.iterdir() for line in f.read_text().splitlines() if '"event": "done"' in line]
        assert len(done) == 1, f"{path} was built {len(done)} times"
    for path in tmp_path.glob("scorecard-*"):
        assert (path / "manifest.json").is_file()


def test_axes_are_checked_and_repeats_are_one_trial(place) -> None:
    job = load_job(str(ROOT / "jobs/beir.py"))
    axes = parse_axes(job, [f"data={place / 'set'}", "generator=crop", "volume=0,8"], sweep=True)
    planned = plan_study(job, axes)
    assert [trial.kind for trial in planned.trials] == ["bm25", "frozen", "augmented"]
    with pytest.raises(ConfigError, match="volume = '-x'"):
        parse_axes(job, ["volume=8,-x"], sweep=True)


def test_job_submit_to_a_local_head(place, tmp_path) -> None:
    """The job as a platform team sends it: `ray job submit` with the working directory, to a head node of its own."""
    work = tmp_path / "work"
    work.mkdir()
    subprocess.run(["cp", "-r", str(ROOT / "jobs"), str(ROOT / "dagr_ray"), str(work)], check=True)
    runs = tmp_path / "runs"
    shutil.copytree(place / "runs", runs)
    for path in (*runs.glob("study-*"), *runs.glob("train-*")):
        shutil.rmtree(path)
    job = [sys.executable, "-m", "dagr_ray.cli.main", "study", "jobs/beir.py", *_axes(place)[:1], "volume=0,8"]
    job += ["generator=crop", "passages=40", "max_rank=50", "--runs", str(runs)]
    with local_head() as head:
        done = head.submit(work, job, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "succeeded" in done.stdout.lower() + done.stderr.lower()
    assert any(path.name.startswith("study-") for path in runs.iterdir())
