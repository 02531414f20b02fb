"""Queries that are copied from their passage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from dagr_ray.core.config import ConfigError, JsonObject, Threshold
from dagr_ray.core.words import folded
from dagr_ray.filters import Filter, ScoredQuery

# Of human queries (SciFact, SQuADShifts, Cranfield, NPL), 0 to 0.3 % exceed the first limit and 0 to 1.7 % the second.
LIMITS = {"ngram": 0.8, "lcs": 0.9}
# Thresholds of query types that reuse more of the passage's words than questions do. A share is at most 1.
FORMS = {"crop": 1.0, "title": 1.0, "keywords": 0.95, "claim": 0.95, "error-message": 1.0}


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The runs of ``n`` words; none if the text is shorter."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def lcs_length(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, one step per word of ``other`` (Hyyrö 2004, bit-parallel).

    >>> lcs_length("how tall is the eiffel tower".split(), "the eiffel tower is 330 metres tall".split())
    3
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(one):
        positions[word] = positions.get(word, 0) | 1 << i
    all_bits = (1 << len(one)) - 1
    bits = all_bits  # a bit is 0 at each position at which the length grows
    for word in other:
        at = positions.get(word)
        if at is not None:
            hit = bits & at
            bits = ((bits + hit) | (bits - hit)) & all_bits
    return len(one) - bits.bit_count()


class Copied(Filter):
    """Rejects a query if more than ``max_share`` of it (0.8, or 0.9 for ``lcs``) is in the passage. The score is that share.

    ``measure`` is ``ngram`` or ``lcs``. ``ngram`` is the share of the query's word n-grams that occur in the passage: one
    minus the share of novel n-grams (See et al. 2017, arXiv 1704.04368, figure 6). ``lcs`` is the longest common
    subsequence divided by the query's words (the precision of ROUGE-L, Lin 2004, ACL W04-1013), which also finds a
    sentence with omitted words. For both, use two filters. A copied sentence teaches a retriever to match strings, which
    BM25 already does.

    A query of fewer than ``n`` words scores 0, because "eiffel tower" is a good query for a passage about it. ``by_form``
    has the thresholds of query types that copy by design, by ``lineage.strategy`` or its last part: ``typed/claim`` or
    ``claim``.

    >>> passage = "The Eiffel Tower is 330 metres tall, about the same height as an 81-storey building."
    >>> texts = ["the eiffel tower is 330 metres tall", "how tall is the eiffel tower", "eiffel tower"]
    >>> rows = [ScoredQuery(str(i), text, "d1", passage) for i, text in enumerate(texts)]
    >>> Copied().score(rows, None), Copied(measure="lcs").score(rows, None)
    ([1.0, 0.0, 0.0], [1.0, 0.5, 0.0])
    >>> Copied().keep(1.0), Copied().keep(0.5), Copied().with_thresholds_for("typed/claim", 0).keep(0.9)
    ('copied', None, None)
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # reads words of any script, with their marks
    rowwise: ClassVar[bool] = True
    finds_copies: ClassVar[bool] = True
    measure: Literal["ngram", "lcs"] = "ngram"
    n: Annotated[int, Field(ge=1)] = 4
    max_share: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Threshold()] = None
    by_form: Annotated[JsonObject, Threshold()] = FORMS

    @field_validator("by_form")
    @classmethod
    def _shares(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        for query_type, share in value.items():
            if not (isinstance(share, int | float) and 0 <= share <= 1):
                raise ConfigError(f"copied: by_form: {query_type} = {share!r}; give a share between 0 and 1")
        return value

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        scores: list[float] = []
        passage, passage_words, passage_ngrams = "", list[str](), set[tuple[str, ...]]()
        for row in rows:
            query_words = folded(row.text)
            if len(query_words) < self.n:
                scores.append(0.0)
                continue
            if row.passage != passage:  # queries of one passage are mostly adjacent
                passage, passage_words = row.passage, folded(row.passage)
                passage_ngrams = set(ngrams(passage_words, self.n)) if self.measure == "ngram" else set()
            if self.measure == "lcs":
                scores.append(lcs_length(query_words, passage_words) / len(query_words))
            else:
                query_ngrams = ngrams(query_words, self.n)
                scores.append(sum(ngram in passage_ngrams for ngram in query_ngrams) / len(query_ngrams))
        return scores

    def with_thresholds_for(self, query_type: str, passages: int) -> Filter:
        """With the threshold of the query type."""
        share = self.by_form.get(query_type, self.by_form.get(query_type.rpartition("/")[2]))
        return self if share is None else self.model_copy(update={"max_share": float(share)})

    def keep(self, score: float) -> str | None:
        return "copied" if score > (LIMITS[self.measure] if self.max_share is None else self.max_share) else None
