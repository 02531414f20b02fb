"""Several searches of the same queries as one: reciprocal ranks, weighted scores, and weights tuned on judgements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core import tables

Scale = Literal["z-score", "min-max"]
CUT = 10


def reciprocal(ranks: np.ndarray, k: float, weights: np.ndarray) -> np.ndarray:
    """Reciprocal-rank fusion: the sum of weight / (k + rank) over the searches (rows of ``ranks``; inf: not found).

    Source: Cormack et al. 2009, https://doi.org/10.1145/1571941.1572114.
    """
    return (weights[:, None] / (k + ranks)).sum(axis=0)


def scaled(scores: np.ndarray, spread: Sequence[np.ndarray], scale: Scale) -> np.ndarray:
    """Scores of one search, scaled by ``spread``: mean, deviation, lowest and highest of the hits of each score's query.

    NaN is a passage that the search did not find, which has its query's lowest score. With ``min-max`` the only score of a
    query is 1; with ``z-score`` equal scores are all 0.

    >>> two = (np.array([3.0, 3.0]), np.array([1.0, 1.0]), np.array([2.0, 2.0]), np.array([4.0, 4.0]))
    >>> scaled(np.array([4.0, np.nan]), two, "min-max").tolist(), scaled(np.array([4.0, np.nan]), two, "z-score").tolist()
    ([1.0, 0.0], [1.0, -1.0])
    """
    mean, deviation, lowest, highest = spread
    there = ~np.isnan(scores)
    filled = np.where(there, scores, lowest)
    if scale == "min-max":
        wide = highest - lowest
        shares = np.divide(filled - lowest, wide, out=np.ones_like(filled), where=wide != 0)
        return np.where(there, shares, 0.0)
    return np.divide(filled - mean, deviation, out=np.zeros_like(filled), where=deviation != 0)


class Lists:
    """The ``candidates`` of several searches, joined: each (query, passage) once, and what each search says of it."""

    def __init__(self, searches: Sequence[pa.Table]) -> None:
        self.rows = sum(found.num_rows for found in searches)
        whole = pa.concat_tables([tables.empty("candidates"), *searches]).combine_chunks()
        # sorted, so that the numbers of passages have the order of their ids
        self.query_ids, self.doc_ids = (pc.unique(whole[name]).sort() for name in ("query_id", "doc_id"))
        query = pc.index_in(whole["query_id"], value_set=self.query_ids).to_numpy().astype(np.int64)
        doc = pc.index_in(whole["doc_id"], value_set=self.doc_ids).to_numpy().astype(np.int64)
        of = np.repeat(np.arange(len(searches)), [found.num_rows for found in searches])
        pairs, place = np.unique(query * max(len(self.doc_ids), 1) + doc, return_inverse=True)
        self.query, self.doc = np.divmod(pairs, max(len(self.doc_ids), 1))
        # by search and pair; no rank and no score if a search did not return the passage
        self.ranks = np.full((len(searches), len(pairs)), np.inf)
        self.scores = np.full((len(searches), len(pairs)), np.nan)
        self.ranks[of, place] = whole["rank"].to_numpy()
        self.scores[of, place] = whole["score"].to_numpy()

    def reciprocal(self, k: int) -> np.ndarray:
        """The sum of 1 / (k + rank) for each pair."""
        return reciprocal(self.ranks, k, np.ones(len(self.ranks)))

    def weighted(self, weights: Sequence[float], scale: Scale) -> np.ndarray:
        """The weighted mean of the scaled scores for each pair."""
        return np.asarray(weights) @ self.scaled(scale) / sum(weights)

    def scaled(self, scale: Scale) -> np.ndarray:
        """Scores by search and pair, scaled by the hits of search and query; what was not found has the lowest."""
        count, made = len(self.query_ids), np.zeros_like(self.scores)
        for of, scores in enumerate(self.scores):
            there = ~np.isnan(scores)
            query, found = self.query[there], scores[there]
            hits = np.maximum(np.bincount(query, minlength=count), 1)
            lowest, highest = np.full(count, np.inf), np.full(count, -np.inf)
            np.minimum.at(lowest, query, found)
            np.maximum.at(highest, query, found)
            silent = ~np.isfinite(lowest)
            lowest[silent], highest[silent] = 0, 0
            mean = np.bincount(query, found, count) / hits
            deviation = np.sqrt(np.bincount(query, (found - mean[query]) ** 2, count) / hits)
            spread = [each[self.query] for each in (mean, deviation, lowest, highest)]
            made[of] = scaled(scores, spread, scale)
        return made

    def order(self, fused: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs in the order of their fused scores, ``depth`` of each query, ties by falling doc_id; and their ranks."""
        order = np.lexsort((-self.doc, -fused.astype(np.float32), self.query))
        starts = np.searchsorted(self.query[order], np.arange(len(self.query_ids)))
        rank = np.arange(len(order)) - starts[self.query[order]] + 1
        return order[rank <= depth], rank[rank <= depth]

    def ranked(self, fused: np.ndarray, depth: int) -> pa.Table:
        """The ``candidates`` table of fused scores."""
        order, rank = self.order(fused, depth)
        return tables.columns(
            "candidates",
            len(order),
            query_id=self.query_ids.take(pa.array(self.query[order])),
            doc_id=self.doc_ids.take(pa.array(self.doc[order])),
            rank=pa.array(rank, pa.int32()),
            score=pa.array(fused[order], pa.float32()),
        )


def simplex(parts: int, steps: int) -> Iterator[tuple[float, ...]]:
    """All weights of ``parts`` searches that are multiples of 1 / steps and sum to 1.

    >>> list(simplex(2, 2))
    [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    """

    def counts(parts: int, left: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (left,)
            return
        for first in range(left + 1):
            yield from ((first, *rest) for rest in counts(parts - 1, left - first))

    for found in counts(parts, steps):
        yield tuple(n / steps for n in found)


def tune(lists: Lists, qrels: pa.Table, scale: Scale, steps: int) -> tuple[tuple[float, ...], float, list[float]]:
    """The weights of the best mean nDCG@10, that nDCG@10, and those of each search alone.

    Of several that are equally good, those nearest to equal weights: the others are more likely to be so by chance.
    """
    judge = _Judge(lists, qrels)
    scaled = lists.scaled(scale)
    grid = list(simplex(len(scaled), steps))
    values = [judge.ndcg(np.asarray(weights) @ scaled) for weights in grid]
    spread = [float(np.var(weights)) for weights in grid]
    best = min(range(len(grid)), key=lambda i: (-round(values[i], 6), spread[i], grid[i]))
    alone = [values[grid.index(tuple(float(i == j) for j in range(len(scaled))))] for i in range(len(scaled))]
    return grid[best], values[best], alone


class _Judge:
    """nDCG@10 of any order of the joined pairs. Source: Järvelin and Kekäläinen 2002, with gain = relevance as trec_eval."""

    def __init__(self, lists: Lists, qrels: pa.Table) -> None:
        self.lists = lists
        judged = dict[str, dict[str, int]]()
        for query_id, doc_id, relevance in zip(
            *(qrels[n].to_pylist() for n in ("query_id", "doc_id", "relevance")), strict=True
        ):
            judged.setdefault(query_id, {})[doc_id] = max(relevance, 0)
        self.count = max(len(judged), 1)
        discounts = 1 / np.log2(np.arange(2, CUT + 2))
        ideal = {q: sorted(docs.values(), reverse=True)[:CUT] for q, docs in judged.items()}
        best = {q: float(np.dot(gains, discounts[: len(gains)])) for q, gains in ideal.items()}
        ids, docs = lists.query_ids.to_pylist(), lists.doc_ids.to_pylist()
        gains = np.array(
            [judged.get(ids[q], {}).get(docs[d], 0) for q, d in zip(lists.query, lists.doc, strict=True)], float
        )
        best_of = np.array([best.get(query_id) or np.inf for query_id in ids])
        self.gains, self.discounts = gains / best_of[lists.query] if len(gains) else gains, discounts

    def ndcg(self, fused: np.ndarray) -> float:
        """The mean over all judged queries; one without hits has 0."""
        order, rank = self.lists.order(fused, CUT)
        return float((self.gains[order] * self.discounts[rank - 1]).sum() / self.count)
