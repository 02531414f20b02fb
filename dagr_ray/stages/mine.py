"""Mines hard negatives: a query's hits besides its own passage, without those that are probably relevant.

``Relabel`` checks them again with a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import zip_longest
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import OmitWhenDefault
from dagr_ray.core.joins import Positives, SearchResults, Twins, rows_beside
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage, derived
from dagr_ray.stages.relabel import _share_of


class Mine(Stage):
    """One example per relevant passage of each selected query, with up to ``negatives`` hard negatives from searches.

    ``searches`` may hold more queries than are selected. Their results are taken in turn (the best of the first, the
    best of the second, the second of the first, ...), each passage and each text once. Never a negative:

    * the positive, a passage with its text, and the positives of other queries with the same text;
    * a passage with a score too close to the positive's. The rules are those of NV-Retriever (arXiv 2407.15831), where
      PercPos at 95 % raised nDCG@10 from 0.541 to 0.586; each applies if it is set. If the search returned the positive:
      a score over ``margin`` times the positive's (TopK-PercPos), or over the positive's minus ``difference``
      (TopK-MarginPos). In any case: a score of at least ``threshold`` (TopK-Abs). The last two are in the scale of the
      searches: use them only with searches of one kind.

    A query without any negative is rejected; one with fewer than ``negatives`` is kept and counted as ``short``.
    ``positive_score`` and ``negative_scores`` are from the first search, null if it did not return the passage.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "mine"
    rows_from: ClassVar[str] = "selected"
    outputs: ClassVar[tuple[str, ...]] = ("examples", "rejected")
    selected: Stage
    corpus: Stage
    searches: tuple[Stage, ...] = ()
    negatives: Annotated[int, Field(ge=0)] = 1
    margin: Annotated[float, Field(gt=0)] | None = 0.95
    difference: Annotated[Annotated[float, Field(ge=0)] | None, OmitWhenDefault()] = None
    threshold: Annotated[float | None, OmitWhenDefault()] = None
    depth: Annotated[int, Field(ge=1)] = 100

    def label(self) -> str:
        return f"{len(self.searches)}x{self.negatives}"

    def size(self, inputs: Inputs) -> int:
        return inputs["selected"].count("qrels")

    @derived("searches.{}.queries")
    def _searched(self) -> list[Stage | None]:
        """The order of these queries tells in which shards of a search the hits are."""
        return [search.shards_of() for search in self.searches]

    def _candidates(self, inputs: Inputs) -> list[SearchResults]:
        names = [f"searches.{i}" for i in range(len(self.searches))]
        return [SearchResults(inputs[name], inputs.get(f"{name}.queries"), inputs["selected"]) for name in names]

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """Whole shards of the queries, small ones joined; all at once if a search is not sharded by queries."""
        selected = inputs["selected"]
        cut = all(f"searches.{i}.queries" in inputs for i in range(len(self.searches)))
        return (selected.ranges("qrels", step) if cut else []) or [(0, selected.count("qrels"))]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        selected, candidates = inputs["selected"], self._candidates(inputs)
        twins = lru_cache(maxsize=1)(lambda: Twins(inputs["corpus"], titled=True))
        positives = lru_cache(maxsize=1)(lambda: Positives(selected))

        def run(start: int, stop: int) -> Output:
            qrels = tables.relevant(selected.slice("qrels", start, stop)).select(["query_id", "doc_id"])
            query_rows = rows_beside(selected, "qrels", "queries", start, stop)
            results = [_Results(search.of(qrels["query_id"], *query_rows), qrels, self.depth) for search in candidates]
            docs_of = positives().of(qrels)
            text_of = _text_of(twins(), results, docs_of)
            # one set for each different set of passages: queries with the same text share it
            texts_of = {id(docs): {text_of[doc_id] for doc_id in docs} for docs in docs_of.values()}
            relevant = {query_id: texts_of[id(docs)] for query_id, docs in docs_of.items()}
            examples, rejected = [], []
            total_close = short = 0
            for query_id, positive_id in zip(*(column.to_pylist() for column in qrels.columns), strict=True):
                lists = [r.of(query_id) for r in results]
                negatives, too_close = self._negatives(lists, text_of, text_of[positive_id], relevant[query_id])
                total_close += too_close
                if not negatives and self.negatives:
                    count = sum(len(search) for search in lists)
                    detail = f"{count} candidates, {too_close} of them too close to the positive"
                    rejected.append({"id": query_id, "by": self.type, "reason": "no-negative", "detail": detail})
                    continue
                short += len(negatives) < self.negatives
                first = {hit.doc_id: hit.score for hit in lists[0]} if lists else {}
                examples.append(
                    {
                        "query_id": query_id,
                        "positive_id": positive_id,
                        "negative_ids": negatives,
                        "positive_score": first.get(positive_id),
                        "negative_scores": [first.get(doc_id) for doc_id in negatives],
                    }
                )
            output = {"examples": tables.table("examples", examples), "rejected": tables.table("rejected", rejected)}
            counts = {
                "in": qrels.num_rows,
                "out": len(examples),
                "rejected": {f"{self.type}/no-negative": len(rejected)} if rejected else {},
                "too_close": total_close,
                "short": short,
            }
            return Output(output, counts=counts)

        return run

    def _negatives(
        self, lists: list[list[_Hit]], text_of: dict[str, str], positive: str, alike: set[str]
    ) -> tuple[list[str], int]:
        """The negatives of one query, and how many candidates the positive-aware rule dropped."""
        close_texts = set()
        for hits in lists:
            positive_score = max((hit.score for hit in hits if text_of[hit.doc_id] == positive), default=None)
            limits = []
            if positive_score is not None and self.margin is not None:
                limits.append(_share_of(positive_score, self.margin))
            if positive_score is not None and self.difference is not None:
                limits.append(positive_score - self.difference)
            if limits:
                close_texts |= {text_of[hit.doc_id] for hit in hits if hit.score > min(limits)}
            if self.threshold is not None:
                close_texts |= {text_of[hit.doc_id] for hit in hits if hit.score >= self.threshold}
        close_texts = {text for text in close_texts if text not in alike}
        chosen: dict[str, str] = {}
        for hit in _in_turn(lists):
            text = text_of[hit.doc_id]
            if len(chosen) == self.negatives:
                break
            if text not in alike and text not in close_texts:
                chosen.setdefault(text, hit.doc_id)
        return list(chosen.values()), len(close_texts)


class _Hit(NamedTuple):
    doc_id: str
    score: float


def _in_turn(lists: list[list[_Hit]]) -> Iterator[_Hit]:
    for hits in zip_longest(*lists):
        yield from (hit for hit in hits if hit is not None)


class _Results:
    """A search's hits by query, best first. Arrow arrays, because a hundred hits per query are many Python objects."""

    def __init__(self, candidates: pa.Table, qrels: pa.Table, depth: int) -> None:
        query_ids = qrels["query_id"].unique()
        mask = pc.and_(pc.is_in(candidates["query_id"], value_set=query_ids), pc.less_equal(candidates["rank"], depth))
        rows = candidates.filter(mask).combine_chunks()
        index = pc.index_in(rows["query_id"], value_set=query_ids).to_numpy()
        order = np.lexsort((rows["rank"].to_numpy(), index))
        self.rows = rows.select(["doc_id", "score"]).take(pa.array(order))
        edges = np.searchsorted(index[order], np.arange(len(query_ids) + 1))
        self.range_of = {q: (edges[i], edges[i + 1]) for i, q in enumerate(query_ids.to_pylist())}

    def of(self, query_id: str) -> list[_Hit]:
        start, stop = self.range_of[query_id]
        part = self.rows.slice(start, stop - start)
        return [_Hit(*row) for row in zip(part["doc_id"].to_pylist(), part["score"].to_pylist(), strict=True)]


def _text_of(twins: Twins, results: list[_Results], positives: dict[str, set[str]]) -> dict[str, str]:
    """Passage id -> representative of its text, for all passages of a shard."""
    positive_ids = pa.array(sorted(set().union(*{id(docs): docs for docs in positives.values()}.values())), tables.TEXT)
    ids = pa.chunked_array([positive_ids, *(r.rows["doc_id"].unique() for r in results)], tables.TEXT).unique()
    all_ids = pa.chunked_array([ids])
    twins.require(all_ids)
    return dict(zip(ids.to_pylist(), twins.first(all_ids).to_pylist(), strict=True))
