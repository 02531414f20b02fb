"""A hypothetical passage for a query: it looks like an answer, but may not be true."""

from __future__ import annotations

from typing import ClassVar

from dagr_ray.strategies._rewriting import FewShot, Rewriting

_FEW_SHOT = FewShot(
    ("Query",),
    "Passage",
    (
        {
            "Query": "how long do honey bees live",
            "Passage": "A worker bee that hatches in summer lives for about six weeks. Bees of the winter cluster live for "
            "four to six months, because they do not fly out, and a queen can reach five years.",
        },
        {
            "Query": "overwrite existing file when renaming",
            "Passage": "os.replace renames a file or directory. If the target exists and is a file, it is replaced silently, "
            "and the operation is atomic on POSIX systems.",
        },
        {
            "Query": "refund for a cancelled train",
            "Passage": "If your train is cancelled and you decide not to travel, you can claim the full price of the unused "
            "ticket within 28 days, at the ticket office or with the form on our website.",
        },
    ),
    least_words=6,
)


class Hyde(Rewriting):
    """A hypothetical document that answers the query (Gao et al. 2022, arXiv 2212.10496).

    HyDE encodes the document in place of the query. Here the document is a positive passage of the query, so a retriever
    can be trained on queries without known passages. The model invents its facts.

    >>> import random
    >>> from dagr_ray.strategies import Passage
    >>> row = Passage("q1", "", "", query="how to copy a folder")
    >>> Hyde().prompt(row, (), random.Random(0)).text.splitlines()[-2:]
    ['Query: how to copy a folder', 'Passage:']
    >>> Hyde().parse(row, " Use copytree to copy a directory with all that is in it.\\nQuery: x").kept
    ['Use copytree to copy a directory with all that is in it.']
    >>> Hyde().parse(row, " copytree").rejected
    [('too-short', 'copytree')]
    """

    abstract: ClassVar[bool] = False
    writes: ClassVar[str] = "passages"
    task: str = "Each query is followed by a passage that answers it in two or three sentences."

    def few_shot(self) -> FewShot:
        return _FEW_SHOT
