"""Is it good: a filter scores generated queries once, and decides on the stored score at will. One file each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dagr_ray.core.config import Config

Table = Literal["", "candidates", "scores", "generations"]


class Candidate(NamedTuple):
    """A generated query with the passage that it was written for; no passage where the filter does not read it."""

    query_id: str
    text: str
    doc_id: str
    passage: str


class Filter(Config):
    """Base of the filters. Fields that decide on stored scores alone are marked ``Annotated[..., Threshold()]``.

    ``reads`` is the table besides the queries that ``score`` wants: the ``candidates`` of a search, the ``scores`` of a
    teacher, or the ``generations``. ``rowwise`` promises that a row's score depends on nothing but the row and what is
    read for its query, so that any number of rows is scored in shards of flat memory; ``needs_passage`` that ``score`` looks
    at passages.
    """

    abstract: ClassVar[bool] = True
    reads: ClassVar[Table] = ""
    rowwise: ClassVar[bool] = False
    needs_passage: ClassVar[bool] = True
    finds_copies: ClassVar[bool] = False  # rejects queries that are copies of their passages
    streams: ClassVar[bool] = False  # has `score_stream`: compares all queries, and holds none of them
    best: ClassVar[Literal["high", "low"]] = "high"  # the scores that ``room`` is for

    def score(self, rows: Sequence[Candidate], search: pa.Table | None) -> list[float]:
        """A score for each row, in order; all rows of the stage at once unless ``rowwise``. ``search`` is what it ``reads``.

        Of ``generations`` it is given (query_id, logprob), one row for each query.
        """
        raise NotImplementedError

    def score_stream(self, queries: Callable[[], Iterable[pa.Table]], rows: int) -> npt.NDArray[np.float32]:
        """A score for each of ``rows`` queries; ``queries()`` gives their tables anew, part by part, in order."""
        raise NotImplementedError

    def keep(self, score: float) -> str | None:
        """None to keep, else the reason of the rejection. Pure and cheap."""
        raise NotImplementedError

    def settled(self, form: str, passages: int) -> Filter:
        """The filter that holds for queries of one ``form`` (``lineage.strategy``), written for a corpus of ``passages``.

        ``passages`` is 0 unless the filter is ``by_size``.
        """
        return self

    @property
    def by_size(self) -> bool:
        """Whether ``settled`` wants to know the size of the corpus."""
        return False

    def room(self, rows: int) -> int | None:
        """How many of ``rows`` rows, which all filters up to this one keep, may stay: those with the ``best`` scores."""
        return None

    def mend(self, text: str, score: float) -> tuple[str, str] | None:
        """What replaces a text that is kept, and what was done to it; None where the text stays. Pure and cheap."""
        return None
