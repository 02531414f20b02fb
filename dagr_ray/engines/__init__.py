"""Who answers: an engine turns prompts into completions. One file each; heavy state is opened on the worker."""

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
    """How completions are drawn. Defaults are Promptagator's (arXiv 2209.11755): temperature 0.7.

    ``logprob`` keeps the mean log-probability of each completion. An engine computes it over the whole vocabulary at every
    token, which took vLLM 5 % of its time with a small model on a CPU, so it is only done where something reads it.
    """

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = 32
    logprob: Annotated[bool, OmitWhenDefault()] = False


@dataclass
class Completion:
    """One sample of one prompt. ``error`` is set where the engine could not answer; then ``raw`` is None.

    ``logprob`` is the mean natural log-probability of the completion's tokens, as the model gives it at temperature 1;
    None where there is no model, it does not tell, or it was not asked (``Sampling.logprob``).
    """

    raw: str | None
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    truncated: bool = False
    error: str | None = None
    logprob: float | None = None
    own_prompt: bool = False  # asked in a request for this sample alone: its prompt was paid for again
    retries: int = 0
    failed_prompt_tokens: int = 0  # at most so many were paid for attempts without an answer
    failed_completion_tokens: int = 0


def token_usage(answers: Sequence[Sequence[Completion]]) -> dict[str, int]:
    """The tokens that answers cost, each a prompt's samples. A prompt counts once for each request that held it.

    >>> one = Completion("a", "stop", prompt_tokens=10, cached_tokens=0, completion_tokens=2)
    >>> token_usage([[one, one]])["prompt_tokens"]
    10
    >>> other = Completion("a", "stop", 10, 8, 2, own_prompt=True, retries=1)
    >>> token_usage([[other, other]])
    {'prompt_tokens': 20, 'cached_tokens': 16, 'completion_tokens': 4, 'retries': 2}
    """
    prompts = [c for answer in answers for i, c in enumerate(answer) if i == 0 or c.own_prompt]
    samples = [c for answer in answers for c in answer]
    found = {name: sum(getattr(c, name) for c in prompts) for name in ("prompt_tokens", "cached_tokens")}
    found["completion_tokens"] = sum(c.completion_tokens for c in samples)
    rest = {
        n: sum(getattr(c, n) for c in samples) for n in ("retries", "failed_prompt_tokens", "failed_completion_tokens")
    }
    return found | {name: value for name, value in rest.items() if value}


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


class Engine(PricedEngine):
    """Base of the engines. What changes the text (model, dtype, quantisation) is a field.

    ``has_model`` is false if no language model answers: such an engine takes no time to start and has no tokens.
    ``tells_probabilities`` says that its session gives the probabilities of given next tokens.
    """

    abstract: ClassVar[bool] = True
    has_model: ClassVar[bool] = True
    tells_probabilities: ClassVar[bool] = False
    # Prompts are tokenised elsewhere, where a special token that a passage spells out may become one.
    reads_markers: ClassVar[bool] = False

    def special_tokens(self) -> frozenset[str]:
        """Those of the model's own tokenizer, for an engine that ``reads_markers``; none where it is not known."""
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
        """Loads the model in this process (or in processes of its own). Raises ConfigError naming cause and remedy."""
        raise NotImplementedError

    def model_name(self) -> str:
        """What ``lineage`` calls the model."""
        return self.type

    def check(self, pool: Pool | None = None) -> None:
        """Raises ConfigError, before anything starts, where the engine could not open (package or model missing).

        With a pool, also what is wrong with the pool for this engine.
        """
