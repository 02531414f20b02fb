"""What to ask: a strategy turns a passage into a prompt and a completion into queries. Pure; one file each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from dagr_ray.core.config import Config
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt


class Strategy(Config):
    """Base of the strategies. ``version`` changes with the prompt, ``parse_version`` with the parser alone.

    ``reads`` is the table that holds what is asked about: passages (``corpus``), or ``pairs`` of a passage with a query or
    another passage. ``writes`` says what the texts of ``parse`` are: ``queries`` that the passage answers, ``passages``
    that answer the query, ``negatives`` that do not, or ``triples`` (query, positive, negative in turn).

    The other class variables tell a recipe what else a strategy needs: ``own_engine`` is the type of the engine that
    answers it if no language model does; ``copies_its_passage`` says that a query is a part of its passage by design, so
    that no filter may look for copies and no exemplars are shown; ``writes_whole_queries`` is false if a query may be cut
    anywhere, so that no filter may ask for a whole one; ``keeps_meaning`` asks for a round trip by meaning besides the one
    by words; ``changes_language`` for one by meaning instead; ``reads_links`` for pairs of passages that are linked.
    """

    abstract: ClassVar[bool] = True
    parse_version: ClassVar[int] = 1
    by_logprob: ClassVar[bool] = False  # its completions are chosen by their log-probability, so that is kept
    reads: ClassVar[str] = "corpus"
    writes: ClassVar[str] = "queries"
    own_engine: ClassVar[str] = ""
    copies_its_passage: ClassVar[bool] = False
    writes_whole_queries: ClassVar[bool] = True
    keeps_meaning: ClassVar[bool] = False
    changes_language: ClassVar[bool] = False
    reads_links: ClassVar[bool] = False

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
