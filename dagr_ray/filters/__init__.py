"""Filters: each scores generated queries once; decisions on the stored scores can change at any time. One file each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dagr_ray.core.config import Config
from dagr_ray.moved import rename_methods

Table = Literal["", "candidates", "scores", "generations"]


class ScoredQuery(NamedTuple):
    """A generated query with its source passage. ``passage`` is empty if the filter does not need it."""

    query_id: str
    text: str
    doc_id: str
    passage: str


class Filter(Config):
    """Base of the filters. Mark fields that only decide on stored scores as ``Annotated[..., Threshold()]``.

    ``reads`` is the table that ``score`` needs besides the queries: the ``candidates`` of a search, the ``scores`` of a
    teacher, or the ``generations``. A ``rowwise`` filter computes a row's score from the row and its own rows of that
    table only, so any number of rows is scored in shards of constant memory. ``needs_passage`` tells whether ``score``
    reads passages.
    """

    abstract: ClassVar[bool] = True
    reads: ClassVar[Table] = ""
    rowwise: ClassVar[bool] = False
    needs_passage: ClassVar[bool] = True
    finds_copies: ClassVar[bool] = False  # rejects queries that are copies of their passages
    streams: ClassVar[bool] = False  # has `score_stream`: compares all queries, and holds none of them
    best: ClassVar[Literal["high", "low"]] = "high"  # the scores that ``room`` is for

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = {
            "settled": "with_thresholds_for",
            "needs_corpus_size": "needs_corpus_size",
            "room": "quota",
            "mend": "rewrite",
        }
        rename_methods(cls, names)

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        """A score for each row, in order. ``rows`` are all rows of the stage unless the filter is ``rowwise``.

        ``search`` is the table that the filter ``reads``; of ``generations`` it has (query_id, logprob) for each query.
        """
        raise NotImplementedError

    def score_stream(self, queries: Callable[[], Iterable[pa.Table]], rows: int) -> npt.NDArray[np.float32]:
        """A score for each of ``rows`` queries. Each call of ``queries()`` iterates over their tables again, in order."""
        raise NotImplementedError

    def keep(self, score: float) -> str | None:
        """None to keep the query, otherwise the reason to reject it. Pure and cheap."""
        raise NotImplementedError

    def with_thresholds_for(self, query_type: str, passages: int) -> Filter:
        """The filter with the thresholds for one query type (``lineage.strategy``) and a corpus of ``passages``.

        ``passages`` is 0 unless the filter ``needs_corpus_size``.
        """
        return self

    @property
    def needs_corpus_size(self) -> bool:
        """Whether ``with_thresholds_for`` needs the number of passages."""
        return False

    def quota(self, rows: int) -> int | None:
        """How many rows to keep of the ``rows`` that pass all filters up to this one, by ``best`` score; None for all."""
        return None

    def rewrite(self, text: str, score: float) -> tuple[str, str] | None:
        """A replacement for a kept text, and a description of the change; None to keep the text. Pure and cheap."""
        return None
