"""An engine without a model: answers with a sentence of the passage."""

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
    """The sentences of a text in order. Long ones are split into spans of ``max_words`` words, short ones are dropped.

    >>> sentences("Copy a file. Symbolic links are followed, e.g. on Linux and macOS. No.")
    ['Symbolic links are followed, e.g. on Linux and macOS.']
    >>> sentences("Copy a file.")
    ['Copy a file.']
    """
    long_enough: list[str] = []
    short: list[str] = []
    spaced = not words.unspaced(text)
    for sentence in words.sentences(text):
        for span in (
            _spans(sentence.split(), max_words) if spaced else _unspaced_spans(words.pieces(sentence), max_words)
        ):
            text_of_span = " ".join(span) if spaced else "".join(span).rstrip()
            (long_enough if len(span) >= min_words else short).append(text_of_span)
    return long_enough or short


def _spans(pieces: list[str], most: int) -> Iterator[list[str]]:
    for first in range(0, len(pieces), most):
        yield pieces[first : first + most]


def _unspaced_spans(pieces: list[str], most: int) -> Iterator[list[str]]:
    """Splits a text without spaces between words, if possible at the last space in reach."""
    while len(pieces) > most:
        stop = next((i for i in range(most, most // 2, -1) if pieces[i - 1].endswith(" ")), most)
        yield pieces[:stop]
        pieces = pieces[stop:]
    if pieces:
        yield pieces


class CropEngine(Engine):
    """Answers with a sentence of the passage, without a language model: the baseline that every generator must beat.

    A sentence as query for the rest of its passage is the inverse cloze task (Lee et al. 2019, arXiv 1906.00300);
    sampling it independently of the passage is Contriever's cropping (Izacard et al. 2022, arXiv 2112.09118). The samples
    of a passage are different sentences until all sentences are used.
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # sentences and words of any script
    type: ClassVar[str] = "crop-engine"
    has_model: ClassVar[bool] = False
    min_words: Annotated[int, Field(ge=1)] = 4
    max_words: Annotated[int, Field(ge=2)] = 32

    def open(self, pool: Pool) -> Session:
        return _CropSession(self)


class _CropSession:
    def __init__(self, config: CropEngine) -> None:
        self.config = config

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        """Sample ``i`` is sentence ``i`` of the sentences shuffled with the seed; after the last, the first follows."""
        answers = []
        rng = random.Random()
        for prompt, seed in zip(prompts, seeds, strict=True):
            if prompt.is_cut:
                answers.append([Completion(prompt.passage, "stop", 0, 0, 0) for _ in range(n)])
                continue
            choices = sentences(prompt.passage, self.config.min_words, self.config.max_words) or [""]
            if len(choices) > 1:
                rng.seed(seed)
                rng.shuffle(choices)
            answers.append([Completion(choices[i % len(choices)], "stop", 0, 0, 0) for i in range(n)])
        return answers

    def close(self) -> None:
        pass
