"""Queries of a described searcher."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.config import Config
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies import Strategy
from dagr_ray.strategies._one_query import OneQuery, one_query

Words = Annotated[str, Field(min_length=1, max_length=200)]


class Searcher(Config):
    """A described searcher: profession, skill in the subject, and goal.

    >>> Searcher(profession="nurse", skill="new to this", goal="wants a quick answer").text()
    'nurse, new to this, wants a quick answer'
    """

    abstract: ClassVar[bool] = True  # not a plugin: a value inside strategies
    profession: Words
    skill: Words
    goal: Words

    def text(self) -> str:
        return " ".join(f"{self.profession}, {self.skill}, {self.goal}".split())


def _searchers(*rows: tuple[str, str, str]) -> tuple[Searcher, ...]:
    return tuple(Searcher(profession=a, skill=b, goal=c) for a, b, c in rows)


# Each may be paired with any passage: skill and goal describe how a person asks, not about what.
PERSONAS = _searchers(
    ("software engineer", "expert in the field", "looks up one exact detail"),
    ("student", "first week of the course", "does not know the right terms yet"),
    ("support agent", "knows the basics", "has a customer waiting on the phone"),
    ("journalist", "no background", "checks a fact before it is printed"),
    ("nurse", "practical experience", "needs a safe answer quickly"),
    ("teacher", "knows the matter well", "looks for a simple way to explain it"),
    ("lawyer", "reads every word", "looks for the exact conditions and exceptions"),
    ("retired hobbyist", "self-taught", "wants to do it at home"),
    ("data analyst", "advanced user", "compares two ways to do the same thing"),
    ("small business owner", "in a hurry", "wants to know what it costs or takes"),
    ("researcher", "specialist", "looks for evidence and numbers"),
    ("parent", "worried beginner", "asks in everyday words"),
    ("technician", "hands-on", "has something that does not work"),
    ("manager", "broad overview only", "needs a summary to decide"),
    ("tester", "sceptical", "looks for limits and odd cases"),
    ("translator", "careful with words", "wants to know what a term means"),
)
# Two searchers for each passage, so that the model sees that the query depends on the searcher.
EXAMPLES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "os.replace Rename a file or directory. If the target exists and is a file, it is replaced silently. The "
        "operation fails with an OSError when source and target are on different file systems.",
        (
            (
                "student, first week of the course, does not know the right terms yet",
                "python swap old file for new one",
            ),
            (
                "administrator, expert in the field, looks for limits",
                "os.replace OSError across different file systems",
            ),
        ),
    ),
    (
        "Adults with a mild sprain should rest the ankle for two days and cool it for 15 minutes several times a day. "
        "See a doctor if you cannot put weight on it or if the swelling does not go down within a week.",
        (
            ("runner, in a hurry, wants to know how long it takes", "when can I run again after a mild ankle sprain"),
            ("coach, practical experience, needs a safe answer", "signs that a sprained ankle needs a doctor"),
        ),
    ),
    (
        "Lake Baikal in southern Siberia is the deepest lake in the world, reaching 1,642 metres. It holds about a "
        "fifth of the unfrozen fresh water on the surface of the Earth.",
        (
            ("journalist, no background, checks a fact", "is lake baikal really the deepest lake in the world"),
            ("geographer, specialist, looks for numbers", "share of earth's surface fresh water held by lake baikal"),
        ),
    ),
)
_EXAMPLE_QUERIES = frozenset(query.casefold() for _, searches in EXAMPLES for _, query in searches)


class Persona(OneQuery):
    """A query by a searcher with a profession, a skill and a goal, chosen at random for each sample.

    Personas diversify what a model writes (Persona Hub: Ge et al. 2024, arXiv 2406.20094, section 2). The samples of a
    passage have different searchers until the list is used up, and every searcher is equally likely. Lineage names
    the profession: ``persona/nurse``.

    The searcher comes before the passage, after the examples that all prompts share. When it came after the passage, a
    model of 135M parameters wrote about the searcher: 24 % of its queries shared a word with their passage, against
    53 % in this order. The cost is that the engine recomputes the passage for each sample.

    >>> row = Passage("d1", "shutil.copytree", "Recursively copy a directory tree.")
    >>> first, second = Persona().strategies_for(random.Random(0), 2)
    >>> first.name(), second.name()
    ('persona/technician', 'persona/translator')
    >>> print(first.prompt(row, (), random.Random(0)).text.rpartition("\\n\\n")[2])
    Searcher: technician, hands-on, has something that does not work
    Passage: shutil.copytree Recursively copy a directory tree.
    Query:
    >>> first.parse(row, ' "does copytree follow symbolic links"').kept
    ['does copytree follow symbolic links']
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2
    personas: Annotated[tuple[Searcher, ...], Field(min_length=1)] = PERSONAS

    def name(self) -> str:
        if len(self.personas) > 1:
            return self.type
        return f"{self.type}/{re.sub(r'[^a-z0-9]+', '-', self.personas[0].profession.casefold()).strip('-')}"

    def per_sample(self) -> bool:
        return len(self.personas) > 1

    def strategies_for(self, rng: random.Random, samples: int) -> Sequence[Strategy]:
        """A searcher for each sample. None is used again before all others have been used."""
        if not self.per_sample():
            return [self] * samples
        searchers: list[Searcher] = []
        while len(searchers) < samples:
            searchers += rng.sample(self.personas, min(len(self.personas), samples - len(searchers)))
        return [self.model_copy(update={"personas": (searcher,)}) for searcher in searchers]

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """Examples, the searcher, the passage. Ignores ``exemplars``, because their searchers are unknown."""
        if self.per_sample():
            [strategy] = self.strategies_for(rng, 1)
            return strategy.prompt(row, exemplars, rng)
        parts = [
            f"Searcher: {searcher}\nPassage: {passage}\nQuery: {query}"
            for passage, searches in EXAMPLES
            for searcher, query in searches
        ]
        passage = " ".join(tables.passage_text(row.title, row.text).split())
        before = "\n\n".join(["What different people type to find a passage.", *parts, "Searcher: "])
        searcher = f"{self.personas[0].text()}\nPassage: "
        return Prompt(before, searcher + passage, f"{self.controls.prompt_line()}\nQuery:", stop=("\n",))

    def parse(self, row: Passage, raw: str) -> Parsed:
        """The first line with text."""
        return one_query(raw, _EXAMPLE_QUERIES)
