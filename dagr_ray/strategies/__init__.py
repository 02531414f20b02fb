"""What to ask: a strategy turns a passage into a prompt and a completion into queries. Pure; one file each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from dagr_ray.config import Config


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


class Strategy(Config):
    """Base of the strategies. ``version`` changes with the prompt, ``parse_version`` with the parser alone.

    ``reads`` is the table that holds what is asked about: passages (``corpus``), or ``pairs`` of a passage with a query or
    another passage. ``writes`` says what the texts of ``parse`` are: ``queries`` that the passage answers, ``passages``
    that answer the query, ``negatives`` that do not, or ``triples`` (query, positive, negative in turn).
    """

    abstract: ClassVar[bool] = True
    parse_version: ClassVar[int] = 1
    by_logprob: ClassVar[bool] = False  # its completions are chosen by their log-probability, so that is kept
    reads: ClassVar[str] = "corpus"
    writes: ClassVar[str] = "queries"

    def name(self) -> str:
        """What ``lineage`` calls it: the type, and after a slash the form where it has several."""
        return self.type

    def asked(self) -> tuple[Strategy, ...]:
        """The strategies that each passage is asked with, in this order: itself, unless it is made of several."""
        return (self,)

    def draws(self) -> bool:
        """Whether each sample of a passage has a prompt of its own; else all share one, which is cheaper."""
        return False

    def drawn(self, rng: random.Random, samples: int) -> Sequence[Strategy]:
        """The strategy that asks for each of a passage's samples, and reads its answer: drawn where there are several."""
        return [self] * samples

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """The prompt for a passage; the same for the same row, exemplars and seed. Corpus text never becomes structure."""
        raise NotImplementedError

    def parse(self, row: Passage, raw: str) -> Parsed:
        """Queries out of a raw completion. Never raises on any text; an unusable completion is a rejection."""
        raise NotImplementedError
