"""Queries with typing errors, for the keyboard engine."""

from __future__ import annotations

import random
from typing import ClassVar

from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies import Strategy
from dagr_ray.strategies._rewriting import one_line


class Noisy(Strategy):
    """The pair's query, for ``KeyboardEngine`` to add typing errors (training on them: arXiv 2204.00716, CharacterBERT).

    >>> row = Passage("p1", "", "Bees of summer live for six weeks.", query="how long do bees live")
    >>> Noisy().prompt(row, (), random.Random(0)).text
    'how long do bees live'
    >>> Noisy().parse(row, "how logn do bees live").kept, Noisy().parse(row, "how long do bees live").rejected
    (['how logn do bees live'], [('unchanged', 'how long do bees live')])
    """

    abstract: ClassVar[bool] = False
    reads: ClassVar[str] = "pairs"
    own_engine: ClassVar[str] = "keyboard-engine"

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        return Prompt("", one_line(row.query), "")

    def parse(self, row: Passage, raw: str) -> Parsed:
        text = one_line(raw)
        if not any(c.isalpha() for c in text):
            return Parsed(rejected=[("empty", text[:200])])
        if text == one_line(row.query):
            return Parsed(rejected=[("unchanged", text[:200])])
        return Parsed(kept=[text])
