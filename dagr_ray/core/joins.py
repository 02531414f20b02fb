"""Looks up related rows of other tables without reading these tables as a whole.

``rows_with`` finds rows by a column's values, ``beside`` by the shard that wrote them; ``Lookup`` (by a unique key) and
``RowsByQuery`` serve many look-ups. Filters and miners use ``SearchResults``, ``Twins`` and ``Positives`` of a search, a
corpus and judgements. These keep a hash of each row in memory, 8 bytes, and only the texts whose hash recurs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact

WINDOW = 8192  # rows of a table that are looked at together: a row group
Hashes = npt.NDArray[np.int64]


def rows_with(
    folder: Artifact,
    table: str,
    key: str,
    values: Iterable[str] | pa.Array | pa.ChunkedArray,
    columns: list[str] | None = None,
) -> pa.Table:
    """The rows of a table whose ``key`` is one of ``values``, in the order of the table, which is read part by part."""
    wanted = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(sorted(values), tables.TEXT)
    empty = tables.empty(table)
    parts = [empty if columns is None else empty.select(columns)]
    for part in folder.scan(table, columns) if len(wanted) else ():
        parts.append(part.filter(pc.is_in(part[key], value_set=wanted)))
    return pa.concat_tables(parts)


def rows_beside(folder: Artifact, known: str, other: str, start: int, stop: int) -> tuple[int, int]:
    """The rows of table ``other`` from the shards with rows ``start`` to ``stop`` of ``known``: a shard writes all its tables."""
    manifest_tables = (folder.manifest or {})["tables"]
    known_parts, other_parts = ([part["rows"] for part in manifest_tables[name]["parts"]] for name in (known, other))
    if len(known_parts) != len(other_parts):
        return 0, folder.count(other)
    starts, others = list(accumulate(known_parts, initial=0)), list(accumulate(other_parts, initial=0))
    first, last = bisect_right(starts, start) - 1, bisect_left(starts, stop)
    return others[first], others[max(first, last)]


def beside(folder: Artifact, known: str, other: str, start: int, stop: int) -> pa.Table:
    """The rows of ``rows_beside``. They are of whole shards, so rows of other queries may be among them."""
    return folder.slice(other, *rows_beside(folder, known, other, start, stop))


class Lookup:
    """Looks up rows of a large table by a unique key. Starts at the place of the last rows and widens the search from there.

    The tables of a recipe have the same order, so a shard reads little more than the rows that it needs; a table in
    another order is read through.
    """

    def __init__(self, folder: Artifact, name: str, key: str) -> None:
        self.folder, self.name, self.key = folder, name, key
        self.windows = -(-folder.count(name) // WINDOW)
        self.at: int | None = None
        self.read = lru_cache(maxsize=4)(self._read)

    def _read(self, window: int, columns: tuple[str, ...]) -> pa.Table:
        return self.folder.slice(self.name, window * WINDOW, (window + 1) * WINDOW, [self.key, *columns])

    def of(self, keys: pa.ChunkedArray, hint: float, columns: list[str]) -> Iterator[tuple[Any, ...]]:
        """(key, *columns) of each key, in any order. ``hint`` in [0, 1): the approximate place of the first."""
        wanted = keys.unique()
        missing = set(wanted.to_pylist())
        near = int(hint * self.windows) if self.at is None else self.at
        for window in sorted(range(self.windows), key=lambda w: (abs(w - near), w)) if missing else ():
            rows = self.read(window, tuple(columns))
            rows = rows.filter(pc.is_in(rows[self.key], value_set=wanted))
            if len(rows):
                self.at = window
                missing.difference_update(rows[self.key].to_pylist())
                yield from zip(*(column.to_pylist() for column in rows.columns), strict=True)
            if not missing:
                return
        assert not missing, f"{len(missing)} rows of {self.name} are not in {self.folder.path}, such as {min(missing)}"


class RowsByQuery:
    """The rows of a table by query. Remembers their places and reads them on request."""

    def __init__(self, source: Artifact, name: str, columns: list[str]) -> None:
        self.source, self.name, self.columns = source, name, columns
        self.ranges: dict[str, list[tuple[int, int]]] = {}
        at = 0
        for part in source.scan(name, ["query_id"]):
            encoded = part["query_id"].combine_chunks().dictionary_encode()
            codes, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
            starts = np.flatnonzero(np.diff(codes, prepend=-1))
            for first, last in zip(starts, np.append(starts, len(codes))[1:], strict=True):
                self.ranges.setdefault(names[codes[first]], []).append((at + int(first), at + int(last)))
            at += len(codes)

    def of(self, query_ids: Any) -> dict[str, list[dict[str, Any]]]:
        """Query id -> its rows, in the table's order; queries without rows are missing."""
        wanted = {query_id: self.ranges[query_id] for query_id in query_ids if query_id in self.ranges}
        spans = _merged(sorted(span for each in wanted.values() for span in each))
        found: dict[str, list[dict[str, Any]]] = {}
        for start, stop in spans:
            for row in self.source.slice(self.name, start, stop, self.columns).to_pylist():
                found.setdefault(row["query_id"], []).append(row)
        return found


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merges adjacent spans: the queries of a shard are mostly adjacent, and each read has a cost."""
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


class Rows:
    """The row numbers of queries in a table. 16 bytes per query."""

    def __init__(self, queries: Artifact) -> None:
        hashes = _all(_hashes(part["query_id"]) for part in queries.scan("queries", ["query_id"]))
        self.row_of = np.argsort(hashes, kind="stable")
        self.known = hashes[self.row_of]

    def of(self, query_ids: pa.ChunkedArray) -> Hashes:
        """Their rows, and rows of other queries with an equal hash."""
        wanted_hashes = np.unique(_hashes(query_ids))
        first, last = (
            np.searchsorted(self.known, wanted_hashes),
            np.searchsorted(self.known, wanted_hashes, side="right"),
        )
        return _all(self.row_of[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True))


class SearchResults:
    """The candidates of a search for some of its queries; ``queries`` is their folder.

    ``source`` is the folder that the search's shards divide by rows (``Stage.shards_of``). Without it, all candidates are
    read to find those of some queries.
    """

    def __init__(self, search: Artifact, source: Artifact | None, queries: Artifact) -> None:
        self.search, self.source, self.queries = search, source, queries
        self.starts = [shard["start"] for shard in search.plan["shards"]]

    @cached_property
    def _rows(self) -> Rows:
        assert self.source is not None
        return Rows(self.source)

    def of(self, query_ids: pa.ChunkedArray, start: int, stop: int) -> pa.Table:
        """Candidates of queries in rows ``start`` to ``stop``, and of the other queries in their shards."""
        if self.source is None:
            return rows_with(self.search, "candidates", "query_id", query_ids.unique())
        rows = np.arange(start, stop) if self.source == self.queries else self._rows.of(query_ids)
        parts_written = (self.search.manifest or {})["tables"]["candidates"]["parts"]
        edges = list(accumulate((part["rows"] for part in parts_written), initial=0))
        shard_tables = [tables.empty("candidates")]
        for shard in np.unique(np.searchsorted(self.starts, rows, side="right") - 1).tolist():
            shard_tables.append(self.search.slice("candidates", edges[shard], edges[shard + 1]))
        return pa.concat_tables(shard_tables)


class Twins:
    """Maps each passage to the first id with the same text, except for case and spacing; a unique passage to itself.

    Titles may differ: one text is documented under several names, and a query cannot tell such passages apart. A passage
    without text has no twin; with ``titled``, passages without text are compared by title.
    """

    def __init__(self, corpus: Artifact, titled: bool = False) -> None:
        columns = ["doc_id", "title", "text"] if titled else ["doc_id", "text"]

        def texts(part: pa.Table) -> pa.ChunkedArray:
            folded = tables.fold_texts(part["text"])
            return pc.if_else(pc.equal(folded, ""), tables.fold_texts(part["title"]), folded) if titled else folded

        id_hashes, hashes = [], []
        for part in corpus.scan("corpus", columns):
            id_hashes.append(_hashes(part["doc_id"]))
            hashes.append(_hashes(texts(part)))
        self.corpus, self.known, recurring = corpus, np.sort(_all(id_hashes)), _recurring(hashes)
        repeated = [pa.table({"doc_id": pa.array([], tables.TEXT), "text": pa.array([], tables.TEXT)})]
        for part in corpus.scan("corpus", columns) if len(recurring) else ():
            rows = pa.table({"doc_id": part["doc_id"], "text": texts(part)})
            rows = rows.filter(pa.array(np.isin(_hashes(rows["text"]), recurring)))
            repeated.append(rows if titled else rows.filter(pc.not_equal(rows["text"], "")))
        twins = pa.concat_tables(repeated)
        firsts = twins.group_by("text").aggregate([("doc_id", "min")])
        self.ids = twins["doc_id"].combine_chunks()
        index = pc.index_in(twins["text"], value_set=firsts["text"].combine_chunks())
        self.firsts = firsts["doc_id_min"].take(index).combine_chunks()

    def first(self, ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """The representative of each id; an id that is not in the corpus represents itself."""
        index = pc.index_in(ids, value_set=self.ids).combine_chunks()
        return pa.chunked_array([pc.coalesce(self.firsts.take(index), ids.combine_chunks())], tables.TEXT)

    def require(self, ids: pa.ChunkedArray) -> None:
        """Raises AssertionError if an id is not in the corpus."""
        missing = ids.filter(pa.array(~np.isin(_hashes(ids), self.known)))
        assert not len(missing), (
            f"{len(missing)} passages are not in {self.corpus.path}, such as {missing[0].as_py()!r}"
        )


class Positives:
    """The relevant passages of a query, and of all queries with the same text."""

    def __init__(self, queries: Artifact) -> None:
        texts = _recurring(_hashes(tables.fold_texts(part["text"])) for part in queries.scan("queries", ["text"]))
        # a query may have passages in several parts
        split_queries = _recurring(np.unique(_hashes(part["query_id"])) for part in queries.scan("qrels", ["query_id"]))
        self.said: dict[str, str] = {}
        for part in queries.scan("queries", ["query_id", "text"]) if len(texts) or len(split_queries) else ():
            said = pa.table({"query_id": part["query_id"], "text": tables.fold_texts(part["text"])})
            needed = np.isin(_hashes(said["text"]), texts) | np.isin(_hashes(said["query_id"]), split_queries)
            self.said.update(
                zip(*(column.to_pylist() for column in said.filter(pa.array(needed)).columns), strict=True)
            )
        self.passages: dict[str, set[str]] = {}
        for part in queries.scan("qrels", ["query_id", "doc_id", "relevance"]) if self.said else ():
            rows = tables.relevant(part)
            for query_id, doc_id in zip(*(rows[name].to_pylist() for name in ("query_id", "doc_id")), strict=True):
                if query_id in self.said:
                    self.passages.setdefault(self.said[query_id], set()).add(doc_id)

    def of(self, qrels: pa.Table) -> dict[str, set[str]]:
        """Query id -> passages, for the queries of some relevant ``qrels``."""
        docs_of: dict[str, set[str]] = {}
        for query_id, doc_id in zip(*(qrels[name].to_pylist() for name in ("query_id", "doc_id")), strict=True):
            docs_of.setdefault(query_id, set()).add(doc_id)
        # queries with the same text share one set, because a set for each would take quadratic memory
        return {
            key: self.passages.get(self.said[key], docs) if key in self.said else docs for key, docs in docs_of.items()
        }


def _hashes(texts: pa.ChunkedArray) -> Hashes:
    # hashes of equal texts are equal within one process, which is enough here
    return np.fromiter(map(hash, texts.to_pylist()), np.int64, len(texts))


def _all(parts: Iterable[Hashes]) -> Hashes:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _recurring(parts: Iterable[Hashes]) -> Hashes:
    values, times = np.unique(_all(parts), return_counts=True)
    return values[times > 1]
