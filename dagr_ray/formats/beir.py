"""Reads collections, and writes BEIR folders. Every bad line is counted and reported with its file and line number.

A collection is a folder with passages, queries and judgements by split, in any layout of ``layouts`` and any format of
``records``, at a path or any URI that pyarrow opens. The writer uses BEIR's own layout (Thakur et al., arXiv 2104.08663):
``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError, digest
from dagr_ray.core.storage import filesystem
from dagr_ray.formats import layouts, records
from dagr_ray.formats.lines import EXPECTED_COLUMNS, MAX_BAD_SHARE, Kind, LineProblem, SourceFile, grade_of, stream_sha

log = logging.getLogger("dagr")
__all__ = [
    "MAX_BAD_SHARE",
    "BeirData",
    "LineProblem",
    "content",
    "read",
    "read_qrels",
    "stream_sha",
    "summarise_problems",
    "write",
]
# Judgements of absent passages are common in part of a collection. With a larger share, they belong to another one.
MAX_UNKNOWN_SHARE = 0.5
UNKNOWN = ("unknown-query", "unknown-document")


@dataclass
class BeirData:
    """The content of a folder: tables ``corpus``, ``queries``, ``qrels.<split>``; the problems; lines read by file.

    ``unusable`` maps a split whose judgements cannot be used to the reason; such a split has no table.
    """

    tables: dict[str, pa.Table] = field(default_factory=dict)
    problems: list[LineProblem] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)


def content(path: str) -> str:
    """Hash of the bytes of a collection's files. Other files in the folder do not count."""
    files = layouts.find_layout(path).files()
    return digest([(name, stream_sha(path, i.path, i.size, i.mtime_ns)) for name, i in sorted(files.items())], 16)


def read(path: str) -> BeirData:
    """Reads a folder. Bad lines are skipped and listed; over 1 % of them in a file raises ConfigError with the first ones.

    Judgements of absent queries or passages are skipped as well, up to half of them. A split with more bad lines is
    ``unusable``, because the caller may need another split.
    """
    layout, data = layouts.find_layout(path), BeirData()
    corpus = list(_documents(path, layout, data))
    if not corpus:
        raise ConfigError(f"{path}/{next(iter(layout.corpus))} has no passage; give a collection with passages")
    queries = list(_queries(path, layout, data))
    data.tables = {"corpus": tables.table("corpus", corpus), "queries": tables.table("queries", queries)}
    doc_ids, query_ids = {row["doc_id"] for row in corpus}, {row["query_id"] for row in queries}
    for split in layout.qrels:
        try:
            rows = list(_judgements(path, layout, split, doc_ids, query_ids, data))
        except ConfigError as error:
            data.unusable[split] = str(error)
        else:
            data.tables[f"qrels.{split}"] = tables.table("qrels", rows)
    return data


def glance(path: str, head: int, splits: Collection[str]) -> BeirData:
    """Like ``read``, but reads only some splits, only the first ``head`` passages, and judgements of any passage."""
    layout, data = layouts.find_layout(path), BeirData()
    first = list(itertools.islice(_documents(path, layout, data), head))
    if not first:
        raise ConfigError(f"{path}/{next(iter(layout.corpus))} has no passage; give a collection with passages")
    queries = {row["query_id"] for row in _queries(path, layout, data)} if splits else set()
    for split in layout.qrels:
        wanted = any(tables.split_of(layout.qrels, each) == split for each in splits)
        try:
            rows = list(_judgements(path, layout, split, None, queries, data)) if wanted else []
        except ConfigError as error:
            data.unusable[split] = str(error)
        else:
            data.tables[f"qrels.{split}"] = tables.table("qrels", rows)
    return data


def read_qrels(path: str, split: str) -> tuple[pa.Table, pa.Table]:
    """The ``qrels`` of a split and the ``queries`` of a folder, without its corpus. Bad lines as in ``read``."""
    layout = layouts.find_layout(path)
    name = tables.split_of(layout.qrels, split)
    if name is None:
        raise ConfigError(f"no split {split!r} in {path!r}; allowed: {', '.join(layout.qrels) or 'none'}")
    data = BeirData()
    queries = list(_queries(path, layout, data))
    rows = list(_judgements(path, layout, name, None, {row["query_id"] for row in queries}, data))
    warn(path, data.problems)
    return tables.table("qrels", rows), tables.table("queries", queries)


def read_qrels_file(path: str) -> pa.Table:
    """The ``qrels`` of a file in any format, including TREC's. Bad lines as in ``read``."""
    fs, inside = filesystem(path)
    data = BeirData()
    info = fs.get_file_info(inside)
    folder, _, name = path.partition("?")[0].rpartition("/")
    layout = layouts.Layout(fs, qrels={"": {name: info}})
    qrels = tables.table("qrels", _judgements(folder, layout, "", None, None, data))
    warn(folder, data.problems)
    return qrels


def warn(path: str, problems: Collection[LineProblem]) -> None:
    """Logs skipped and repaired lines: one line for all problems of one kind in a file."""
    for line in summarise_problems(problems):
        log.warning("%s", f"{path}/{line}" if path else line)


def summarise_problems(problems: Collection[LineProblem]) -> list[str]:
    """One line for all problems of one kind in a file, with the first of them."""
    groups: dict[tuple[str, str, bool], list[LineProblem]] = {}
    for problem in problems:
        groups.setdefault((problem.file, problem.reason, problem.repaired), []).append(problem)
    return [
        f"{file}: {len(group):,} line{'s' * (len(group) > 1)} {'repaired' if repaired else 'skipped'}: {reason} (line "
        f"{group[0].line}{f': {group[0].detail}' if group[0].detail else ''})"
        for (file, reason, repaired), group in groups.items()
    ]


def _sources(path: str, files: dict[str, pafs.FileInfo], kind: Kind, fs: pafs.FileSystem) -> Iterator[SourceFile]:
    return (SourceFile(fs, info.path, name.removesuffix(".gz"), path, kind) for name, info in sorted(files.items()))


def _finish(source: SourceFile, data: BeirData) -> None:
    """Adds the problems and line count of a file. Raises ConfigError if too many of its lines are bad."""
    data.problems += source.problems
    data.lines[source.name] = source.lines
    bad = [p for p in source.problems if not p.repaired and p.reason not in UNKNOWN]
    if len(bad) > MAX_BAD_SHARE * source.lines:
        shown = "; ".join(f"line {p.line}: {p.reason}" + (f" ({p.detail})" if p.detail else "") for p in bad[:3])
        raise source.error(
            f"{len(bad)} of {source.lines} lines are bad, over the limit of {MAX_BAD_SHARE:.0%} ({shown}); repair the file: a "
            f"row has {EXPECTED_COLUMNS[source.kind]}"
        )
    unknown = [p for p in source.problems if p.reason in UNKNOWN]
    if len(unknown) > MAX_UNKNOWN_SHARE * source.lines:
        first = unknown[0]
        what = first.reason.removeprefix("unknown-")
        raise source.error(
            f"{len(unknown)} of {source.lines} lines have unknown ids (line {first.line}: no {what} has the id "
            f"{first.detail!r}); give the judgements of this collection, in columns {EXPECTED_COLUMNS['qrels']}"
        )


def _id(value: Any) -> str | None:
    """An id as text; None if the value is not a valid id."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return None
    return tables.clean(str(value))


def _records(path: str, layout: layouts.Layout, kind: Kind, data: BeirData) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of the valid rows of passages or queries; ids are unique and texts not empty.

    If a row has a title but no text, the title becomes the text.
    """
    seen: dict[str, str] = {}
    for source in _sources(path, layout.corpus if kind == "corpus" else layout.queries, kind, layout.fs):
        for number, row in records.rows(source):
            key, text, title = _id(row.get("id")), _text(row.get("text")), _text(row.get("title"))
            if key is None:
                source.bad(number, "no-id", f"{row.get('id')!r} is not an id; give text or a whole number")
            elif text is None or title is None:
                source.bad(number, "broken-json", f"{key}: _id, title and text must be strings")
            elif not text.strip() and not title.strip():
                source.bad(number, "empty-text", key)
            elif key in seen:
                # the query files of several splits may contain the same query
                same = kind == "queries" and seen[key] == (text if text.strip() else title)
                source.bad(number, "duplicate-id", key)
                source.problems[-1].repaired = same
            else:
                if not text.strip():
                    source.bad(number, "empty-text", f"{key}: the title is used as text")
                    source.problems[-1].repaired = True
                    text, title = title, ""
                seen[key] = text if kind == "queries" else ""
                yield key, title, text
        _finish(source, data)


def _text(value: Any) -> str | None:
    """A text, empty if the value is missing; None if the value is not text."""
    if value is None or value != value:
        return ""
    return tables.clean(value) if isinstance(value, str) else None


def _documents(path: str, layout: layouts.Layout, data: BeirData) -> Iterator[dict[str, str]]:
    for key, title, text in _records(path, layout, "corpus", data):
        yield {"doc_id": key, "title": title, "text": text}


def _queries(path: str, layout: layouts.Layout, data: BeirData) -> Iterator[dict[str, str]]:
    for key, _, text in _records(path, layout, "queries", data):
        yield {"query_id": key, "text": text}


def _judgements(
    path: str,
    layout: layouts.Layout,
    split: str,
    doc_ids: set[str] | None,
    query_ids: set[str] | None,
    data: BeirData,
) -> Iterator[dict[str, Any]]:
    seen: dict[tuple[str, str], int] = {}
    for source in _sources(path, layout.qrels[split], "qrels", layout.fs):
        for number, row in records.rows(source):
            query_id, doc_id, grade = _id(row["query"]), _id(row["doc"]), grade_of(row.get("score", 1))
            if query_id is None or doc_id is None:
                source.bad(number, "no-id", f"{row['query']!r}, {row['doc']!r}")
                continue
            if source.spaced:
                query_id, doc_id = tables.unescape_spaces(query_id), tables.unescape_spaces(doc_id)
            if query_ids is not None and query_id not in query_ids:
                source.bad(number, "unknown-query", query_id)
            elif doc_ids is not None and doc_id not in doc_ids:
                source.bad(number, "unknown-document", doc_id)
            elif isinstance(grade, str):
                source.bad(number, "broken-line", grade)
            elif (before := seen.get((query_id, doc_id))) is not None:
                detail = f"{query_id} {doc_id}: grade {grade}" + (f", and {before} before" if before != grade else "")
                source.bad(number, "duplicate-id", detail)
                source.problems[-1].repaired = before == grade
            else:
                seen[query_id, doc_id] = grade
                yield {"query_id": query_id, "doc_id": doc_id, "relevance": grade}
        _finish(source, data)


def write(target: str, corpus: Artifact | None, queries: pa.Table, qrels: dict[str, pa.Table]) -> dict[str, int]:
    """Writes a BEIR folder (path or URI) and returns lines by file. If ``corpus`` is None, no passages are written.

    Ids with tabs, line ends or quotation marks are quoted as in CSV, as BEIR's own loader reads judgements.
    """
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
        body = (f"{_cell(r['query_id'])}\t{_cell(r['doc_id'])}\t{r['relevance']}" for r in table.to_pylist())
        put(f"qrels/{split}.tsv", (line for part in (iter(["query-id\tcorpus-id\tscore"]), body) for line in part))
    return counts


def _json(**values: str) -> str:
    return json.dumps(values, ensure_ascii=False)


def head(path: str, n: int) -> list[str]:
    """Title and text of the first ``n`` valid passages; fewer if the folder cannot be read, which ``read`` reports."""
    passages: list[str] = []
    with contextlib.suppress(ConfigError):
        for row in itertools.islice(_documents(path, layouts.find_layout(path), BeirData()), n):
            passages.append(tables.passage_text(row["title"], row["text"]))
    return passages


def _cell(text: str) -> str:
    """A cell of a TSV file, quoted if its text needs it.

    >>> print(_cell("d1"), _cell('a "b"'))
    d1 "a ""b""\"
    """
    return '"' + text.replace('"', '""') + '"' if re.search(r'["\t\r\n]', text) else text
