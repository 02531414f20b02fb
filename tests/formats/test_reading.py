"""Reading a finished folder: any rows of a table, only what is needed, and never what is damaged or was replaced."""

import json
import os
from pathlib import Path

import pytest

from dagr_ray.core import artifact, tables
from dagr_ray.core.artifact import Artifact


def rows(first, last):
    made = [{"doc_id": f"d{i}", "title": "", "text": f"text {i} " * 3} for i in range(first, last)]
    return tables.table("corpus", made)


def finished(root, sizes, name="made"):
    """A folder whose ``corpus`` has a part of each size."""
    folder, first, parts = Artifact(str(root), name), 0, []
    for shard, size in enumerate(sizes):
        parts.append(folder.commit(shard, {"corpus": rows(first, first + size)}, {})["tables"]["corpus"])
        first += size
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    plan = [
        {"shard": i, "start": 10 * (end - size), "stop": 10 * end}
        for i, (end, size) in enumerate(zip(ends, sizes, strict=True))
    ]
    folder.write_json("plan.json", {"shards": plan})
    folder.write_json("manifest.json", {"tables": {"corpus": {"parts": parts}}})
    return folder


def test_any_slice_is_that_of_the_whole_table(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "ROW_GROUP", 3)
    folder = finished(tmp_path, [5, 0, 7, 1])
    whole = folder.read("corpus").combine_chunks()
    assert folder.count("corpus") == whole.num_rows == 13
    for start in range(15):
        for stop in range(15):
            got = folder.slice("corpus", start, stop).combine_chunks()
            assert got.equals(whole.slice(start, max(stop - start, 0)).combine_chunks()), (start, stop)
    assert folder.slice("corpus", 4, 6, ["text"]).equals(whole.slice(4, 2).select(["text"]))


def test_ranges_are_whole_parts_and_lead_back_to_the_input(tmp_path):
    folder = finished(tmp_path, [5, 0, 7, 1])
    assert folder.ranges("corpus", 1) == [(0, 5), (5, 12), (12, 13)]
    assert folder.ranges("corpus", 8) == [(0, 5), (5, 13)]
    assert folder.ranges("corpus", 100) == [(0, 13)]
    assert finished(tmp_path, [0], "none").ranges("corpus", 5) == []
    assert folder.source_rows("corpus", 0, 5) == (0, 50)
    assert folder.source_rows("corpus", 5, 12) == (50, 120)
    assert folder.source_rows("corpus", 4, 13) == (0, 130)
    assert folder.source_rows("corpus", 6, 7) == (50, 120), "widened to the shard"


def test_a_few_rows_of_a_large_part_are_read_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "ROW_GROUP", 100)
    folder = finished(tmp_path, [5000])
    folder.slice("corpus", 0, 1)
    opened = []
    real = artifact.pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        artifact.pq.ParquetFile,
        "read_row_groups",
        lambda self, groups, *a: opened.append(groups) or real(self, groups, *a),
    )
    assert folder.slice("corpus", 950, 1100)["doc_id"].to_pylist() == [f"d{i}" for i in range(950, 1100)]
    assert opened == [[9, 10]]


@pytest.mark.parametrize("seen_before", [False, True])
def test_a_flipped_bit_is_found_in_a_slice_too(tmp_path, monkeypatch, seen_before):
    monkeypatch.setattr(artifact, "ROW_GROUP", 100)
    folder = finished(tmp_path, [300])
    path = Path(folder.path, folder.manifest["tables"]["corpus"]["parts"][0]["file"])
    before = path.stat()
    if seen_before:
        assert folder.slice("corpus", 0, 10).num_rows == 10
    data = bytearray(path.read_bytes())
    data[40] ^= 1  # in the first page
    with open(path, "r+b") as handle:  # in place, as a disk does it: the same file, size and time
        handle.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises((artifact.Damaged, OSError)):
        folder.slice("corpus", 0, 10)
    path.unlink()
    with pytest.raises(artifact.Damaged, match="missing"):
        folder.slice("corpus", 0, 10)


def test_a_rebuilt_folder_is_not_read_through_what_is_remembered(tmp_path):
    folder = finished(tmp_path, [4])
    reader = Artifact(str(tmp_path), "made")
    assert reader.count("corpus") == 4
    folder.revoke([0])
    assert reader.manifest is None
    with pytest.raises(FileNotFoundError, match="incomplete or unreachable"):
        reader.slice("corpus", 0, 1)
    finished(tmp_path, [2, 5])
    assert reader.count("corpus") == 7 and reader.slice("corpus", 5, 7).num_rows == 2
    # as another machine does it: the same length, another content
    text = json.dumps(reader.manifest)
    Path(folder.path, "manifest.json").write_text(text.replace('"rows": 5', '"rows": 6'))
    assert reader.count("corpus") == 8


def test_a_manifest_is_parsed_once(tmp_path, monkeypatch):
    folder = finished(tmp_path, [3])
    assert folder.count("corpus") == 3
    monkeypatch.setattr(Artifact, "read_json", lambda *_: pytest.fail("read again"))
    assert folder.count("corpus") == 3 and Artifact(str(tmp_path), "made").slice("corpus", 1, 2).num_rows == 1


def test_looking_for_damage_takes_a_listing_for_each_table(tmp_path, monkeypatch):
    folder = finished(tmp_path, [2] * 30)
    parts = [part["file"] for part in folder.manifest["tables"]["corpus"]["parts"]]
    Path(folder.path, parts[3]).unlink()
    Path(folder.path, parts[7]).write_bytes(b"short")
    listed = []
    real = Artifact.listing
    monkeypatch.setattr(Artifact, "listing", lambda self, name: listed.append(name) or real(self, name))
    found = folder.damaged()
    assert set(found) == {3, 7} and "missing" in found[3] and "has 5 bytes" in found[7]
    assert listed == ["corpus"], "and no receipt is read where there is a manifest"
    folder.remove("manifest.json")
    assert Artifact(str(tmp_path), "made").damaged() == found


def test_a_part_from_before_a_column_existed_has_nulls_in_it(tmp_path, monkeypatch):
    now = tables.schema("generations")
    monkeypatch.setitem(tables.SCHEMAS, "generations", now.remove(now.get_field_index("logprob")))
    asked = {"gen_id": ["g0", "g1"], "source_id": ["d", "d"], "sample": [0, 1], "seed": [1, 2], "prompt_sha": ["", ""]}
    rows = tables.columns("generations", 2, truncated=False, raw="a query", completion_tokens=3, **asked)
    folder = Artifact(str(tmp_path), "old")
    part = folder.commit(0, {"generations": rows}, {})["tables"]["generations"]
    folder.write_json("manifest.json", {"tables": {"generations": {"parts": [part]}}})
    monkeypatch.undo()
    for found in (folder.read("generations"), folder.slice("generations", 0, 1), folder.slice("generations", 0, 2)):
        assert tables.check("generations", found)["logprob"].null_count == len(found)
    assert folder.read("generations", ["logprob", "raw"]).to_pylist()[0] == {"logprob": None, "raw": "a query"}
