"""What strategies that rewrite have in common: a task, shown examples of three or more lines each, and one line to write."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.words import word_count
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies._written import Written

_QUOTES = "\"'`“”‘’«»„* \t"
_MARKUP = re.compile(r"<\|[^|<>]{1,40}\|>|\[/?INST\]")


def one_line(text: str) -> str:
    """White space folded: text that is one line cannot look like the next part of a prompt."""
    return " ".join(text.split())


class Form(NamedTuple):
    """The lines of an example: those that are ``given``, the first of which an engine may cut, and the one to write."""

    given: tuple[str, ...]
    label: str
    shown: tuple[Mapping[str, str], ...]
    least_words: int = 2


class Rewriting(Written):
    """Base of the strategies that write one text for a pair, few-shot: a small model follows examples, not instructions."""

    abstract: ClassVar[bool] = True
    parse_version: ClassVar[int] = 2  # words of any script
    reads: ClassVar[str] = "pairs"
    task: str
    max_examples: Annotated[int, Field(ge=1, le=8)] = 8

    def form(self) -> Form:
        """How its examples look."""
        raise NotImplementedError

    def lines(self, row: Passage) -> tuple[str, ...]:
        """What stands on the lines of ``given``."""
        read = {
            "Passage": tables.passage_text(row.title, row.text),
            "Query": row.query,
            "Second passage": row.other,
            "Problem": row.other,
        }
        return tuple(one_line(read[name]) for name in self.form().given)

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """Task, examples, the pair. No use of ``exemplars``, which are queries, nor of ``rng``: the prefix is shared."""
        form = self.form()
        names, examples = (*form.given, form.label), form.shown[: self.max_examples]
        blocks = ["\n".join(f"{name}: {example[name]}" for name in names) for example in examples]
        first, *others = self.lines(row)
        after = "".join(f"\n{name}: {line}" for name, line in zip(form.given[1:], others, strict=True))
        before = "\n\n".join([one_line(self.task), *blocks, f"{form.given[0]}: "])
        return Prompt(before, first, f"{after}{self.controls.line()}\n{form.label}:", stop=("\n",))

    def parse(self, row: Passage, raw: str) -> Parsed:
        """The first line, without its label and quotes; rejected where it says nothing, or nothing of its own."""
        form, shown = self.form(), raw.strip()[:200]
        line = next((found for each in raw.splitlines() if (found := _bare(each, form.label))), "")
        if not line:
            return Parsed(rejected=[("empty", shown)])
        if not any(c.isalpha() for c in line):
            return Parsed(rejected=[("no-text", shown)])
        if _MARKUP.search(line) or any(f"{name}:" in line for name in (*form.given, form.label)):
            return Parsed(rejected=[("template", shown)])
        if line.casefold() in {example[form.label].casefold() for example in form.shown}:
            return Parsed(rejected=[("exemplar-copy", shown)])
        if word_count(line) < form.least_words:
            return Parsed(rejected=[("too-short", shown)])
        if line.casefold() in {given.casefold() for given in self.lines(row)}:
            return Parsed(rejected=[("unchanged", shown)])
        return self.judged(row, line)

    def judged(self, row: Passage, line: str) -> Parsed:
        """What a subclass makes of a line that is well formed."""
        return Parsed(kept=[line])


def _bare(line: str, label: str) -> str:
    text = one_line(line).strip(_QUOTES)
    if text.casefold().startswith(f"{label.casefold()}:"):
        text = text[len(label) + 1 :].strip(_QUOTES)
    return text
