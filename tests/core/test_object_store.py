"""Runs folders, corpora and models on an S3 server: no rename, no lock, an upload of many parts, and drivers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from dagr_ray.cli import inspect, main, results, run
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import StageFailed, load_stage
from dagr_ray.core.storage import filesystem
from dagr_ray.stages.sources import Beir
from tests.conftest import tiny_beir
from tests.support import studies
from tests.support.object_store import BUCKET, ObjectStore, Request

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

ROOT = Path(__file__).parents[2]
HERE = Placement(generate=Pool(workers=0, shard_rows=5))
JOB = """
from dagr_ray.recipes.augmentation import augment, generator_named
from dagr_ray.core.stage import Stage
from dagr_ray.stages.sources import Beir


def mined(data: str) -> Stage:
    corpus = Beir(path=data)
    return augment(corpus, corpus, *generator_named("crop"), exemplars=None, samples=2, max_rank=100)[1]
"""
# A driver of the same stages without Ray: `python -c DRIVER data runs shard_rows`.
DRIVER = """
import sys
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.engines.crop import CropEngine
from dagr_ray.core.build import materialize
from dagr_ray.stages.sources import Beir
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.strategies.crop import Crop

data, runs, rows = sys.argv[1:]
corpus = Beir(path=data)
raw = Generate(corpus=corpus, strategy=Crop(), engine=CropEngine(), samples=2)
materialize(Parse(generations=raw, corpus=corpus), runs, Placement(generate=Pool(workers=0, shard_rows=int(rows))))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with ObjectStore() as running:
        yield running


@pytest.fixture
def store(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The server, and a scratch folder of this test's own for what is fetched from it."""
    monkeypatch.setenv("DAGR_SCRATCH", str(tmp_path / "scratch"))
    return server


@pytest.fixture
def data(store: ObjectStore, tmp_path: Path) -> str:
    """The address of a BEIR folder of 200 passages, and the same folder at ``tmp_path / "set"``."""
    put(tiny_beir(tmp_path / "set", docs=200), f"{tmp_path.name}/set")
    return f"s3://{BUCKET}/{tmp_path.name}/set"


def put(folder: Path, path: str) -> None:
    fs, target = filesystem(f"s3://{BUCKET}/{path}")
    pafs.copy_files(str(folder), target, destination_filesystem=fs)


def objects(path: str) -> list[str]:
    """Every key below a path of the bucket."""
    fs, root = filesystem(f"s3://{BUCKET}/{path}")
    found = fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    return [f.path.removeprefix(f"{root}/") for f in found if f.is_file]


def folder_of(runs: str, kind: str) -> Artifact | None:
    names = [name for name, _ in inspect.folders(runs) if name.startswith(f"{kind}-")]
    return Artifact(runs, names[0]) if names else None


def found(runs: str, kind: str) -> Artifact:
    folder = folder_of(runs, kind)
    assert folder is not None, f"no {kind} in {runs}"
    return folder


def same_tables(one: Artifact, other: Artifact) -> None:
    assert one.name == other.name
    assert one.table_names() == other.table_names()
    for table in one.table_names():
        assert one.read(table).combine_chunks().equals(other.read(table).combine_chunks()), (one.name, table)


def dagr_run(root: Path, data: str, runs: str) -> list[str]:
    command = [sys.executable, "-m", "dagr_ray.cli.main", "run", str(root / "mined.py"), f"data={data}", "--quiet"]
    return [*command, f"--runs={runs}", f"--placement={root / 'placement.toml'}"]


def test_kill_nine_of_a_driver_whose_runs_are_on_an_object_store(store: ObjectStore, tmp_path: Path, data: str) -> None:
    """Corpus and runs behind URIs, Ray's worker writes there; the undisturbed run beside it is on the local disk."""
    (tmp_path / "mined.py").write_text(JOB)
    (tmp_path / "placement.toml").write_text("[generate]\nworkers = 1\ncpus = 1\nshard_rows = 10\n")
    runs = f"s3://{BUCKET}/{tmp_path.name}/killed"
    driver = subprocess.Popen(dagr_run(tmp_path, data, runs), cwd=ROOT, stderr=subprocess.DEVNULL)
    folder = None
    while folder is None or len(folder.listing("receipts")) < 5:
        time.sleep(0.1)
        assert driver.poll() is None, "the driver ended before it could be killed"
        folder = folder or folder_of(runs, "generate")
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(2)  # the worker sees that its driver is gone
    kept = {name: folder.read_bytes(f"receipts/{name}") for name in folder.listing("receipts")}
    assert folder.manifest is None
    assert 5 <= len(kept) < 20

    again = subprocess.run(dagr_run(tmp_path, data, runs), cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.strip().endswith(found(runs, "mine").path)
    assert {name: folder.read_bytes(f"receipts/{name}") for name in kept} == kept
    calm = str(tmp_path / "calm")
    stage = load_stage(found(runs, "mine")).model_copy()
    materialize(stage, calm, HERE)
    for kind in ("beir", "generate", "parse", "select", "mine"):
        same_tables(found(runs, kind), found(calm, kind))
    ids = folder.read("generations")["gen_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 400
    starts = [json.loads(line) for line in attempts(folder) if '"event": "start"' in line]
    assert [start["pending"] for start in starts] == [20, 20 - len(kept)]
    every = [folder.fs.open_input_stream(f"{BUCKET}/{tmp_path.name}/killed/{key}").read() for key in
             objects(f"{tmp_path.name}/killed")]  # fmt: skip
    secret = store.environment()["AWS_SECRET_ACCESS_KEY"].encode()
    assert len(every) > 100 and not any(secret in text for text in every)


def attempts(folder: Artifact) -> list[str]:
    names = sorted(folder.listing("attempts"))
    return [line for name in names for line in (folder.read_bytes(f"attempts/{name}") or b"").decode().splitlines()]


def test_a_part_whose_upload_is_interrupted_is_never_seen(store: ObjectStore, tmp_path: Path) -> None:
    """A part of several MB goes up in pieces: killed before the last step, and refused in the middle."""
    source = tmp_path / "set"
    tiny_beir(source)
    with open(source / "corpus.jsonl", "a") as corpus:
        for i in range(1500):
            corpus.write(json.dumps({"_id": f"r{i}", "text": os.urandom(10_000).hex()}) + "\n")
    runs, waiting = f"s3://{BUCKET}/{tmp_path.name}/runs", threading.Event()

    def hold(request: Request) -> int | None:
        if request.method == "POST" and "uploadId" in request.query and "/corpus/part-" in request.key:
            waiting.set()
            time.sleep(5)
            return 500
        return None

    code = "import sys; from dagr_ray.core.build import materialize; from dagr_ray.stages.sources import Beir\n"
    code += "materialize(Beir(path=sys.argv[1]), sys.argv[2])"
    store.hook = hold
    try:
        driver = subprocess.Popen([sys.executable, "-c", code, str(source), runs], cwd=ROOT)
        assert waiting.wait(timeout=60), "nothing was uploaded in pieces"
        driver.kill()
        driver.wait()
        pieces = [r for r in store.requests if "partNumber" in r.query and "/corpus/part-" in r.key]
        assert len(pieces) > 1
        assert not [key for key in objects(f"{tmp_path.name}/runs") if not key.endswith("plan.json") and
                    "/attempts/" not in key and "/tries/" not in key]  # fmt: skip
        folder = found(runs, "beir")
        assert folder.receipts() == {} and folder.manifest is None

        # the store refuses a piece for good (403 is not tried again): the run ends, and nothing is to be seen either
        store.hook = lambda r: 403 if "/corpus/part-" in r.key and r.query.get("partNumber") == ["2"] else None
        with pytest.raises(StageFailed, match="UploadPart"):
            materialize(Beir(path=str(source)), runs)
        assert folder.receipts() == {} and folder.listing("corpus") == {} and folder.manifest is None
    finally:
        store.hook = None
    folder = materialize(Beir(path=str(source)), runs)
    assert folder.count("corpus") == 1560 and folder.damaged(deep=True) == {}
    same_tables(folder, materialize(Beir(path=str(source)), str(tmp_path / "calm")))


@pytest.mark.parametrize("second", [7, 16])
def test_two_drivers_at_once_on_one_runs_folder(store: ObjectStore, tmp_path: Path, data: str, second: int) -> None:
    """There are no locks on an object store: the work is idempotent. With other shard sizes, one plan holds for both."""
    runs = f"s3://{BUCKET}/{tmp_path.name}/runs"
    both = threading.Barrier(2)

    def together(request: Request) -> int | None:
        if request.method == "PUT" and "/generate-" in request.key and request.key.endswith("/plan.json"):
            both.wait(timeout=60)  # neither has seen the other's plan
        return None

    store.hook = together
    first = len(store.requests)
    try:
        drivers = [
            subprocess.Popen([sys.executable, "-c", DRIVER, data, runs, str(rows)], cwd=ROOT) for rows in (7, second)
        ]
        assert [driver.wait(timeout=120) for driver in drivers] == [0, 0]
    finally:
        store.hook = None
    written = [r.key for r in store.requests[first:] if r.method == "PUT" and "/generations/part-" in r.key]
    assert len(written) > len(set(written)) or second != 7, "the two did not work at the same time"
    folder, calm = found(runs, "generate"), str(tmp_path / "calm")
    ids = folder.read("generations")["gen_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 400
    assert folder.damaged(deep=True) == {}
    materialize(load_stage(found(runs, "parse")), calm, HERE)
    for kind in ("generate", "parse"):
        same_tables(found(runs, kind), found(calm, kind))


def run_cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """A verb in this process, up to the point where the command line ends it."""
    args = main.parser().parse_args(words)
    try:
        home = next(module for module in (run, inspect, results) if hasattr(module, args.verb))
        code = getattr(home, args.verb)(args) or 0
    except Exception as error:
        code = main._explain(error)
    out, err = capsys.readouterr()
    return code, out, err


def test_every_verb_reads_a_runs_folder_on_an_object_store(
    store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is named in the URI this time, as for a store beside the cloud's own."""
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    scores = {"in": [0.5] * 60, "out": [0.4] * 60}
    local, study = studies.made_study(tmp_path, scores, {8: {"in": [0.6] * 60, "out": [0.4] * 60}})
    path = f"{tmp_path.name}/runs"
    fs, target = filesystem(store.uri(path))
    pafs.copy_files(local, target, destination_filesystem=fs)
    runs = f"--runs={store.uri(path)}"
    names = sorted(p.name for p in Path(local).iterdir() if p.is_dir())

    code, out, err = run_cli(capsys, "ls", runs, "--json")
    assert code == 0, err
    listed = {row["folder"]: row for row in json.loads(out)}
    assert set(listed) <= set(names) and listed[study]["state"] == "3/3 trials"
    assert all(row["changed"] > 1.6e9 for row in listed.values()), "no times"
    mine = found(store.uri(path), "mine")
    assert listed[mine.name]["state"] == "complete" and listed[mine.name]["rows"]["examples"] == mine.count("examples")

    code, out, err = run_cli(capsys, "show", mine.name, runs, "--table", "examples", "--rows", "2", "--json")
    assert code == 0, err
    assert json.loads(out) == mine.slice("examples", 0, 2).to_pylist()

    query_id = json.loads(out)[0]["query_id"]
    code, out, err = run_cli(capsys, "trace", query_id, runs, "--json")
    assert code == 0, err
    assert json.loads(out)["id"] == query_id and json.loads(out)["passage"]

    (tmp_path / "mined.py").write_text(JOB)
    job = ["check", str(tmp_path / "mined.py"), f"data={tmp_path / 'set'}", "--one", runs]
    code, out, err = run_cli(capsys, *job, "--json")
    assert code == 0, err
    states = {row["folder"].split("-")[0]: row["state"] for row in json.loads(out)["stages"]}
    assert (states["beir"], states["mine"]) == ("cached", "to do"), "of another sample: the corpus alone is there"

    # a part that changed in the store without changing its size
    broken = next(iter(mine.receipts().values()))["tables"]["examples"]
    stage = load_stage(mine)
    mine.write_bytes(broken["file"], bytes(broken["bytes"]))
    assert set(mine.damaged(deep=True)) == {0} and mine.damaged() == {}
    mine.revoke(mine.damaged(deep=True))
    assert materialize(stage, store.uri(path)).damaged(deep=True) == {}

    code, out, err = run_cli(capsys, "report", runs)
    assert code == 0, err
    assert f"page: {target}/{study}/report.html" in out
    assert b"<html" in (Artifact(store.uri(path), study).read_bytes("report.html") or b"")
    code, out, err = run_cli(capsys, "export", mine.name, store.uri(f"{tmp_path.name}/beir"), runs)
    assert code == 0, err
    assert materialize(Beir(path=store.uri(f"{tmp_path.name}/beir")), str(tmp_path / "again")).count("queries") > 0


def test_credentials_in_an_address_are_refused(
    store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "wJalrXUtnFEMI-K7MDENG"
    for words in (["ls", f"--runs=s3://AKIAIOSFODNN7:{secret}@{BUCKET}/runs"],
                  ["check", "jobs/beir.py", f"data=s3://AKIAIOSFODNN7:{secret}@{BUCKET}/set", f"--runs={tmp_path}"]):  # fmt: skip
        code, out, err = run_cli(capsys, *words)
        assert code == 2 and "environment" in err
        assert secret not in out + err and "AKIA" not in out + err
    assert not any(tmp_path.iterdir())
    # container@account is how Azure's addresses are written
    with pytest.raises(ConfigError, match="credentials"):
        filesystem("abfs://user:word@account.dfs.core.windows.net/path")
    filesystem("abfs://container@account.dfs.core.windows.net/path")


def test_a_model_on_an_object_store_is_fetched_once(store: ObjectStore, tmp_path: Path) -> None:
    """Wherever a model lies it is the same model; another process of the machine does not fetch it again."""
    from dagr_ray.engines.vllm import VLLM
    from dagr_ray.quickstart.models import minilm
    from dagr_ray.retrieval import encoder

    here = minilm()
    put(here, f"{tmp_path.name}/models/minilm")
    there = f"s3://{BUCKET}/{tmp_path.name}/models/minilm"
    first = len(store.requests)
    code = "import sys; from dagr_ray.retrieval.encoder import Encoder; print(Encoder(model=sys.argv[1]).fingerprint())"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, there], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == encoder.Encoder(model=str(here)).fingerprint()
    weights = [r for r in store.requests[first:] if r.method == "GET" and r.key.endswith("model.safetensors")]
    assert len({r.key for r in weights}) == 1 and fetched(weights) == 1

    texts = ["a jetty near the marsh", "an ember in the grove"]
    near, far = (encoder.encode(encoder.load(encoder.Encoder(model=m)), texts) for m in (str(here), there))
    assert (near == far).all()
    # no engine is started for it: what it would be started with is the folder that was fetched
    engine = VLLM(model=there, max_model_len=256)
    assert engine.fingerprint() == VLLM(model=str(here), max_model_len=256).fingerprint()
    arguments = engine.arguments(Pool())
    assert Path(arguments["model"]).is_relative_to(tmp_path / "scratch") and engine.model_name() == "minilm"
    assert engine.to_json()["model"] == there, "workers on other machines fetch it for themselves"
    with pytest.raises(ConfigError, match="no files at"):
        VLLM(model=f"s3://{BUCKET}/{tmp_path.name}/models/none").check()


def fetched(requests: list[Request]) -> int:
    """How often a whole object was asked for, if in pieces."""
    return len([r for r in requests if r.start == 0])
