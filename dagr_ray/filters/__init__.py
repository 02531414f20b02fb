"""Is it good: a filter scores generated queries once, and decides on the stored score at will. One file each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from dagr_ray.config import Config

_CJK = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each character counts as a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


def words(text: str) -> list[str]:
    """The words of a text, without signs and spaces: what the filters count and compare."""
    return _WORD.findall(text)


@dataclass(frozen=True)
class Candidate:
    """A generated query with the passage that it was written for."""

    query_id: str
    text: str
    doc_id: str
    passage: str


class Filter(Config):
    """Base of the filters. Fields that only ``keep`` reads are marked ``Annotated[..., Threshold()]``.

    ``needs_search`` says that ``score`` wants the candidates that a search returned for the queries.
    """

    abstract: ClassVar[bool] = True
    needs_search: ClassVar[bool] = False

    def score(self, rows: Sequence[Candidate], search: pa.Table | None) -> list[float]:
        """A score for each row, in order. Sees all rows of the stage at once. ``search`` is a ``candidates`` table."""
        raise NotImplementedError

    def keep(self, score: float) -> str | None:
        """None to keep, else the reason of the rejection. Pure and cheap."""
        raise NotImplementedError
