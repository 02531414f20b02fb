"""Base of the strategies that make a language model write one query: its controls, and its parser."""

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


class OneQuery(Strategy):
    """Base of the strategies whose answer is one query on one line. ``controls`` are further required attributes."""

    abstract: ClassVar[bool] = True
    controls: Annotated[Controls, OmitWhenDefault()] = Controls()

    def effective_controls(self) -> Controls:
        """The controls that every answer is checked against. Override if the task itself requires more."""
        return self.controls


def one_query(raw: str, example_queries: Collection[str], label: str = "") -> Parsed:
    """The first line of a completion that has text, without number, quotes and label (``label``, "Query:" or similar).

    ``example_queries`` are the queries of the prompt's examples, casefolded; a copy of one is rejected.
    """
    own = re.compile(rf"^{re.escape(label)}\s*:\s*", re.IGNORECASE) if label else None
    text = next((bare for line in raw.splitlines() if (bare := _bare(line, own))), "")
    detail = raw.strip()[:200]
    if not text:
        return Parsed(rejected=[("empty", detail)])
    if not any(c.isalpha() for c in text):
        return Parsed(rejected=[("no-text", detail)])
    if _TEMPLATE.search(text):
        return Parsed(rejected=[("template", detail)])
    if text.casefold() in example_queries:
        return Parsed(rejected=[("exemplar-copy", detail)])
    if text.isascii() and len(text.split()) < 2:
        return Parsed(rejected=[("too-short", detail)])
    return Parsed(kept=[text])


def _bare(line: str, own: re.Pattern[str] | None) -> str:
    """Strips numbers, quotes and labels from a line; empty if the line only announces a query."""
    text = " ".join(line.split())
    if _PREAMBLE.match(text):
        return ""
    before = None
    while text != before:
        before = text
        text = _LABEL.sub("", _NUMBER.sub("", text.strip(_QUOTES)))
        text = own.sub("", text) if own else text
    return text
