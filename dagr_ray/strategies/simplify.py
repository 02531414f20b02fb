"""A passage in plain words."""

from __future__ import annotations

from typing import ClassVar

from dagr_ray.core.words import word_count
from dagr_ray.prompts import Parsed, Passage
from dagr_ray.strategies._rewriting import FewShot, Rewriting

_FEW_SHOT = FewShot(
    ("Passage",),
    "In plain words",
    (
        {
            "Passage": "Adults presenting with a mild sprain should immobilise the ankle for two days and apply cryotherapy "
            "for 15 minutes several times daily.",
            "In plain words": "If you have a mild sprain, keep the ankle still for two days. Cool it for 15 minutes several "
            "times a day.",
        },
        {
            "Passage": "The function raises OSError when source and target reside on different file systems.",
            "In plain words": "It fails with an OSError if the two files are on different disks.",
        },
        {
            "Passage": "Lake Baikal, situated in southern Siberia, comprises approximately one fifth of the world's unfrozen "
            "fresh surface water.",
            "In plain words": "Lake Baikal is in the south of Siberia. It holds about a fifth of the fresh water in the "
            "world's lakes and rivers.",
        },
    ),
    least_words=4,
)


class Simplify(Rewriting):
    """The passage in short sentences and everyday words (reformation in the survey arXiv 2403.02990, section 3).

    It answers the same queries as the passage, so it is a further positive for them.

    >>> import random
    >>> row = Passage("p1", "", "Apis mellifera workers eclosing in summer survive approximately six weeks.")
    >>> Simplify().prompt(row, (), random.Random(0)).text.splitlines()[-1]
    'In plain words:'
    >>> Simplify().parse(row, " Bees that hatch in summer live for about six weeks.").kept
    ['Bees that hatch in summer live for about six weeks.']
    >>> Simplify().parse(row, row.text).rejected[0][0]
    'unchanged'
    """

    abstract: ClassVar[bool] = False
    writes: ClassVar[str] = "passages"
    task: str = "Each passage is followed by the same content in plain words and short sentences."

    def few_shot(self) -> FewShot:
        return _FEW_SHOT

    def check_line(self, row: Passage, line: str) -> Parsed:
        """Rejects a line longer than twice the passage. Plain words need more space, but no other content."""
        if word_count(line) > 2 * max(word_count(row.text), 10):
            return Parsed(rejected=[("too-long", line[:200])])
        return Parsed(kept=[line])
