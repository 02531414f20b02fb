"""Few-shot prompts: a few passages with queries that people wrote for them, then the passage that needs a query."""

from __future__ import annotations

import random
from typing import Annotated, ClassVar

from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.words import first_words
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies._one_query import OneQuery, one_query

# Used if a data set has no human queries. Four kinds of text and four ways to ask, none from a benchmark.
GENERIC = (
    Exemplar(
        "os.replace Rename a file or directory. If the target exists and is a file, it is replaced silently. The "
        "operation fails with an OSError when source and target are on different file systems.",
        "overwrite existing file when renaming",
    ),
    Exemplar(
        "I bought this kettle in March and it has already started to leak around the base. It boils a litre in under "
        "three minutes and looks great on the counter, but I would not buy it again.",
        "does the kettle leak after a few months",
    ),
    Exemplar(
        "Lake Baikal in southern Siberia is the deepest lake in the world, reaching 1,642 metres. It holds about a "
        "fifth of the unfrozen fresh water on the surface of the Earth.",
        "how deep is lake baikal",
    ),
    Exemplar(
        "Adults with a mild sprain should rest the ankle for two days and cool it for 15 minutes several times a day. "
        "See a doctor if you cannot put weight on it or if the swelling does not go down within a week.",
        "how long to rest a sprained ankle",
    ),
)
_EXAMPLE_QUERIES = {exemplar.query.casefold() for exemplar in GENERIC}


class Promptagator(OneQuery):
    """Queries in the style of a few examples (Dai et al. 2022, arXiv 2209.11755, section 3.1: at most 8 exemplars).

    arXiv 2510.02241 repeats the experiment with open models: 3 billion parameters were about as good as 14 billion.
    Instructions and exemplars come first and are the same for all passages, so engines compute them once. They are over
    128 tokens long, the block size of vLLM's prefix cache on a CPU. White space is folded: a passage on one line cannot
    look like the next part of the prompt.

    >>> row = Passage("d1", "shutil.copytree", "Recursively copy a directory tree and return its destination.")
    >>> prompt = Promptagator().prompt(row, (), random.Random(0))
    >>> prompt.passage, prompt.after
    ('shutil.copytree Recursively copy a directory tree and return its destination.', '\\nQuery:')
    >>> Promptagator().parse(row, ' "how do I copy a folder with everything in it"\\nPassage: ...').kept
    ['how do I copy a folder with everything in it']
    >>> Promptagator().parse(row, "1. Query:").rejected
    [('empty', '1. Query:')]
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # counts words of any script
    task: str = "Each passage is followed by a search query that someone typed to find it."
    max_exemplars: Annotated[int, Field(ge=0, le=8)] = 8
    exemplar_words: Annotated[int, Field(ge=8)] = 60
    task_last: bool = False

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """Task, exemplars (generic ones if there are none), passage. Ignores ``rng``, because the prefix is shared."""
        task = " ".join(self.task.split())
        parts = [] if self.task_last else [task]
        for exemplar in (exemplars or GENERIC)[: self.max_exemplars]:
            passage = first_words(exemplar.passage, self.exemplar_words)
            parts.append(f"Passage:\n{passage}\nQuery: {' '.join(exemplar.query.split())}")
        passage = " ".join(tables.passage_text(row.title, row.text).split())
        after = self.controls.prompt_line() + (f"\n{task}\nQuery:" if self.task_last else "\nQuery:")
        return Prompt("\n\n".join([*parts, "Passage:\n"]), passage, after, stop=("\n",))

    def parse(self, row: Passage, raw: str) -> Parsed:
        """The first line with text, without label, number and quotes."""
        return one_query(raw, _EXAMPLE_QUERIES)
