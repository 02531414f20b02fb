"""Rows that end, hang or break their engine: they alone are given up, and the rest is as if they had not been there."""

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
from dagr_ray.core.poison_rows import Mark, SharedLock, split_ranges
from dagr_ray.core.ray_start import connect
from dagr_ray.core.stage import EngineDied, StageFailed
from dagr_ray.core.worker import Opener
from dagr_ray.engines import Completion, Engine
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from tests.conftest import tiny_beir
from tests.support.billed import Killed

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]


class Fragile(Engine):
    """Answers with the passage's number; does to its process what ``evils`` says of it. Logs all that it is asked."""

    abstract = True
    evils: dict[str, str] = {}
    log: str = ""

    def identity(self):
        return {"type": "fragile"}

    def open(self, pool):
        self._note("open")
        return self

    def close(self):
        pass

    def _note(self, text):
        with open(self.log, "a") as file:
            file.write(text + "\n")

    def generate(self, prompts, seeds, sampling, n):
        numbers = [prompt.passage.split("number ")[1].split(".")[0] for prompt in prompts]
        self._note(" ".join(numbers))
        for number in numbers:
            evil = self.evils.get(number)
            if evil == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif evil == "hang":
                time.sleep(3600)
            elif evil == "leave":
                raise Killed
            elif evil == "raise":
                raise ValueError(f"no good: {number}")
            elif evil == "engine":
                raise EngineDied("out of memory in the kernel")
        kept = [number for number in numbers if self.evils.get(number) != "nothing"]
        return [[Completion(f"answer {number}", "stop", 10, 0, 2)] * n for number in kept]


def asked(tmp_path, **evils):
    there = (tmp_path / "set").exists()
    data = Beir(path=str(tmp_path / "set" if there else tiny_beir(tmp_path / "set", docs=60)))
    engine = Fragile(evils={number[1:]: evil for number, evil in evils.items()}, log=str(tmp_path / "log"))
    return Generate(corpus=data, strategy=Crop(), engine=engine)


def refused(folder: Artifact) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in folder.read("rejected").to_pylist()}


def starts(tmp_path) -> int:
    return (tmp_path / "log").read_text().splitlines().count("open")


def test_a_stage_that_skipped_all_rows_fails_and_resumes(tmp_path):
    tiny_beir(tmp_path / "set", docs=12)
    evils = {f"n{i}": "raise" for i in range(12)}
    runs, here = str(tmp_path / "runs"), Placement(generate=Pool(workers=0, shard_rows=2))
    for _ in range(2):  # the second run asks again, and ends as the first did
        before = (tmp_path / "log").read_text().count("\n") if (tmp_path / "log").exists() else 0
        with pytest.raises(StageFailed, match="none of 12 rows has an answer, 12 were skipped: .*; run again") as told:
            materialize(asked(tmp_path, **evils), runs, here)
        assert "\n" not in str(told.value)
        assert (tmp_path / "log").read_text().count("\n") > before
    folder = asked(tmp_path, **evils).folder(runs)
    assert folder.manifest is None and len(folder.receipts()) == 6 and len(folder.revoked()) == 6
    made = materialize(asked(tmp_path, n3="raise"), runs, here)  # the engine is mended, but for one row
    assert made.name == folder.name and refused(made) == {"d3": "engine_error"} and made.count("generations") == 11
    # a stage of which nothing was asked is none that failed
    assert materialize(asked(tmp_path), runs, here).name == made.name


def test_a_mended_engine_is_asked_again_about_every_row(tmp_path):
    """What a broken one raised is no evidence against the rows: the advice to fix it and run again works."""
    runs, here = str(tmp_path / "runs"), Placement(generate=Pool(workers=0, shard_rows=60))
    broken = asked(tmp_path, **{f"n{i}": "raise" for i in range(60)})
    with pytest.raises(StageFailed, match="rows of shard 0 failed alone.*fix the strategy or the engine and run again"):
        materialize(broken, runs, here)
    folder = materialize(asked(tmp_path), runs, here)
    assert folder.name == broken.folder(runs).name and folder.count("generations") == 60
    assert refused(folder) == {} and folder.listing("tries") == {}


@pytest.mark.parametrize("workers", [1, 0])
def test_rows_that_raise_or_answer_nothing_are_given_up_alone(tmp_path, workers):
    stage = asked(tmp_path, n5="raise", n7="nothing", n40="raise")
    if workers:
        connect()
    pool = Pool(workers=workers, cpus=0.5, shard_rows=25)
    folder = materialize(stage, str(tmp_path / "runs"), Placement(generate=pool))
    assert refused(folder) == {"d5": "engine_error", "d7": "engine_error", "d40": "engine_error"}
    assert sorted(folder.read("generations")["source_id"].to_pylist()) == sorted(
        f"d{i}" for i in range(60) if i not in (5, 7, 40)
    )
    counts = folder.manifest["counts"]
    assert (counts["in"], counts["out"], counts["errors"]) == (60, 57, 0)
    assert counts["rejected"] == {"generate/engine_error": 3}
    details = {row["id"]: row["detail"] for row in folder.read("rejected").to_pylist()}
    assert details["d5"] == "ValueError: no good: 5"
    assert folder.listing("tries") == {}
    # shards 0 and 1 failed; what was asked in vain is in the bill
    assert folder.manifest["cost"]["lost_tries"] >= 5 and folder.manifest["cost"]["lost_tokens"] > 0


def test_rows_that_kill_or_hang_a_worker_are_skipped(tmp_path):
    connect()
    pool = Pool(workers=1, cpus=0.5, shard_rows=20, in_flight=2, deadline_s=5)
    calm = materialize(asked(tmp_path), str(tmp_path / "calm"), Placement(generate=pool))
    (tmp_path / "log").unlink()
    folder = materialize(asked(tmp_path, n3="die", n33="hang"), str(tmp_path / "runs"), Placement(generate=pool))
    assert refused(folder) == {"d3": "engine_crash", "d33": "engine_hang"}
    rows = [row for row in calm.read("generations").to_pylist() if row["source_id"] not in ("d3", "d33")]
    assert folder.read("generations").to_pylist() == rows
    # for each of the two: the whole shard, a smaller range, and alone; the one that died without a word once more;
    # a shard that shared a worker with them may have been begun again
    assert 1 + 6 <= starts(tmp_path) <= 1 + 8


def test_a_shard_with_a_receipt_is_not_repeated(tmp_path):
    pool = Pool(workers=0, shard_rows=20)
    stage = asked(tmp_path)
    folder = materialize(stage, str(tmp_path / "runs"), Placement(generate=pool))
    before = (tmp_path / "log").read_text()
    inputs = {name: materialize(each, str(tmp_path / "runs")) for name, each in stage.inputs().items()}
    worker = Opener(stage, inputs, folder, pool, "1-x")()
    assert worker({"shard": 1, "start": 20, "stop": 40}) == folder.receipts()[1]
    assert (tmp_path / "log").read_text() == before + "open\n"


def test_repeated_work_is_no_reason_to_skip_a_shard(tmp_path):
    stage = asked(tmp_path, n18="leave", n19="leave")
    runs = str(tmp_path / "runs")
    inputs = {name: materialize(each, runs) for name, each in stage.inputs().items()}
    deaths, receipt = 0, None
    while receipt is None:
        try:
            receipt = Opener(stage, inputs, stage.folder(runs), Pool(workers=1), "1-x")()(
                {"shard": 0, "start": 0, "stop": 20}
            )
        except Killed:
            deaths += 1
    assert deaths == 6, "the shard, a smaller range, and each of the two alone, twice"
    assert (receipt["counts"]["in"], receipt["counts"]["out"]) == (20, 18)
    # twice 20 rows were begun in vain, and then four times 16, the next two and the one that ends it
    assert receipt["cost"]["lost_tokens"] == round(18 * 12 * (2 * 20 + 4 * 19) / 20)
    assert stage.folder(runs).listing("tries") == {}


def test_a_dead_engine_is_reopened_and_its_row_is_skipped(tmp_path):
    pool = Pool(workers=0, shard_rows=30)
    folder = materialize(asked(tmp_path, n8="engine"), str(tmp_path / "runs"), Placement(generate=pool))
    assert refused(folder) == {"d8": "engine_crash"}
    assert "out of memory in the kernel" in folder.read("rejected").to_pylist()[0]["detail"]
    assert folder.manifest["counts"]["out"] == 59


def test_a_row_that_hangs_in_the_driver_is_given_up(tmp_path):
    pool = Pool(workers=0, shard_rows=30, deadline_s=1)
    folder = materialize(asked(tmp_path, n8="hang"), str(tmp_path / "runs"), Placement(generate=pool))
    assert refused(folder) == {"d8": "engine_hang"}


def test_a_row_that_kills_the_driver_is_skipped_later(tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests.faults.test_poison import *\n"
        f"stage = asked(Path({str(tmp_path)!r}), n8='die')\n"
        f"materialize(stage, {str(tmp_path / 'runs')!r}, Placement(generate=Pool(workers=0, shard_rows=30)))"
    )
    codes = [subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode for _ in range(5)]
    assert codes == [-9, -9, -9, -9, 0]
    [made] = (tmp_path / "runs").glob("generate-*")
    assert refused(Artifact(str(tmp_path / "runs"), made.name)) == {"d8": "engine_crash"}


def test_an_engine_that_fails_for_every_row_fails_the_stage_soon(tmp_path):
    stage = asked(tmp_path, **{f"n{i}": "raise" for i in range(60)})
    with pytest.raises(StageFailed, match="4 rows of shard 0 failed alone.*fix the strategy or the engine"):
        materialize(stage, str(tmp_path / "runs"), Placement(generate=Pool(workers=0, shard_rows=60)))


@pytest.mark.parametrize("poison", [{0}, {17}, {127}, {0, 1}, {3, 60, 64, 127}])
def test_narrowing_finds_every_poison_row_and_no_other(poison):
    marks = []
    while True:
        ranges, given_up = split_ranges(0, 128, marks)
        bad = next((r for r in ranges if poison & set(range(*r))), None)
        if bad is None:
            break
        marks.append(Mark(0, *bad, "1"))
    assert set(given_up) == poison
    assert sorted(i for r in ranges for i in range(*r)) == sorted(set(range(128)) - poison)
    if len(poison) == 1:
        assert len(marks) == 4


def test_a_doubted_range_runs_while_nothing_else_does():
    import threading

    turns, seen, inside = SharedLock(), [], []

    def shared():
        with turns.shared():
            inside.append(1)
            time.sleep(0.01)
            inside.pop()

    def alone():
        with turns.alone():
            seen.append((len(inside), turns.is_alone))

    threads = [threading.Thread(target=shared if i % 3 else alone) for i in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert seen == [(0, True)] * 10 and not turns.is_alone
