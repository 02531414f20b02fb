"""Prompt leakage: parts of a prompt or its template that a model wrote instead of a query."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import pyarrow as pa

from dagr_ray.core.config import Threshold
from dagr_ray.core.words import folded
from dagr_ray.filters import Filter, ScoredQuery

PHRASE_WORDS = 5  # a run of so many words of a phrase is not a coincidence
Kind = Literal["chat-token", "placeholder", "prompt-label", "instruction", "phrase"]
# The order is part of the score: a kind's position is its bit. Add at the end, and raise the version.
KINDS: dict[Kind, re.Pattern[str]] = {
    "chat-token": re.compile(
        r"<\|[^|<>]{1,40}\|>|\[/?INST\]|</?s>|<</?SYS>>|<(?:start|end)_of_turn>|^\s*#{2,} ?(?:instruction|response|input)\b",
        re.IGNORECASE | re.MULTILINE,
    ),
    "placeholder": re.compile(
        r"[\[<(](?:insert|your|enter|fill|query|question|passage|document|topic|name)\b[^\]>)\n]*[\]>)]"
        r"|\{(?:insert|your|enter|fill)\b[^}\n]*\}|\{+\s*(?:query|question|passage|document)\s*\}+"
        r"|_{3,}|\blorem ipsum\b|\bx{3,}\b"
        r"|^\W*(?:n/?a|none|null|unknown|query|question|todo|tbd|example|title|text)\W*$",
        re.IGNORECASE,
    ),
    "prompt-label": re.compile(
        r"(?:^|[.?!]\s+|\n)\s*(?:query|question|passage|document|answer|title|example|claim|keywords|user|assistant|system)"
        r"\s*\d*\s*:",
        re.IGNORECASE,
    ),
    "instruction": re.compile(
        r"\b(?:write|generate|create|formulate|produce|come up with) (?:a|an|one|some|the|\d+|several)(?: [\w-]+){0,3} "
        r"(?:quer(?:y|ies)|questions?)\b[^.?!]{0,40}\b(?:passage|document|text|paragraph|following|above|below|given)\b"
        r"|\b(?:search|user|relevant|good|bad) (?:query|question) (?:for|about|that (?:matches|fits)) (?:the|this) "
        r"(?:passage|document|text|paragraph|following|above)\b"
        r"|\b(?:based on|given|using|from) (?:the|this) (?:following |above |given |provided )?(?:passage|paragraph)\b"
        r"|\byou are (?:a|an) (?:helpful|ai|expert|search)\b[^.?!]{0,20}\b(?:assistant|engine|model|writer|generator)\b"
        r"|\beach passage is followed by\b|\bfind this passage\b",
        re.IGNORECASE,
    ),
}


class Template(Filter):
    """Rejects queries with parts of a prompt: chat tokens, placeholders, labels, instructions, and your own ``phrases``.

    The score has one bit for each of ``KINDS`` and one for the phrases; 0 means none. ``allow`` tolerates kinds without
    new scoring. A query contains a phrase if it has five consecutive words of it, or all words of a shorter one. Give the
    sentences of a prompt and the queries of its examples as phrases. Self-Instruct also drops echoes of the prompt (Wang
    et al. 2022, arXiv 2212.10560, section 2.2); Zhang et al. 2023 (arXiv 2307.06865) measure how models reveal their
    context word by word.

    >>> texts = ["Query: copy a dict", "Write a query for the passage above", "copy a dict [insert topic]", "copy a dict"]
    >>> rows = [ScoredQuery(str(i), text, "d1", "") for i, text in enumerate(texts)]
    >>> [Template().keep(score) for score in Template().score(rows, None)]
    ['prompt-label', 'instruction', 'placeholder', None]
    >>> own = Template(phrases=("how deep is lake baikal",))
    >>> own.keep(own.score([ScoredQuery("q1", "how deep is Lake Baikal?", "d1", "")], None)[0])
    'phrase'
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # reads words of any script, with their marks
    rowwise: ClassVar[bool] = True
    needs_passage: ClassVar[bool] = False
    phrases: tuple[str, ...] = ()
    allow: Annotated[tuple[Kind, ...], Threshold()] = ()

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        rules: list[Callable[[str], object]] = [kind.search for kind in KINDS.values()]
        if self.phrases:
            rules.append(_Phrases(self.phrases))
        return [float(sum(1 << bit for bit, rule in enumerate(rules) if rule(row.text))) for row in rows]

    def keep(self, score: float) -> str | None:
        kinds = (name for bit, name in enumerate((*KINDS, "phrase")) if int(score) >> bit & 1)
        return next((name for name in kinds if name not in self.allow), None)


class _Phrases:
    """Whether a text contains a run of words of one of the phrases."""

    def __init__(self, phrases: Sequence[str]) -> None:
        words_of = [folded(phrase) for phrase in phrases]
        self.sizes = sorted({min(len(words), PHRASE_WORDS) for words in words_of if words})
        self.runs = {run for words in words_of for run in _runs(words, min(len(words), PHRASE_WORDS))}

    def __call__(self, text: str) -> bool:
        words = folded(text)
        return any(run in self.runs for size in self.sizes for run in _runs(words, size))


def _runs(words: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)] if size else []
