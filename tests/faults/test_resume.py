"""A driver killed for real in the middle of generation on Ray, and the same command again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import load_stage
from tests.conftest import tiny_beir

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
TABLES = ("generations", "rejected")
JOB = """
from dagr_ray.recipes.augmentation import augment, generator_named
from dagr_ray.core.stage import Stage
from dagr_ray.stages.sources import Beir


def mined(data: str) -> Stage:
    corpus = Beir(path=data)
    return augment(corpus, corpus, *generator_named("crop"), exemplars=None, samples=2, max_rank=100)[1]
"""


def _command(root: Path, runs: str) -> list[str]:
    words = [f"data={root / 'set'}", f"--runs={root / runs}"]
    placement = f"--placement={root / 'placement.toml'}"
    return [sys.executable, "-m", "dagr_ray.cli.main", "run", str(root / "mined.py"), *words, placement]


def _generate(root: Path, runs: str) -> Artifact | None:
    found = list((root / runs).glob("generate-*"))
    return Artifact(str(root / runs), found[0].name) if found else None


def _rows(folder: Artifact, table: str) -> list[dict]:
    return folder.read(table).to_pylist()


def test_sigkill_of_the_driver_loses_and_repeats_nothing(tmp_path) -> None:
    tiny_beir(tmp_path / "set", docs=700)
    (tmp_path / "mined.py").write_text(JOB)
    (tmp_path / "placement.toml").write_text("[generate]\nworkers = 1\ncpus = 1\nshard_rows = 5\n")
    driver = subprocess.Popen(_command(tmp_path, "killed"), cwd=ROOT, stderr=subprocess.DEVNULL)
    folder = None
    while folder is None or len(folder.receipts()) < 10:
        time.sleep(0.05)
        assert driver.poll() is None, "the driver ended before it could be killed"
        folder = _generate(tmp_path, "killed")
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(2)  # the workers see that their driver is gone
    kept = folder.receipts()
    planned = len(folder.read_json("plan.json")["shards"])
    assert folder.manifest is None
    assert 10 <= len(kept) < planned
    stamps = {n: Path(folder.path, "receipts", f"{n:05d}.json").stat().st_mtime_ns for n in kept}

    done = subprocess.run(
        _command(tmp_path, "killed"), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    mined = load_stage(Artifact(folder.runs, next((tmp_path / "killed").glob("mine-*")).name))
    materialize(mined, str(tmp_path / "calm"), Placement(generate=Pool(workers=0, shard_rows=5)))
    calm = _generate(tmp_path, "calm")
    assert calm is not None
    for table in TABLES:
        assert _rows(folder, table) == _rows(calm, table)
    ids = folder.read("generations")["gen_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 2 * folder.manifest["counts"]["in"]
    assert {n: Path(folder.path, "receipts", f"{n:05d}.json").stat().st_mtime_ns for n in kept} == stamps
    first, second = (json.loads(line) for line in _starts(folder))
    assert (first["pending"], second["pending"]) == (planned, planned - len(kept))
    for kind in ("parse", "select", "mine"):
        one, two = (next((tmp_path / runs).glob(f"{kind}-*/manifest.json")).read_text() for runs in ("killed", "calm"))
        assert json.loads(one)["tables"] == json.loads(two)["tables"]


def _starts(folder: Artifact) -> list[str]:
    lines = [line for name in sorted(folder.listing("attempts")) for line in _text(folder, name).splitlines()]
    return [line for line in lines if '"event": "start"' in line]


def _text(folder: Artifact, name: str) -> str:
    return (folder.read_bytes(f"attempts/{name}") or b"").decode()
