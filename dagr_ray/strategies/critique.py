"""A critique of a query: its problem in a few words, or "none"."""

from __future__ import annotations

from typing import ClassVar

from dagr_ray.prompts import Parsed, Passage
from dagr_ray.strategies._rewriting import FewShot, Rewriting

FINE = "none"
_FEW_SHOT = FewShot(
    ("Passage", "Query"),
    "Problem",
    (
        {
            "Passage": "Lake Baikal in southern Siberia is the deepest lake in the world, reaching 1,642 metres.",
            "Query": "what does the passage say",
            "Problem": "names nothing that the passage is about",
        },
        {
            "Passage": "os.replace renames a file. If the target exists and is a file, it is replaced silently.",
            "Query": "overwrite existing file when renaming",
            "Problem": "none",
        },
        {
            "Passage": "If your train is cancelled, you can claim the full price of the ticket within 28 days.",
            "Query": "how many trains are cancelled each day",
            "Problem": "the passage does not answer it",
        },
        {
            "Passage": "Adults with a mild sprain should rest the ankle for two days and cool it several times a day.",
            "Query": "Adults with a mild sprain should rest the ankle for two days",
            "Problem": "copies the passage word by word",
        },
        {
            "Passage": "The kettle boils a litre in under three minutes, but started to leak around the base.",
            "Query": "does the kettle leak after a few months",
            "Problem": "none",
        },
    ),
    least_words=1,
)


class Critique(Rewriting):
    """The evaluator of a refinement loop: names the problem of a query, for ``Retry`` (MetaSynth, arXiv 2510.01523).

    ``none`` means no problem. It is kept as well, so that every pair has a verdict.

    >>> import random
    >>> row = Passage("p1", "", "Bees of summer live for six weeks.", query="what are bees")
    >>> Critique().prompt(row, (), random.Random(0)).text.splitlines()[-2:]
    ['Query: what are bees', 'Problem:']
    >>> Critique().parse(row, " the passage does not answer it").kept, Critique().parse(row, "None.").kept
    (['the passage does not answer it'], ['none'])
    """

    abstract: ClassVar[bool] = False
    writes: ClassVar[str] = "critiques"
    task: str = (
        "Each passage is followed by a search query that was written for it, and by what is wrong with the query."
    )

    def few_shot(self) -> FewShot:
        return _FEW_SHOT

    def parse(self, row: Passage, raw: str) -> Parsed:
        """Parses as every rewriting does, but the answer may equal the problem of an example."""
        parsed = super().parse(row, raw)
        if parsed.rejected and parsed.rejected[0][0] == "exemplar-copy":
            return Parsed(kept=[" ".join(raw.split("\n")[0].split()).strip(" .\"'").casefold()])
        return Parsed(kept=[line.rstrip(".") for line in parsed.kept], rejected=parsed.rejected)

    def check_line(self, row: Passage, line: str) -> Parsed:
        problem = line.casefold().strip(" .\"'")
        return Parsed(kept=[FINE if problem in (FINE, "nothing", "no problem") else line])
