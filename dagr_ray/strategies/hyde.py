"""A passage for a query: what an answer might look like, whether or not it is true."""

from __future__ import annotations

from typing import ClassVar

from dagr_ray.strategies._rewriting import Form, Rewriting

_FORM = Form(
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

    There it is encoded in the query's place; here it is a positive passage for the query, so a retriever can be tuned
    to queries whose passages nobody has. Its facts are the model's own.

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

    def form(self) -> Form:
        return _FORM
