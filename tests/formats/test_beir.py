"""BEIR folders: read with care, gzipped and by URI; every bad line counted with its file and line."""

import gzip
import json
from pathlib import Path

import pytest

from dagr_ray.core.config import ConfigError
from dagr_ray.formats import beir


def folder(path: Path, docs: int = 300, queries: int = 200) -> Path:
    """A clean BEIR folder with ``docs`` passages and one judged query for each of the first ``queries``."""
    (path / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": f"d{i}", "title": f"title {i}", "text": f"text number {i}"}) for i in range(docs)]
    asked = [json.dumps({"_id": f"q{i}", "text": f"where is number {i}"}) for i in range(queries)]
    (path / "corpus.jsonl").write_text("\n".join(corpus) + "\n")
    (path / "queries.jsonl").write_text("\n".join(asked) + "\n")
    rows = "\n".join(f"q{i}\td{i}\t1" for i in range(queries))
    (path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows + "\n")
    return path


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def test_clean_folder(tmp_path) -> None:
    data = beir.read(str(folder(tmp_path / "set")))
    assert {name: t.num_rows for name, t in data.tables.items()} == {"corpus": 300, "queries": 200, "qrels.test": 200}
    assert not data.problems


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("corpus.jsonl", b'{"_id": "x", "text": \n', "broken-json"),
        ("corpus.jsonl", b'["not", "an", "object"]\n', "broken-json"),
        ("corpus.jsonl", b'{"_id": "x", "text": 5}\n', "broken-json"),
        ("corpus.jsonl", b'{"_id": "d1", "text": "again"}\n', "duplicate-id"),
        ("corpus.jsonl", b'{"_id": "x", "title": "", "text": "  "}\n', "empty-text"),
        ("corpus.jsonl", '{"_id": "x", "text": "caf\u00e9"}\n'.encode("latin-1"), "wrong-encoding"),
        ("queries.jsonl", b'{"_id": "q1", "text": "again"}\n', "duplicate-id"),
        ("qrels/test.tsv", b"q1\tnowhere\t1\n", "unknown-document"),
        ("qrels/test.tsv", b"nobody\td1\t1\n", "unknown-query"),
        ("qrels/test.tsv", b"q1 d1 1\n", "broken-line"),
    ],
)
def test_a_bad_line_is_left_out_and_named(tmp_path, file, line, reason) -> None:
    path = folder(tmp_path / "set")
    number = len((path / file).read_text().splitlines()) + 1
    append(path / file, line)
    data = beir.read(str(path))
    assert [(p.file, p.line, p.reason) for p in data.problems] == [(file, number, reason)]
    assert {name: t.num_rows for name, t in data.tables.items()} == {"corpus": 300, "queries": 200, "qrels.test": 200}


def test_over_one_percent_stops_with_file_line_and_reason(tmp_path) -> None:
    path = folder(tmp_path / "set")
    append(path / "corpus.jsonl", b"oops\n" * 4)
    with pytest.raises(ConfigError, match=r"corpus\.jsonl: 4 of 304 lines are bad.*line 301: broken-json"):
        beir.read(str(path))


def test_title_stands_in_for_an_empty_text(tmp_path) -> None:
    path = folder(tmp_path / "set")
    append(path / "corpus.jsonl", b'{"_id": "x", "title": "only a title", "text": ""}\n')
    data = beir.read(str(path))
    assert data.tables["corpus"]["text"].to_pylist()[-1] == "only a title"
    assert [(p.reason, p.repaired) for p in data.problems] == [("empty-text", True)]


def test_gzip_and_uri_read_the_same(tmp_path) -> None:
    path = folder(tmp_path / "set")
    plain = beir.read(str(path)).tables
    for file in ("corpus.jsonl", "queries.jsonl"):
        (path / f"{file}.gz").write_bytes(gzip.compress((path / file).read_bytes()))
        (path / file).unlink()
    assert beir.read(path.as_uri()).tables == plain
    whole = (path / "corpus.jsonl.gz").read_bytes()
    (path / "corpus.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="not a complete gzip file"):
        beir.read(str(path))


def test_content_follows_bytes_not_place(tmp_path) -> None:
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    (two / "notes.txt").write_text("beside the point")
    assert beir.content(str(one)) == beir.content(str(two))
    append(two / "corpus.jsonl", b'{"_id": "n", "text": "new"}\n')
    assert beir.content(str(one)) != beir.content(str(two))


def test_missing_file_says_what_a_folder_holds(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no corpus\.jsonl in .*BEIR folder"):
        beir.read(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no corpus\.jsonl"):
        beir.read(str(tmp_path / "absent"))


def test_odd_text_survives(tmp_path) -> None:
    path = folder(tmp_path / "set")
    odd = {
        "_id": "odd",
        "title": "\u202eright",
        "text": "nul \x00 surrogate \ud800 emoji \U0001f469\u200d\U0001f4bb <script>",
    }
    append(path / "corpus.jsonl", json.dumps(odd).encode() + b"\n")
    text = beir.read(str(path)).tables["corpus"]["text"].to_pylist()[-1]
    assert text == "nul \ufffd surrogate \ufffd emoji \U0001f469\u200d\U0001f4bb <script>"
    assert beir.read(str(path)).problems == []
