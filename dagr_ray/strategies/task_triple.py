"""A retrieval task, a query, a passage that answers it and one that does not, all generated from a topic."""

from __future__ import annotations

import random
import re
from typing import ClassVar

from dagr_ray.core.words import word_count
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies._one_query import OneQuery
from dagr_ray.strategies._rewriting import one_line

_EXAMPLES = (
    (
        "beekeeping",
        "find the answer of an encyclopedia to a question",
        "how long do honey bees live",
        "A worker bee that hatches in summer lives for about six weeks. Bees of the winter cluster live for four to six "
        "months, because they do not fly out.",
        "Honey bees collect nectar and pollen from early spring to autumn. A strong colony has about 50,000 workers.",
    ),
    (
        "public transport",
        "find the rule of a company for a customer's case",
        "refund for a cancelled train",
        "If your train is cancelled and you do not travel, you can claim the full price of the ticket within 28 days.",
        "A seat reservation can be moved to another train free of charge until ten minutes before departure.",
    ),
    (
        "programming",
        "find the function of a library that does what is asked",
        "overwrite existing file when renaming",
        "os.replace renames a file or directory. If the target exists and is a file, it is replaced silently.",
        "os.renames works like rename, and first creates the directories that the new path needs.",
    ),
)
_LINES = ("Topic", "Task", "Query", "Right passage", "Wrong passage")
_LABELLED = re.compile(r"^\s*(task|query|right passage|wrong passage)\s*:\s*(.*)$", re.IGNORECASE)


class TaskTriple(OneQuery):
    """Task, query, positive and hard negative with no corpus (Wang et al. 2024, arXiv 2401.00368, section 3.1).

    The row's text is the topic of the task, so that answers differ. The model writes from its own knowledge: facts may
    be wrong, which matters little, because a retriever only learns which texts belong together. Controls apply to all
    three texts.

    >>> row = Passage("t1", "", "astronomy")
    >>> TaskTriple().prompt(row, (), random.Random(0)).text.splitlines()[-2:]
    ['Topic: astronomy', 'Task:']
    >>> answer = "find a fact\\nQuery: how far is the moon\\nRight passage: The moon is 384,400 km away from us.\\n"
    >>> TaskTriple().parse(row, answer + "Wrong passage: The moon turns once in 27 days around its axis.").kept[0]
    'how far is the moon'
    >>> TaskTriple().parse(row, "find a fact\\nQuery: how far is the moon").rejected[0][0]
    'incomplete'
    """

    abstract: ClassVar[bool] = False
    parse_version: ClassVar[int] = 2  # words of any script
    writes: ClassVar[str] = "triples"
    task: str = "For each topic: a search task, a query, a passage that answers it, and a similar one that does not."

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """Task, three examples, the topic."""
        blocks = ["\n".join(f"{k}: {v}" for k, v in zip(_LINES, example, strict=True)) for example in _EXAMPLES]
        before = "\n\n".join([one_line(self.task), *blocks, "Topic: "])
        return Prompt(
            before, one_line(row.text or row.title), f"{self.controls.prompt_line()}\nTask:", stop=("\n\n", "\nTopic:")
        )

    def parse(self, row: Passage, raw: str) -> Parsed:
        """Query, right and wrong passage, if all are present, all differ, and none is copied from an example."""
        text_of = {"task": one_line(raw.lstrip().partition("\n")[0])}
        for line in raw.splitlines():
            if (labelled := _LABELLED.match(line)) and labelled[2].strip():
                text_of.setdefault(labelled[1].casefold(), one_line(labelled[2]))
        triple = [text_of.get(name, "") for name in ("query", "right passage", "wrong passage")]
        shown = one_line(raw)[:200]
        if not all(any(c.isalpha() for c in text) for text in triple):
            return Parsed(rejected=[("incomplete", shown)])
        folded = [text.casefold() for text in triple]
        if len(set(folded)) < 3:
            return Parsed(rejected=[("repeated", shown)])
        if set(folded) & {text.casefold() for example in _EXAMPLES for text in example}:
            return Parsed(rejected=[("exemplar-copy", shown)])
        if min(map(word_count, triple[1:])) < 5:
            return Parsed(rejected=[("too-short", shown)])
        return Parsed(kept=triple)
