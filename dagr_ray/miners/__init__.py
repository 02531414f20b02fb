"""Retrievers by name: what is near a query. They mine hard negatives, check round trips, and are rows of every table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import pyarrow as pa

from dagr_ray.core.config import Config

Self = TypeVar("Self", bound="Miner")
Build = Callable[[Iterable[pa.Table], Path], None]


class Searcher(Protocol):
    """An opened index."""

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """For each query at most ``k`` (doc_id, score), best first; ties by doc_id, descending, as trec_eval breaks them."""
        ...


class Miner(Config):
    """Base of the miners. ``model`` is the folder of a fine-tuned encoder, which a miner without one ignores.

    ``part`` says how many passages one part of an index holds, in rows of a placement's shard; None for a miner that can
    only search what was built in one piece.
    """

    abstract: ClassVar[bool] = True
    part: ClassVar[int | None] = None

    def builder(self, model: Path | None = None) -> Build:
        """Loads what is heavy; returns the function that writes the index of some passages as files below a folder."""
        raise NotImplementedError

    def build(self, corpus: Iterable[pa.Table], folder: Path, model: Path | None = None) -> None:
        """Writes the index of a corpus (``corpus`` tables, part by part) as files below ``folder``."""
        self.builder(model)(corpus, folder)

    def open(self, *parts: Path, model: Path | None = None) -> Searcher:
        """Loads an index from the folders of its parts. What it finds does not depend on how it was cut."""
        raise NotImplementedError

    def settled(self: Self, language: str | None) -> Self:
        """The miner for a collection in ``language`` (ISO 639; None where that cannot be told beforehand)."""
        return self

    def read_as(self) -> str:
        """How texts are made into words, for people; empty for a miner that has no words."""
        return ""

    def objection(self, language: str | None) -> str | None:
        """Why the miner is not for a collection in ``language``; None where it is."""
        return None

    def built(self: Self) -> Self:
        """The miner without what only decides how its index is searched: all that have this in common share the index."""
        return self
