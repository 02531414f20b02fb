"""Checks that a text looks like a search query at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import pyarrow as pa

from dagr_ray.core.config import Threshold
from dagr_ray.core.words import folded
from dagr_ray.filters import Filter, ScoredQuery

_TAGS = "a|b|br|code|div|em|h[1-6]|i|img|li|ol|p|pre|script|span|strong|table|td|th|tr|ul"
_MARKUP = re.compile(
    rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>"  # HTML by name: list<int> is a query about types
    r"|```|^\s*#{1,6}\s|\]\(https?:"  # Markdown
    r"|\*\*\w[^*\n]*[\w?!.]\*\*(?!\w)"  # bold, but not f(**a, b**2)
    r"|\|[^|\n]*\|[^|\n]*\|",  # a row of a table
    re.IGNORECASE | re.MULTILINE,
)
_LIST = re.compile(r"\n\s*\S|^\s*(?:[-*•–]|\(?\d{1,2}[.)]|\(?[a-d]\))\s+", re.IGNORECASE)
_GENERIC = re.compile(
    r"\b(?:which|what|all|one|any|some|each|none|two) (?:\w+ )?of the (?:following|above|below)\b"
    r"|\b(?:the|these|this) (?:following|above|below) (?:\w+ )?(?:sentences?|statements?|passages?|texts?|paragraphs?"
    r"|words?|phrases?|questions?|options?|answers?|queries|query|examples?)\b"
    r"|\b(?:in|of|from|by|to|about|does|is|the) (?:the|this|that) (?:given )?(?:passage|paragraph|excerpt|snippet"
    r"|text above|above text|above passage)\b"
    r"|\b(?:in|from|of|by|about|does|is) (?:this|that) (?:article|text|document)\b"
    r"|^\W*(?:this|the) (?:passage|paragraph|excerpt|article|text)\b"
    r"|\baccording to (?:the|this) (?:passage|text|article|document|author|paragraph|above)\b"
    r"|\b(?:main|central|primary) (?:idea|topic|theme|point|purpose|message) (?:of|in) (?:the|this) "
    r"(?:passage|text|article|document|author|paragraph|story|sentence)\b"
    r"|\bthe author(?:'s)?\b"
    r"|\b(?:fill in the blanks?|true or false|choose the (?:best|correct|right)|best (?:describes|summari[sz]es) the)\b"
    r"|\b(?:correct|right|best|relevant) (?:answer|option|choice|query|question) (?:to|for|of) (?:the|this|these) "
    r"(?:above|below|following|passage|query|questions?|text)\b"
    r"|\bwhat (?:is|are|was) (?:the|a|your) (?:question|query|answer|title|passage|document|text|topic)s?\W*$",
    re.IGNORECASE,
)
# Words without content. A query of only such words fits every passage.
_EMPTY_WORDS = frozenset(
    """
    a about an and any are as at be been being but by can could did do does doing done for from get give had has
    have he her here him his how i if in into is it its know like made make many me mean means more most much my
    of on one or our out over question query say says she should so some such tell than that the their them then
    there these they thing things this those to up us use used using very was way we were what when where which
    who whom whose why will with work works would you your explain describe example examples please
    """.split()
)


def _empty(text: str) -> bool:
    return all(word in _EMPTY_WORDS for word in folded(text))


Defect = Literal["no-letters", "markup", "list", "generic"]
# The order is part of the score: a defect's position is its bit. Add at the end, and raise the version.
DEFECTS: dict[Defect, Callable[[str], object]] = {
    "no-letters": lambda text: not any(c.isalpha() for c in text),
    "markup": _MARKUP.search,
    "list": lambda text: _LIST.search(text.strip()),
    "generic": lambda text: _GENERIC.search(text) or _empty(text),
}


class Format(Filter):
    """Rejects texts that are no queries: markup, lists, generic questions. See also ``template`` and ``repetition``.

    The score has one bit for each of ``DEFECTS``; 0 means a good query. ``allow`` tolerates defects without new scoring.
    The heuristics on signs and lists adapt Gopher's (Rae et al. 2021, arXiv 2112.11446, appendix A.1) to queries.
    ``generic`` detects questions that small models ask about any passage, such as "Which of the following sentences is
    nonsensical?" (SmolLM2-135M on SQuADShifts); such a training query makes its positive noise. The patterns are English;
    in other languages, the round trip rejects such queries.

    >>> texts = ["how to merge two dicts", "Which of the following sentences is nonsensical?", "<p>dict</p>", "1. dict"]
    >>> scores = Format().score([ScoredQuery(str(i), text, "d1", "") for i, text in enumerate(texts)], None)
    >>> [Format().keep(score) for score in scores]
    [None, 'generic', 'markup', 'list']
    >>> Format(allow=("generic",)).keep(scores[1]) is None
    True
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 3  # reads words of any script, with their marks
    rowwise: ClassVar[bool] = True
    needs_passage: ClassVar[bool] = False
    allow: Annotated[tuple[Defect, ...], Threshold()] = ()

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        tests = DEFECTS.values()
        return [float(sum(1 << bit for bit, has in enumerate(tests) if has(row.text))) for row in rows]

    def keep(self, score: float) -> str | None:
        defects = (name for bit, name in enumerate(DEFECTS) if int(score) >> bit & 1)
        return next((name for name in defects if name not in self.allow), None)
