"""BEIR folders: read with care (every bad line counted, with its file and line) and written.

A folder holds ``corpus.jsonl``, ``queries.jsonl`` (or ``.jsonl.gz``) and ``qrels/<split>.tsv``; it may lie behind any
URI that pyarrow opens. Source of the layout: BEIR (Thakur et al., arXiv 2104.08663).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from dagr_ray import tables
from dagr_ray.artifact import Artifact
from dagr_ray.config import ConfigError, digest
from dagr_ray.store import filesystem

MAX_BAD_SHARE = 0.01


@dataclass
class Problem:
    """A line that was left out (or mended), where it stands, and why."""

    file: str
    line: int
    reason: str
    detail: str = ""
    mended: bool = False


@dataclass
class BeirData:
    """What a folder held: tables ``corpus``, ``queries``, ``qrels.<split>``; the problems; lines read by file."""

    tables: dict[str, pa.Table] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)


def _members(path: str) -> tuple[pafs.FileSystem, dict[str, pafs.FileInfo]]:
    """The files of a BEIR folder by their name without ``.gz``. Raises ConfigError where one is missing."""
    fs, root = filesystem(path)
    found: dict[str, pafs.FileInfo] = {}
    for folder in (root, f"{root}/qrels"):
        for info in fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
            name = info.path[len(root) + 1 :].removesuffix(".gz")
            if info.is_file and (name in ("corpus.jsonl", "queries.jsonl") or name.startswith("qrels/")):
                found[name] = info
    for name in ("corpus.jsonl", "queries.jsonl"):
        if name not in found:
            raise ConfigError(
                f"no {name} in {path!r}; give a BEIR folder (corpus.jsonl, queries.jsonl, qrels/<split>.tsv)"
            )
    return fs, {name: info for name, info in found.items() if not name.startswith("qrels/") or name.endswith(".tsv")}


@lru_cache(maxsize=65536)
def stream_sha(uri: str, file: str, size: int, mtime_ns: int | None) -> str:
    """SHA-256 of a file (a path in ``uri``'s file system), computed again only where size or time have changed."""
    fs, _ = filesystem(uri)
    with fs.open_input_stream(file, compression=None) as stream:
        sha = hashlib.sha256()
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def content(path: str) -> str:
    """Hash of the bytes of a BEIR folder's files; what lies beside them does not count."""
    _, members = _members(path)
    return digest([(name, stream_sha(path, i.path, i.size, i.mtime_ns)) for name, i in sorted(members.items())], 16)


def read(path: str) -> BeirData:
    """Reads a folder. Bad lines are left out and listed; over 1 % of them in a file raises ConfigError with the first."""
    fs, members = _members(path)
    data = BeirData()
    corpus = list(_documents(fs, members, data))
    queries = list(_queries(fs, members, data))
    data.tables = {"corpus": tables.table("corpus", corpus), "queries": tables.table("queries", queries)}
    doc_ids, query_ids = {row["doc_id"] for row in corpus}, {row["query_id"] for row in queries}
    for name in sorted(members):
        if name.startswith("qrels/"):
            split = name.removeprefix("qrels/").removesuffix(".tsv")
            rows = list(_judgements(fs, members, name, doc_ids, query_ids, data))
            data.tables[f"qrels.{split}"] = tables.table("qrels", rows)
    _refuse_if_bad(path, data)
    return data


def judgements(path: str, split: str) -> tuple[pa.Table, pa.Table]:
    """The ``qrels`` of a split and the ``queries`` of a folder, whose corpus is not read. Bad lines as in ``read``."""
    fs, members = _members(path)
    name = f"qrels/{split}.tsv"
    if name not in members:
        there = [n.removeprefix("qrels/").removesuffix(".tsv") for n in sorted(members) if n.startswith("qrels/")]
        raise ConfigError(f"no split {split!r} in {path!r}; allowed: {', '.join(there) or 'none'}")
    data = BeirData()
    queries = list(_queries(fs, members, data))
    rows = list(_judgements(fs, members, name, None, {row["query_id"] for row in queries}, data))
    _refuse_if_bad(path, data)
    return tables.table("qrels", rows), tables.table("queries", queries)


def _refuse_if_bad(path: str, data: BeirData) -> None:
    for name, lines in data.lines.items():
        bad = [p for p in data.problems if p.file == name and not p.mended]
        if len(bad) > MAX_BAD_SHARE * lines:
            shown = "; ".join(f"line {p.line}: {p.reason}" + (f" ({p.detail})" if p.detail else "") for p in bad[:3])
            raise ConfigError(
                f"{path}/{name}: {len(bad)} of {lines} lines are bad, over the limit of {MAX_BAD_SHARE:.0%} ({shown}); "
                "mend the file"
            )


def _lines(
    fs: pafs.FileSystem, members: dict[str, pafs.FileInfo], name: str, data: BeirData
) -> Iterator[tuple[int, str]]:
    info = members[name]
    data.lines[name] = 0
    with fs.open_input_stream(info.path, compression=None) as stream:
        binary = gzip.GzipFile(fileobj=stream) if info.path.endswith(".gz") else stream
        try:
            for number, raw in enumerate(io.BufferedReader(binary), 1):
                if not raw.strip():
                    continue
                data.lines[name] += 1
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    data.problems.append(Problem(name, number, "wrong-encoding", f"byte {error.start} is not UTF-8"))
        except (EOFError, gzip.BadGzipFile) as error:
            raise ConfigError(f"{info.path}: not a whole gzip file ({error}); fetch it again") from None


def _records(
    fs: pafs.FileSystem, members: dict[str, pafs.FileInfo], name: str, data: BeirData
) -> Iterator[tuple[int, str, str, str]]:
    """(line, id, title, text) of the good lines of a JSONL file; ids are unique and texts not empty."""
    seen: set[str] = set()
    for number, line in _lines(fs, members, name, data):
        try:
            value: Any = json.loads(line)
            key, text, title = value["_id"], value.get("text") or "", value.get("title") or ""
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            data.problems.append(Problem(name, number, "broken-json", f"{type(error).__name__}: {error}"[:200]))
            continue
        if not (isinstance(text, str) and isinstance(title, str) and isinstance(key, str | int)):
            data.problems.append(Problem(name, number, "broken-json", "_id, title and text must be strings"))
            continue
        key, text, title = tables.clean(str(key)), tables.clean(text), tables.clean(title)
        if key in seen:
            data.problems.append(Problem(name, number, "duplicate-id", key))
        elif not text.strip() and not title.strip():
            data.problems.append(Problem(name, number, "empty-text", key))
        else:
            if not text.strip():
                data.problems.append(Problem(name, number, "empty-text", f"{key}: the title stands in", mended=True))
            seen.add(key)
            yield number, key, title, text


def _documents(fs: pafs.FileSystem, members: dict[str, pafs.FileInfo], data: BeirData) -> Iterator[dict[str, str]]:
    for _, key, title, text in _records(fs, members, "corpus.jsonl", data):
        yield {"doc_id": key, "title": title, "text": text if text.strip() else title}


def _queries(fs: pafs.FileSystem, members: dict[str, pafs.FileInfo], data: BeirData) -> Iterator[dict[str, str]]:
    for _, key, title, text in _records(fs, members, "queries.jsonl", data):
        yield {"query_id": key, "text": text if text.strip() else title}


def _judgements(
    fs: pafs.FileSystem,
    members: dict[str, pafs.FileInfo],
    name: str,
    doc_ids: set[str] | None,
    query_ids: set[str],
    data: BeirData,
) -> Iterator[dict[str, Any]]:
    seen: set[tuple[str, str]] = set()
    for number, line in _lines(fs, members, name, data):
        cells = line.split("\t")
        if number == 1 and cells[0].strip().lower() in ("query-id", "query_id", "qid"):
            data.lines[name] -= 1
            continue
        try:
            query_id, doc_id, relevance = cells[0], cells[1], int(cells[2])
        except (IndexError, ValueError):
            data.problems.append(Problem(name, number, "broken-line", line[:100]))
            continue
        if query_id not in query_ids:
            data.problems.append(Problem(name, number, "unknown-query", query_id))
        elif doc_ids is not None and doc_id not in doc_ids:
            data.problems.append(Problem(name, number, "unknown-document", doc_id))
        elif (query_id, doc_id) in seen:
            data.problems.append(Problem(name, number, "duplicate-id", f"{query_id} {doc_id}"))
        else:
            seen.add((query_id, doc_id))
            yield {"query_id": query_id, "doc_id": doc_id, "relevance": relevance}


def write(target: str, corpus: Artifact | None, queries: pa.Table, qrels: dict[str, pa.Table]) -> dict[str, int]:
    """Writes a BEIR folder (path or URI); returns lines by file. ``corpus`` None leaves the passages out."""
    fs, root = filesystem(target)
    fs.create_dir(f"{root}/qrels", recursive=True)
    counts: dict[str, int] = {}

    def put(name: str, lines: Iterator[str]) -> None:
        with fs.open_output_stream(f"{root}/{name}") as stream:
            counts[name] = 0
            for line in lines:
                stream.write(line.encode() + b"\n")
                counts[name] += 1

    if corpus is not None:
        rows = (row for part in corpus.scan("corpus") for row in part.to_pylist())
        put("corpus.jsonl", (_json(_id=r["doc_id"], title=r["title"], text=r["text"]) for r in rows))
    put("queries.jsonl", (_json(_id=r["query_id"], text=r["text"]) for r in queries.to_pylist()))
    for split, table in qrels.items():
        body = (f"{r['query_id']}\t{r['doc_id']}\t{r['relevance']}" for r in table.to_pylist())
        put(f"qrels/{split}.tsv", (line for part in (iter(["query-id\tcorpus-id\tscore"]), body) for line in part))
    return counts


def _json(**values: str) -> str:
    return json.dumps(values, ensure_ascii=False)


def head(path: str, n: int, most: int = 1 << 22) -> list[str]:
    """Title and text of the first ``n`` good passages of a folder, as far as ``most`` bytes hold them."""
    fs, members = _members(path)
    start = b""
    with contextlib.suppress(OSError), fs.open_input_stream(members["corpus.jsonl"].path) as stream:
        start = stream.read(most)
    found: list[str] = []
    for line in start.decode("utf-8", "replace").split("\n"):
        # what is wrong with a line is told when the folder is read
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            row = json.loads(line)
            found.append(tables.passage_text(str(row.get("title") or ""), str(row["text"])))
        if len(found) == n:
            break
    return found
