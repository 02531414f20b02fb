"""Parts of a prompt or of its form that a model wrote out instead of a query."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import pyarrow as pa

from dagr_ray.core.config import Threshold
from dagr_ray.core.words import folded
from dagr_ray.filters import Candidate, Filter

PHRASE_WORDS = 5  # so many words of a phrase in a row are no accident
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
    """Refuses what leaks from a prompt: chat tokens, placeholders, labels, instructions, and ``phrases`` of one's own.

    The score has one bit for each of ``KINDS`` and one for the phrases, so 0 is none of them; ``allow`` tolerates some
    without scoring anew. A phrase leaks where five of its words stand in a row in the query, or all of a shorter one: give
    the sentences of a prompt and the queries of its examples. Echoes of the prompt are among what Self-Instruct drops
    (Wang et al. 2022, arXiv 2212.10560, section 2.2); that models give their context away word by word is measured by
    Zhang et al. 2023 (arXiv 2307.06865).

    >>> texts = ["Query: copy a dict", "Write a query for the passage above", "copy a dict [insert topic]", "copy a dict"]
    >>> rows = [Candidate(str(i), text, "d1", "") for i, text in enumerate(texts)]
    >>> [Template().keep(score) for score in Template().score(rows, None)]
    ['prompt-label', 'instruction', 'placeholder', None]
    >>> own = Template(phrases=("how deep is lake baikal",))
    >>> own.keep(own.score([Candidate("q1", "how deep is Lake Baikal?", "d1", "")], None)[0])
    'phrase'
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # words of any script, with their marks
    rowwise: ClassVar[bool] = True
    needs_passage: ClassVar[bool] = False
    phrases: tuple[str, ...] = ()
    allow: Annotated[tuple[Kind, ...], Threshold()] = ()

    def score(self, rows: Sequence[Candidate], search: pa.Table | None) -> list[float]:
        rules: list[Callable[[str], object]] = [kind.search for kind in KINDS.values()]
        if self.phrases:
            rules.append(_Phrases(self.phrases))
        return [float(sum(1 << bit for bit, rule in enumerate(rules) if rule(row.text))) for row in rows]

    def keep(self, score: float) -> str | None:
        found = (name for bit, name in enumerate((*KINDS, "phrase")) if int(score) >> bit & 1)
        return next((name for name in found if name not in self.allow), None)


class _Phrases:
    """Whether a text holds a run of words of any of some phrases."""

    def __init__(self, phrases: Sequence[str]) -> None:
        found = [folded(phrase) for phrase in phrases]
        self.sizes = sorted({min(len(phrase), PHRASE_WORDS) for phrase in found if phrase})
        self.runs = {run for phrase in found for run in _runs(phrase, min(len(phrase), PHRASE_WORDS))}

    def __call__(self, text: str) -> bool:
        said = folded(text)
        return any(run in self.runs for size in self.sizes for run in _runs(said, size))


def _runs(said: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(said[i : i + size]) for i in range(len(said) - size + 1)] if size else []
