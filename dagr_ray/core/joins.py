"""What stands beside some of the queries in other tables, so that a shard of them is worked on without the others.

Rows of the stage's other tables, candidates of a search, passages and queries that say the same as others. What is held
for all rows is a hash of each, 8 bytes, and the texts of those alone whose hash recurs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact

Hashes = npt.NDArray[np.int64]


def rows_beside(folder: Artifact, name: str, start: int, stop: int) -> tuple[int, int]:
    """The rows of another table from the shards whose ``qrels`` are rows ``start`` to ``stop``: a shard writes all its tables."""
    made = (folder.manifest or {})["tables"]
    known = [part["rows"] for part in made["qrels"]["parts"]]
    other = [part["rows"] for part in made[name]["parts"]]
    if len(known) != len(other):
        return 0, folder.count(name)
    starts, others = list(accumulate(known, initial=0)), list(accumulate(other, initial=0))
    first, last = bisect_right(starts, start) - 1, bisect_left(starts, stop)
    return others[first], others[max(first, last)]


class Rows:
    """In which rows of a table some queries stand. 16 bytes a query."""

    def __init__(self, queries: Artifact) -> None:
        hashes = _all(_hashes(part["query_id"]) for part in queries.scan("queries", ["query_id"]))
        self.row_of = np.argsort(hashes, kind="stable")
        self.known = hashes[self.row_of]

    def of(self, query_ids: pa.ChunkedArray) -> Hashes:
        """Their rows, and any rows of other queries with their hash."""
        wanted = np.unique(_hashes(query_ids))
        first, last = np.searchsorted(self.known, wanted), np.searchsorted(self.known, wanted, side="right")
        return _all(self.row_of[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True))


class SearchResults:
    """The candidates of a search for some of its queries; ``queries`` are those, or a part of them.

    ``asked`` is the folder of whose rows the shards of the search are ranges (``Stage.shards_of``). Without it, all
    candidates are read to find those of some queries.
    """

    def __init__(self, search: Artifact, asked: Artifact | None, queries: Artifact) -> None:
        self.search, self.asked, self.queries = search, asked, queries
        self.starts = [shard["start"] for shard in search.plan["shards"]]

    @cached_property
    def _rows(self) -> Rows:
        assert self.asked is not None
        return Rows(self.asked)

    def of(self, query_ids: pa.ChunkedArray, start: int, stop: int) -> pa.Table:
        """Of queries that are rows ``start`` to ``stop``; with others of their shards. Any other search is read through."""
        if self.asked is None:
            wanted = query_ids.unique()
            parts = (
                part.filter(pc.is_in(part["query_id"], value_set=wanted)) for part in self.search.scan("candidates")
            )
            return pa.concat_tables([tables.empty("candidates"), *parts])
        rows = np.arange(start, stop) if self.asked == self.queries else self._rows.of(query_ids)
        made = (self.search.manifest or {})["tables"]["candidates"]["parts"]
        edges = list(accumulate((part["rows"] for part in made), initial=0))
        found = [tables.empty("candidates")]
        for shard in np.unique(np.searchsorted(self.starts, rows, side="right") - 1).tolist():
            found.append(self.search.slice("candidates", edges[shard], edges[shard + 1]))
        return pa.concat_tables(found)


class Twins:
    """Passages that are equal but for case and spacing, each by the first id of them; a passage of its own by its own id.

    Titles may differ: one text is documented under several names, and a query cannot tell such passages apart. A passage
    without a text has no twin, or with ``titled`` those that have its title.
    """

    def __init__(self, corpus: Artifact, titled: bool = False) -> None:
        columns = ["doc_id", "title", "text"] if titled else ["doc_id", "text"]

        def texts(part: pa.Table) -> pa.ChunkedArray:
            folded = tables.fold_texts(part["text"])
            return pc.if_else(pc.equal(folded, ""), tables.fold_texts(part["title"]), folded) if titled else folded

        known, hashes = [], []
        for part in corpus.scan("corpus", columns):
            known.append(_hashes(part["doc_id"]))
            hashes.append(_hashes(texts(part)))
        self.corpus, self.known, again = corpus, np.sort(_all(known)), _recurring(hashes)
        found = [pa.table({"doc_id": pa.array([], tables.TEXT), "text": pa.array([], tables.TEXT)})]
        for part in corpus.scan("corpus", columns) if len(again) else ():
            rows = pa.table({"doc_id": part["doc_id"], "text": texts(part)})
            rows = rows.filter(pa.array(np.isin(_hashes(rows["text"]), again)))
            found.append(rows if titled else rows.filter(pc.not_equal(rows["text"], "")))
        among = pa.concat_tables(found)
        firsts = among.group_by("text").aggregate([("doc_id", "min")])
        self.ids = among["doc_id"].combine_chunks()
        place = pc.index_in(among["text"], value_set=firsts["text"].combine_chunks())
        self.firsts = firsts["doc_id_min"].take(place).combine_chunks()

    def first(self, ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """For each id, the one that stands for it; an id that is not in the corpus stands for itself."""
        place = pc.index_in(ids, value_set=self.ids).combine_chunks()
        return pa.chunked_array([pc.coalesce(self.firsts.take(place), ids.combine_chunks())], tables.TEXT)

    def require(self, ids: pa.ChunkedArray) -> None:
        """Raises AssertionError where an id is not in the corpus."""
        missing = ids.filter(pa.array(~np.isin(_hashes(ids), self.known)))
        assert not len(missing), (
            f"{len(missing)} passages are not in {self.corpus.path}, such as {missing[0].as_py()!r}"
        )


class Positives:
    """The relevant passages of a query, and of all queries that say the same."""

    def __init__(self, queries: Artifact) -> None:
        texts = _recurring(_hashes(tables.fold_texts(part["text"])) for part in queries.scan("queries", ["text"]))
        # a query may have passages in several parts
        apart = _recurring(np.unique(_hashes(part["query_id"])) for part in queries.scan("qrels", ["query_id"]))
        self.said: dict[str, str] = {}
        for part in queries.scan("queries", ["query_id", "text"]) if len(texts) or len(apart) else ():
            said = pa.table({"query_id": part["query_id"], "text": tables.fold_texts(part["text"])})
            again = np.isin(_hashes(said["text"]), texts) | np.isin(_hashes(said["query_id"]), apart)
            self.said.update(zip(*(column.to_pylist() for column in said.filter(pa.array(again)).columns), strict=True))
        self.passages: dict[str, set[str]] = {}
        for part in queries.scan("qrels", ["query_id", "doc_id", "relevance"]) if self.said else ():
            rows = tables.relevant(part)
            for query_id, doc_id in zip(*(rows[name].to_pylist() for name in ("query_id", "doc_id")), strict=True):
                if query_id in self.said:
                    self.passages.setdefault(self.said[query_id], set()).add(doc_id)

    def of(self, qrels: pa.Table) -> dict[str, set[str]]:
        """Query id -> passages, for the queries of some relevant ``qrels``."""
        found: dict[str, set[str]] = {}
        for query_id, doc_id in zip(*(qrels[name].to_pylist() for name in ("query_id", "doc_id")), strict=True):
            found.setdefault(query_id, set()).add(doc_id)
        # queries that say the same have one set, which holds their own: many sets of as many would be a square
        return {key: self.passages.get(self.said[key], own) if key in self.said else own for key, own in found.items()}


def _hashes(texts: pa.ChunkedArray) -> Hashes:
    # equal texts have equal hashes within one process, which is all that is asked of them
    return np.fromiter(map(hash, texts.to_pylist()), np.int64, len(texts))


def _all(parts: Iterable[Hashes]) -> Hashes:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _recurring(parts: Iterable[Hashes]) -> Hashes:
    values, times = np.unique(_all(parts), return_counts=True)
    return values[times > 1]
