"""A passage with one detail changed, so that it no longer answers its query."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import ClassVar

from dagr_ray.core import tables
from dagr_ray.core.words import tokens, unspaced, word_count
from dagr_ray.prompts import Parsed, Passage
from dagr_ray.strategies._rewriting import FewShot, Rewriting, one_line


def changed_span(before: str, after: str) -> tuple[str, str] | None:
    """The span in which two texts differ, as (in the first, in the second); None if they are equal.

    The span goes from the first differing word to the last one.

    >>> changed_span("The lake is 1,642 metres deep.", "The lake is 80 metres deep.")
    ('1,642', '80')
    >>> changed_span("a b c", "a b c") is None
    True
    """
    old, new = tokens(before), tokens(after)
    ops = [op for op in SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if op[0] != "equal"]
    if not ops:
        return None
    between = "" if unspaced(before) else " "
    return between.join(old[ops[0][1] : ops[-1][2]]), between.join(new[ops[0][3] : ops[-1][4]])


_FEW_SHOT = FewShot(
    ("Passage", "Query"),
    "Changed passage",
    (
        {
            "Passage": "Adults with a mild sprain should rest the ankle for two days.",
            "Query": "how long to rest a sprained ankle",
            "Changed passage": "Adults with a mild sprain should rest the wrist for two days.",
        },
        {
            "Passage": "os.replace renames a file; an existing target is replaced silently.",
            "Query": "overwrite existing file when renaming",
            "Changed passage": "os.replace renames a file; an existing target is never replaced.",
        },
        {
            "Passage": "The museum is open on Mondays from 10 to 17.",
            "Query": "is the museum open on mondays",
            "Changed passage": "The museum is open on Sundays from 10 to 17.",
        },
    ),
    least_words=4,
)


class Counterfactual(Rewriting):
    """The passage with one entity, number or attribute changed: a negative with the same words as the positive.

    Source: counterfactual data augmentation, arXiv 1909.12434 (one minimal edit inverts the label). The changed span is
    recorded; an answer that changes over ``max_span`` words, or no word, is rejected.

    >>> import random
    >>> row = Passage("p1", "", "Lake Baikal is 1,642 metres deep.", query="how deep is lake baikal")
    >>> Counterfactual().prompt(row, (), random.Random(0)).text.splitlines()[-2:]
    ['Query: how deep is lake baikal', 'Changed passage:']
    >>> parsed = Counterfactual().parse(row, " Lake Victoria is 1,642 metres deep.")
    >>> parsed.kept, parsed.changes
    (['Lake Victoria is 1,642 metres deep.'], [('Baikal', 'Victoria')])
    >>> Counterfactual().parse(row, "Bees live for six weeks in summer, and for months in winter.").rejected[0][0]
    'more-than-one-change'
    """

    abstract: ClassVar[bool] = False
    writes: ClassVar[str] = "negatives"
    task: str = (
        "Each passage answers the query. The changed passage is the same but for one word, and does not answer it."
    )
    max_span: int = 5

    def few_shot(self) -> FewShot:
        return _FEW_SHOT

    def check_line(self, row: Passage, line: str) -> Parsed:
        """Accepts a line that changes one span of at most ``max_span`` words."""
        span = changed_span(one_line(tables.passage_text(row.title, row.text)), line)
        if span is None:
            return Parsed(rejected=[("unchanged", line[:200])])
        if max(map(word_count, span)) > self.max_span:
            return Parsed(rejected=[("more-than-one-change", line[:200])])
        return Parsed(kept=[line], changes=[span])
