"""Validates a server's answers: their size, the types of their values, and plausible numbers.

A server is not trusted: it may be broken, controlled by somebody else, or another program altogether.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import TYPE_CHECKING, Any

from dagr_ray.core import tables
from dagr_ray.engines import Completion

if TYPE_CHECKING:
    import aiohttp

# The longest tokens of known vocabularies are runs of 128 spaces (cl100k, Llama 3); the limit is twice as much.
TOKEN_CHARACTERS = 256
# Bytes of JSON for each requested token, without and with its log-probability, text and offset.
TOKEN_BYTES, LOGPROB_BYTES = 512, 2048
OVERHEAD_BYTES = 131072  # names, identifiers, usage, spaces
TEMPLATE_TOKENS = 512  # tokens that a server may add to a prompt
LOWEST_LOGPROB = -1e4
NO_COMPLETION = "the answer is not a completion in JSON"


class TooLarge(Exception):
    """An answer that is larger than the request allows."""


def size_limit(request: dict[str, Any]) -> int:
    """The most bytes of an answer to a request, after decompression."""
    per_token = LOGPROB_BYTES if "logprobs" in request else TOKEN_BYTES
    return OVERHEAD_BYTES + per_token * request["max_tokens"] * request.get("n", 1)


async def body(response: aiohttp.ClientResponse, most: int) -> bytes:
    """A response's body, decompressed. Raises TooLarge if it has over ``most`` bytes before or after decompression.

    Of an error response, only the beginning is read. Raises ValueError for an unknown or damaged encoding.
    """
    raw = bytearray()
    async for chunk in response.content.iter_any():
        raw += chunk
        if len(raw) > most:
            response.close()
            if response.status < 300:
                raise TooLarge(f"the answer has over {most} bytes, more than the request allows")
            break
    packing = response.headers.get("Content-Encoding", "").strip().lower()
    if packing in ("", "identity"):
        return bytes(raw[:most])
    if packing not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"the answer is encoded as {packing[:40]!r}, which was not requested")
    decompressor = zlib.decompressobj(wbits=47)  # detects gzip's and zlib's formats
    try:
        text = decompressor.decompress(bytes(raw), most + 1)
    except zlib.error:
        raise ValueError(f"the answer is not a complete {packing} stream") from None
    if len(text) > most and response.status < 300:
        raise TooLarge(f"the answer has over {most} bytes after decompression, more than the request allows")
    return text[:most]


def completions(raw: bytes, request: dict[str, Any], most_prompt: int) -> list[Completion] | str:
    """The completions in an answer, or a description of the error. ``most_prompt``: the most tokens of the prompt.

    A missing or invalid count is 0, and counts are capped at the request's limits. Servers report the tokens of all samples
    together; they are divided evenly. Raises TooLarge for a text that ``max_tokens`` cannot produce.
    """
    samples, max_tokens = request.get("n", 1), request["max_tokens"]
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return NO_COMPLETION
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        return NO_COMPLETION
    ordered = _in_order(choices, samples)
    if isinstance(ordered, str):
        return ordered
    texts = [choice["text"] for choice in ordered if isinstance(choice.get("text"), str)]
    if len(texts) < samples:
        return NO_COMPLETION
    longest = max(map(len, texts))
    if longest > max_tokens * TOKEN_CHARACTERS:
        raise TooLarge(f"the answer has {longest} characters, more than max_tokens = {max_tokens} can produce")
    usage = _object(value.get("usage"))
    prompt = _count(usage.get("prompt_tokens"), most_prompt + TEMPLATE_TOKENS)
    cached = _count(_object(usage.get("prompt_tokens_details")).get("cached_tokens"), prompt)
    written = _count(usage.get("completion_tokens"), max_tokens * samples)
    return [
        Completion(
            tables.clean(text),
            _reason(choice.get("finish_reason")),
            prompt,
            cached,
            (written + i) // samples,
            logprob=mean(choice.get("logprobs"), max_tokens),
        )
        for i, (text, choice) in enumerate(zip(texts, ordered, strict=True))
    ]


def _in_order(choices: list[dict[str, Any]], samples: int) -> list[dict[str, Any]] | str:
    """The first ``samples`` choices by their index, or by their position if no choice has an index."""
    indices = [choice.get("index") for choice in choices]
    positions = range(len(choices)) if all(index is None for index in indices) else indices
    if not all(type(position) is int for position in positions) or len(set(positions)) < len(choices):
        return "the answer's choices have no distinct indices"
    by_position = dict(zip(positions, choices, strict=True))
    if not all(position in by_position for position in range(samples)):
        return f"{len(choices)} of {samples} choices are in the answer" if choices else NO_COMPLETION
    return [by_position[position] for position in range(samples)]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any, most: int) -> int:
    return min(value, most) if type(value) is int and value >= 0 else 0  # True is an int, but not a count


def _reason(value: Any) -> str | None:
    return tables.clean(value[:64]) if isinstance(value, str) and value else None


def mean(logprobs: Any, max_tokens: int) -> float | None:
    """The mean of an answer's ``token_logprobs``; None if they are not a list of log-probabilities.

    >>> mean({"token_logprobs": [-1.0, -2.0]}, 8), mean({"token_logprobs": [None]}, 8), mean(None, 8)
    (-1.5, None, None)
    """
    values = _object(logprobs).get("token_logprobs")
    if not isinstance(values, list) or not 0 < len(values) <= max_tokens + 1:  # some servers include the end token
        return None
    # rounding may give values a little over 0
    if not all(type(x) in (int, float) and LOWEST_LOGPROB <= x <= 1e-3 for x in values):
        return None
    return math.fsum(values) / len(values)
