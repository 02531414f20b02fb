"""Loops: repeated words or characters, a common failure of small models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

import pyarrow as pa
from pydantic import Field

from dagr_ray.core.config import Threshold
from dagr_ray.core.words import folded
from dagr_ray.filters import Filter, ScoredQuery

MIN_WORDS = 6  # a short query may repeat a word
BLOCK = 4  # the longest block of words that counts as a loop
# Part of a word four times in a row. Repeated digits and signs are a number or a rule, not a loop.
_LOOP = re.compile(r"((?=\S{0,9}[^\W\d_])\S{1,10}?)\1{3,}")
_LONGEST = 2000  # only the first characters are checked


class Repetition(Filter):
    """Rejects a query if at least ``max_share`` of it is repetition. The score is that share.

    The score is the larger of two shares: words that occurred before, of all words (for queries of 6 words or more), and
    characters in parts of words that repeat three times or more. If up to 4 words occur four times in a row, the loop would
    not have ended: the score is 1, whatever else the query has. Gopher's repetition filters measure shares of duplicate
    text (Rae et al. 2021, arXiv 2112.11446, appendix A.1). Holtzman et al. 2019 (arXiv 1904.09751) show that maximising
    likelihood makes models loop.

    >>> texts = ["dict copy dict copy dict copy dict copy", "hahahahahaha", "to be or not to be shakespeare"]
    >>> Repetition().score([ScoredQuery(str(i), text, "d1", "") for i, text in enumerate(texts)], None)
    [1.0, 1.0, 0.2857142857142857]
    >>> Repetition().keep(0.75), Repetition().keep(0.2857142857142857)
    ('repetition', None)
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # reads words of any script, with their marks
    rowwise: ClassVar[bool] = True
    needs_passage: ClassVar[bool] = False
    max_share: Annotated[float, Field(gt=0, le=1), Threshold()] = 0.5

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        return [repeated(row.text) for row in rows]

    def keep(self, score: float) -> str | None:
        return "repetition" if score >= self.max_share else None


def repeated(text: str) -> float:
    """The share of a text that repeats an earlier part of it, in [0, 1]."""
    beginning = text[:_LONGEST]
    words = folded(beginning)
    if _loops(words):
        return 1.0
    repeated_words = 1 - len(set(words)) / len(words) if len(words) >= MIN_WORDS else 0.0
    looped_characters = sum(len(loop.group()) for loop in _LOOP.finditer(beginning))
    return max(repeated_words, looped_characters / max(len(beginning), 1))


def _loops(words: list[str]) -> bool:
    """Whether up to ``BLOCK`` words, not all of them numbers, occur four times in a row."""
    if len(set(words)) == len(words):
        return False
    for size in range(1, BLOCK + 1):
        run = 0
        for i, (word, later) in enumerate(zip(words, words[size:], strict=False)):
            run = run + 1 if word == later else 0
            if run >= 3 * size and not all(map(str.isdigit, words[i - size + 1 : i + 1])):
                return True
    return False
