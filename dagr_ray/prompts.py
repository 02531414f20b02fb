"""Types that engines and strategies share: passages, exemplars, prompts and parsed completions."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple


class Passage(NamedTuple):
    """One row of the ``corpus`` or ``pairs`` table. A pair also has a ``query`` that the passage answers, or another text."""

    doc_id: str
    title: str
    text: str
    query: str = ""
    other: str = ""


class Exemplar(NamedTuple):
    """A passage and a query that a person wrote for it."""

    passage: str
    query: str


class Prompt(NamedTuple):
    """A prompt in three parts, so that an engine can cut only the passage to its token budget.

    ``before`` (instructions and exemplars) is the same for every row of a stage, so that its prefill is shared. If
    ``is_cut``, the strategy has already cut the text, and the engine without a model returns the passage unchanged.
    """

    before: str
    passage: str
    after: str
    stop: tuple[str, ...] = ()
    is_cut: bool = False

    @property
    def text(self) -> str:
        return self.before + self.passage + self.after


class LazyRandom(random.Random):
    """A ``random.Random(seed)`` that seeds itself at its first number. Most prompts need none, and seeding is slow.

    One object serves many rows in turn:

    >>> rng = LazyRandom()
    >>> rng.seeded(7).sample(range(100), 3) == random.Random(7).sample(range(100), 3)
    True
    """

    _next: int | None = None

    def seeded(self, seed: int) -> LazyRandom:
        """Returns this object, in the state of ``random.Random(seed)``."""
        self._next = seed
        return self

    def _seed_now(self) -> None:
        if self._next is not None:
            self.seed(self._next)
            self._next = None

    def random(self) -> float:
        """A number in [0, 1)."""
        self._seed_now()
        return super().random()

    def getrandbits(self, k: int) -> int:
        """A number of ``k`` bits."""
        self._seed_now()
        return super().getrandbits(k)


@dataclass(slots=True)
class Parsed:
    """The result of parsing a completion: accepted texts, and (reason, detail) of each rejection.

    ``changes`` holds (before, after) for each accepted text that changes one span of its source.
    """

    kept: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    changes: list[tuple[str, str]] = field(default_factory=list)
