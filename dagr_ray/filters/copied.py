"""Queries that are copied out of their passage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from dagr_ray.core.config import ConfigError, JsonObject, Threshold
from dagr_ray.core.words import folded
from dagr_ray.filters import Candidate, Filter

# Of people's own queries for their passages (SciFact, SQuADShifts, Cranfield, NPL) 0 to 0.3 % and 0 to 1.7 % are over.
LIMITS = {"ngram": 0.8, "lcs": 0.9}
# Forms of query that are made of their passage's words, more than a question is. A share is never over 1.
FORMS = {"crop": 1.0, "title": 1.0, "keywords": 0.95, "claim": 0.95, "error-message": 1.0}


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The runs of ``n`` words; none of a text of fewer."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def lcs_length(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, in steps of one per word of ``other`` (Hyyrö 2004, bit-parallel).

    >>> lcs_length("how tall is the eiffel tower".split(), "the eiffel tower is 330 metres tall".split())
    3
    """
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    everything = (1 << len(one)) - 1
    left = everything  # a bit is unset where the length grows
    for word in other:
        at = places.get(word)
        if at is not None:
            hit = left & at
            left = ((left + hit) | (left - hit)) & everything
    return len(one) - left.bit_count()


class Copied(Filter):
    """Refuses a query of which more than ``max_share`` (0.8, or 0.9 for ``lcs``) stands in the passage; that is the score.

    ``measure`` says how: ``ngram`` is the share of the query's word n-grams that stand in the passage, one minus the
    share of novel n-grams (See et al. 2017, arXiv 1704.04368, figure 6); ``lcs`` is the longest common subsequence by the
    query's words (ROUGE-L's precision, Lin 2004, ACL W04-1013), which also finds a sentence with words left out. Both
    can be asked, as two filters. A copied sentence teaches a retriever to match strings, which BM25 does already.

    A query of fewer than ``n`` words scores 0: "eiffel tower" is a good query for a passage about it. ``by_form`` is the
    threshold of forms that copy by design, by ``lineage.strategy`` or by its last part: ``typed/claim`` or ``claim``.

    >>> passage = "The Eiffel Tower is 330 metres tall, about the same height as an 81-storey building."
    >>> texts = ["the eiffel tower is 330 metres tall", "how tall is the eiffel tower", "eiffel tower"]
    >>> rows = [Candidate(str(i), text, "d1", passage) for i, text in enumerate(texts)]
    >>> Copied().score(rows, None), Copied(measure="lcs").score(rows, None)
    ([1.0, 0.0, 0.0], [1.0, 0.5, 0.0])
    >>> Copied().keep(1.0), Copied().keep(0.5), Copied().settled("typed/claim", 0).keep(0.9)
    ('copied', None, None)
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # words of any script, with their marks
    rowwise: ClassVar[bool] = True
    finds_copies: ClassVar[bool] = True
    measure: Literal["ngram", "lcs"] = "ngram"
    n: Annotated[int, Field(ge=1)] = 4
    max_share: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Threshold()] = None
    by_form: Annotated[JsonObject, Threshold()] = FORMS

    @field_validator("by_form")
    @classmethod
    def _shares(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        for form, share in value.items():
            if not (isinstance(share, int | float) and 0 <= share <= 1):
                raise ConfigError(f"copied: by_form: {form} = {share!r}; give a share between 0 and 1")
        return value

    def score(self, rows: Sequence[Candidate], search: pa.Table | None) -> list[float]:
        scores: list[float] = []
        passage, known, grams = "", list[str](), set[tuple[str, ...]]()
        for row in rows:
            asked = folded(row.text)
            if len(asked) < self.n:
                scores.append(0.0)
                continue
            if row.passage != passage:  # queries of one passage mostly stand together
                passage, known = row.passage, folded(row.passage)
                grams = set(ngrams(known, self.n)) if self.measure == "ngram" else set()
            if self.measure == "lcs":
                scores.append(lcs_length(asked, known) / len(asked))
            else:
                own = ngrams(asked, self.n)
                scores.append(sum(gram in grams for gram in own) / len(own))
        return scores

    def settled(self, form: str, passages: int) -> Filter:
        """With the threshold of a form of query."""
        share = self.by_form.get(form, self.by_form.get(form.rpartition("/")[2]))
        return self if share is None else self.model_copy(update={"max_share": float(share)})

    def keep(self, score: float) -> str | None:
        return "copied" if score > (LIMITS[self.measure] if self.max_share is None else self.max_share) else None
