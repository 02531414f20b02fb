"""Engines: each turns prompts into completions. One file each; models are opened on the worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

from pydantic import Field

from dagr_ray.core.config import Config, ConfigError, OmitWhenDefault
from dagr_ray.core.placement import Pool, PricedEngine
from dagr_ray.prompts import Prompt


class Sampling(Config):
    """The sampling of completions. Defaults are Promptagator's (arXiv 2209.11755): temperature 0.7.

    ``logprob`` records the mean log-probability of each completion. An engine computes it over the whole vocabulary at
    every token, which took 5 % of vLLM's time with a small model on a CPU, so it is only done if a stage reads it.
    """

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = 32
    logprob: Annotated[bool, OmitWhenDefault()] = False


@dataclass
class Completion:
    """One sample of one prompt. If the engine could not answer, ``error`` is set and ``raw`` is None.

    ``logprob`` is the mean natural log-probability of the completion's tokens under the model at temperature 1; None if
    there is no model, the engine does not report it, or it was not requested (``Sampling.logprob``).
    """

    raw: str | None
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    truncated: bool = False
    error: str | None = None
    logprob: float | None = None
    own_prompt: bool = False  # the sample had its own request, whose prompt was billed again
    retries: int = 0
    failed_prompt_tokens: int = 0  # at most so many were billed for attempts without an answer
    failed_completion_tokens: int = 0


def token_usage(answers: Sequence[Sequence[Completion]]) -> dict[str, int]:
    """The billed tokens of answers (the samples of each prompt). A prompt counts once for each request that sent it.

    >>> one = Completion("a", "stop", prompt_tokens=10, cached_tokens=0, completion_tokens=2)
    >>> token_usage([[one, one]])["prompt_tokens"]
    10
    >>> other = Completion("a", "stop", 10, 8, 2, own_prompt=True, retries=1)
    >>> token_usage([[other, other]])
    {'prompt_tokens': 20, 'cached_tokens': 16, 'completion_tokens': 4, 'retries': 2}
    """
    prompts = [c for answer in answers for i, c in enumerate(answer) if i == 0 or c.own_prompt]
    samples = [c for answer in answers for c in answer]
    usage = {name: sum(getattr(c, name) for c in prompts) for name in ("prompt_tokens", "cached_tokens")}
    usage["completion_tokens"] = sum(c.completion_tokens for c in samples)
    rest = {
        n: sum(getattr(c, n) for c in samples) for n in ("retries", "failed_prompt_tokens", "failed_completion_tokens")
    }
    return usage | {name: value for name, value in rest.items() if value}


class Session(Protocol):
    """An opened engine. Several threads call ``generate`` at once, each with the prompts of its own shard."""

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        """``n`` completions for each prompt, in order. Sample ``i`` of prompt ``j`` has the seed ``seeds[j] + i``."""
        ...

    def close(self) -> None:
        """Ends every process of the engine and frees its memory."""
        ...


class Engine(PricedEngine):
    """Base of the engines. Everything that changes the text (model, dtype, quantisation) is a field.

    ``has_model`` is false if no language model answers: such an engine takes no time to start and has no tokens.
    ``tells_probabilities`` means that its session can return the probabilities of given next tokens.
    """

    abstract: ClassVar[bool] = True
    has_model: ClassVar[bool] = True
    tells_probabilities: ClassVar[bool] = False
    # A server tokenises the prompts, so a special token spelled out in a passage may become a real one.
    reads_markers: ClassVar[bool] = False

    def special_tokens(self) -> frozenset[str]:
        """The special tokens of the model's tokenizer, for an engine that ``reads_markers``; empty if unknown."""
        return frozenset()

    def tunable_folder(self) -> Path:
        """The folder of the model, for a stage that tunes it. Raises ConfigError if the engine has none."""
        raise ConfigError(
            f"engine {self.type!r} has no model here that could be tuned; give vllm with a model's folder"
        )

    def with_model(self, folder: Path) -> Engine:
        """This engine with the model of another folder."""
        raise ConfigError(f"engine {self.type!r} takes no other model; give vllm")

    def open(self, pool: Pool) -> Session:
        """Loads the model in this process (or in its own processes). Raises ConfigError with cause and remedy."""
        raise NotImplementedError

    def model_name(self) -> str:
        """The name of the model in ``lineage``."""
        return self.type

    def check(self, pool: Pool | None = None) -> None:
        """Raises ConfigError, before anything starts, if the engine cannot open (package or model missing).

        With a pool, also checks the pool's settings for this engine.
        """
