"""What a server's answer may be: as large as what was asked for can be, of the types that it should have, plausible.

A server is not trusted: it may be broken, in somebody else's hands, or another program altogether.
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

# The longest tokens of known vocabularies are runs of 128 spaces (cl100k, Llama 3); twice that leaves room.
TOKEN_CHARACTERS = 256
# Bytes of JSON for each token that was asked for, and with its log-probability, its text and its place beside it.
TOKEN_BYTES, TOLD_BYTES = 512, 2048
BESIDES_BYTES = 131072  # names, identifiers, usage, spaces
TEMPLATE_TOKENS = 512  # which a server may put around a prompt
LOWEST_LOGPROB = -1e4
NO_COMPLETION = "the answer is no completion in JSON"


class TooLarge(Exception):
    """An answer that is larger than what was asked for can be."""


def largest(request: dict[str, Any]) -> int:
    """The bytes that an answer to a request may have, unpacked."""
    each = TOLD_BYTES if "logprobs" in request else TOKEN_BYTES
    return BESIDES_BYTES + each * request["max_tokens"] * request.get("n", 1)


async def body(response: aiohttp.ClientResponse, most: int) -> bytes:
    """A response's body, unpacked. Reads no more than ``most`` bytes, packed or not; raises TooLarge where there are more.

    Of an error, the beginning is enough. Raises ValueError for a packing that is unknown or broken.
    """
    said = bytearray()
    async for chunk in response.content.iter_any():
        said += chunk
        if len(said) > most:
            response.close()
            if response.status < 300:
                raise TooLarge(f"the answer has over {most} bytes, more than what was asked for can have")
            break
    packing = response.headers.get("Content-Encoding", "").strip().lower()
    if packing in ("", "identity"):
        return bytes(said[:most])
    if packing not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"the answer is packed as {packing[:40]!r}, which was not asked for")
    unpacker = zlib.decompressobj(wbits=47)  # finds out whether it is gzip's format or zlib's
    try:
        found = unpacker.decompress(bytes(said), most + 1)
    except zlib.error:
        raise ValueError(f"the answer is no whole {packing}") from None
    if len(found) > most and response.status < 300:
        raise TooLarge(f"the answer has over {most} bytes unpacked, more than what was asked for can have")
    return found[:most]


def completions(raw: bytes, request: dict[str, Any], most_prompt: int) -> list[Completion] | str:
    """The completions in an answer to a request, or what is wrong with it. ``most_prompt``: tokens of its prompt.

    A count that is missing or no number is 0, and none is more than what was asked for. Servers count what they wrote in
    all: it is shared out among several samples. Raises TooLarge for a text that ``max_tokens`` cannot hold.
    """
    samples, max_tokens = request.get("n", 1), request["max_tokens"]
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return NO_COMPLETION
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not all(isinstance(each, dict) for each in choices):
        return NO_COMPLETION
    chosen = _in_order(choices, samples)
    if isinstance(chosen, str):
        return chosen
    texts = [choice["text"] for choice in chosen if isinstance(choice.get("text"), str)]
    if len(texts) < samples:
        return NO_COMPLETION
    longest = max(map(len, texts))
    if longest > max_tokens * TOKEN_CHARACTERS:
        raise TooLarge(f"the answer has {longest} characters, more than max_tokens = {max_tokens} can hold")
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
        for i, (text, choice) in enumerate(zip(texts, chosen, strict=True))
    ]


def _in_order(choices: list[dict[str, Any]], samples: int) -> list[dict[str, Any]] | str:
    """The first ``samples`` choices by their index, or by their place where none has one."""
    given = [choice.get("index") for choice in choices]
    places = range(len(choices)) if all(place is None for place in given) else given
    if not all(type(place) is int for place in places) or len(set(places)) < len(choices):
        return "the answer's choices have no indices of their own"
    by_place = dict(zip(places, choices, strict=True))
    if not all(place in by_place for place in range(samples)):
        return f"{len(choices)} of {samples} choices are in the answer" if choices else NO_COMPLETION
    return [by_place[place] for place in range(samples)]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any, most: int) -> int:
    return min(value, most) if type(value) is int and value >= 0 else 0  # True is an int, and no number of tokens


def _reason(value: Any) -> str | None:
    return tables.clean(value[:64]) if isinstance(value, str) and value else None


def mean(logprobs: Any, max_tokens: int) -> float | None:
    """The mean of an answer's ``token_logprobs``; None where they are no list of log-probabilities, as some servers' are not.

    >>> mean({"token_logprobs": [-1.0, -2.0]}, 8), mean({"token_logprobs": [None]}, 8), mean(None, 8)
    (-1.5, None, None)
    """
    found = _object(logprobs).get("token_logprobs")
    if not isinstance(found, list) or not 0 < len(found) <= max_tokens + 1:  # some tell of the end, too
        return None
    # a little over 0 comes of rounding
    if not all(type(x) in (int, float) and LOWEST_LOGPROB <= x <= 1e-3 for x in found):
        return None
    return math.fsum(found) / len(found)
