"""A part of the passage as its query, for the crop engine."""

from __future__ import annotations

import random
from typing import Annotated, ClassVar, Literal

from dagr_ray.core.config import OmitWhenDefault
from dagr_ray.core.words import pieces, word_count
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies import Strategy

# The least and largest share of a text in a span: Contriever's random cropping.
SPAN = (0.05, 0.5)
LEAST_SPAN = 4
# The fewest words of a passage without its sentence, for the sentence to find it.
LEAST_REMAINDER = 8


class Crop(Strategy):
    """Part of a passage as its query, no language model (Contriever: Izacard et al. 2022, arXiv 2112.09118, section 3.2).

    ``sentence`` uses the engine's sentence as it is. ``span`` uses a random run of words, 5 to 50 % of the text, chosen
    independently of its positive: the paper's cropping. ``inverse-cloze`` (Lee et al. 2019, arXiv 1906.00300, section 4)
    removes the sentence from its passage, if at least 8 words remain. The stage ``Cloze`` is the corpus without these
    sentences; training reads the positives from it.

    >>> row = Passage("d1", "shutil.copy", "Copy data and mode bits.  Return the destination.")
    >>> Crop().prompt(row, (), random.Random(0)).text
    'Copy data and mode bits.  Return the destination.'
    >>> Crop().parse(row, "Copy data and mode bits.").kept, Crop().parse(row, " ").rejected
    (['Copy data and mode bits.'], [('empty', '')])
    >>> Crop(mode="span").prompt(row, (), random.Random(0)).text
    'mode bits. Return the'
    >>> Crop(mode="inverse-cloze").parse(row, "Copy data and mode bits.").rejected
    [('nothing-left', 'Copy data and mode bits.')]
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # words of any script
    parse_version: ClassVar[int] = 2  # words of any script
    own_engine: ClassVar[str] = "crop-engine"
    copies_its_passage: ClassVar[bool] = True
    mode: Annotated[Literal["sentence", "span", "inverse-cloze"], OmitWhenDefault()] = "sentence"

    def name(self) -> str:
        return self.type if self.mode == "sentence" else f"{self.type}/{self.mode}"

    def per_sample(self) -> bool:
        return self.mode == "span"

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """Only the text, because a title as query would match by its words. Spans are cut here, sentences by the engine."""
        text = row.text or row.title
        if self.mode != "span":
            return Prompt("", text, "")
        words = pieces(text)
        size = max(round(rng.uniform(*SPAN) * len(words)), LEAST_SPAN)
        first = rng.randint(0, max(len(words) - size, 0))
        return Prompt("", "".join(words[first : first + size]).rstrip(), "", is_cut=True)

    def parse(self, row: Passage, raw: str) -> Parsed:
        text = " ".join(raw.split())
        if not text:
            return Parsed(rejected=[("empty", "")])
        if not any(c.isalpha() for c in text):
            return Parsed(rejected=[("no-text", text[:200])])
        if len(text.split()) < 2 and text.isascii():
            return Parsed(rejected=[("too-short", text[:200])])
        if self.mode == "inverse-cloze" and word_count(without(text, row.text)) < LEAST_REMAINDER:
            return Parsed(rejected=[("nothing-left", text[:200])])
        return Parsed(kept=[text])


def without(sentence: str, text: str) -> str:
    """Removes a sentence from a text and folds white space. A text without the sentence keeps all its words.

    >>> without("Return the destination.", "Copy a file. Return  the destination. Or not.")
    'Copy a file. Or not.'
    """
    folded = " ".join(text.split())
    return " ".join(folded.replace(" ".join(sentence.split()), " ", 1).split())
