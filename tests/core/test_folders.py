"""Stage folders: committed by receipts, safe against a kill at any moment, against damage, and against a second writer."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq
import pytest

from dagr_ray import __version__
from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact, Damaged, add_up
from dagr_ray.core.attempt import code_version
from dagr_ray.core.build import materialize, plan
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage, StageFailed, load_stage, walk
from dagr_ray.stages.sources import Beir, Sample
from tests.conftest import tiny_beir

LIGHT = Placement(light=Pool(workers=0, shard_rows=10))


class Numbers(Stage):
    """Writes ``n`` queries, one a row; ``bad`` of them fail."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("queries", "rejected")
    n: int = 100
    bad: int = 0
    calls: ClassVar[list[tuple[int, int]]] = []

    def size(self, inputs):
        return self.n

    def open(self, inputs, folder, pool):
        def run(start, stop):
            self.calls.append((start, stop))
            rows = [{"query_id": tables.id_of("n", i), "text": f"row {i}"} for i in range(start, stop)]
            errors = sum(i < self.bad for i in range(start, stop))
            return Output({"queries": tables.table("queries", rows)}, counts={"in": stop - start, "errors": errors})

        return run


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_a_manifest_says_which_commit_made_it(tmp_path):
    assert code_version(tmp_path) == __version__
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "init")
    code_version.cache_clear()
    assert code_version(tmp_path) == __version__, "a checkout without a commit"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    code_version.cache_clear()
    clean = code_version(tmp_path)
    assert re.fullmatch(re.escape(__version__) + r" \([0-9a-f]{7,40}\)", clean)
    (tmp_path / "code.py").write_text("2")
    assert code_version(tmp_path) == clean, "it is looked up once in a process"
    code_version.cache_clear()
    assert code_version(tmp_path) == clean.replace(")", "-dirty)")
    code_version.cache_clear()
    made = materialize(Numbers(n=1), str(tmp_path / "runs"), LIGHT)
    assert made.manifest["code"] == code_version()
    made.write_json("manifest.json", made.manifest | {"code": __version__})
    assert Artifact(made.runs, made.name).manifest["code"] == __version__, "as manifests of before say it"


class Upper(Stage):
    """Reads another stage."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("queries",)
    source: Stage

    def open(self, inputs, folder, pool):
        def run(start, stop):
            rows = [{**row, "text": row["text"].upper()} for row in inputs["source"].read("queries").to_pylist()]
            return Output({"queries": tables.table("queries", rows)}, counts={"in": len(rows), "out": len(rows)})

        return run


def ids(folder: Artifact) -> list[str]:
    return folder.read("queries")["query_id"].to_pylist()


def test_build_read_and_cache(tmp_path) -> None:
    Numbers.calls.clear()
    folder = materialize(Upper(source=Numbers()), str(tmp_path), LIGHT)
    assert folder.count("queries") == 100
    assert folder.slice("queries", 7, 9)["text"].to_pylist() == ["ROW 7", "ROW 8"]
    assert len(Numbers.calls) == 10
    materialize(Upper(source=Numbers()), str(tmp_path), LIGHT)
    assert len(Numbers.calls) == 10
    manifest = folder.manifest
    assert manifest is not None
    assert manifest["tables"]["queries"]["rows"] == 100
    assert load_stage(folder) == Upper(source=Numbers())
    source = Numbers().folder(str(tmp_path))
    assert source.slice("queries", 18, 22)["text"].to_pylist() == ["row 18", "row 19", "row 20", "row 21"]


def test_only_missing_shards_are_done_again(tmp_path) -> None:
    runs = str(tmp_path)
    before = ids(materialize(Numbers(), runs, LIGHT))
    folder = Numbers().folder(runs)
    Numbers.calls.clear()
    (Path(folder.path) / "manifest.json").unlink()
    (Path(folder.path) / "receipts" / "00003.json").unlink()
    assert ids(materialize(Numbers(), runs, LIGHT)) == before
    assert Numbers.calls == [(30, 40)]
    assert len(folder.listing("attempts")) == 2


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_damage_is_noticed_and_only_it_is_rebuilt(tmp_path, damage) -> None:
    runs = str(tmp_path)
    folder = materialize(Numbers(), runs, LIGHT)
    before = ids(folder)
    part = sorted((Path(folder.path) / "queries").iterdir())[4]
    whole = part.read_bytes()
    if damage == "delete":
        part.unlink()
    elif damage == "truncate":
        part.write_bytes(whole[:-7])
    else:
        part.write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    found = next(iter(plan([Numbers()], runs, deep=True, repair=True)))
    assert part.name in found.problem
    Numbers.calls.clear()
    assert ids(materialize(Numbers(), runs, LIGHT)) == before
    assert Numbers.calls == [(40, 50)]
    assert part.read_bytes() == whole


def test_a_second_writer_of_a_shard_changes_nothing(tmp_path) -> None:
    folder = Artifact(str(tmp_path), "twice")
    one = tables.table("queries", [{"query_id": "a", "text": "first"}])
    two = tables.table("queries", [{"query_id": "a", "text": "second"}])
    first = folder.commit(0, {"queries": one}, {"counts": {}, "cost": {}})
    second = folder.commit(0, {"queries": two}, {"counts": {}, "cost": {}})
    assert first == second
    assert not folder.damaged(deep=True)
    assert pq.read_table(f"{folder.path}/{first['tables']['queries']['file']}")["text"].to_pylist() == ["first"]


def test_too_many_errors_fail_the_stage_and_keep_its_shards(tmp_path) -> None:
    with pytest.raises(StageFailed, match="2 of 100 rows failed"):
        materialize(Numbers(bad=2), str(tmp_path), LIGHT)
    folder = Numbers(bad=2).folder(str(tmp_path))
    assert folder.manifest is None
    assert len(folder.receipts()) == 10


def test_shared_inputs_are_walked_once() -> None:
    shared = Numbers()
    found = walk(Upper(source=shared), Upper(source=Upper(source=Numbers())))
    assert [stage.type for stage in found] == ["numbers", "upper", "upper"]


def test_sums_of_nested_counts() -> None:
    assert add_up({"a": 1, "r": {"x": 1}}, {"a": 2, "r": {"x": 1, "y": 5}}) == {"a": 3, "r": {"x": 2, "y": 5}}


SLOW = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {tests!r})
    import test_folders as t
    from dagr_ray.core.build import materialize
    plain = t.Numbers.open
    def slow(self, inputs, folder, pool):
        run = plain(self, inputs, folder, pool)
        def each(start, stop):
            time.sleep(0.1)
            return run(start, stop)
        return each
    t.Numbers.open = slow
    materialize(t.Numbers(), {runs!r}, t.LIGHT)
    print(len(t.Numbers.calls))
""")


def _driver(runs: Path) -> subprocess.Popen[str]:
    code = SLOW.format(tests=str(Path(__file__).parent), runs=str(runs))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_killed_driver_resumes_with_the_same_ids(tmp_path) -> None:
    undisturbed = ids(materialize(Numbers(), str(tmp_path / "calm"), LIGHT))
    runs = tmp_path / "killed"
    folder = Numbers().folder(str(runs))
    driver = _driver(runs)
    while len(folder.receipts()) < 3:
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    kept = len(folder.receipts())
    assert 3 <= kept < 10
    assert folder.manifest is None
    again = _driver(runs)
    out, _ = again.communicate(timeout=60)
    assert int(out) == 10 - kept
    assert ids(folder) == undisturbed


def test_two_drivers_at_once_share_the_work(tmp_path) -> None:
    drivers = [_driver(tmp_path), _driver(tmp_path)]
    done = [int(driver.communicate(timeout=60)[0]) for driver in drivers]
    assert sum(done) == 10
    folder = Numbers().folder(str(tmp_path))
    assert len(set(ids(folder))) == 100
    assert not folder.damaged(deep=True)
    assert json.loads((Path(folder.path) / "manifest.json").read_text())["tables"]["queries"]["rows"] == 100


def test_a_flipped_bit_in_an_input_is_found_and_rebuilt(tmp_path):

    corpus = Beir(path=str(tiny_beir(tmp_path / "set")))
    folder = materialize(corpus, str(tmp_path / "runs"))
    [part] = folder.manifest["tables"]["corpus"]["parts"]
    file, rows = Path(folder.path, part["file"]), folder.read("corpus")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    assert folder.damaged() == {}, "of the same size: only its bytes tell"
    with pytest.raises(Damaged, match="damaged"):
        folder.read("corpus")
    made = materialize(Sample(corpus=corpus, n=20), str(tmp_path / "runs"))
    assert made.count("corpus") == 20
    assert folder.read("corpus").equals(rows) and len(folder.revoked()) == 1


HELD = """
import os, sys
from dagr_ray.core import disk
real = os.fsync
def wait(handle):
    print("writing", flush=True)
    sys.stdin.readline()
    real(handle)
os.fsync = wait
disk.write(sys.argv[1], b"whole", os.path.dirname(sys.argv[1]), lasting=True)
"""


def test_files_of_killed_writers_are_removed(tmp_path) -> None:
    folder = Numbers(n=30).folder(str(tmp_path))
    receipts = Path(folder.path, "receipts")
    writers = []
    for name in ("00001.json", "00002.json"):
        command = [sys.executable, "-c", HELD, str(receipts / name)]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "writing\n"
        writers.append(writer)
    killed, other = writers
    killed.kill()
    killed.wait()
    strangers = {"a.tmp", "00001.json.0a1b2c3d.tmp.bak", "00001.json.0A1B2C3D.tmp"}
    for name in strangers:
        (receipts / name).touch()
    assert len(list(receipts.glob("*.tmp"))) == 4
    with folder.lock():
        kept = {path.name for path in receipts.iterdir()} - strangers
        assert len(kept) == 1 and next(iter(kept)).startswith("00002.json."), "one is written by another driver"
    other.communicate("\n", timeout=10)
    assert other.returncode == 0
    assert {path.name for path in receipts.iterdir()} == strangers | {"00002.json"}
    assert (receipts / "00002.json").read_bytes() == b"whole"


def test_a_run_after_a_killed_one_leaves_no_temporary_file(tmp_path) -> None:
    child = os.fork()
    if child == 0:
        os.link = lambda *names: os.kill(os.getpid(), signal.SIGKILL)  # in the middle of the first receipt
        materialize(Numbers(n=30), str(tmp_path), LIGHT)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.tmp"))) == 1
    assert materialize(Numbers(n=30), str(tmp_path), LIGHT).count("queries") == 30
    assert not list(tmp_path.rglob("*.tmp"))
