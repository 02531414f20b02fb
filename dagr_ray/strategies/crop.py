"""A sentence of the passage as its query: the strategy for the crop engine."""

from __future__ import annotations

import random
from typing import ClassVar

from dagr_ray.strategies import Exemplar, Parsed, Passage, Prompt, Strategy


class Crop(Strategy):
    """Takes the engine's sentence as it is. Source: Contriever's independent cropping (arXiv 2112.09118, section 3.2).

    >>> row = Passage("d1", "shutil.copy", "Copy data and mode bits.  Return the destination.")
    >>> Crop().prompt(row, (), random.Random(0)).text
    'Copy data and mode bits.  Return the destination.'
    >>> Crop().parse(row, "Copy data and mode bits.").kept, Crop().parse(row, " ").rejected
    (['Copy data and mode bits.'], [('empty', '')])
    """

    abstract: ClassVar[bool] = False

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """The text alone: a title as a query would be found by its words."""
        return Prompt("", row.text or row.title, "")

    def parse(self, row: Passage, raw: str) -> Parsed:
        text = " ".join(raw.split())
        if not text:
            return Parsed(rejected=[("empty", "")])
        if not any(c.isalpha() for c in text):
            return Parsed(rejected=[("no-text", text[:200])])
        if len(text.split()) < 2 and text.isascii():
            return Parsed(rejected=[("too-short", text[:200])])
        return Parsed(kept=[text])
