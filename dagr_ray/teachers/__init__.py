"""Teachers: each scores (query, passage) pairs, higher is better. One file each.

Scores of one teacher compare within a query. A teacher's docstring states if they also compare between queries, or have
a meaning (a grade, a probability).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import ClassVar, NamedTuple, Protocol

from dagr_ray.core.config import Config
from dagr_ray.core.placement import Pool, PricedEngine

NO_SCORE = float("nan")
Cost = dict[str, float]


class SearchHit(NamedTuple):
    """A passage in the results of a search: its rank from 1, and the search's score."""

    rank: int
    score: float


class ScoreSpread(NamedTuple):
    """Statistics of the scores of all hits that a search returned for a query."""

    mean: float
    deviation: float
    lowest: float
    highest: float


class QueryPassage(NamedTuple):
    """A query with a passage. ``hits`` and ``spreads`` have one entry for each search; None means no hit."""

    query_id: str
    query: str
    doc_id: str
    passage: str
    hits: tuple[SearchHit | None, ...] = ()
    spreads: tuple[ScoreSpread | None, ...] = ()


class Scorer(Protocol):
    """An opened teacher. ``score`` may be called by several threads at once, each with the pairs of its own shard."""

    def score(self, pairs: Sequence[QueryPassage], cost: Cost | None = None) -> list[float]:
        """A score for each pair, in order; ``NO_SCORE`` if a pair cannot be scored. Adds its usage to ``cost``.

        All pairs of a query are adjacent and in the same call, because a teacher may compare them.
        """
        ...

    def close(self) -> None:
        """Frees all resources; a second call does nothing."""
        ...


class Teacher(Config):
    """Base of the teachers. ``needs_searches`` is the least number of searches whose hits it needs.

    ``pool`` is the name of the placement's pool that it runs on; ``reads_heads`` tells that it scores with selected
    attention heads.
    """

    abstract: ClassVar[bool] = True
    pool: ClassVar[str] = "light"
    needs_searches: ClassVar[int] = 0
    reads_heads: ClassVar[bool] = False

    def open(self, pool: Pool) -> Scorer:
        """Loads the model. Raises ConfigError with cause and remedy."""
        raise NotImplementedError

    def scorer(self) -> str:
        """The name of this teacher in the ``scores`` table."""
        return "-".join(part for part in (self.type, self.label()) if part)

    def engine_asked(self) -> PricedEngine | None:
        """The engine that this teacher uses; None if it uses none."""
        return None

    def with_engine(self, engine: PricedEngine) -> Teacher:
        """This teacher with another engine. Only for teachers that use one."""
        raise NotImplementedError(f"{type(self).__name__} uses no engine")

    def check(self) -> None:
        """Raises ConfigError, before anything starts, if the teacher cannot open."""


def by_query(pairs: Sequence[QueryPassage]) -> Iterator[list[QueryPassage]]:
    """The pairs of each query, in order.

    >>> pairs = [QueryPassage(query_id, "", doc_id, "") for query_id, doc_id in ("1a", "1b", "2a")]
    >>> [[pair.doc_id for pair in group] for group in by_query(pairs)]
    [['a', 'b'], ['a']]
    """
    return (list(own) for _, own in groupby(pairs, key=lambda pair: pair.query_id))
