"""The engine without a model: answers with a sentence of the passage."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from dagr_ray.cluster import Pool
from dagr_ray.engines import Completion, Engine, Sampling, Session
from dagr_ray.strategies import Prompt

# A sentence ends at . ! ? with space and no lower-case letter behind it, at CJK stops, and at the end of a paragraph. The
# signs come first, because the search for a set of characters is quick and one for what follows a position is not.
_END = re.compile(r"[.!?。\n](?:(?<=[.!?])[\"')\]]*\s+(?![a-z])|(?<=[。!?])|(?<=\n)\s*\n)")


def sentences(text: str, min_words: int = 4, max_words: int = 32) -> list[str]:
    """The sentences of a text in order; longer ones become spans of ``max_words`` words, shorter than ``min_words`` go.

    >>> sentences("Copy a file. Symbolic links are followed, e.g. on Linux and macOS. No.")
    ['Symbolic links are followed, e.g. on Linux and macOS.']
    >>> sentences("Copy a file.")
    ['Copy a file.']
    """
    return [" ".join(span) for span in _spans(text, min_words, max_words)]


def _spans(text: str, min_words: int, max_words: int) -> list[list[str]]:
    found: list[list[str]] = []
    short: list[list[str]] = []
    for piece in _pieces(text):
        words = piece.split()
        if len(words) <= max_words:
            if words:
                (found if len(words) >= min_words else short).append(words)
            continue
        for i in range(0, len(words), max_words):
            span = words[i : i + max_words]
            (found if len(span) >= min_words else short).append(span)
    return found or short


def _pieces(text: str) -> list[str]:
    made, start = [], 0
    for end in _END.finditer(text):
        first = end.start()
        made.append(text[start : first if text[first] == "\n" else first + 1])
        start = end.end()
    made.append(text[start:])
    return made


class CropEngine(Engine):
    """Answers with a sentence of the passage, no language model: the baseline that every generator has to beat.

    A sentence as query for the rest of its passage is the inverse cloze task (Lee et al. 2019, arXiv 1906.00300);
    drawing it independently of the passage is Contriever's cropping (Izacard et al. 2022, arXiv 2112.09118). Samples of
    one passage are different sentences as long as it has any left.
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "crop-engine"
    min_words: Annotated[int, Field(ge=1)] = 4
    max_words: Annotated[int, Field(ge=2)] = 32

    def open(self, pool: Pool) -> Session:
        return _Session(self)


class _Session:
    def __init__(self, config: CropEngine) -> None:
        self.config = config

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        """Sample ``i`` is sentence ``i`` of an order drawn with the seed; after the last comes the first again."""
        made = []
        dice = random.Random()
        for prompt, seed in zip(prompts, seeds, strict=True):
            if prompt.whole:
                made.append([Completion(prompt.passage, "stop", 0, 0, 0) for _ in range(n)])
                continue
            found = _spans(prompt.passage, self.config.min_words, self.config.max_words) or [[]]
            if len(found) > 1:
                dice.seed(seed)
                dice.shuffle(found)
            drawn = [" ".join(span) for span in found[:n]]
            made.append([Completion(drawn[i % len(drawn)], "stop", 0, 0, 0) for i in range(n)])
        return made

    def close(self) -> None:
        pass
