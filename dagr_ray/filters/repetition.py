"""Loops: words or characters written over and over, which is how small models end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

import pyarrow as pa
from pydantic import Field

from dagr_ray.core.config import Threshold
from dagr_ray.core.words import folded
from dagr_ray.filters import Candidate, Filter

MIN_WORDS = 6  # a short query may say a word twice
BLOCK = 4  # words of a block that may loop
# A piece of a word four times in a row; one of digits and signs is a number or a rule, not a loop.
_LOOP = re.compile(r"((?=\S{0,9}[^\W\d_])\S{1,10}?)\1{3,}")
_LONGEST = 2000  # characters that are looked at


class Repetition(Filter):
    """Refuses a query of which at least ``max_share`` is a repetition; the score is that share.

    The larger of two: the words that stand there before, of all words (from 6 words on), and the characters of pieces of
    words that follow themselves three times or more. Up to 4 words that stand four times in a row are a loop that would
    not have ended: the score is 1, however long the rest. Shares of duplicate text are the measure of Gopher's
    repetition filters (Rae et al. 2021, arXiv 2112.11446, appendix A.1); that maximising likelihood makes models loop is
    shown by Holtzman et al. 2019 (arXiv 1904.09751).

    >>> texts = ["dict copy dict copy dict copy dict copy", "hahahahahaha", "to be or not to be shakespeare"]
    >>> Repetition().score([Candidate(str(i), text, "d1", "") for i, text in enumerate(texts)], None)
    [1.0, 1.0, 0.2857142857142857]
    >>> Repetition().keep(0.75), Repetition().keep(0.2857142857142857)
    ('repetition', None)
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # words of any script, with their marks
    rowwise: ClassVar[bool] = True
    needs_passage: ClassVar[bool] = False
    max_share: Annotated[float, Field(gt=0, le=1), Threshold()] = 0.5

    def score(self, rows: Sequence[Candidate], search: pa.Table | None) -> list[float]:
        return [repeated(row.text) for row in rows]

    def keep(self, score: float) -> str | None:
        return "repetition" if score >= self.max_share else None


def repeated(text: str) -> float:
    """The share of a text that repeats what stands before it, in [0, 1]."""
    looked_at = text[:_LONGEST]
    found = folded(looked_at)
    if _loops(found):
        return 1.0
    said_again = 1 - len(set(found)) / len(found) if len(found) >= MIN_WORDS else 0.0
    looped = sum(len(loop.group()) for loop in _LOOP.finditer(looked_at))
    return max(said_again, looped / max(len(looked_at), 1))


def _loops(found: list[str]) -> bool:
    """Whether up to ``BLOCK`` words, not all numbers, stand four times in a row."""
    if len(set(found)) == len(found):
        return False
    for size in range(1, BLOCK + 1):
        run = 0
        for i, (one, other) in enumerate(zip(found, found[size:], strict=False)):
            run = run + 1 if one == other else 0
            if run >= 3 * size and not all(map(str.isdigit, found[i - size + 1 : i + 1])):
                return True
    return False
