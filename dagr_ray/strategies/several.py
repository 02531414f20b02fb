"""Several strategies on the same passage, in adjacent requests, so that an engine reads the passage once."""

from __future__ import annotations

import random
from typing import ClassVar

from pydantic import model_validator

from dagr_ray.core.config import ConfigError
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies import Strategy
from dagr_ray.strategies.promptagator import Promptagator

# The query forms that differ most between BEIR's tasks (arXiv 2104.08663, table 1): keywords, questions, needs.
FORMS = (
    Promptagator(task="A few keywords that find this passage in a search engine.", task_last=True),
    Promptagator(task="A question that this passage answers.", task_last=True),
    Promptagator(task="The problem of a person who needs this passage, in their own words.", task_last=True),
)


class Several(Strategy):
    """Prompts for each passage with every one of ``strategies``, ``samples`` times each, in adjacent requests.

    The shared part of the prompts comes first: exemplars, then the passage, then the task (``task_last``). All prompts
    but the first therefore hit the engine's prefix cache (vLLM, arXiv 2309.06180), which keeps a passage for a short
    while only. The lineage of a query names its strategy.

    >>> row = Passage("d1", "shutil.copytree", "Recursively copy a directory tree.")
    >>> first, second, _ = [one.prompt(row, (), random.Random(0)) for one in Several().members()]
    >>> first.before + first.passage == second.before + second.passage, first.after == second.after
    (True, False)
    >>> Several().parse(row, " copy folder with files").kept
    ['copy folder with files']
    """

    abstract: ClassVar[bool] = False
    strategies: tuple[Strategy, ...] = FORMS

    @model_validator(mode="after")
    def _one_kind(self) -> Several:
        if not self.strategies:
            raise ConfigError("several: strategies = () is empty; give at least one strategy")
        kinds = sorted({strategy.writes for strategy in self.strategies})
        if kinds != [self.writes]:
            raise ConfigError(
                f"several: the strategies write {', '.join(kinds)}; give only strategies that write {self.writes}"
            )
        return self

    def members(self) -> tuple[Strategy, ...]:
        return self.strategies

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """The first strategy's prompt."""
        return self.strategies[0].prompt(row, exemplars, rng)

    def parse(self, row: Passage, raw: str) -> Parsed:
        """Parses as the first strategy does; the stage ``Parse`` uses the strategy of each completion."""
        return self.strategies[0].parse(row, raw)
