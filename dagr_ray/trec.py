"""TREC run and qrels files: read with care (every bad line counted, with its file and line) and written.

A run has lines ``query Q0 doc rank score tag``, a qrels file lines ``query iteration doc relevance``; white space stands
between the columns. Files may be gzipped and lie behind any URI that pyarrow opens. As in trec_eval
(https://github.com/usnistgov/trec_eval) a run is ordered by score as a 32-bit number, ties by falling document id; the
ranks in the file mean nothing.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray import tables
from dagr_ray.beir import MAX_BAD_SHARE, Problem, stream_sha
from dagr_ray.config import ConfigError, digest
from dagr_ray.store import filesystem

BATCH = 1 << 18  # lines that are held as Python objects
LARGEST = float(np.finfo(np.float32).max)


@dataclass
class TrecFile:
    """What a file held: a ``candidates`` or ``qrels`` table, the lines that were left out, how many lines were read."""

    table: pa.Table
    lines: int
    problems: list[Problem] = field(default_factory=list)


def content(path: str) -> str:
    """Hash of a file's bytes. Raises ConfigError where there is no file."""
    fs, inside = filesystem(path)
    info = fs.get_file_info(inside)
    if not info.is_file:
        raise ConfigError(f"no file at {path!r}; give a TREC run or qrels file")
    return digest(stream_sha(path, inside, info.size, info.mtime_ns), 16)


def read_run(path: str) -> TrecFile:
    """The run as ``candidates``: queries in the order of the file, each one's passages best first, ranks from 1.

    Left out and listed: lines without six columns or without a finite score, and a passage's second line for one query.
    Raises ConfigError where they are over 1 % of the lines, with the first of them.
    """
    return _read(path, "run", _hit, _ranked)


def read_qrels(path: str) -> TrecFile:
    """The judgements as ``qrels``, in the order of the file. Bad lines as in ``read_run``; four columns are wanted."""
    return _read(path, "qrels", _judgement, lambda rows: rows.select(["query_id", "doc_id", "value"]))


def _hit(cells: list[str]) -> tuple[str, str, float] | None:
    if len(cells) != 6:
        return None
    try:
        score = float(cells[4])
    except ValueError:
        return None
    return (cells[0], cells[2], score) if abs(score) <= LARGEST else None


def _judgement(cells: list[str]) -> tuple[str, str, int] | None:
    try:
        relevance = int(cells[3]) if len(cells) == 4 else LARGEST
    except ValueError:
        return None
    return (cells[0], cells[2], int(relevance)) if abs(relevance) < 2**31 else None


def _read(path: str, what: str, parse: Callable[[list[str]], Any], finish: Callable[[pa.Table], pa.Table]) -> TrecFile:
    name = path.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
    kind = "candidates" if what == "run" else "qrels"
    value_type = tables.schema(kind).field("score" if what == "run" else "relevance").type
    problems: list[Problem] = []
    parts: list[pa.Table] = []
    lines = 0
    pending: list[list[Any]] = [[], [], [], []]  # line, query, document, value

    def flush() -> None:
        line, query, doc, value = (pa.array(c, t) for c, t in zip(pending, types, strict=True))
        # ids come again and again: a run of ten million lines has few different ones
        columns = {"line": line, "query_id": query.dictionary_encode(), "doc_id": doc.dictionary_encode()}
        parts.append(pa.table(columns | {"value": value}))
        for each in pending:
            each.clear()

    types = (pa.int64(), tables.TEXT, tables.TEXT, value_type)
    for number, text in _lines(path, name, problems):
        lines += 1
        found = parse(text.split())
        if found is None:
            problems.append(Problem(name, number, "broken-line", text.strip()[:100]))
            continue
        for column, cell in zip(pending, (number, *found), strict=True):
            column.append(cell)
        if len(pending[0]) == BATCH:
            flush()
    flush()
    lines += sum(problem.reason == "wrong-encoding" for problem in problems)
    rows = _once(pa.concat_tables(parts).unify_dictionaries().combine_chunks(), name, problems)
    problems.sort(key=lambda problem: problem.line)
    if len(problems) > MAX_BAD_SHARE * lines:
        shown = "; ".join(f"line {p.line}: {p.reason} ({p.detail})" for p in problems[:3])
        wanted = "query Q0 doc rank score tag" if what == "run" else "query 0 doc relevance"
        raise ConfigError(
            f"{path}: {len(problems)} of {lines} lines are bad, over the limit of {MAX_BAD_SHARE:.0%} ({shown}); mend the "
            f"file: a TREC {what} file has lines {wanted!r}"
        )
    if not rows.num_rows:
        raise ConfigError(f"{path}: no line in it; give a TREC {what} file")
    made = finish(rows)
    schema = tables.schema(kind)
    columns = [column.cast(kind.type) for column, kind in zip(made.columns, schema, strict=True)]
    return TrecFile(tables.check(kind, pa.table(columns, schema=schema)), lines, problems)


def _lines(path: str, name: str, problems: list[Problem]) -> Iterator[tuple[int, str]]:
    fs, inside = filesystem(path)
    if not fs.get_file_info(inside).is_file:
        raise ConfigError(f"no file at {path!r}; give a TREC run or qrels file")
    with fs.open_input_stream(inside, compression=None) as stream:
        binary = gzip.GzipFile(fileobj=stream) if inside.endswith(".gz") else stream
        try:
            for number, raw in enumerate(io.BufferedReader(binary), 1):
                if not raw.strip():
                    continue
                try:
                    yield number, tables.clean(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    problems.append(Problem(name, number, "wrong-encoding", f"byte {error.start} is not UTF-8"))
        except (EOFError, gzip.BadGzipFile) as error:
            raise ConfigError(f"{path}: not a whole gzip file ({error}); fetch it again") from None


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Numbers of the values of a dictionary column, and the values."""
    whole = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return whole.indices.to_numpy().astype(np.int64), whole.dictionary


def _once(rows: pa.Table, name: str, problems: list[Problem]) -> pa.Table:
    """Each (query, document) once: the first line stands."""
    queries, _ = _codes(rows["query_id"])
    docs, names = _codes(rows["doc_id"])
    _, first = np.unique(queries * max(len(names), 1) + docs, return_index=True)
    if len(first) < rows.num_rows:
        again = np.ones(rows.num_rows, bool)
        again[first] = False
        for row in rows.filter(pa.array(again)).to_pylist():
            problems.append(Problem(name, row["line"], "duplicate-id", f"{row['query_id']} {row['doc_id']}"))
        rows = rows.filter(pa.array(~again)).combine_chunks()
    return rows


def _ranked(rows: pa.Table) -> pa.Table:
    """The rows as (query_id, doc_id, rank, score), in trec_eval's order."""
    queries, _ = _codes(rows["query_id"])
    docs, names = _codes(rows["doc_id"])
    place = np.empty(len(names), np.int64)
    # by bytes of UTF-8, as trec_eval's strcmp
    place[pc.sort_indices(names).to_numpy()] = np.arange(len(names))
    scores = rows["value"].to_numpy()
    _, first, which = np.unique(queries, return_index=True, return_inverse=True)
    seen = first[which]  # the row in which a row's query is first
    order = np.lexsort((-place[docs], -scores, seen))
    starts = np.flatnonzero(np.diff(seen[order], prepend=-1))
    ranks = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order))) + 1
    rows = rows.take(pa.array(order))
    return pa.table(
        {"query_id": rows["query_id"], "doc_id": rows["doc_id"], "rank": pa.array(ranks), "score": rows["value"]}
    )


# -- written ------------------------------------------------------------------------------------------------------------


def run_lines(rows: Iterable[tuple[str, str, int, float]], tag: str) -> Iterator[str]:
    """Lines of a run file from (query id, doc id, rank, score).

    >>> list(run_lines([("q 1", "d1", 1, 0.1)], "bm25"))
    ['q_1 Q0 d1 1 0.1 bm25']
    """
    # nine digits give a float32 back exactly
    return (f"{_word(q)} Q0 {_word(d)} {rank} {score:.9g} {_word(tag)}" for q, d, rank, score in rows)


def qrels_lines(rows: Iterable[tuple[str, str, int]]) -> Iterator[str]:
    """Lines of a qrels file from (query id, doc id, relevance)."""
    return (f"{_word(q)} 0 {_word(d)} {relevance}" for q, d, relevance in rows)


def _word(text: str) -> str:
    """White space would break the columns."""
    return "_".join(text.split()) or "_"
