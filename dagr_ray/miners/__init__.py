"""Miners: first-stage retrievers. They mine hard negatives, check round trips, and are baselines in every table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import pyarrow as pa

from dagr_ray.core.config import Config
from dagr_ray.moved import rename_methods

Self = TypeVar("Self", bound="Miner")
Build = Callable[[Iterable[pa.Table], Path], None]


class Searcher(Protocol):
    """An opened index."""

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """For each query at most ``k`` (doc_id, score), best first; ties by descending doc_id, like trec_eval."""
        ...


class Miner(Config):
    """Base of the miners. ``model`` is the folder of a fine-tuned encoder; miners without an encoder ignore it.

    ``shards_per_part`` is the size of one part of an index, in shards of the placement. None means that the index must be
    built in one part.
    """

    abstract: ClassVar[bool] = True
    shards_per_part: ClassVar[int | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = {"settled": "for_language", "read_as": "describe_analyzer", "objection": "language_mismatch"}
        rename_methods(cls, names | {"built": "index_settings", "part": "shards_per_part"})

    def builder(self, model: Path | None = None) -> Build:
        """Loads the model or library; returns the function that writes the index of passages as files below a folder."""
        raise NotImplementedError

    def build(self, corpus: Iterable[pa.Table], folder: Path, model: Path | None = None) -> None:
        """Writes the index of a corpus (``corpus`` tables, part by part) as files below ``folder``."""
        self.builder(model)(corpus, folder)

    def open(self, *parts: Path, model: Path | None = None) -> Searcher:
        """Loads an index from the folders of its parts. The results do not depend on the partition."""
        raise NotImplementedError

    def for_language(self: Self, language: str | None) -> Self:
        """The miner for a collection in ``language`` (ISO 639; None if the language is not known yet)."""
        return self

    def describe_analyzer(self) -> str:
        """A description of how texts are split into words; empty if the miner does not use words."""
        return ""

    def language_mismatch(self, language: str | None) -> str | None:
        """Why the miner does not fit a collection in ``language``; None if it does."""
        return None

    def index_settings(self: Self) -> Self:
        """The miner without the settings that only affect searching. Miners that are equal in this share one index."""
        return self
