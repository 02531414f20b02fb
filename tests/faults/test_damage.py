"""Files of ours with other content, other programs' files beside them, and bits that a disk has turned."""

import argparse
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.fs as pafs
import pytest

from dagr_ray.cli import inspect
from dagr_ray.core import checksums, disk, shapes, tables
from dagr_ray.core.artifact import Artifact, Damaged
from dagr_ray.core.build import materialize, plan
from dagr_ray.core.config import ConfigError
from dagr_ray.core.cost import stage_bill
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.poison_rows import RangeMarks
from dagr_ray.report import bills, summarise
from dagr_ray.training.checkpoints import Checkpoints
from tests.core.test_folders import LIGHT, Numbers, Upper, ids

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
END = Upper(source=Numbers(n=30))
RECEIPT = {"shard": 0, "tables": {}, "files": {}, "counts": {}, "cost": {}}
PART = {"file": "queries/part-00000-0123abcd.parquet", "rows": 1, "bytes": 9, "sha256": "0" * 64}

# What may stand in a file of ours that is not ours. Each is tried in place of each kind of file.
CONTENTS = {
    "a list": b"[1]",
    "an empty object": b"{}",
    "null": b"null",
    "a number": b"7",
    "text": b'"text"',
    "nothing": b"",
    "a blank": b" \n",
    "zeros": b"\x00" * 300,
    "half a file": None,
    "deep lists": b"[" * 5000,
    "deep lists that close": b"[" * 3000 + b"]" * 3000,
    "deep objects": b'{"tables":' * 3000 + b"1" + b"}" * 3000,
    "utf-16": json.dumps(RECEIPT).encode("utf-16"),
    "latin-1": b'{"shard": 0, "caf\xe9": 1}',
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(RECEIPT).encode(),
    "two values": b"{} {}",
    "a comment": b"// mine\n{}",
    "wrong types": json.dumps({"shard": "0", "tables": [], "shards": {}, "trials": 3, "at": "now", "files": 1}).encode(),
    "negative": json.dumps({**RECEIPT, "counts": {"in": -5}, "cost": {"prompt_tokens": -1}}).encode(),
    "infinite": b'{"shard": 0, "tables": {}, "files": {}, "counts": {"in": Infinity}, "cost": {"busy_s": NaN}, "at": 1e999}',
    "huge": b'{"shard": 1' + b"0" * 5000 + b', "tables": {}, "files": {}, "counts": {}, "cost": {}}',
    "of another shard": json.dumps({**RECEIPT, "shard": 7}).encode(),
    "twice the same key": b'{"shard": 0, "tables": 3, "tables": {}, "shards": [], "counts": {"in": 1, "in": 9}}',
    "a part elsewhere": json.dumps({**RECEIPT, "tables": {"queries": PART | {"file": "../../x.parquet"}}}).encode(),
    "a file elsewhere": json.dumps({**RECEIPT, "files": {"/etc/passwd": {"file": "/etc/passwd"}}}).encode(),
    "inputs elsewhere": json.dumps(
        {"stage": {"type": "upper"}, "fingerprint": "0", "inputs": {"source": "../.."}, "shards": [], "tables": {}}
    ).encode(),
    "another stage's": json.dumps(
        {"stage": {"type": "upper"}, "fingerprint": "0" * 12, "inputs": {}, "shards": [], "tables": {}, "files": {},
         "counts": {}, "cost": {}, "finished": 1.0}
    ).encode(),
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A runs folder of two stages, with what a dead worker leaves behind, and a receipt that was taken back."""
    runs = tmp_path_factory.mktemp("built")
    folder = materialize(END, str(runs), LIGHT)
    source = END.source.folder(str(runs))
    RangeMarks(source, "001-aaaa", False).begin(1, 10, 20)
    source.write_json("revoked/00002-abcd.json", source.receipt(2))
    return runs, ids(folder)


def look(runs: Path) -> str:
    """What `ls`, `bill`, `show` and `check` say; nothing but ConfigError and Damaged may come of them."""
    args = argparse.Namespace(runs=str(runs), json=False, folder=None, table=None, rows=2)
    inspect.ls(args)
    print(bills.text(bills.everything(str(runs))))
    for stage in (END, END.source):
        args.folder = stage.folder_name()
        for verb in (inspect.show, inspect.bill):
            try:
                verb(args)
            except (ConfigError, Damaged) as error:
                assert "\n" not in str(error) and stage.folder_name() in str(error)
    return "; ".join(filter(None, (line.problem for line in plan([END], str(runs), deep=True))))


FILES = ["manifest.json", "plan.json", "receipts/00000.json", "revoked/00002-abcd.json", "tries", "attempts"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_of_ours_with_other_content_is_made_again(tmp_path, built, capsys, content, file) -> None:
    shutil.copytree(built[0], tmp_path / "runs")
    home = Path(END.source.folder(str(tmp_path / "runs")).path)
    path = home / file if (home / file).is_file() else next((home / file).iterdir())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if CONTENTS[content] is None else CONTENTS[content])
    problem = look(tmp_path / "runs")
    shown = capsys.readouterr().out
    assert END.folder_name() in shown and END.source.folder_name() in shown, "one bad folder hides no other"
    was_found = re.search("is damaged|not as it was written", problem) is not None
    assert was_found == (path.name in ("manifest.json", "plan.json", "00000.json"))
    list(plan([END], str(tmp_path / "runs"), deep=True, repair=True))
    assert ids(materialize(END, str(tmp_path / "runs"), LIGHT)) == built[1]
    assert look(tmp_path / "runs") == ""


@pytest.mark.parametrize("content", CONTENTS)
def test_a_receipt_with_other_content_and_no_manifest_is_no_end(tmp_path, built, content) -> None:
    shutil.copytree(built[0], tmp_path / "runs")
    source = END.source.folder(str(tmp_path / "runs"))
    data = CONTENTS[content] if CONTENTS[content] is not None else b'{"shard": 0, "tab'
    source.remove("manifest.json")
    Path(source.path, "receipts/00001.json").write_bytes(data)
    assert ids(materialize(END.source, str(tmp_path / "runs"), LIGHT)) == ids(END.source.folder(str(built[0])))


@pytest.mark.parametrize("file", FILES)
def test_no_bit_of_a_file_of_ours_turns_unseen(built, file) -> None:
    home = Path(END.source.folder(str(built[0])).path)
    path = home / file if (home / file).is_file() else next((home / file).iterdir())
    place, data = path.relative_to(home).as_posix(), path.read_bytes()
    rng, seen = random.Random(3), 0

    def read(data):
        if place.startswith("attempts"):
            found, bad = shapes.lines(home.name, place, data)
            if bad:
                raise shapes.Malformed(str(bad))
            return found
        return shapes.read(home.name, place, data)

    sound_one = read(data)
    for _ in range(400):
        at = rng.randrange(len(data))
        turned = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        try:
            found = read(turned)
        except shapes.Malformed:
            seen += 1
            continue
        # a bit of the seal's own mark: the file is then read as one of before there were seals
        rest = {k: v for k, v in found.items() if k in sound_one} if isinstance(found, dict) else found
        assert rest == sound_one or place.startswith("attempts"), (at, turned[at - 20 : at + 20])
    assert seen > 300
    with pytest.raises(shapes.Malformed):
        shapes.read("numbers-000000000000", place, data.splitlines()[0] if place.startswith("attempts") else data)


def test_the_study_file_too(tmp_path, capsys) -> None:
    folder = Artifact(str(tmp_path), "study-one-0123456789ab")
    trial = {
        "trial": "t0",
        "params": {},
        "kind": "bm25",
        "folder": "scorecard-0123456789ab",
        "stages": {},
        "seconds": 1.0,
    }
    args = argparse.Namespace(runs=str(tmp_path), json=False, folder=None)
    for name, data in {
        **CONTENTS,
        "a kind of its own": json.dumps({"name": "one", "trials": [trial | {"kind": "best"}]}).encode(),
        "a folder elsewhere": json.dumps({"name": "one", "trials": [trial | {"folder": "../x"}]}).encode(),
        "endless seconds": json.dumps({"name": "one", "trials": [trial | {"seconds": float("inf")}]}).encode(),
    }.items():
        folder.write_bytes("study.json", data if data is not None else b'{"name": "one", "tri')
        inspect.ls(args)
        assert "damaged: study.json" in capsys.readouterr().out, name
        for work in (summarise, bills.study):
            with pytest.raises(ConfigError, match="run the study again") as raised:
                work(str(tmp_path), folder.name)
            assert "\n" not in str(raised.value)
    folder.write_json("study.json", {"name": "one", "trials": [trial]})
    assert summarise(str(tmp_path), folder.name)["name"] == "one"


STRANGERS = (
    ".DS_Store", "Thumbs.db", "desktop.ini", "._00000.json", "00000.json~", ".#00000.json", "#00000.json#", ".00000.json.swp",
    ".00000.json.Xy12Ab", "00000 (1).json", "00000 copy.json", "00000.conflict.json", "00000.sync-conflict-1.json",
    "00000.json.orig", "00000.json.part", "00000.json.0a1b2c3d.tmp", ".nfs000000000000a1b2", "0.json", "a.jsonl",
    "001-9c1f.jsonl~", "001-9c1f (1).jsonl", "00000-0123abcd4567 (1).json", "00000-ab.json", "notes.txt", "99999.JSON",
)  # fmt: skip


@pytest.mark.parametrize("where", ["receipts", "attempts", "tries", "revoked", "starts", "queries", ""])
def test_what_other_programs_leave_is_not_read(tmp_path, built, capsys, where) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(built[0], runs)
    source = END.source.folder(str(runs))
    before = {name: source.listing(name) for name in shapes.NAMES}
    home = Path(source.path, where)
    home.mkdir(exist_ok=True)
    copy = json.dumps({**(source.receipt(0) or {}), "rows": [0, 3], "tables": {}}).encode()
    for name in STRANGERS:
        (home / name).write_bytes(random.Random(name).choice([b"\x00\x01rubbish", copy, b""]))
    (home / "00007.json").mkdir()
    (home / "a folder").mkdir()
    (runs / f"{source.name} (1)").mkdir()
    (runs / ".DS_Store").write_bytes(b"x")
    assert {name: source.listing(name) for name in shapes.NAMES} == before
    assert look(runs) == "" and "(1)" not in capsys.readouterr().out
    source.revoke([0])
    assert ids(materialize(END, str(runs), LIGHT)) == built[1]
    assert stage_bill(source, source.receipts().values(), bills.Rates())["attempts"] == 2


@pytest.mark.parametrize("where", ["", "queries", "receipts", "attempts", "tries", "revoked"])
def test_a_file_where_a_folder_should_be_and_the_other_way_round(tmp_path, built, where) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(built[0], runs)
    home = Path(END.source.folder(str(runs)).path)
    shutil.rmtree(home / where)
    (home / where).write_text("a file")
    look(runs)
    assert ids(materialize(END.source, str(runs), LIGHT)) == ids(END.source.folder(str(built[0])))
    shutil.rmtree(home)
    for name in ("plan.json", "manifest.json", "receipts/00000.json", "attempts/001-abcd.jsonl", ".lock"):
        (home / name / "inner").mkdir(parents=True)
    look(runs)
    assert ids(materialize(END.source, str(runs), LIGHT)) == ids(END.source.folder(str(built[0])))
    assert list(home.glob("plan.json.*.aside")), "what stood there is kept"


class Chance(Numbers):
    """Writes another text each time, as a language model does, and a file."""

    made: ClassVar[int] = 0

    def open(self, inputs, folder, pool):
        def run(start, stop):
            Chance.made += 1
            rows = [{"query_id": f"q{i}", "text": f"text {Chance.made}"} for i in range(start, stop)]
            folder.write_bytes(f"extra/{start}.bin", bytes([Chance.made]) * 1000)
            from dagr_ray.core.stage import Output

            return Output(
                {"queries": tables.table("queries", rows)}, [f"extra/{start}.bin"], counts={"in": stop - start}
            )

        return run


def flip(path: Path, at: int = 60) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_what_was_made_from_other_bytes_is_made_again(tmp_path, caplog) -> None:
    source, runs = Chance(n=20), str(tmp_path)
    end = Upper(source=Upper(source=source))
    first = materialize(end, runs, LIGHT).read("queries")["text"].to_pylist()
    folder = source.folder(runs)
    flip(Path(folder.path, folder.manifest["tables"]["queries"]["parts"][0]["file"]))
    found = {line.stage.type: line for line in plan([end], runs, deep=True, repair=True)}
    assert "checksum" in found["chance"].problem
    second = materialize(end, runs, LIGHT).read("queries")["text"].to_pylist()
    assert second[:10] != first[:10] and second[10:] == first[10:]
    assert [r.message for r in caplog.records].count(
        f"{end.folder_name()}: rebuilding all: its input source has other content now"
    ) == 1
    assert Upper(source=source).folder(runs).stale() is None
    # in the middle of its work
    Upper(source=source).folder(runs).remove("manifest.json")
    folder.restart()
    third = materialize(end, runs, LIGHT).read("queries")["text"].to_pylist()
    assert set(third).isdisjoint(second), "no shard of before is left"


def test_a_folder_without_recorded_inputs_is_accepted(tmp_path) -> None:
    runs = str(tmp_path)
    for stage in (END.source, END):
        folder = materialize(stage, runs, LIGHT)
        for name in ["manifest.json", "plan.json", *(f"receipts/{each}" for each in folder.listing("receipts"))]:
            value = {k: v for k, v in folder.read_json(name).items() if k not in ("made_from", "remade")}
            Path(folder.path, name).write_text(json.dumps(value, indent=1))
    Numbers.calls.clear()
    assert {line.state for line in plan([END], runs, deep=True)} == {"cached"}
    folder = END.source.folder(runs)
    flip(Path(folder.path, folder.manifest["tables"]["queries"]["parts"][1]["file"]))
    list(plan([END], runs, deep=True, repair=True))
    assert materialize(END, runs, LIGHT).count("queries") == 30
    assert Numbers.calls == [(10, 20)] and len(END.folder(runs).listing("attempts")) == 1


def test_a_file_is_checked_once_and_again_after_a_write(tmp_path, monkeypatch) -> None:
    folder = materialize(Chance(n=10), str(tmp_path), LIGHT)
    seen = []
    real = checksums.checksum
    monkeypatch.setattr(checksums, "checksum", lambda fs, path: seen.append(path) or real(fs, path))
    for _ in range(3):
        path = Path(folder.local_path("extra", "0.bin"))
        assert folder.local_path("extra") == str(path.parent)
    assert len(seen) == 1
    os.utime(path, (1, 1))
    folder.local_path("extra")
    assert len(seen) == 2
    (path.parent / ".DS_Store").write_bytes(b"x")
    (path.parent / "0 (1).bin").write_bytes(b"x")
    clean = Path(folder.local_path("extra"))
    assert clean != path.parent and [each.name for each in clean.iterdir()] == ["0.bin"]
    assert (clean / "0.bin").read_bytes() == path.read_bytes()
    flip(path)
    for parts in (("extra",), ("extra", "0.bin"), ()):
        with pytest.raises(Damaged, match="0.bin is damaged"):
            folder.local_path(*parts)
    path.unlink()
    with pytest.raises(Damaged, match="0.bin is missing"):
        folder.local_path("extra")


def test_a_damaged_folder_at_the_end_mends_itself(tmp_path) -> None:
    folder = materialize(END, str(tmp_path), LIGHT)
    before = ids(folder)
    [part] = folder.manifest["tables"]["queries"]["parts"]
    flip(Path(folder.path, part["file"]))
    assert ids(materialize(END, str(tmp_path), LIGHT)) == before


def test_a_plan_that_was_lost_is_told_by_the_receipts(tmp_path) -> None:
    folder = materialize(Numbers(), str(tmp_path), LIGHT)
    shards = folder.plan["shards"]
    folder.remove("plan.json")
    assert "plan.json is missing" in next(iter(plan([Numbers()], str(tmp_path), deep=True, repair=True))).problem
    Numbers.calls.clear()
    other = Placement(light=Pool(workers=0, shard_rows=7))
    assert materialize(Numbers(), str(tmp_path), other).plan["shards"] == shards and not Numbers.calls


def test_copies_of_a_store_are_checked_and_fetched_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DAGR_SCRATCH", str(tmp_path / "scratch"))
    store = pafs.SubTreeFileSystem(str(tmp_path / "store"), pafs.LocalFileSystem())
    source = tmp_path / "store" / "bucket" / "model"
    source.mkdir(parents=True)
    (source / "w.bin").write_bytes(np.arange(1000).tobytes())
    entry = {"file": "model/w.bin", **checksums.checksum(store, "bucket/model/w.bin")}
    place = Path(checksums.local_copy(store, "bucket/model", {"w.bin": entry}))
    flip(place / "w.bin")
    assert (
        Path(checksums.local_copy(store, "bucket/model", {"w.bin": entry}), "w.bin").read_bytes()
        == (source / "w.bin").read_bytes()
    )
    (source / "w.bin").write_bytes(b"rebuilt")
    newer = {"file": "model/w.bin", **checksums.checksum(store, "bucket/model/w.bin")}
    assert Path(checksums.local_copy(store, "bucket/model", {"w.bin": newer}), "w.bin").read_bytes() == b"rebuilt"
    with pytest.raises(Damaged, match="w.bin is damaged"):
        checksums.local_copy(store, "bucket/model", {"w.bin": entry})


@pytest.mark.parametrize("content", CONTENTS)
def test_a_checkpoint_with_another_list_is_not_taken(tmp_path, content) -> None:
    folder, files = Artifact(str(tmp_path), "train-0123456789ab"), tmp_path / "files"
    files.mkdir()
    for step in (2, 4):
        (files / "w.bin").write_bytes(bytes([step]) * 50)
        Checkpoints(folder, "0a1b2c3d").put(step, files) if step == 2 else Checkpoints(folder, "0a1b2c3e").put(
            step, files
        )
    names = Checkpoints(folder, "")._names()
    Path(folder.path, "checkpoints", ".00000009-0a1b.Xy12").mkdir()
    Path(folder.path, "checkpoints", "00000009-0a1b2c3d (1)").mkdir()
    last = Path(folder.path, "checkpoints", names[0], "rank-0.json")
    last.write_bytes(CONTENTS[content] if CONTENTS[content] is not None else last.read_bytes()[:30])
    into = tmp_path / "into"
    into.mkdir()
    assert Checkpoints(folder, "f").last(into) in (None, 2, 4)
    assert names[0] not in [path.name for path in into.iterdir() if path.name == "w.bin" and path.read_bytes()[0] == 4]


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch) -> None:
    order = []
    for name in ("fsync", "replace", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name, **k: order.append(name) or real(*a, **k))
    disk.write(f"{tmp_path}/a/b.json", b"x", str(tmp_path), lasting=True)
    assert order == ["fsync", "replace", "fsync"]
    order.clear()
    disk.write(f"{tmp_path}/a/c.json", b"x", str(tmp_path), once=True, lasting=True)
    assert order == ["fsync", "link", "fsync"]
    order.clear()
    disk.write(f"{tmp_path}/a/d.json", b"x", str(tmp_path))
    assert order == ["replace"]
    folder = Artifact(str(tmp_path), "made")
    order.clear()
    rows = tables.table("queries", [{"query_id": "a", "text": "b"}])
    folder.commit(0, {"queries": rows}, {"counts": {}, "cost": {}})
    assert order == ["replace", "fsync", "fsync", "fsync", "link", "fsync"], "the part, its folder, then the receipt"
