"""Queries that are copied out of their passage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import pyarrow as pa
from pydantic import Field

from dagr_ray.config import Threshold
from dagr_ray.filters import Candidate, Filter, words


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    found = [word.casefold() for word in words(text)]
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


class Copied(Filter):
    """Refuses a query of whose word n-grams more than ``max_share`` stand in the passage; the score is that share.

    A copied sentence teaches a retriever to match strings, which BM25 does already. The measure is one minus the share
    of novel n-grams (See et al. 2017, arXiv 1704.04368, figure 6). A query of fewer than ``n`` words scores 0: "eiffel
    tower" is a good query for a passage about it. Leave this filter out for cropped queries, copies by design.

    >>> passage = "The Eiffel Tower is 330 metres tall, about the same height as an 81-storey building."
    >>> texts = ["the eiffel tower is 330 metres tall", "how tall is the eiffel tower", "eiffel tower"]
    >>> Copied().score([Candidate(str(i), text, "d1", passage) for i, text in enumerate(texts)], None)
    [1.0, 0.0, 0.0]
    >>> Copied().keep(1.0), Copied().keep(0.5)
    ('copied', None)
    """

    abstract: ClassVar[bool] = False
    rowwise: ClassVar[bool] = True
    n: Annotated[int, Field(ge=1)] = 4
    max_share: Annotated[float, Field(ge=0, le=1), Threshold()] = 0.8

    def score(self, rows: Sequence[Candidate], search: pa.Table | None) -> list[float]:
        scores, passage, known = [], "", set[tuple[str, ...]]()
        for row in rows:
            asked = _ngrams(row.text, self.n)
            if asked and row.passage != passage:  # queries of one passage mostly stand together
                passage, known = row.passage, set(_ngrams(row.passage, self.n))
            scores.append(sum(gram in known for gram in asked) / len(asked) if asked else 0.0)
        return scores

    def keep(self, score: float) -> str | None:
        return "copied" if score > self.max_share else None
