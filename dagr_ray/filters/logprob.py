"""The log-probability of a query under the model that wrote it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import pyarrow as pa
from pydantic import Field

from dagr_ray.core.config import Threshold
from dagr_ray.filters import Filter, ScoredQuery, Table


class Logprob(Filter):
    """Keeps the ``top`` (or ``top_share``) queries by mean token log-probability, and rejects queries below ``min_logprob``.

    Reads ``generations``. InPars writes 100,000 queries and trains on the 10,000 with the highest mean log-probability
    (Bonifacio et al. 2022, arXiv 2202.05144, section 3). All queries of one completion share its mean. If the engine
    reports no log-probability, the score is NaN and the query is rejected.

    >>> generations = pa.table({"query_id": ["q1", "q2"], "logprob": pa.array([-0.4, None], pa.float32())})
    >>> rows = [ScoredQuery("q1", "copy a dict", "d1", ""), ScoredQuery("q2", "sort a list", "d1", "")]
    >>> [round(score, 3) for score in Logprob().score(rows, generations)]
    [-0.4, nan]
    >>> Logprob().keep(-0.4), Logprob(min_logprob=-0.3).keep(-0.4), Logprob().keep(math.nan)
    (None, 'low-logprob', 'no-logprob')
    """

    abstract: ClassVar[bool] = False
    reads: ClassVar[Table] = "generations"
    rowwise: ClassVar[bool] = True
    needs_passage: ClassVar[bool] = False
    min_logprob: Annotated[Annotated[float, Field(le=0)] | None, Threshold()] = None
    top: Annotated[Annotated[int, Field(ge=1)] | None, Threshold()] = None
    top_share: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Threshold()] = None

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        assert search is not None, "a filter on log-probabilities needs the completions"
        value_of = dict(zip(search["query_id"].to_pylist(), search["logprob"].to_pylist(), strict=True))
        values = (value_of.get(row.query_id) for row in rows)
        return [math.nan if value is None else value for value in values]

    def keep(self, score: float) -> str | None:
        if math.isnan(score):
            return "no-logprob"
        return "low-logprob" if self.min_logprob is not None and score < self.min_logprob else None

    def quota(self, rows: int) -> int | None:
        limits = [self.top] if self.top is not None else []
        return min(limits + ([round(self.top_share * rows)] if self.top_share is not None else []), default=None)
