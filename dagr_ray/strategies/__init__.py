"""Strategies: each turns a passage into a prompt, and a completion into queries. Pure functions, one file each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from dagr_ray.core.config import Config
from dagr_ray.moved import rename_methods
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt


class Strategy(Config):
    """Base of the strategies. Raise ``version`` when the prompt changes, ``parse_version`` when only the parser changes.

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
    by_logprob: ClassVar[bool] = False  # completions are selected by log-probability, so engines must report it
    reads: ClassVar[str] = "corpus"
    writes: ClassVar[str] = "queries"
    own_engine: ClassVar[str] = ""
    copies_its_passage: ClassVar[bool] = False
    writes_whole_queries: ClassVar[bool] = True
    keeps_meaning: ClassVar[bool] = False
    changes_language: ClassVar[bool] = False
    reads_links: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        rename_methods(cls, {"asked": "members", "draws": "per_sample", "drawn": "strategies_for"})

    def name(self) -> str:
        """The name in ``lineage``: the type, then a slash and the form if the strategy has several forms."""
        return self.type

    def members(self) -> tuple[Strategy, ...]:
        """The strategies that each passage is prompted with, in order: this one, unless it combines several."""
        return (self,)

    def per_sample(self) -> bool:
        """Whether each sample of a passage has its own prompt. A prompt shared by all samples is cheaper."""
        return False

    def strategies_for(self, rng: random.Random, samples: int) -> Sequence[Strategy]:
        """The strategy that prompts for and parses each sample of a passage. If there are several, ``rng`` chooses."""
        return [self] * samples

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """The prompt for a passage, equal for equal row, exemplars and seed. Corpus text must not become structure."""
        raise NotImplementedError

    def parse(self, row: Passage, raw: str) -> Parsed:
        """Extracts queries from a raw completion. Never raises; an unusable completion is a rejection with a reason."""
        raise NotImplementedError
