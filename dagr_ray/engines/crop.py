"""The engine without a model: answers with a sentence of the passage."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from dagr_ray.core import words
from dagr_ray.core.placement import Pool
from dagr_ray.engines import Completion, Engine, Sampling, Session
from dagr_ray.prompts import Prompt


def sentences(text: str, min_words: int = 4, max_words: int = 32) -> list[str]:
    """The sentences of a text in order; longer ones become spans of ``max_words`` words, shorter than ``min_words`` go.

    >>> sentences("Copy a file. Symbolic links are followed, e.g. on Linux and macOS. No.")
    ['Symbolic links are followed, e.g. on Linux and macOS.']
    >>> sentences("Copy a file.")
    ['Copy a file.']
    """
    found: list[str] = []
    short: list[str] = []
    spaced = not words.unspaced(text)
    for sentence in words.sentences(text):
        for span in (
            _spans(sentence.split(), max_words) if spaced else _unspaced_spans(words.pieces(sentence), max_words)
        ):
            whole = " ".join(span) if spaced else "".join(span).rstrip()
            (found if len(span) >= min_words else short).append(whole)
    return found or short


def _spans(pieces: list[str], most: int) -> Iterator[list[str]]:
    for first in range(0, len(pieces), most):
        yield pieces[first : first + most]


def _unspaced_spans(pieces: list[str], most: int) -> Iterator[list[str]]:
    """A text without spaces between words is parted at the last space in reach, where there is one."""
    while len(pieces) > most:
        stop = next((i for i in range(most, most // 2, -1) if pieces[i - 1].endswith(" ")), most)
        yield pieces[:stop]
        pieces = pieces[stop:]
    if pieces:
        yield pieces


class CropEngine(Engine):
    """Answers with a sentence of the passage, no language model: the baseline that every generator has to beat.

    A sentence as query for the rest of its passage is the inverse cloze task (Lee et al. 2019, arXiv 1906.00300);
    drawing it independently of the passage is Contriever's cropping (Izacard et al. 2022, arXiv 2112.09118). Samples of
    one passage are different sentences as long as it has any left.
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # sentences and words of any script
    type: ClassVar[str] = "crop-engine"
    has_model: ClassVar[bool] = False
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
            found = sentences(prompt.passage, self.config.min_words, self.config.max_words) or [""]
            if len(found) > 1:
                dice.seed(seed)
                dice.shuffle(found)
            made.append([Completion(found[i % len(found)], "stop", 0, 0, 0) for i in range(n)])
        return made

    def close(self) -> None:
        pass
