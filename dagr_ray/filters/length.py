"""Length in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import pyarrow as pa
from pydantic import Field, model_validator

from dagr_ray.core.config import ConfigError, Threshold
from dagr_ray.core.words import words
from dagr_ray.filters import Filter, ScoredQuery


class Length(Filter):
    """Rejects queries of fewer than ``min_words`` or more than ``max_words`` words. The score is the number of words.

    A word-count bound is the first of the heuristics of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A.1), here
    for queries. BEIR's queries have 3 to 20 words on average, but ArguAna's have 193 (Thakur et al. 2021, arXiv
    2104.08663, table 1): raise ``max_words`` for such tasks.

    >>> row = ScoredQuery("q1", "how do I copy a dict", "d1", "Return a shallow copy of the dictionary.")
    >>> Length().score([row], None)
    [6.0]
    >>> Length().keep(6.0), Length(max_words=5).keep(6.0), Length().keep(1.0)
    (None, 'too-long', 'too-short')
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # counts words of any script, with their marks
    rowwise: ClassVar[bool] = True
    needs_passage: ClassVar[bool] = False
    min_words: Annotated[int, Field(ge=1), Threshold()] = 2
    max_words: Annotated[int, Field(ge=1), Threshold()] = 40

    @model_validator(mode="after")
    def _ordered(self) -> Length:
        if self.min_words > self.max_words:
            raise ConfigError(f"length: min_words = {self.min_words} is over max_words = {self.max_words}; swap them")
        return self

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        return [float(len(words(row.text))) for row in rows]

    def keep(self, score: float) -> str | None:
        if score < self.min_words:
            return "too-short"
        return "too-long" if score > self.max_words else None
