"""A better query, written from a query and its critique."""

from __future__ import annotations

from typing import ClassVar

from dagr_ray.strategies._rewriting import FewShot, Rewriting

_FEW_SHOT = FewShot(
    ("Passage", "Query", "Problem"),
    "Better query",
    (
        {
            "Passage": "Lake Baikal in southern Siberia is the deepest lake in the world, reaching 1,642 metres.",
            "Query": "what does the passage say",
            "Problem": "names nothing that the passage is about",
            "Better query": "how deep is lake baikal",
        },
        {
            "Passage": "If your train is cancelled, you can claim the full price of the ticket within 28 days.",
            "Query": "how many trains are cancelled each day",
            "Problem": "the passage does not answer it",
            "Better query": "refund for a cancelled train",
        },
        {
            "Passage": "Adults with a mild sprain should rest the ankle for two days and cool it several times a day.",
            "Query": "Adults with a mild sprain should rest the ankle for two days",
            "Problem": "copies the passage word by word",
            "Better query": "how long to rest a sprained ankle",
        },
    ),
)


class Retry(Rewriting):
    """The generator of a refinement loop: a better query than the pair's, given its problem by ``Critique``.

    Source: the loop of generator and evaluator of MetaSynth, arXiv 2510.01523.

    >>> import random
    >>> from dagr_ray.strategies import Passage
    >>> row = Passage("p1", "", "Bees live for six weeks.", query="what are bees", other="too vague")
    >>> Retry().prompt(row, (), random.Random(0)).text.splitlines()[-3:]
    ['Query: what are bees', 'Problem: too vague', 'Better query:']
    >>> Retry().parse(row, "how long do bees live").kept, Retry().parse(row, "what are bees").rejected[0][0]
    (['how long do bees live'], 'unchanged')
    """

    abstract: ClassVar[bool] = False
    task: str = "Each passage has a search query with a problem. A better query for the passage follows."

    def few_shot(self) -> FewShot:
        return _FEW_SHOT
