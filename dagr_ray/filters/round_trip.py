"""The round trip: does a search with the query find the passage that it was written for?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import pyarrow as pa
from pydantic import Field

from dagr_ray import tables
from dagr_ray.config import Threshold
from dagr_ray.filters import Candidate, Filter

ABSENT = 1e6  # the score of a passage that the search did not return: larger than any depth, exact in float32


class RoundTrip(Filter):
    """Refuses a query whose own passage is not among the first ``max_rank`` results; the score is its rank from 1.

    Promptagator (Dai et al. 2022, arXiv 2209.11755, section 3.2) keeps K = 1, which helps 8 of 11 BEIR sets and hurts
    the small corpora NFCorpus and SciFact; so the default here is wider. A passage that is not among the results at all
    scores 1e6, so ``max_rank`` over the depth of the search keeps no more than the depth does.

    >>> search = tables.table("candidates", [
    ...     {"query_id": "q1", "doc_id": "d7", "rank": 1, "score": 9.0},
    ...     {"query_id": "q1", "doc_id": "d1", "rank": 2, "score": 8.0},
    ... ])
    >>> rows = [Candidate("q1", "copy a dict", "d1", ""), Candidate("q2", "sort a list", "d1", "")]
    >>> RoundTrip().score(rows, search)
    [2.0, 1000000.0]
    >>> RoundTrip().keep(2.0), RoundTrip(max_rank=1).keep(2.0), RoundTrip().keep(1e6)
    (None, 'low-rank', 'not-found')
    """

    abstract: ClassVar[bool] = False
    needs_search: ClassVar[bool] = True
    max_rank: Annotated[int, Field(ge=1, lt=ABSENT), Threshold()] = 20

    def score(self, rows: Sequence[Candidate], search: pa.Table | None) -> list[float]:
        assert search is not None, "a round trip needs the results of a search"
        pairs = pa.table(
            {
                "query_id": pa.array([row.query_id for row in rows], tables.TEXT),
                "doc_id": pa.array([row.doc_id for row in rows], tables.TEXT),
                "row": pa.array(range(len(rows)), pa.int64()),
            }
        )
        results = search.select(["query_id", "doc_id", "rank"])
        hits = pairs.join(results, ["query_id", "doc_id"], join_type="inner")
        found = hits.group_by("row").aggregate([("rank", "min")])
        scores = [ABSENT] * len(rows)
        for row, rank in zip(found["row"].to_pylist(), found["rank_min"].to_pylist(), strict=True):
            scores[row] = float(rank)
        return scores

    def keep(self, score: float) -> str | None:
        if score >= ABSENT:
            return "not-found"
        return "low-rank" if score > self.max_rank else None
