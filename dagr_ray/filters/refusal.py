"""Refusals and other chat of an assistant instead of a query."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import pyarrow as pa

from dagr_ray.core.config import Threshold
from dagr_ray.filters import Filter, ScoredQuery

_AT_START = r"(?:^|[.!?:;,]\s+|\bbut\s+)\W*"
_CANNOT = r"(?:can(?:no|['’]?)t|can not|could(?: not|n['’]t)|(?: am|['’]m) (?:not able|unable) to|won['’]?t|will not)"
_DO = (
    r"(?:help|assist|provide|fulfill?|comply|complete|answer|respond|generate|create|produce|write|formulate|determine"
    r"|discuss|continue|engage|access|see|find)"
)
_OBJECT = (
    r"(?:that|this|it|you|with (?:that|this|your|the)|(?:a|any|the|your|such|an)(?: \w+){0,2} (?:quer(?:y|ies)|question"
    r"|questions|request|content|text|passage|document|answer|response|information|context))"
)
Kind = Literal["identity", "refusal", "apology", "chat"]
# The order is part of the score: a kind's position is its bit. Add at the end, and raise the version.
KINDS: dict[Kind, re.Pattern[str]] = {
    "identity": re.compile(
        r"\bas an? (?:ai|artificial intelligence|large language|language)(?:[- ](?:powered|based))?"
        r"(?: (?:language )?(?:model|assistant|system|chatbot|bot))\b|\bas an ai,"
        r"|\bi(?: am|['’]m) (?:just |only )?an? (?:ai|artificial intelligence|(?:large )?language model)\b"
        r"(?! (?:engineer|researcher|student|developer|expert|enthusiast))"
        r"|\bmy (?:training data|knowledge cut-?off|programming)\b"
        r"|\b(?:als|en tant qu['’]|como) (?:ki|ia|modelo? de (?:lenguaje|linguagem)|modèle de langage|sprachmodell)\b",
        re.IGNORECASE,
    ),
    "refusal": re.compile(
        rf"{_AT_START}(?:unfortunately,? )?i ?{_CANNOT} (?:\w+ly )?{_DO}\b[^.?!]{{0,20}}?\b{_OBJECT}\b"
        rf"|{_AT_START}i(?: am|['’]m) (?:not able|unable) to {_DO}\b"
        r"|\bi(?: must|['’]ll have to| have to) (?:decline|refuse)\b"
        r"|\bi don['’]?t have (?:enough|any|access to|the ability)\b[^.?!]{0,30}(?:information|context|data|text|passage|real-time)"
        r"|\b(?:no|not enough) (?:passage|document|text|context|information) (?:was|were|is|has been) (?:provided|given)\b"
        r"|\b(?:passage|document|text) (?:does not|doesn['’]t|did not) (?:contain|provide|include|mention) "
        r"(?:any|enough|sufficient)\b",
        re.IGNORECASE,
    ),
    "apology": re.compile(
        r"^\W*(?:i(?: am|['’]m) (?:very |really |so )?sorry,? (?:but|i|for|about the)|sorry,? (?:but )?i\b"
        r"|i apologi[sz]e\b|my apologies\b)",
        re.IGNORECASE,
    ),
    "chat": re.compile(
        r"^\W*(?:sure|certainly|of course|absolutely|great question|okay|ok)\s*[!,.:]\s*(?:here|i|let|the|below)\b"
        r"|^\W*here(?: is|['’]s| are) (?:an?|the|your|some|my|one|two|three|four|five|\d+)(?: \w+){0,4} "
        r"(?:quer(?:y|ies)|questions?)\b"
        r"|\blet me know if (?:you|this|there)\b|\bi hope (?:this|that) helps\b|\bfeel free to (?:ask|reach)\b"
        r"|\bhow (?:can|may) i (?:help|assist) you(?: today)?\b|\bis there anything else (?:i|you)\b",
        re.IGNORECASE,
    ),
}


class Refusal(Filter):
    """Rejects an assistant's chat in place of a query: "As an AI", "I cannot help with that", apologies, small talk.

    The score has one bit for each of ``KINDS``; 0 means none. ``allow`` tolerates kinds without new scoring. Filters of
    instruction data use similar phrases (Vicuna's cleaning; Self-Instruct, Wang et al. 2022, arXiv 2212.10560, section
    2.2). A query may say that its author cannot do something ("i cannot copy a folder"), so the patterns also check who
    cannot do what.

    >>> texts = ["As an AI language model, I cannot search.", "i cannot copy a folder", "Sorry, but I can't help with that."]
    >>> scores = Refusal().score([ScoredQuery(str(i), text, "d1", "") for i, text in enumerate(texts)], None)
    >>> [Refusal().keep(score) for score in scores]
    ['identity', None, 'refusal']
    >>> Refusal(allow=("refusal", "apology")).keep(scores[2]) is None
    True
    """

    abstract: ClassVar[bool] = False
    rowwise: ClassVar[bool] = True
    needs_passage: ClassVar[bool] = False
    allow: Annotated[tuple[Kind, ...], Threshold()] = ()

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        return [
            float(sum(1 << bit for bit, kind in enumerate(KINDS.values()) if kind.search(row.text))) for row in rows
        ]

    def keep(self, score: float) -> str | None:
        kinds = (name for bit, name in enumerate(KINDS) if int(score) >> bit & 1)
        return next((name for name in kinds if name not in self.allow), None)
