"""Reads and writes TREC run and qrels files. Every bad line is counted and reported with its file and line number.

A run has lines ``query Q0 doc rank score tag``, a qrels file lines ``query iteration doc relevance``, separated by white
space. Files may be gzipped, at a path or any URI that pyarrow opens. As in trec_eval
(https://github.com/usnistgov/trec_eval), a run is ordered by score as a 32-bit number, then by descending document id;
the ranks in the file are ignored.

White space in an id is escaped by ``tables.escape_spaces``, and read back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError, digest
from dagr_ray.core.paths import last_name
from dagr_ray.core.storage import filesystem
from dagr_ray.formats.lines import (
    MAX_BAD_SHARE,
    UNPACKING,
    LineProblem,
    describe_damage,
    grade_of,
    open_unpacked,
    stream_sha,
)

BATCH = 1 << 18  # lines that are held as Python objects
LARGEST = float(np.finfo(np.float32).max)
_BLANK = " \t\n\r\x0b\x0c"
_SPACE = re.compile(f"[{_BLANK}]+")


@dataclass
class TrecFile:
    """The content of a file: a ``candidates`` or ``qrels`` table, the number of lines, and the skipped lines."""

    table: pa.Table
    lines: int
    problems: list[LineProblem] = field(default_factory=list)


def content(path: str) -> str:
    """Hash of a file's bytes. Raises ConfigError if there is no file."""
    fs, inside = filesystem(path)
    info = fs.get_file_info(inside)
    if not info.is_file:
        raise ConfigError(f"no file at {path!r}; give a TREC run or qrels file")
    return digest(stream_sha(path, inside, info.size, info.mtime_ns), 16)


def read_run(path: str) -> TrecFile:
    """The run as ``candidates``: queries in the order of the file, their passages best first, ranks from 1.

    Skips and lists lines without six columns or a finite score, and repeated passages of a query. Raises ConfigError if
    they are over 1 % of the lines, with the first of them.
    """
    return _read(path, "run", _parse_run_line, _rank)


def read_qrels(path: str) -> TrecFile:
    """The judgements as ``qrels``, in the order of the file. Lines have four columns; bad lines as in ``read_run``."""
    return _read(path, "qrels", _parse_judgement, lambda rows: rows.select(["query_id", "doc_id", "value"]))


def _parse_run_line(cells: list[str]) -> tuple[str, str, float] | str:
    if len(cells) != 6:
        return f"{len(cells)} columns, not 6"
    try:
        score = float(cells[4])
    except ValueError:
        return f"score {cells[4][:40]!r} is not a number"
    return (cells[0], cells[2], score) if abs(score) <= LARGEST else f"score {cells[4][:40]} is not a finite number"


def _parse_judgement(cells: list[str]) -> tuple[str, str, int] | str:
    if len(cells) != 4:
        return f"{len(cells)} columns, not 4"
    grade = grade_of(cells[3])
    return grade if isinstance(grade, str) else (cells[0], cells[2], grade)


def _read(path: str, what: str, parse: Callable[[list[str]], Any], finish: Callable[[pa.Table], pa.Table]) -> TrecFile:
    name = last_name(path)
    kind = "candidates" if what == "run" else "qrels"
    value_type = tables.schema(kind).field("score" if what == "run" else "relevance").type
    problems: list[LineProblem] = []
    parts: list[pa.Table] = []
    lines, width = 0, 6 if what == "run" else 4
    pending: list[list[Any]] = [[], [], [], []]  # line, query, document, value

    def flush() -> None:
        line, query, doc, value = (pa.array(c, t) for c, t in zip(pending, types, strict=True))
        # ids repeat: a run of ten million lines has few different ones
        columns = {"line": line, "query_id": query.dictionary_encode(), "doc_id": doc.dictionary_encode()}
        parts.append(pa.table(columns | {"value": value}))
        for column in pending:
            column.clear()

    types = (pa.int64(), tables.TEXT, tables.TEXT, value_type)
    for number, text in _lines(path, name, problems):
        lines += 1
        cells = text.split()
        if len(cells) != width or not text.isascii():  # an id may have white space that trec_eval does not split at
            cells = _SPACE.split(text.strip(_BLANK))
        row = parse(cells)
        if isinstance(row, str):
            problems.append(LineProblem(name, number, "broken-line", f"{row}: {text.strip()[:100]}"))
            continue
        if "\\u" in text:
            row = (tables.unescape_spaces(row[0]), tables.unescape_spaces(row[1]), row[2])
        for column, cell in zip(pending, (number, *row), strict=True):
            column.append(cell)
        if len(pending[0]) == BATCH:
            flush()
    flush()
    lines += sum(problem.reason == "wrong-encoding" for problem in problems)
    rows = _deduplicate(pa.concat_tables(parts).unify_dictionaries().combine_chunks(), name, problems)
    problems.sort(key=lambda problem: problem.line)
    bad = [problem for problem in problems if not problem.repaired]
    if len(bad) > MAX_BAD_SHARE * lines:
        shown = "; ".join(f"line {p.line}: {p.reason} ({p.detail})" for p in bad[:3])
        expected = "query Q0 doc rank score tag" if what == "run" else "query 0 doc relevance"
        raise ConfigError(
            f"{path}: {len(bad)} of {lines} lines are bad, over the limit of {MAX_BAD_SHARE:.0%} ({shown}); repair the "
            f"file: a TREC {what} file has lines {expected!r}"
        )
    if not rows.num_rows:
        raise ConfigError(f"{path} has no line; give a TREC {what} file")
    finished = finish(rows)
    schema = tables.schema(kind)
    columns = [column.cast(field.type) for column, field in zip(finished.columns, schema, strict=True)]
    return TrecFile(tables.check(kind, pa.table(columns, schema=schema)), lines, problems)


def _lines(path: str, name: str, problems: list[LineProblem]) -> Iterator[tuple[int, str]]:
    fs, inside = filesystem(path)
    if not fs.get_file_info(inside).is_file:
        raise ConfigError(f"no file at {path!r}; give a TREC run or qrels file")
    with open_unpacked(fs, inside) as stream:
        try:
            for number, raw in enumerate(stream, 1):
                if not raw.strip():
                    continue
                try:
                    yield number, tables.clean(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    problems.append(LineProblem(name, number, "wrong-encoding", f"byte {error.start} is not UTF-8"))
        except UNPACKING as error:
            raise ConfigError(f"{path}: {describe_damage(inside, error)}") from None


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """The codes and the values of a dictionary column."""
    whole = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return whole.indices.to_numpy().astype(np.int64), whole.dictionary


def _deduplicate(rows: pa.Table, name: str, problems: list[LineProblem]) -> pa.Table:
    """Keeps the first line of each (query, document). An equal repetition counts as repaired, not as bad."""
    queries, _ = _codes(rows["query_id"])
    docs, names = _codes(rows["doc_id"])
    _, first, which = np.unique(queries * max(len(names), 1) + docs, return_index=True, return_inverse=True)
    if len(first) < rows.num_rows:
        repeated = np.ones(rows.num_rows, bool)
        repeated[first] = False
        before = rows["value"].to_numpy()[first[which]][repeated]
        for row, value in zip(rows.filter(pa.array(repeated)).to_pylist(), before.tolist(), strict=True):
            detail, same = f"{row['query_id']} {row['doc_id']}", row["value"] == value
            detail += "" if same else f": {row['value']:g}, and {value:g} before"
            problems.append(LineProblem(name, row["line"], "duplicate-id", detail, repaired=same))
        rows = rows.filter(pa.array(~repeated)).combine_chunks()
    return rows


def _rank(rows: pa.Table) -> pa.Table:
    """The rows as (query_id, doc_id, rank, score), in trec_eval's order."""
    queries, _ = _codes(rows["query_id"])
    docs, names = _codes(rows["doc_id"])
    name_order = np.empty(len(names), np.int64)
    # by bytes of UTF-8, like trec_eval's strcmp
    name_order[pc.sort_indices(names).to_numpy()] = np.arange(len(names))
    scores = rows["value"].to_numpy()
    _, first, which = np.unique(queries, return_index=True, return_inverse=True)
    first_row = first[which]  # the first row of each row's query
    order = np.lexsort((-name_order[docs], -scores, first_row))
    starts = np.flatnonzero(np.diff(first_row[order], prepend=-1))
    ranks = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order))) + 1
    rows = rows.take(pa.array(order))
    return pa.table(
        {"query_id": rows["query_id"], "doc_id": rows["doc_id"], "rank": pa.array(ranks), "score": rows["value"]}
    )


# -- writing ------------------------------------------------------------------------------------------------------------


def run_lines(rows: Iterable[tuple[str, str, int, float]], tag: str) -> Iterator[str]:
    """Lines of a run file from (query id, doc id, rank, score).

    >>> list(run_lines([("q 1", "d1", 1, 0.1)], "bm25"))
    ['q\\\\u00201 Q0 d1 1 0.1 bm25']
    """
    spaced, by = tables.escape_spaces, tables.escape_spaces(tag)
    # nine digits give a float32 back exactly
    return (f"{spaced(q)} Q0 {spaced(d)} {rank} {score:.9g} {by}" for q, d, rank, score in rows)


def qrels_lines(rows: Iterable[tuple[str, str, int]]) -> Iterator[str]:
    """Lines of a qrels file from (query id, doc id, relevance)."""
    return (f"{tables.escape_spaces(q)} 0 {tables.escape_spaces(d)} {relevance}" for q, d, relevance in rows)
