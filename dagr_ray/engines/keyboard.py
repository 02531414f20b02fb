"""An engine that copies its input with typing errors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from dagr_ray.core.placement import Pool
from dagr_ray.core.words import characters
from dagr_ray.engines import Completion, Engine, Sampling
from dagr_ray.prompts import Prompt

_ROWS = ("1234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm")
_AT = {key: (y, x) for y, row in enumerate(_ROWS) for x, key in enumerate(row)}
# the rows of a keyboard are shifted by about half a key each, so a key touches two keys of the next row
_NEAR = {
    key: "".join(
        k for k, (v, u) in _AT.items() if k != key and abs(v - y) <= 1 and abs(u - x) <= 1 and abs(u - x + v - y) <= 1
    )
    for key, (y, x) in _AT.items()
}


def slip(text: str, rate: float, rng: random.Random) -> str:
    """The text with typing errors: each letter or digit is changed with probability ``rate``, at least one in all.

    An error is a neighbouring key, two swapped letters, an omitted letter or a doubled one: the four kinds of most typing
    errors (Damerau 1964, https://doi.org/10.1145/363958.363994), here in equal shares.

    >>> slip("how long do bees live", 0.01, random.Random(3))
    'how long do bees livee'
    >>> slip("42", 0.0, random.Random(0)) != "42"
    True
    """
    keys = characters(text)
    at = [i for i, key in enumerate(keys) if key[0].isalnum()]
    if not at:
        return text
    hit = {i for i in at if rng.random() < rate} or {rng.choice(at)}
    output: list[str] = []
    i = 0
    while i < len(keys):
        key = keys[i]
        if i not in hit:
            output.append(key)
        else:
            kind = rng.choice(("near", "swap", "drop", "twice"))
            near = _NEAR.get(key.lower(), "")
            if kind == "near" and near:
                typed = rng.choice(near)
                output.append(typed.upper() if key.isupper() else typed)
            elif kind == "swap" and i + 1 < len(keys) and keys[i + 1] not in (key, " "):
                output += [keys[i + 1], key]
                i += 1
            elif kind == "drop" and len(at) > 1:
                pass
            else:
                output += [key, key]
        i += 1
    return "".join(output)


class KeyboardEngine(Engine):
    """Answers with the passage of the prompt, with typing errors in a share ``rate`` of its letters; no language model.

    >>> from dagr_ray.core.ray_pool import Pool
    >>> session = KeyboardEngine(rate=0.05).open(Pool(workers=0))
    >>> [[completion]] = session.generate([Prompt("", "how long do bees live", "")], [3], Sampling(), 1)
    >>> completion.raw != "how long do bees live", completion.completion_tokens
    (True, 0)
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # a letter keeps its marks
    type: ClassVar[str] = "keyboard-engine"
    has_model: ClassVar[bool] = False
    rate: Annotated[float, Field(ge=0, le=1)] = 0.03

    def open(self, pool: Pool) -> _KeyboardSession:
        return _KeyboardSession(self.rate)


class _KeyboardSession:
    def __init__(self, rate: float) -> None:
        self.rate = rate

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        """Sample ``i`` has the errors of seed ``seed + i``."""
        answers = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            typed = [slip(prompt.passage, self.rate, random.Random(seed + i)) for i in range(n)]
            answers.append([Completion(text, "stop", 0, 0, 0) for text in typed])
        return answers

    def close(self) -> None:
        pass
