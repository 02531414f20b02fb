"""Aggregates many coarse ratings into one fine ranking: raters with unknown thresholds.

The model is from Villemaud, Sankagiri and Grossglauser 2025 (arXiv 2510.01871): item i has a score x_i, a rater u has
a threshold y_u, and u rates i positively if x_i > y_u. One rater tells little; together they divide the items into ordered
bins, and the order inside a bin is unknown. A rating with several grades counts as several thresholds. Real raters make
mistakes, so the noisy form of the model is fitted, P(positive) = 1 / (1 + exp(-(x_i - y_u))) (Rasch's): with complete
ratings and no mistakes, it orders items by their number of positive ratings, which is the order of the bins.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage

STEPS = 100
PAIRS = 1 << 22  # of items compared at once
PRIOR = 3.0  # standard deviation of scores and thresholds before any rating: 95 % of raters' odds within 1 to 365


@dataclass
class Ranking:
    """The ranking of ``n`` items from ratings. Ranks count from 1, the best.

    ``score`` [n] is the estimate of x_i and ``deviation`` [n] its standard error. ``first`` and ``last`` [n] are the best
    and the worst possible rank of an item: it comes after all items that more raters put above it than below it, and the
    other items may be anywhere. ``threshold`` [raters] is the estimate of y_u.
    """

    score: np.ndarray
    deviation: np.ndarray
    first: np.ndarray
    last: np.ndarray
    threshold: np.ndarray

    def bins(self) -> list[list[int]]:
        """The items from best to worst; items that no rater distinguishes are grouped.

        >>> rank(np.array([[1, 1, 0, 0], [1, 1, 1, 0]], float)).bins()
        [[0, 1], [2], [3]]
        """
        order = sorted(range(len(self.score)), key=lambda i: (self.first[i] + self.last[i], i))
        groups: list[list[int]] = []
        for item in order:
            last = groups[-1][-1] if groups else None
            if last is not None and (self.first[last], self.last[last]) == (self.first[item], self.last[item]):
                groups[-1].append(item)
            else:
                groups.append([item])
        return groups


def rank(ratings: np.ndarray) -> Ranking:
    """Fits ``ratings`` [raters, items], each 1, 0 or NaN (not rated), by the most probable scores and thresholds.

    Alternating Newton steps, with a normal prior of deviation 3 that keeps an item that everybody likes at a finite score.

    >>> np.argsort(-rank(np.array([[1, 0, 0], [1, 1, 0], [np.nan, 1, 0]])).score).tolist()
    [0, 1, 2]
    """
    is_rated = ~np.isnan(ratings)
    likes = np.where(is_rated, ratings, 0.0)
    score, threshold = np.zeros(ratings.shape[1]), np.zeros(ratings.shape[0])
    weight = np.zeros_like(likes)
    for _ in range(STEPS):
        before = score.copy()
        for axis in (0, 1):
            odds = 1 / (1 + np.exp(-(score[None, :] - threshold[:, None])))
            weight = np.where(is_rated, odds * (1 - odds), 0.0)
            gap = np.where(is_rated, likes - odds, 0.0).sum(axis=axis)
            if axis == 0:
                score = score + (gap - score / PRIOR**2) / (weight.sum(axis=0) + 1 / PRIOR**2)
            else:
                threshold = threshold + (-gap - threshold / PRIOR**2) / (weight.sum(axis=1) + 1 / PRIOR**2)
        if np.abs(score - before).max(initial=0.0) < 1e-9:
            break
    above = is_rated.astype(float) * likes
    below = is_rated.astype(float) * (1 - likes)
    n = ratings.shape[1]
    first, last = np.ones(n, np.int64), np.full(n, n)
    step = max(PAIRS // max(n, 1), 1)
    for start in range(0, n, step):  # a matrix of all pairs of items may not fit in memory
        some = slice(start, start + step)
        # [i, j]: raters who like i but not j, minus raters who like j but not i
        net = above[:, some].T @ below - below[:, some].T @ above
        first[some] += (net < 0).sum(axis=1)
        last[some] -= (net > 0).sum(axis=1)
    deviation = 1 / np.sqrt(weight.sum(axis=0) + 1 / PRIOR**2)
    return Ranking(score, deviation, first, last, threshold)


def worth_asking(ratings: np.ndarray, ranking: Ranking, k: int) -> list[tuple[int, int, float]]:
    """Up to ``k`` missing ratings (rater, item, gain) that would tell most, best first.

    The gain is the expected fall of the variance of the item's score over the two answers. An item that is alone in its
    bin needs no further rating. A rater who is equally likely to give either answer tells most, so raters near their
    thresholds come first, as in the paper's search.
    """
    odds = 1 / (1 + np.exp(-(ranking.score[None, :] - ranking.threshold[:, None])))
    information, variance = odds * (1 - odds), ranking.deviation[None, :] ** 2
    gain = variance**2 * information / (1 + variance * information)
    gain = np.where(np.isnan(ratings) & (ranking.first < ranking.last)[None, :], gain, 0.0)
    best = np.argsort(-gain, axis=None, kind="stable")[:k]
    candidates = ((int(i // gain.shape[1]), int(i % gain.shape[1]), float(gain.flat[i])) for i in best)
    return [candidate for candidate in candidates if candidate[2] > 0]


class Aggregate(Stage):
    """One ranking of each query's passages from the scores of several raters, in ``scores``.

    Every scorer in each of ``labels`` is a rater, and so is every person in ``ratings`` (``People``). Grades (up to
    ``levels`` different values) are used as they are; finer scores are divided into ``levels`` of equal numbers of pairs.
    Each step between two levels is an unknown threshold of its own: see this module. Each query is fitted alone, because
    a rater's threshold for relevance depends on the query.

    The scorer ``aggregate`` gives each passage's score, ``aggregate-deviation`` its standard error, and ``ask.json`` the
    ``ask`` missing ratings (rater, query, passage) that would tell most, best first, for people or judges.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("scores",)
    labels: tuple[Stage, ...]
    levels: Annotated[int, Field(ge=2)] = 4
    ask: Annotated[int, Field(ge=0)] = 100

    @model_validator(mode="after")
    def _something_to_join(self) -> Aggregate:
        if not self.labels:
            raise ConfigError("aggregate: labels are empty; give stages that write scores or ratings")
        return self

    def label(self) -> str:
        return f"{len(self.labels)}labels"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            cuts, rated = self._rated([inputs[f"labels.{i}"] for i in range(len(self.labels))])
            rows: list[dict[str, Any]] = []
            asks: list[tuple[float, str, str, str]] = []
            for query_id, of in rated.items():
                docs = list(dict.fromkeys(doc for _, doc in of))
                raters = [(scorer, cut) for scorer, scorer_cuts in cuts.items() for cut in scorer_cuts]
                ratings = np.full((len(raters), len(docs)), np.nan)
                for u, (scorer, cut) in enumerate(raters):
                    for i, doc in enumerate(docs):
                        score = of.get((scorer, doc))
                        ratings[u, i] = np.nan if score is None else score > cut
                ranking = rank(ratings)
                for name, values in (("aggregate", ranking.score), ("aggregate-deviation", ranking.deviation)):
                    rows += [
                        {"query_id": query_id, "doc_id": doc, "scorer": name, "score": float(value)}
                        for doc, value in zip(docs, values, strict=True)
                    ]
                for u, i, gain in worth_asking(ratings, ranking, self.ask):
                    asks.append((gain, raters[u][0], query_id, docs[i]))
                if len(asks) > 100 * (self.ask + 1):
                    asks = self._best_questions(asks)
            questions = self._best_questions(asks)
            names = ("gain", "rater", "query_id", "doc_id")
            folder.write_bytes(
                "ask.json",
                json.dumps([dict(zip(names, question, strict=True)) for question in questions], indent=1).encode(),
            )
            pairs = len(rows) // 2
            counts = {"in": pairs, "out": pairs, "queries": len(rated), "raters": len(cuts), "ask": len(questions)}
            return Output({"scores": tables.table("scores", rows)}, ["ask.json"], counts)

        return run

    def _best_questions(self, asks: list[tuple[float, str, str, str]]) -> list[tuple[float, str, str, str]]:
        """The best of some (gain, rater, query, passage); a rater has several thresholds: of one question the largest gain."""
        unique = {question[1:]: question for question in sorted(asks)}
        return sorted(unique.values(), key=lambda question: (-question[0], question[1:]))[: self.ask]

    def _rated(self, labels: list[Artifact]) -> tuple[dict[str, list[float]], dict[str, dict[tuple[str, str], float]]]:
        """Rater -> its cuts, and query -> (rater, passage) -> score. Raters of one name in two labels are two raters."""
        rated: dict[str, dict[tuple[str, str], float]] = {}
        values: dict[str, list[float]] = {}
        for number, folder in enumerate(labels):
            table = "ratings" if "ratings" in folder.table_names() else "scores"
            columns = ("query_id", "doc_id", *(("who", "grade") if table == "ratings" else ("scorer", "score")))
            rows = folder.read(table, list(columns))
            before = set(values)
            for query_id, doc_id, scorer, score in zip(*(rows[c].to_pylist() for c in columns), strict=True):
                name = f"{scorer}#{number}" if scorer in before else scorer
                rated.setdefault(query_id, {})[name, doc_id] = score
                values.setdefault(name, []).append(score)
        return {name: self._cuts(own) for name, own in values.items()}, rated

    def _cuts(self, values: list[float]) -> list[float]:
        """The cuts between a rater's levels: a rating is positive if it is above the cut."""
        known = sorted(set(values))
        if len(known) <= self.levels:
            return known[:-1]
        shares = np.arange(1, self.levels) / self.levels
        cuts = {float(cut) for cut in np.quantile(np.array(values), shares, method="lower")}
        return sorted(cuts - {known[-1]}) or [known[-2]]
