"""Fusion of searches, such as BM25 and dense search: a teacher without another model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool
from dagr_ray.retrieval import fusion
from dagr_ray.teachers import Cost, QueryPassage, Scorer, Teacher


class Hybrid(Teacher):
    """Fuses the results of several searches for a passage.

    ``fusion`` ``ranks`` is reciprocal-rank fusion (Cormack et al. 2009, https://doi.org/10.1145/1571941.1572114): the sum
    of weight / (k + rank) over the searches that return the passage. It compares within a query only. ``min-max`` and
    ``z-score`` are the weighted mean of the searches' own scores, each scaled by all hits of the query: the convex
    combination that Bruch et al. (arXiv 2210.11934) find better than ranks if weights can be tuned. A passage that a search
    did not return then counts as that search's worst hit, or as 0 if the search has no hits.

    ``weights`` has one number for each search, in their order; the default is 1 for all.

    >>> from dagr_ray.teachers import SearchHit, ScoreSpread
    >>> hits = [(SearchHit(1, 9.0), SearchHit(2, 0.5)), (SearchHit(2, 4.0), None), (None, SearchHit(1, 0.8))]
    >>> spreads = (ScoreSpread(6.5, 2.5, 4.0, 9.0), ScoreSpread(0.65, 0.15, 0.5, 0.8))
    >>> pairs = [QueryPassage("q1", "a query", doc, "", own, spreads) for doc, own in zip("abc", hits)]
    >>> [round(score, 4) for score in Hybrid().open(Pool()).score(pairs)]
    [0.0325, 0.0161, 0.0164]
    >>> Hybrid(fusion="min-max", weights=(3, 1)).open(Pool()).score(pairs)
    [0.75, 0.0, 0.25]
    """

    abstract: ClassVar[bool] = False
    needs_searches: ClassVar[int] = 1
    fusion: Literal["ranks", "min-max", "z-score"] = "ranks"
    k: Annotated[float, Field(gt=0)] = 60.0
    weights: tuple[Annotated[float, Field(ge=0)], ...] = ()

    def label(self) -> str:
        return "" if self.fusion == "ranks" else self.fusion

    def open(self, pool: Pool) -> Scorer:
        return _Fusion(self)


class _Fusion:
    def __init__(self, config: Hybrid) -> None:
        self.config = config

    def score(self, pairs: Sequence[QueryPassage], cost: Cost | None = None) -> list[float]:
        config = self.config
        searches = len(pairs[0].hits) if pairs else 0
        weights = np.array(config.weights or (1.0,) * searches)
        if pairs and len(weights) != searches:
            raise ConfigError(
                f"hybrid: weights = {config.weights} for {searches} searches; give one for each, in their order"
            )
        hits = [[pair.hits[i] for pair in pairs] for i in range(searches)]
        if config.fusion == "ranks":
            ranks = np.array([[hit.rank if hit else np.inf for hit in own] for own in hits])
            return fusion.reciprocal(ranks, config.k, weights).tolist() if pairs else []
        total = np.zeros(len(pairs))
        for i, own in enumerate(hits):
            # a search without hits for a query scores all of its passages 0
            spreads = np.array([pair.spreads[i] or (0.0, 0.0, 0.0, 0.0) for pair in pairs], float).reshape(-1, 4).T
            scores = np.array([hit.score if hit else np.nan for hit in own])
            total += weights[i] * fusion.scaled(scores, list(spreads), config.fusion)
        return (total / (weights.sum() or 1.0)).tolist()

    def close(self) -> None:
        pass
