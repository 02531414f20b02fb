"""What comes next: the log-probabilities of a few given tokens after a prompt, from a vLLM session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError
from dagr_ray.engines._feeding import Request
from dagr_ray.prompts import Prompt

if TYPE_CHECKING:
    from dagr_ray.engines.vllm import _Session


@dataclass
class NextToken:
    """The natural log-probability of each choice as the next token, of the whole vocabulary; or why there is none."""

    logprobs: tuple[float, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    truncated: bool = False
    error: str | None = None


def next_token(session: _Session, prompts: Sequence[Prompt], choices: Sequence[str]) -> list[NextToken]:
    """For each prompt the log-probabilities of ``choices``, texts that follow it such as " 0" and " 1".

    Each choice must add exactly one token of its own after what all share (a tokenizer may make a space and a digit of
    " 0"). Raises ConfigError where they do not. Nothing is sampled from them: the request draws one token, unread.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    found = [NextToken(()) for _ in prompts]
    asked: list[tuple[int, bool, list[int], Request]] = []
    for i, prompt in enumerate(prompts):
        after, ids = _split(session, prompt.after, choices)
        try:
            tokens, cut = session.encode(prompt, 1, after)
        except ValueError as error:
            found[i].error = str(error)
            continue
        params = SamplingParams(
            temperature=0, max_tokens=1, logprob_token_ids=ids, output_kind=RequestOutputKind.FINAL_ONLY
        )
        asked.append((i, cut, ids, Request(tokens, params)))
    session.feeding.ask([request for _, _, _, request in asked])
    for i, cut, ids, request in asked:
        answer = request.answer
        if isinstance(answer, str):
            found[i].error = answer
            continue
        [position] = answer.outputs[0].logprobs
        values = tuple(float(position[token].logprob) for token in ids)
        found[i] = NextToken(values, len(request.tokens), answer.num_cached_tokens or 0, cut)
    return found


def _split(session: _Session, after: str, choices: Sequence[str]) -> tuple[list[int], list[int]]:
    """The tokens of the prompt's end with what all choices begin with, and the one token that each adds."""
    whole = [session.tokenise(after + choice) for choice in choices]
    shared = next((i for i, column in enumerate(zip(*whole, strict=False)) if len(set(column)) > 1), 0)
    if any(len(tokens) != shared + 1 for tokens in whole):
        added = {choice: len(tokens) - shared for choice, tokens in zip(choices, whole, strict=True)}
        raise ConfigError(
            f"vllm: {session.config.model_name()} needs {added} tokens for the choices after "
            f"{tables.clean(after)[-20:]!r}, and each must be one; give other choices, or another model"
        )
    return whole[0][:shared], [tokens[shared] for tokens in whole]
