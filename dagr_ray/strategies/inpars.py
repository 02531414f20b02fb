"""Three fixed examples and a passage: the prompts of InPars."""

from __future__ import annotations

import random
from typing import ClassVar, Literal, NamedTuple

from dagr_ray.core import tables
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies._one_query import OneQuery, one_query


class Example(NamedTuple):
    """A passage, a query as people type it (bad), and a question that covers the passage's content (good)."""

    passage: str
    good: str
    bad: str


# These replace the paper's three examples, which are passages of MS MARCO.
EXAMPLES = (
    Example(
        "Honey keeps for years because it holds little water and is acid enough to stop most bacteria. Kept in a closed "
        "jar in a dark place it does not spoil, though it may turn cloudy and grainy; warm water makes it liquid again.",
        "Why does honey not spoil for years, and what can be done when it has turned grainy?",
        "how long can you keep honey in a closed jar",
    ),
    Example(
        "Tenants who leave before the end of a fixed lease usually owe the rent until a new tenant is found. The landlord "
        "must make a reasonable effort to let the flat again and may keep the deposit only for rent that is really lost.",
        "How much rent does a tenant owe who moves out before the lease ends, and may the landlord keep the deposit?",
        "what happens if i move out before the end of my lease",
    ),
    Example(
        "The float type holds about 15 decimal digits. Sums of many numbers lose digits when small terms are added to a "
        "large total; math.fsum keeps track of what is lost and returns a result that is rounded once.",
        "How can the sum of many floating-point numbers be computed without losing digits of the small ones?",
        "why is the sum of floats not exact in python",
    ),
)
_EXAMPLE_QUERIES = frozenset(text.casefold() for example in EXAMPLES for text in (example.good, example.bad))


class Inpars(OneQuery):
    """One question with three fixed exemplars (Bonifacio et al. 2022, arXiv 2202.05144, section 3 and appendix).

    ``vanilla`` shows documents with one query each, as people type them. ``gbq`` ("guided by bad questions") calls that
    query the bad question, shows a good question before it, which covers the document's context, and asks for a good
    one. As in the paper, the exemplars are the same for every data set; they are our own, because the paper's are passages
    of MS MARCO. Completions keep their mean log-probability (``logprob`` of ``generations``), by which the paper selects
    10,000 of 100,000 queries.

    >>> row = Passage("d1", "shutil.copytree", "Recursively copy a directory tree.")
    >>> print(Inpars().prompt(row, (), random.Random(0)).text[-76:].strip())
    Document: shutil.copytree Recursively copy a directory tree.
    Relevant Query:
    >>> Inpars(form="gbq").prompt(row, (), random.Random(0)).after
    '\\nGood Question:'
    >>> Inpars(form="gbq").parse(row, " How is a folder copied?\\nBad Question: copy").kept
    ['How is a folder copied?']
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2
    by_logprob: ClassVar[bool] = True
    form: Literal["vanilla", "gbq"] = "vanilla"

    def name(self) -> str:
        return f"{self.type}/{self.form}"

    @property
    def _label(self) -> str:
        return "Good Question" if self.form == "gbq" else "Relevant Query"

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """The paper's prompt. Ignores ``exemplars``, because its own are fixed."""
        parts = []
        for i, example in enumerate(EXAMPLES, 1):
            queries = f"{example.good}\nBad Question: {example.bad}" if self.form == "gbq" else example.bad
            parts.append(f"Example {i}:\nDocument: {example.passage}\n{self._label}: {queries}")
        passage = " ".join(tables.passage_text(row.title, row.text).split())
        before = "\n\n".join([*parts, f"Example {len(EXAMPLES) + 1}:\nDocument: "])
        return Prompt(before, passage, f"{self.controls.prompt_line()}\n{self._label}:", stop=("\n",))

    def parse(self, row: Passage, raw: str) -> Parsed:
        """The first line with text. A bad question in place of a good one is rejected."""
        if self.form == "gbq" and raw.strip().casefold().startswith("bad question"):
            return Parsed(rejected=[("bad-question", raw.strip()[:200])])
        return one_query(raw, _EXAMPLE_QUERIES, self._label)
