"""Passages in Parquet: read with the care that a BEIR folder gets, in any number of pieces."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.formats import parquet
from dagr_ray.stages.sources import Parquet, ParquetCheck

N = 400


def passages(first=0, n=N, **changed):
    """A table of ``n`` good rows; ``changed`` maps a column to {position: value}."""
    rows = range(first, first + n)
    columns = {
        "doc_id": [f"d{i}" for i in rows],
        "title": [f"title {i}" for i in rows],
        "text": [f"This is passage number {i}." for i in rows],
    }
    for name, values in changed.items():
        for position, value in values.items():
            columns[name][position] = value
    return pa.table(columns)


def source(path, *tables, **options):
    """A folder with a file for each table."""
    path.mkdir(parents=True)
    for i, table in enumerate(tables):
        pq.write_table(table, path / f"{i}.parquet", **options)
    return path


def made(path, runs, step=16384):
    return materialize(Parquet(path=str(path)), str(runs), Placement(light=Pool(workers=0, shard_rows=step)))


def rejected(folder):
    return [(row["id"], row["reason"], row["detail"]) for row in folder.read("rejected").to_pylist()]


@pytest.mark.parametrize(
    "shape", ["file", "folder", "uri", "large", "view", "coded", "numbers", "untitled", "more columns", "null titles"]
)
def test_good_rows_arrive_complete(tmp_path, shape):
    table = passages()
    kinds = {"large": pa.large_string(), "view": pa.string_view(), "coded": pa.dictionary(pa.int32(), pa.string())}
    if shape in kinds:
        table = pa.table({name: table[name].cast(pa.string()).cast(kinds[shape]) for name in table.column_names})
    if shape == "numbers":
        table = table.set_column(0, "doc_id", pa.array(range(N)))
    if shape == "untitled":
        table = table.drop_columns("title")
    if shape == "null titles":
        table = table.set_column(1, "title", pa.nulls(N, pa.string()))
    if shape == "more columns":
        table = table.append_column("vector", pa.array([[1.0]] * N))
    path = source(tmp_path / "set", table)
    asked = {"file": path / "0.parquet", "uri": f"file://{path}"}.get(shape, path)
    folder = made(asked, tmp_path / "runs")
    rows = folder.read("corpus")
    assert rows["doc_id"].to_pylist() == [str(i) if shape == "numbers" else f"d{i}" for i in range(N)]
    assert rows["text"].to_pylist() == passages()["text"].to_pylist()
    no_title = shape in ("untitled", "null titles")
    assert rows["title"].to_pylist() == ([""] * N if no_title else passages()["title"].to_pylist())
    assert folder.manifest["counts"] == {"in": N, "out": N, "rejected": {}}


def with_bytes(column, values):
    """The table of ``passages`` with raw bytes in a column that says it holds text."""
    table = passages()
    raw = [values.get(i, text.encode()) for i, text in enumerate(table[column].to_pylist())]
    ends = np.cumsum([0, *map(len, raw)]).astype(np.int32)
    array = pa.Array.from_buffers(pa.string(), N, [None, pa.py_buffer(ends), pa.py_buffer(b"".join(raw))])
    return table.set_column(table.column_names.index(column), column, array)


@pytest.mark.parametrize(
    ("table", "row", "reason", "detail"),
    [
        (passages(doc_id={7: None}), 7, "no-id", ""),
        (passages(doc_id={0: ""}), 0, "no-id", ""),
        (passages(doc_id={399: "d5"}), 399, "duplicate-id", "d5"),
        (passages(text={3: None}, title={3: None}), 3, "empty-text", "d3"),
        (passages(text={3: " \n\u2003"}, title={3: "\t"}), 3, "empty-text", "d3"),
        (with_bytes("text", {9: b"caf\xe9"}), 9, "wrong-encoding", "text is not UTF-8"),
        (with_bytes("text", {9: b"\xed\xa0\x80"}), 9, "wrong-encoding", "text is not UTF-8"),
        (with_bytes("doc_id", {9: b"\xff"}), 9, "wrong-encoding", "doc_id is not UTF-8"),
    ],
)
def test_a_bad_row_is_left_out_and_named(tmp_path, table, row, reason, detail):
    path = source(tmp_path / "set", passages(1000), table, passages(2000))
    folder = made(path, tmp_path / "runs", step=100)
    assert rejected(folder) == [(f"1.parquet:{row}", reason, detail)]
    ids = folder.read("corpus")["doc_id"].to_pylist()
    wanted = [*range(1000, 1000 + N), *(i for i in range(N) if i != row), *range(2000, 2000 + N)]
    assert ids == [f"d{i}" for i in wanted]
    assert folder.manifest["counts"] == {"in": 3 * N, "out": 3 * N - 1, "rejected": {f"parquet/{reason}": 1}}


def test_of_repeated_ids_the_first_good_row_is_kept(tmp_path):
    first = passages(text={4: ""}, title={4: ""})  # d4 is bad there, so its second row is the first good one
    second = passages(1000, doc_id={0: "d4", 1: "d3", 2: "d4"})
    folder = made(source(tmp_path / "set", first, second), tmp_path / "runs")
    assert rejected(folder) == [
        ("0.parquet:4", "empty-text", "d4"),
        ("1.parquet:1", "duplicate-id", "d3"),
        ("1.parquet:2", "duplicate-id", "d4"),
    ]
    ids = folder.read("corpus")["doc_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 2 * N - 3
    assert folder.read("corpus").to_pylist()[ids.index("d4")]["text"] == "This is passage number 1000."


def test_equal_hashes_of_different_ids_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "hash", lambda text: len(text) // 3, raising=False)
    table = passages(doc_id={N - 1: "d0"})
    monkeypatch.setattr(parquet, "MAX_BAD_SHARE", 1.0)
    assert [(p.line, p.reason) for p in parquet.check(str(source(tmp_path / "set", table))).problems] == [
        (N - 1, "duplicate-id")
    ]


def test_a_title_stands_in_for_an_empty_text_and_nul_is_replaced(tmp_path):
    table = passages(text={3: " ", 4: "a\x00b"}, title={5: "\x00"}, doc_id={6: "d\x006"})
    rows = made(source(tmp_path / "set", table), tmp_path / "runs").read("corpus").to_pylist()
    assert rows[3]["text"] == "title 3" and rows[4]["text"] == "a\ufffdb"
    assert rows[5]["title"] == "\ufffd" and rows[6]["doc_id"] == "d\ufffd6"
    assert len(rows) == N


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"text": dict.fromkeys(range(10, 15), ""), "title": dict.fromkeys(range(10, 15), "")}, "row 10: empty-text"),
        ({"doc_id": dict.fromkeys(range(5), None)}, "row 0: no-id"),
        ({"doc_id": dict.fromkeys(range(1, 6), "d0")}, r"row 1: duplicate-id \(d0\)"),
        ({"doc_id": dict.fromkeys(range(N), "same")}, r"duplicate-id \(same\)"),
    ],
)
def test_over_one_percent_of_a_file_stops(tmp_path, changed, said):
    path = source(tmp_path / "set", passages(1000, 4000), passages(**changed))
    with pytest.raises(ConfigError, match=f"(?s)bad, over the limit of 1% .*{said}.*repair the file"):
        made(path, tmp_path / "runs")


def test_a_file_that_stands_there_twice_stops_too(tmp_path):
    with pytest.raises(ConfigError, match="400 of 800 rows are bad.*duplicate-id"):
        made(source(tmp_path / "set", passages(), passages()), tmp_path / "runs")


def test_errors_name_the_value_and_the_allowed_ones(tmp_path):
    def said(path):
        with pytest.raises(ConfigError) as error:
            parquet.check(str(path))
        return str(error.value)

    assert "no Parquet file" in said(tmp_path / "nowhere")
    assert "no column 'text', only doc_id, title, body" in said(
        source(tmp_path / "a", passages().rename_columns(["doc_id", "title", "body"]))
    )
    wrong = passages().set_column(2, "text", pa.array(range(N)))
    assert "'text' is of type int64; allowed: string" in said(source(tmp_path / "b", wrong))
    wrong = passages().set_column(0, "doc_id", pa.array(np.arange(N) / 2))
    assert "'doc_id' is of type double; allowed: string or integer" in said(source(tmp_path / "c", wrong))
    whole = (source(tmp_path / "d", passages()) / "0.parquet").read_bytes()
    (tmp_path / "d" / "0.parquet").write_bytes(whole[:-100])
    assert "not a complete Parquet file" in said(tmp_path / "d")


def test_the_rows_are_the_same_in_any_number_of_pieces(tmp_path, monkeypatch):
    path = source(
        tmp_path / "set", passages(doc_id={3: None}), passages(1000, 3), passages(2000, 1000), row_group_size=250
    )
    whole = made(path, tmp_path / "whole").read("corpus").combine_chunks()
    monkeypatch.setattr(parquet, "LARGE", 100)
    monkeypatch.setattr(parquet, "BATCH", 64)
    layout = parquet.check(str(path)).layout
    assert [each["groups"] for each in layout] == [[250, 150], [3], [250] * 4]
    for step in (1, 100, 700, 10_000):
        runs = tmp_path / f"of-{step}"
        assert made(path, runs, step).read("corpus").combine_chunks().equals(whole)
    pieces = parquet.ranges(layout, 1)
    assert [stop - start for start, stop in pieces] == [100, 100, 50, 100, 50, 3, *[100, 100, 50] * 4]
    assert sum(len(parquet.ranges(layout, step)) for step in (10_000, 700)) == 1 + 3


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    one, two = source(tmp_path / "one", passages()), source(tmp_path / "two", passages())
    (two / "_SUCCESS").write_text("")
    (two / "_temporary").mkdir()
    (two / "_temporary" / "x.parquet").write_text("half")
    assert Parquet(path=str(one)).fingerprint() == Parquet(path=str(two)).fingerprint()
    assert ParquetCheck(path=str(one)).fingerprint() != Parquet(path=str(one)).fingerprint()
    before = Parquet(path=str(two)).fingerprint()
    pq.write_table(passages(text={0: "another"}), two / "0.parquet")
    assert Parquet(path=str(two)).fingerprint() != before
