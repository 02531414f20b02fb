"""Queries of several forms, one form chosen at random for each sample."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

from pydantic import field_validator

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError, JsonObject
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies import Strategy
from dagr_ray.strategies._one_query import OneQuery, one_query

Form = Literal["question", "keywords", "claim", "title", "situation", "conversational", "error-message"]
FORMS: tuple[str, ...] = get_args(Form)
# The label before a query of each form. Small models follow the examples; larger ones also use the label.
LABELS: Mapping[str, str] = {
    "question": "Question",
    "keywords": "Keywords",
    "claim": "Claim",
    "title": "Title",
    "situation": "Situation",
    "conversational": "Chat",
    "error-message": "Error message",
}
EXAMPLES: tuple[tuple[str, Mapping[str, str]], ...] = (
    (
        "os.replace Rename a file or directory. If the target exists and is a file, it is replaced silently. The operation "
        "fails with an OSError when source and target are on different file systems.",
        {
            "question": "how do I rename a file in python when the target already exists?",
            "keywords": "rename file overwrite target",
            "claim": "os.replace overwrites an existing file without asking.",
            "title": "Renaming Files over Existing Ones in Python",
            "situation": "My script writes a new version of a file and has to put it in the place of the old one.",
            "conversational": "ok that wrote the file, and how do I get it over the old one now?",
            "error-message": "OSError: [Errno 18] Invalid cross-device link: '/tmp/a.txt' -> '/home/a.txt'",
        },
    ),
    (
        "The kettle switches itself off when it runs dry. If it does not heat afterwards, let it cool for ten minutes and "
        "press the red button under the base. A kettle that shows E4 has a broken sensor and must be repaired.",
        {
            "question": "why does the kettle not heat after it ran dry?",
            "keywords": "kettle ran dry reset button",
            "claim": "A kettle that ran dry works again once it has cooled and is reset.",
            "title": "What to Do When Your Kettle Has Boiled Dry",
            "situation": "I forgot the kettle on the stove until all the water was gone and now it stays cold.",
            "conversational": "hm it is still cold, is there some button I can press?",
            "error-message": "E4 SENSOR",
        },
    ),
    (
        "Transfers to foreign accounts need the account holder's name exactly as the bank has it. Otherwise the payment "
        "comes back after five working days, and a fee of 12 euros is kept. Code AC04 means that the account is closed.",
        {
            "question": "what happens to a foreign transfer with a misspelled name?",
            "keywords": "foreign transfer returned fee",
            "claim": "Banks return foreign transfers whose account name is misspelled.",
            "title": "Names and Fees in Foreign Bank Transfers",
            "situation": "I sent money to my landlord in Spain last week and today it was back, less some euros.",
            "conversational": "and if I get the name wrong, do they send my money back?",
            "error-message": "Payment rejected: AC04 closed account number",
        },
    ),
)
_EXAMPLE_QUERIES = frozenset(text.casefold() for _, written in EXAMPLES for text in written.values())


class Typed(OneQuery):
    """One of several forms of query, chosen at random for each sample with the weights of ``mix``.

    A retriever tuned to one form of query loses on the others. CADET (arXiv 2502.19712, section 3) generates questions,
    claims, titles and keywords; BEIR's tasks also have situations and turns of a conversation. NVIDIA's generator for
    retrievers (NeMo Curator, tutorials/nemo-retriever-synthetic-data-generation) generates several types at once. The
    samples of a passage are spread over the forms as evenly as the weights allow, so each form has its share of all
    queries. If ``form`` is set, all queries have that form. Lineage names the form: ``typed/claim``.

    Examples of all forms come first, then the passage, then the label of the form. Engines therefore compute the
    examples once for all passages, and a passage once for all its samples. Error messages fit technical passages only.

    >>> row = Passage("d1", "shutil.copytree", "Recursively copy a directory tree.")
    >>> typed = Typed(mix={"claim": 2, "keywords": 1})
    >>> sorted(one.name() for one in typed.strategies_for(random.Random(0), 3))
    ['typed/claim', 'typed/claim', 'typed/keywords']
    >>> Typed(form="claim").prompt(row, (), random.Random(0)).after
    '\\nClaim:'
    >>> Typed(form="claim").parse(row, " Claim: copytree copies all files.").kept
    ['copytree copies all files.']
    """

    abstract: ClassVar[bool] = False
    mix: JsonObject = dict.fromkeys(FORMS, 1)
    form: Form | None = None

    @field_validator("mix")
    @classmethod
    def _weights(cls, value: JsonObject) -> JsonObject:
        valid = all(isinstance(weight, int | float) and weight >= 0 for weight in value.values())
        if not set(value) <= set(FORMS) or not valid or not sum(value.values()):
            raise ConfigError(f"give weights of at least 0, one of them over 0, for some of {', '.join(FORMS)}")
        return value

    def name(self) -> str:
        return f"{self.type}/{self.form}" if self.form else self.type

    def per_sample(self) -> bool:
        return self.form is None

    def strategies_for(self, rng: random.Random, samples: int) -> Sequence[Strategy]:
        """Systematic sampling: equidistant points on the line of all weights, from a random start, then shuffled."""
        if self.form is not None:
            return [self] * samples
        forms, start = [form for form in FORMS if self.mix.get(form)], rng.random()
        total, ends, end = sum(self.mix[form] for form in forms), [], 0.0
        for form in forms:
            end += self.mix[form] / total
            ends.append(end)
        points = [(start + i) / samples for i in range(samples)]
        sampled = [next((f for f, end in zip(forms, ends, strict=True) if point < end), forms[-1]) for point in points]
        rng.shuffle(sampled)
        return [self.model_copy(update={"form": form}) for form in sampled]

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """Examples of each form in the mix, the passage, the form. Ignores ``exemplars``, which have only one form."""
        if self.form is None:
            [strategy] = self.strategies_for(rng, 1)
            return strategy.prompt(row, exemplars, rng)
        forms = [form for form in FORMS if self.mix.get(form) or form == self.form]
        parts = []
        for passage, written in EXAMPLES:
            lines = [f"{LABELS[form]}: {written[form]}" for form in forms]
            parts.append("\n".join([f"Passage: {passage}", *lines]))
        passage = " ".join(tables.passage_text(row.title, row.text).split())
        before = "\n\n".join([*parts, "Passage: "])
        return Prompt(before, passage, f"{self.controls.prompt_line()}\n{LABELS[self.form]}:", stop=("\n",))

    def parse(self, row: Passage, raw: str) -> Parsed:
        """The first line with text, without its label; error messages keep their quotes."""
        parsed = one_query(raw, _EXAMPLE_QUERIES, LABELS[self.form] if self.form else "")
        if self.form == "error-message":
            parsed.kept = [_restore_quote(text, raw) for text in parsed.kept]
        return parsed


def _restore_quote(text: str, raw: str) -> str:
    """Restores a quote that was stripped from one end of a text, if the other quote of the pair is still inside."""
    for quote in "'\"`":
        if text.count(quote) % 2 and f"{text}{quote}" in raw:
            return f"{text}{quote}"
        if text.count(quote) % 2 and f"{quote}{text}" in raw:
            return f"{quote}{text}"
    return text
