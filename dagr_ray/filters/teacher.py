"""A teacher's score of a query and its source passage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dagr_ray.core.config import ConfigError, Threshold
from dagr_ray.filters import Filter, ScoredQuery, Table


class Teacher(Filter):
    """Rejects a query if a teacher scores its source passage under ``min_score``; keeps the ``top`` or ``top_share`` best.

    Reads the ``scores`` of a teacher's stage; ``scorer`` selects one teacher if the stage has several. ``by`` is the
    ``score`` of the source passage, or its ``margin``: that score minus the best score of the query's other passages,
    negative if the teacher prefers another passage. GPL trains on such margins of a cross-encoder (Wang et al. 2021, arXiv
    2112.07577, section 3); InPars-v2 keeps the 10,000 queries that its reranker scores highest (arXiv 2301.01820). If
    scores compare within a query only, use ``margin``. A query without a score (NaN), or without another passage for its
    margin, is rejected.

    >>> scores = pa.table({"query_id": ["q1", "q1", "q2"], "doc_id": ["d1", "d7", "d2"],
    ...                    "scorer": ["cross-encoder"] * 3, "score": [4.0, 5.5, 2.0]})
    >>> rows = [ScoredQuery("q1", "copy a dict", "d1", ""), ScoredQuery("q2", "sort a list", "d2", "")]
    >>> Teacher().score(rows, scores)
    [4.0, 2.0]
    >>> Teacher(by="margin").score(rows, scores)
    [-1.5, nan]
    >>> Teacher(min_score=3).keep(2.0), Teacher(min_score=3).keep(4.0), Teacher().keep(math.nan)
    ('low-score', None, 'no-score')
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "teacher-score"
    reads: ClassVar[Table] = "scores"
    needs_passage: ClassVar[bool] = False
    by: Literal["score", "margin"] = "score"
    scorer: str | None = None
    min_score: Annotated[float | None, Threshold()] = None
    top: Annotated[Annotated[int, Field(ge=1)] | None, Threshold()] = None
    top_share: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Threshold()] = None

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        assert search is not None, "teacher-score needs the scores of a teacher"
        scorers = sorted(search["scorer"].unique().to_pylist())
        if self.scorer is not None:
            search = search.filter(pc.equal(search["scorer"], self.scorer))
        if (self.scorer is None and len(scorers) > 1) or (self.scorer is not None and scorers and not len(search)):
            raise ConfigError(f"{self.type}: scorer = {self.scorer!r}; allowed: {', '.join(scorers)}")
        of_query: dict[str, dict[str, float]] = {}
        for query_id, doc_id, score in zip(
            *(search[n].to_pylist() for n in ("query_id", "doc_id", "score")), strict=True
        ):
            of_query.setdefault(query_id, {})[doc_id] = score
        return [self._value(of_query.get(row.query_id, {}), row.doc_id) for row in rows]

    def _value(self, scores: dict[str, float], doc_id: str) -> float:
        own = scores.get(doc_id, math.nan)
        if self.by == "score":
            return own
        return own - max((score for other, score in scores.items() if other != doc_id), default=math.nan)

    def keep(self, score: float) -> str | None:
        if math.isnan(score):
            return "no-score"
        return "low-score" if self.min_score is not None and score < self.min_score else None

    def quota(self, rows: int) -> int | None:
        limits = [self.top] if self.top is not None else []
        return min(limits + ([round(self.top_share * rows)] if self.top_share is not None else []), default=None)
