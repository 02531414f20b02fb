"""Collections read with care (every bad line counted, with its file and line), and BEIR folders written.

A collection is a folder with passages, queries and judgements by split, in any layout that ``layouts`` knows and any
format that ``records`` reads; it may lie behind any URI that pyarrow opens. What is written is BEIR's own layout (Thakur
et al., arXiv 2104.08663): ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``.
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
from dagr_ray.formats.lines import MAX_BAD_SHARE, WANTED, Kind, Problem, Source, grade_of, stream_sha

log = logging.getLogger("dagr")
__all__ = ["MAX_BAD_SHARE", "BeirData", "Problem", "content", "judgements", "read", "stream_sha", "told", "write"]
# Judgements of what is not there are common, as a part of a collection is; where more than these are, it is another one's.
MAX_UNKNOWN_SHARE = 0.5
UNKNOWN = ("unknown-query", "unknown-document")


@dataclass
class BeirData:
    """What a folder held: tables ``corpus``, ``queries``, ``qrels.<split>``; the problems; lines read by file.

    ``unusable`` says why the judgements of a split cannot be used; it has no table.
    """

    tables: dict[str, pa.Table] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)


def content(path: str) -> str:
    """Hash of the bytes of a folder's files; what lies beside them does not count."""
    files = layouts.found(path).files()
    return digest([(name, stream_sha(path, i.path, i.size, i.mtime_ns)) for name, i in sorted(files.items())], 16)


def read(path: str) -> BeirData:
    """Reads a folder. Bad lines are left out and listed; over 1 % of them in a file raises ConfigError with the first.

    Judgements of queries or passages that are not there are left out too, up to half of them. A split of which more is bad
    is ``unusable``: another split may be the one that is wanted.
    """
    layout, data = layouts.found(path), BeirData()
    corpus = list(_documents(path, layout, data))
    if not corpus:
        raise ConfigError(f"{path}/{next(iter(layout.corpus))}: no passage in it; give a collection that has some")
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
    """As ``read``, but of some splits alone, of the first ``head`` passages, and of judgements of whatever passage."""
    layout, data = layouts.found(path), BeirData()
    first = list(itertools.islice(_documents(path, layout, data), head))
    if not first:
        raise ConfigError(f"{path}/{next(iter(layout.corpus))}: no passage in it; give a collection that has some")
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


def judgements(path: str, split: str) -> tuple[pa.Table, pa.Table]:
    """The ``qrels`` of a split and the ``queries`` of a folder, whose corpus is not read. Bad lines as in ``read``."""
    layout = layouts.found(path)
    named = tables.split_of(layout.qrels, split)
    if named is None:
        raise ConfigError(f"no split {split!r} in {path!r}; allowed: {', '.join(layout.qrels) or 'none'}")
    data = BeirData()
    queries = list(_queries(path, layout, data))
    rows = list(_judgements(path, layout, named, None, {row["query_id"] for row in queries}, data))
    warn(path, data.problems)
    return tables.table("qrels", rows), tables.table("queries", queries)


def judgement_file(path: str) -> pa.Table:
    """The ``qrels`` of a file in any of the formats, TREC's too. Bad lines as in ``read``."""
    fs, inside = filesystem(path)
    data = BeirData()
    info = fs.get_file_info(inside)
    place, _, name = path.partition("?")[0].rpartition("/")
    layout = layouts.Layout(fs, qrels={"": {name: info}})
    found = tables.table("qrels", _judgements(place, layout, "", None, None, data))
    warn(place, data.problems)
    return found


def warn(path: str, problems: Collection[Problem]) -> None:
    """Says what was left out or mended: one line for all problems of one kind in a file."""
    for line in told(problems):
        log.warning("%s", f"{path}/{line}" if path else line)


def told(problems: Collection[Problem]) -> list[str]:
    """A line for all problems of one kind in a file, with the first of them."""
    groups: dict[tuple[str, str, bool], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.file, problem.reason, problem.mended), []).append(problem)
    return [
        f"{file}: {len(each):,} line{'s' * (len(each) > 1)} {'mended' if mended else 'left out'}: {reason} (line "
        f"{each[0].line}{f': {each[0].detail}' if each[0].detail else ''})"
        for (file, reason, mended), each in groups.items()
    ]


def _sources(path: str, files: dict[str, pafs.FileInfo], kind: Kind, fs: pafs.FileSystem) -> Iterator[Source]:
    return (Source(fs, info.path, name.removesuffix(".gz"), path, kind) for name, info in sorted(files.items()))


def _done(source: Source, data: BeirData) -> None:
    """Takes over what was found in a file. Raises ConfigError where too much of it is bad."""
    data.problems += source.problems
    data.lines[source.name] = source.lines
    bad = [p for p in source.problems if not p.mended and p.reason not in UNKNOWN]
    if len(bad) > MAX_BAD_SHARE * source.lines:
        shown = "; ".join(f"line {p.line}: {p.reason}" + (f" ({p.detail})" if p.detail else "") for p in bad[:3])
        raise source.refuse(
            f"{len(bad)} of {source.lines} lines are bad, over the limit of {MAX_BAD_SHARE:.0%} ({shown}); mend the file: a "
            f"row has {WANTED[source.kind]}"
        )
    unknown = [p for p in source.problems if p.reason in UNKNOWN]
    if len(unknown) > MAX_UNKNOWN_SHARE * source.lines:
        first = unknown[0]
        what = first.reason.removeprefix("unknown-")
        raise source.refuse(
            f"{len(unknown)} of {source.lines} lines judge what is not there (line {first.line}: no {what} has the id "
            f"{first.detail!r}); give the judgements of this collection, in columns {WANTED['qrels']}"
        )


def _id(value: Any) -> str | None:
    """An id as text; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return None
    return tables.clean(str(value))


def _records(path: str, layout: layouts.Layout, kind: Kind, data: BeirData) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of the good rows of passages or queries; ids are unique and texts not empty.

    A title without a text is the text, and then no title.
    """
    seen: dict[str, str] = {}
    for source in _sources(path, layout.corpus if kind == "corpus" else layout.queries, kind, layout.fs):
        for number, row in records.rows(source):
            key, text, title = _id(row.get("id")), _text(row.get("text")), _text(row.get("title"))
            if key is None:
                source.bad(number, "no-id", f"{row.get('id')!r} is no id; give text or a whole number")
            elif text is None or title is None:
                source.bad(number, "broken-json", f"{key}: _id, title and text must be strings")
            elif not text.strip() and not title.strip():
                source.bad(number, "empty-text", key)
            elif key in seen:
                # a query may stand in the lists of several splits
                again = kind == "queries" and seen[key] == (text if text.strip() else title)
                source.bad(number, "duplicate-id", key)
                source.problems[-1].mended = again
            else:
                if not text.strip():
                    source.bad(number, "empty-text", f"{key}: the title stands in")
                    source.problems[-1].mended = True
                    text, title = title, ""
                seen[key] = text if kind == "queries" else ""
                yield key, title, text
        _done(source, data)


def _text(value: Any) -> str | None:
    """A text, empty where there is none; None for what is no text."""
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
                told_twice = f"{query_id} {doc_id}: grade {grade}" + (
                    f", and {before} before" if before != grade else ""
                )
                source.bad(number, "duplicate-id", told_twice)
                source.problems[-1].mended = before == grade
            else:
                seen[query_id, doc_id] = grade
                yield {"query_id": query_id, "doc_id": doc_id, "relevance": grade}
        _done(source, data)


def write(target: str, corpus: Artifact | None, queries: pa.Table, qrels: dict[str, pa.Table]) -> dict[str, int]:
    """Writes a BEIR folder (path or URI); returns lines by file. ``corpus`` None leaves the passages out.

    Ids with tabs, line ends or quotation marks are quoted as in CSV, which is how BEIR's own loader reads judgements.
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
    """Title and text of the first ``n`` good passages of a folder; fewer where it cannot be read, which is told later."""
    found: list[str] = []
    with contextlib.suppress(ConfigError):
        for row in itertools.islice(_documents(path, layouts.found(path), BeirData()), n):
            found.append(tables.passage_text(row["title"], row["text"]))
    return found


def _cell(text: str) -> str:
    """A cell of a TSV file that may hold anything.

    >>> print(_cell("d1"), _cell('a "b"'))
    d1 "a ""b""\"
    """
    return '"' + text.replace('"', '""') + '"' if re.search(r'["\t\r\n]', text) else text
