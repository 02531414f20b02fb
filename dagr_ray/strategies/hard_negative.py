"""A passage that looks relevant to a query and is not."""

from __future__ import annotations

from typing import ClassVar

from dagr_ray.core.words import folded
from dagr_ray.prompts import Parsed, Passage
from dagr_ray.strategies._rewriting import FewShot, Rewriting

_FEW_SHOT = FewShot(
    ("Passage", "Query"),
    "Wrong passage",
    (
        {
            "Passage": "Lake Baikal in southern Siberia is the deepest lake in the world, reaching 1,642 metres.",
            "Query": "how deep is lake baikal",
            "Wrong passage": "Lake Baikal is frozen from January to May, and its ice is thick enough in March for lorries to "
            "cross to Olkhon island.",
        },
        {
            "Passage": "json.loads reads a JSON document from a str, bytes or bytearray instance and returns an object.",
            "Query": "parse json string",
            "Wrong passage": "json.dumps writes an object as a JSON string; with indent set, its elements are printed one to "
            "a line.",
        },
        {
            "Passage": "If your train is cancelled, you can claim the full price of the unused ticket within 28 days.",
            "Query": "refund for a cancelled train",
            "Wrong passage": "A seat reservation can be moved to another train free of charge until ten minutes before "
            "departure, in the app or at a machine.",
        },
    ),
    least_words=6,
)


class HardNegative(Rewriting):
    """A passage of the query's topic that does not answer it ("Don't Retrieve, Generate", arXiv 2504.21015).

    That study found such negatives worse than mined ones; SyNeg (Li et al. 2024, arXiv 2412.17250) found a mixture with
    mined negatives better than either. A teacher that scores them afterwards detects the false negatives. Each sample
    is one negative, so ``samples=n`` writes n of them.

    >>> import random
    >>> row = Passage("p1", "", "Bees of summer live for six weeks.", query="how long do bees live")
    >>> HardNegative().prompt(row, (), random.Random(0)).text.splitlines()[-2:]
    ['Query: how long do bees live', 'Wrong passage:']
    >>> HardNegative().parse(row, "Bees collect nectar and pollen from early spring to autumn.").kept
    ['Bees collect nectar and pollen from early spring to autumn.']
    >>> HardNegative().parse(row, "Bees of summer live for about six weeks.").rejected[0][0]
    'copies-positive'
    """

    abstract: ClassVar[bool] = False
    writes: ClassVar[str] = "negatives"
    task: str = (
        "Each passage answers the query below it. The wrong passage is about the same topic in a similar style, but does "
        "not answer the query."
    )

    def few_shot(self) -> FewShot:
        return _FEW_SHOT

    def check_line(self, row: Passage, line: str) -> Parsed:
        """Rejects a line with over 80 % of its words from the right passage."""
        positive, negative = set(folded(row.text)), folded(line)
        if sum(word in positive for word in negative) > 0.8 * len(negative):
            return Parsed(rejected=[("copies-positive", line[:200])])
        return Parsed(kept=[line])
