"""The same query in other words."""

from __future__ import annotations

from typing import ClassVar

from dagr_ray.strategies._rewriting import FewShot, Rewriting

_FEW_SHOT = FewShot(
    ("Query",),
    "Same in other words",
    (
        {
            "Query": "overwrite existing file when renaming",
            "Same in other words": "rename a file on top of another one",
        },
        {"Query": "how deep is lake baikal", "Same in other words": "depth of baikal in metres"},
        {
            "Query": "does the kettle leak after a few months",
            "Same in other words": "water comes out of kettle, durability",
        },
        {"Query": "refund for a cancelled train", "Same in other words": "get money back when my train does not run"},
        {
            "Query": "how long to rest a sprained ankle",
            "Same in other words": "ankle sprain days until I can walk again",
        },
    ),
)


class Paraphrase(Rewriting):
    """A query with the meaning of another (reformation in the survey arXiv 2403.02990, section 3; same passage).

    Round trips check the meaning: BM25 and a dense search must both find the passage of the original query.
    ``recipes.strategies`` sets up these filters.

    >>> import random
    >>> from dagr_ray.strategies import Passage
    >>> row = Passage("p1", "", "Bees of summer live for six weeks.", query="how long do bees live")
    >>> Paraphrase().prompt(row, (), random.Random(0)).text.splitlines()[-2:]
    ['Query: how long do bees live', 'Same in other words:']
    >>> Paraphrase().parse(row, ' "lifespan of a honey bee"').kept
    ['lifespan of a honey bee']
    >>> Paraphrase().parse(row, "How long do bees live").rejected
    [('unchanged', 'How long do bees live')]
    """

    abstract: ClassVar[bool] = False
    keeps_meaning: ClassVar[bool] = True
    task: str = "Each search query is followed by another one that means the same and uses other words."

    def few_shot(self) -> FewShot:
        return _FEW_SHOT
