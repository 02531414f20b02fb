"""Queries that are written more than once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, ClassVar

import pyarrow as pa
from pydantic import Field

from dagr_ray import tables
from dagr_ray.config import Threshold
from dagr_ray.filters import Candidate, Filter, words


class Duplicate(Filter):
    """Keeps ``copies`` of equal queries over the whole stage; the score is a query's place among its equals, from 0.

    Equal means the same words in the same order, whatever their case, spacing and punctuation; ``exact`` means the same
    characters. The place is drawn by the hash of the query's id, so it does not depend on the order of the rows.
    Duplicates of one text weigh it double and, with two positives, make each a false negative of the other; that
    deduplication pays is measured by Lee et al. 2021 (arXiv 2107.06499).

    >>> texts = ["Copy a dict?", "copy  a dict", "list"]
    >>> rows = [Candidate(f"q{i}", text, f"d{i}", "") for i, text in enumerate(texts)]
    >>> scores = Duplicate().score(rows, None)
    >>> sorted(scores[:2]), scores[2], Duplicate(exact=True).score(rows, None)
    ([0.0, 1.0], 0.0, [0.0, 0.0, 0.0])
    >>> Duplicate().keep(0.0), Duplicate().keep(1.0), Duplicate(copies=2).keep(1.0)
    (None, 'duplicate', None)
    """

    abstract: ClassVar[bool] = False
    exact: bool = False
    copies: Annotated[int, Field(ge=1), Threshold()] = 1

    def score(self, rows: Sequence[Candidate], search: pa.Table | None) -> list[float]:
        equals: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            # a text without words (only signs) is compared as it is
            same = row.text if self.exact else " ".join(words(row.text)).casefold() or row.text
            equals[same].append(i)
        scores = [0.0] * len(rows)
        for group in equals.values():
            if len(group) > 1:
                group.sort(key=lambda i: tables.mint("duplicate", rows[i].query_id))
            for place, i in enumerate(group):
                scores[i] = float(place)
        return scores

    def keep(self, score: float) -> str | None:
        return "duplicate" if score >= self.copies else None
