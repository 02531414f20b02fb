"""What strategies have in common that have a language model write one query: controls, and how an answer is read."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, ClassVar

from dagr_ray.core.config import OmitWhenDefault
from dagr_ray.prompts import Parsed
from dagr_ray.strategies import Strategy
from dagr_ray.strategies._controls import Controls

_LABEL = re.compile(
    r"^(?:(?:search |user |possible |good |generated |relevant |example )?(?:query|queries|question)|q)"
    r"\s*\d{0,3}\s*[:.)\]-]\s*",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"^(?:\(?\d{1,3}[.):]|[-*•–—>#]+)\s+")
_QUOTES = "\"'`“”‘’«»„* \t"
_PREAMBLE = re.compile(
    r"^(?:sure|certainly|of course|okay|ok|here(?:'s| is| are)|the (?:search )?quer(?:y|ies)\b).*:$", re.IGNORECASE
)
_TEMPLATE = re.compile(
    r"<\|[^|<>]{1,40}\|>|^(?:passage|document|text|answer|options?|title)\s*\d*\s*:|\b(?:passage|query|question)\s*:",
    re.IGNORECASE,
)


class Written(Strategy):
    """Base of the strategies whose answer is one query on one line. ``controls`` says what it is to be like besides."""

    abstract: ClassVar[bool] = True
    controls: Annotated[Controls, OmitWhenDefault()] = Controls()

    def checked(self) -> Controls:
        """What every answer is measured for: the controls, unless the task itself asks for more."""
        return self.controls


def one_query(raw: str, shown: Collection[str], label: str = "") -> Parsed:
    """The first line of a completion that says something, without number, quotes and label: ``label``, "Query:" or the like.

    ``shown`` are the queries of the prompt's examples, casefolded: a copy of one is refused.
    """
    own = re.compile(rf"^{re.escape(label)}\s*:\s*", re.IGNORECASE) if label else None
    text = next((found for line in raw.splitlines() if (found := _bare(line, own))), "")
    said = raw.strip()[:200]
    if not text:
        return Parsed(rejected=[("empty", said)])
    if not any(c.isalpha() for c in text):
        return Parsed(rejected=[("no-text", said)])
    if _TEMPLATE.search(text):
        return Parsed(rejected=[("template", said)])
    if text.casefold() in shown:
        return Parsed(rejected=[("exemplar-copy", said)])
    if text.isascii() and len(text.split()) < 2:
        return Parsed(rejected=[("too-short", said)])
    return Parsed(kept=[text])


def _bare(line: str, own: re.Pattern[str] | None) -> str:
    """A line without what models put around a query; empty for a line that only announces one."""
    text = " ".join(line.split())
    if _PREAMBLE.match(text):
        return ""
    before = None
    while text != before:
        before = text
        text = _LABEL.sub("", _NUMBER.sub("", text.strip(_QUOTES)))
        text = own.sub("", text) if own else text
    return text
