"""A query that needs two passages."""

from __future__ import annotations

from typing import ClassVar

from dagr_ray.core.words import folded, long
from dagr_ray.prompts import Parsed, Passage
from dagr_ray.strategies._rewriting import FewShot, Rewriting

_FEW_SHOT = FewShot(
    ("Passage", "Second passage"),
    "Query that needs both",
    (
        {
            "Passage": "The Angara is the only river that flows out of Lake Baikal.",
            "Second passage": "Lake Baikal in southern Siberia is the deepest lake in the world, reaching 1,642 metres.",
            "Query that needs both": "which river flows out of the deepest lake in the world",
        },
        {
            "Passage": "shutil.copytree calls copy2 for each file unless copy_function says otherwise.",
            "Second passage": "copy2 copies a file with its metadata, such as the times of its last change.",
            "Query that needs both": "does copytree keep modification times",
        },
        {
            "Passage": "The night train to Vienna leaves from platform 7 of the main station.",
            "Second passage": "Platforms 5 to 9 of the main station are closed for repairs until the end of March.",
            "Query that needs both": "does the night train to vienna run in march",
        },
    ),
    least_words=3,
)


class MultiHop(Rewriting):
    """A query whose answer needs both passages, which a search by embeddings has linked (``LinkedPairs``).

    Two linked passages and one question, as in the construction of HotpotQA (arXiv 1809.09600, section 2). A query is
    rejected if all its words come from one passage. Whether it really needs both, only a reader can decide.

    >>> import random
    >>> row = Passage("p1", "", "The Angara flows out of Baikal.", other="Baikal is the deepest lake.")
    >>> MultiHop().prompt(row, (), random.Random(0)).text.splitlines()[-2:]
    ['Second passage: Baikal is the deepest lake.', 'Query that needs both:']
    >>> MultiHop().parse(row, "river that flows out of the deepest lake").kept
    ['river that flows out of the deepest lake']
    >>> MultiHop().parse(row, "what flows out of the Angara").rejected[0][0]
    'one-passage'
    """

    abstract: ClassVar[bool] = False
    reads_links: ClassVar[bool] = True
    task: str = "Each pair of passages is followed by a search query that can only be answered with both of them."

    def few_shot(self) -> FewShot:
        return _FEW_SHOT

    def check_line(self, row: Passage, line: str) -> Parsed:
        """Accepts a line that shares with each passage a word of four letters or more that the other passage lacks."""
        first, second = (set(folded(text)) for text in self.lines(row))
        query = {word for word in folded(line) if long(word)}
        if not (query & first - second and query & second - first):
            return Parsed(rejected=[("one-passage", line[:200])])
        return Parsed(kept=[line])
