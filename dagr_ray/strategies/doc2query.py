"""The passage alone, and then its query: for a generator that was tuned to answer so."""

from __future__ import annotations

import random
from typing import Annotated, ClassVar

from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.words import first_words
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies._one_query import OneQuery, one_query


class Doc2Query(OneQuery):
    """A passage and the label of its query, without a task and without examples (Nogueira et al. 2019, arXiv 1904.08375).

    Give it to ``TuneGenerator``, which learns from prompts of this form, and to the ``Generate`` that asks the tuned model.
    A model that was not tuned continues such a prompt with anything. White space is folded, so a passage is one line.

    >>> row = Passage("d1", "shutil.copytree", "Recursively copy a directory tree and return its destination.")
    >>> Doc2Query(max_words=4).prompt(row, (), random.Random(0)).text
    'Passage:\\nshutil.copytree Recursively copy a\\nQuery:'
    >>> Doc2Query().parse(row, " how do I copy a folder").kept
    ['how do I copy a folder']
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "doc2query"
    max_words: Annotated[int, Field(ge=1)] = 130

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """The same for a passage whatever the exemplars and the numbers are."""
        passage = first_words(" ".join(tables.passage_text(row.title, row.text).split()), self.max_words)
        return Prompt("Passage:\n", passage, f"{self.controls.prompt_line()}\nQuery:", stop=("\n",))

    def parse(self, row: Passage, raw: str) -> Parsed:
        """The first line that says something."""
        return one_query(raw, ())
