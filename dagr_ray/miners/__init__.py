"""Retrievers by name: what is near a query. They mine hard negatives, check round trips, and are rows of every table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import pyarrow as pa

from dagr_ray.config import Config


class Searcher(Protocol):
    """An opened index."""

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """For each query at most ``k`` (doc_id, score), best first; ties by doc_id, descending, as trec_eval breaks them."""
        ...


class Miner(Config):
    """Base of the miners. ``model`` is the folder of a fine-tuned encoder, which a miner without one ignores."""

    abstract: ClassVar[bool] = True

    def build(self, corpus: Iterable[pa.Table], folder: Path, model: Path | None = None) -> None:
        """Writes the index of a corpus (``corpus`` tables, part by part) as files below ``folder``."""
        raise NotImplementedError

    def open(self, folder: Path, model: Path | None = None) -> Searcher:
        """Loads an index that ``build`` wrote."""
        raise NotImplementedError
