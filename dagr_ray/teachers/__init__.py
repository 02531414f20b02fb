"""How relevant: a teacher gives each (query, passage) pair a score, higher is better. One file each.

Scores of one teacher compare within a query; whether they compare between queries, or have a meaning (a grade, a
probability), the teacher says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import ClassVar, NamedTuple, Protocol

from dagr_ray.core.config import Config
from dagr_ray.core.placement import Pool, PricedEngine

NO_SCORE = float("nan")
Cost = dict[str, float]


class Hit(NamedTuple):
    """Where a search put a passage: rank from 1, and the search's own score."""

    rank: int
    score: float


class Spread(NamedTuple):
    """The scores of all hits that a search had for a query."""

    mean: float
    deviation: float
    lowest: float
    highest: float


class Pair(NamedTuple):
    """A query with a passage. ``hits`` and ``spreads`` have an entry for each search: None where there was no hit."""

    query_id: str
    query: str
    doc_id: str
    passage: str
    hits: tuple[Hit | None, ...] = ()
    spreads: tuple[Spread | None, ...] = ()


class Scorer(Protocol):
    """An opened teacher. ``score`` may be called by several threads at once, each with the pairs of its own shard."""

    def score(self, pairs: Sequence[Pair], cost: Cost | None = None) -> list[float]:
        """A score for each pair, in order; ``NO_SCORE`` where there can be none. Adds what it took to ``cost``.

        All pairs of a query stand together, and all of them are given at once: a teacher may compare them.
        """
        ...

    def close(self) -> None:
        """Frees what was opened; a second call does nothing."""
        ...


class Teacher(Config):
    """Base of the teachers. ``needs_searches`` is the least number of searches whose hits it wants to see.

    ``pool`` names the placement's pool that it runs on; ``reads_heads`` says that it scores with chosen attention heads.
    """

    abstract: ClassVar[bool] = True
    pool: ClassVar[str] = "light"
    needs_searches: ClassVar[int] = 0
    reads_heads: ClassVar[bool] = False

    def open(self, pool: Pool) -> Scorer:
        """Loads what is heavy. Raises ConfigError naming cause and remedy."""
        raise NotImplementedError

    def scorer(self) -> str:
        """What the ``scores`` table calls this teacher."""
        return "-".join(part for part in (self.type, self.label()) if part)

    def engine_asked(self) -> PricedEngine | None:
        """The engine that this teacher asks; None if it asks none."""
        return None

    def with_engine(self, engine: PricedEngine) -> Teacher:
        """This teacher with another engine. Only for teachers that ask one."""
        raise NotImplementedError(f"{type(self).__name__} asks no engine")

    def check(self) -> None:
        """Raises ConfigError, before anything starts, where the teacher could not open."""


def by_query(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """The pairs of each query, in order.

    >>> [[p.doc_id for p in own] for own in by_query([Pair("q1", "", d, "") for d in "ab"] + [Pair("q2", "", "a", "")])]
    [['a', 'b'], ['a']]
    """
    return (list(own) for _, own in groupby(pairs, key=lambda pair: pair.query_id))
