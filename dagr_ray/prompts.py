"""What engines and strategies share: passages, exemplars, prompts, and what is read from an answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple


class Passage(NamedTuple):
    """One row of the ``corpus`` table, or of ``pairs``: then with a query that it answers, or a passage linked to it."""

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
    """A prompt in three pieces, so that an engine can cut the passage, and nothing else, to its token budget.

    ``before`` is the same for every row of a stage (instructions and exemplars first), so that its prefill is shared.
    ``whole`` says that the strategy has cut the text itself: the engine without a model answers with the passage as it is.
    """

    before: str
    passage: str
    after: str
    stop: tuple[str, ...] = ()
    whole: bool = False

    @property
    def text(self) -> str:
        return self.before + self.passage + self.after


class Dice(random.Random):
    """``random.Random(seed)`` that is seeded at its first number: most prompts need none, and seeding is slow.

    One object serves many rows in turn:

    >>> dice = Dice()
    >>> dice.thrown(7).sample(range(100), 3) == random.Random(7).sample(range(100), 3)
    True
    """

    _next: int | None = None

    def thrown(self, seed: int) -> Dice:
        """This object, in the state of ``random.Random(seed)``."""
        self._next = seed
        return self

    def _settle(self) -> None:
        if self._next is not None:
            self.seed(self._next)
            self._next = None

    def random(self) -> float:
        """A number in [0, 1)."""
        self._settle()
        return super().random()

    def getrandbits(self, k: int) -> int:
        """A number of ``k`` bits."""
        self._settle()
        return super().getrandbits(k)


@dataclass(slots=True)
class Parsed:
    """What a completion yields: texts that go on, and (reason, detail) for what does not.

    ``changes`` holds (before, after) for each text that changes one span of what it was made from.
    """

    kept: list[str] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    changes: list[tuple[str, str]] = field(default_factory=list)
