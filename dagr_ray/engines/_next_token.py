"""The log-probabilities of a few given next tokens after a prompt, from a vLLM session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError
from dagr_ray.engines._feeding import Request
from dagr_ray.prompts import Prompt

if TYPE_CHECKING:
    from dagr_ray.engines.vllm import _VLLMSession


@dataclass
class NextToken:
    """The natural log-probability of each choice as the next token, over the whole vocabulary; or an error."""

    logprobs: tuple[float, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    truncated: bool = False
    error: str | None = None


def next_token(session: _VLLMSession, prompts: Sequence[Prompt], choices: Sequence[str]) -> list[NextToken]:
    """For each prompt the log-probabilities of ``choices``, continuations such as " 0" and " 1".

    Each choice must add exactly one token after the tokens that all choices share (a tokenizer may split " 0" into a space
    and a digit); otherwise raises ConfigError. The request samples one token, which is ignored.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    results = [NextToken(()) for _ in prompts]
    requests: list[tuple[int, bool, list[int], Request]] = []
    for i, prompt in enumerate(prompts):
        after, ids = _split(session, prompt.after, choices)
        try:
            tokens, cut = session.encode(prompt, 1, after)
        except ValueError as error:
            results[i].error = str(error)
            continue
        params = SamplingParams(
            temperature=0, max_tokens=1, logprob_token_ids=ids, output_kind=RequestOutputKind.FINAL_ONLY
        )
        requests.append((i, cut, ids, Request(tokens, params)))
    session.feeding.ask([request for _, _, _, request in requests])
    for i, cut, ids, request in requests:
        answer = request.answer
        if isinstance(answer, str):
            results[i].error = answer
            continue
        [position] = answer.outputs[0].logprobs
        values = tuple(float(position[token].logprob) for token in ids)
        results[i] = NextToken(values, len(request.tokens), answer.num_cached_tokens or 0, cut)
    return results


def _split(session: _VLLMSession, after: str, choices: Sequence[str]) -> tuple[list[int], list[int]]:
    """The tokens of the prompt's end and the choices' common beginning, and the one token that each choice adds."""
    sequences = [session.tokenise(after + choice) for choice in choices]
    shared = next((i for i, column in enumerate(zip(*sequences, strict=False)) if len(set(column)) > 1), 0)
    if any(len(tokens) != shared + 1 for tokens in sequences):
        added = {choice: len(tokens) - shared for choice, tokens in zip(choices, sequences, strict=True)}
        raise ConfigError(
            f"vllm: {session.config.model_name()} needs {added} tokens for the choices after "
            f"{tables.clean(after)[-20:]!r}, but each choice must be one token; give other choices, or another model"
        )
    return sequences[0][:shared], [tokens[shared] for tokens in sequences]
