"""Who answers: an engine turns prompts into completions. One file each; heavy state is opened on the worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from pydantic import Field

from dagr_ray.cluster import Pool
from dagr_ray.config import Config
from dagr_ray.strategies import Prompt


class Sampling(Config):
    """How completions are drawn. Defaults are Promptagator's (arXiv 2209.11755): temperature 0.7."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = 32


@dataclass
class Completion:
    """One sample of one prompt. ``error`` is set where the engine could not answer; then ``raw`` is None."""

    raw: str | None
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    truncated: bool = False
    error: str | None = None


class EngineDied(RuntimeError):
    """The engine is gone and answers nothing any more: it has to be opened again. Says what it died of."""


class Session(Protocol):
    """An opened engine. ``generate`` is called by several threads at once, each with the prompts of its own shard."""

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        """``n`` completions for each prompt, in order; sample ``i`` of a prompt is drawn with seed ``seeds[j] + i``."""
        ...

    def close(self) -> None:
        """Ends every process of the engine and frees its memory."""
        ...


class Engine(Config):
    """Base of the engines. What changes the text (model, dtype, quantisation) is a field."""

    abstract: ClassVar[bool] = True

    def open(self, pool: Pool) -> Session:
        """Loads the model in this process (or in processes of its own). Raises ConfigError naming cause and remedy."""
        raise NotImplementedError

    def model_name(self) -> str:
        """What ``lineage`` calls the model."""
        return self.type

    def check(self) -> None:
        """Raises ConfigError, before anything starts, where the engine could not open (package or model missing)."""
