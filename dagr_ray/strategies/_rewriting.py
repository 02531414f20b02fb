"""Base of the strategies that rewrite a text: a task, examples of two or more lines each, and one line to write."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.words import word_count
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies._one_query import OneQuery

_QUOTES = "\"'`“”‘’«»„* \t"
_MARKUP = re.compile(r"<\|[^|<>]{1,40}\|>|\[/?INST\]")


def one_line(text: str) -> str:
    """Folds white space. A text on one line cannot look like the next part of a prompt."""
    return " ".join(text.split())


class FewShot(NamedTuple):
    """The examples of a prompt. ``inputs`` and ``output`` are the labels of their lines, and keys of ``examples``.

    An engine may cut the first input. ``least_words`` is the shortest output that is accepted.
    """

    inputs: tuple[str, ...]
    output: str
    examples: tuple[Mapping[str, str], ...]
    least_words: int = 2


class Rewriting(OneQuery):
    """Base of the strategies that write one text for a pair, few-shot. Small models follow examples, not instructions."""

    abstract: ClassVar[bool] = True
    parse_version: ClassVar[int] = 2  # words of any script
    reads: ClassVar[str] = "pairs"
    task: str
    max_examples: Annotated[int, Field(ge=1, le=8)] = 8

    def few_shot(self) -> FewShot:
        """The examples of the prompt."""
        raise NotImplementedError

    def lines(self, row: Passage) -> tuple[str, ...]:
        """The text of each input line for a row."""
        text_of = {
            "Passage": tables.passage_text(row.title, row.text),
            "Query": row.query,
            "Second passage": row.other,
            "Problem": row.other,
        }
        return tuple(one_line(text_of[name]) for name in self.few_shot().inputs)

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """Task, examples, the pair. Ignores ``exemplars`` (they are queries) and ``rng`` (the prefix is shared)."""
        few_shot = self.few_shot()
        names, examples = (*few_shot.inputs, few_shot.output), few_shot.examples[: self.max_examples]
        blocks = ["\n".join(f"{name}: {example[name]}" for name in names) for example in examples]
        first, *others = self.lines(row)
        after = "".join(f"\n{name}: {line}" for name, line in zip(few_shot.inputs[1:], others, strict=True))
        before = "\n\n".join([one_line(self.task), *blocks, f"{few_shot.inputs[0]}: "])
        return Prompt(before, first, f"{after}{self.controls.prompt_line()}\n{few_shot.output}:", stop=("\n",))

    def parse(self, row: Passage, raw: str) -> Parsed:
        """The first line with text, without its label and quotes. Rejects copies of an example or of an input."""
        few_shot, shown = self.few_shot(), raw.strip()[:200]
        line = next((text for row_text in raw.splitlines() if (text := _bare(row_text, few_shot.output))), "")
        if not line:
            return Parsed(rejected=[("empty", shown)])
        if not any(c.isalpha() for c in line):
            return Parsed(rejected=[("no-text", shown)])
        if _MARKUP.search(line) or any(f"{name}:" in line for name in (*few_shot.inputs, few_shot.output)):
            return Parsed(rejected=[("template", shown)])
        if line.casefold() in {example[few_shot.output].casefold() for example in few_shot.examples}:
            return Parsed(rejected=[("exemplar-copy", shown)])
        if word_count(line) < few_shot.least_words:
            return Parsed(rejected=[("too-short", shown)])
        if line.casefold() in {text.casefold() for text in self.lines(row)}:
            return Parsed(rejected=[("unchanged", shown)])
        return self.check_line(row, line)

    def check_line(self, row: Passage, line: str) -> Parsed:
        """Accepts or rejects a well-formed line; a subclass adds its own rules here."""
        return Parsed(kept=[line])


def _bare(line: str, label: str) -> str:
    text = one_line(line).strip(_QUOTES)
    if text.casefold().startswith(f"{label.casefold()}:"):
        text = text[len(label) + 1 :].strip(_QUOTES)
    return text
