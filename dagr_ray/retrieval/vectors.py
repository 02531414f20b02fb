"""Vectors on disk with their ids. Exact search reads them block by block, so a corpus may exceed memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dagr_ray.retrieval.exact_search import Nearest

BLOCK_ROWS = 131072
VECTORS, IDS = "vectors.npy", "ids.parquet"

Ranking = list[tuple[str, float]]


def best_first(hits: Iterable[tuple[str, float]], k: int | None = None) -> Ranking:
    """The first ``k`` hits by descending score, ties by descending doc_id, which is trec_eval's order.

    >>> best_first([("a", 1.0), ("c", 1.0), ("b", 2.0)], 2)
    [('b', 2.0), ('c', 1.0)]
    """
    by_id = sorted(hits, key=lambda hit: hit[0], reverse=True)
    return sorted(by_id, key=lambda hit: -hit[1])[:k]


class VectorWriter:
    """Appends vectors to a folder: ``vectors.npy`` [n, dimension] and ``ids.parquet`` in the same order.

    A context manager. The number of rows is written into the header of the .npy file at the end.
    """

    def __init__(self, folder: Path, dimension: int, dtype: str = "float32") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.dimension, self.dtype, self.rows = dimension, np.dtype(dtype), 0
        self._schema = pa.schema([pa.field("doc_id", pa.large_string(), nullable=False)])
        self._file = open(folder / VECTORS, "wb")
        self._ids = pq.ParquetWriter(folder / IDS, self._schema)
        self._write_header()

    def _write_header(self) -> None:
        # numpy reserves space in the header for a larger first dimension, so both headers have the same length
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, self.dimension)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def add(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Appends rows; ``vectors`` is [len(ids), dimension]."""
        assert vectors.shape == (len(ids), self.dimension), f"{vectors.shape} for {len(ids)} ids"
        self._file.write(np.ascontiguousarray(vectors, self.dtype).tobytes())
        self._ids.write_table(pa.table({"doc_id": pa.array(ids, pa.large_string())}, schema=self._schema))
        self.rows += len(ids)

    def __enter__(self) -> VectorWriter:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()
        self._ids.close()


class VectorIndex:
    """Vectors [n, dimension] in one or more parts (arrays or memory maps), with their ids. Scores are inner products."""

    def __init__(self, ids: Sequence[str] | pa.ChunkedArray, *parts: np.ndarray) -> None:
        self.ids = ids if isinstance(ids, pa.ChunkedArray) else pa.chunked_array([pa.array(ids, pa.large_string())])
        self.parts = [part for part in parts if len(part)]
        self.starts = np.cumsum([0, *map(len, self.parts)])
        assert len(self.ids) == self.starts[-1], f"{len(self.ids)} ids for {self.starts[-1]} vectors"

    @classmethod
    def open(cls, *folders: Path) -> VectorIndex:
        """The index that VectorWriters wrote into these folders, one after the other. The vectors stay on disk."""
        ids = [pq.read_table(folder / IDS)["doc_id"] for folder in folders]
        chunks = [chunk for column in ids for chunk in column.chunks]
        # the operating system refuses an empty memory map
        filled = [folder for folder, column in zip(folders, ids, strict=True) if len(column)]
        parts = [np.load(folder / VECTORS, mmap_mode="r") for folder in filled]
        return cls(pa.chunked_array(chunks, pa.large_string()), *parts)

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self, step: int | None = None) -> Iterator[np.ndarray]:
        """All vectors in order as float32, ``step`` (default BLOCK_ROWS) at once."""
        step = step or BLOCK_ROWS
        for start in range(0, len(self), step):
            yield self.rows(start, min(start + step, len(self)))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """A float32 copy of the vectors ``start`` to ``stop``."""
        vectors, first = np.empty((stop - start, self.parts[0].shape[1]), np.float32), start
        while first < stop:
            part = int(np.searchsorted(self.starts, first, side="right")) - 1
            last = min(stop, int(self.starts[part + 1]))
            inside = slice(first - int(self.starts[part]), last - int(self.starts[part]))
            vectors[first - start : last - start] = self.parts[part][inside]
            first = last
        return vectors

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of any rows as float32 [len(rows), dimension]."""
        vectors = np.empty((len(rows), self.parts[0].shape[1]), np.float32)
        part_of = np.searchsorted(self.starts, rows, side="right") - 1
        for part in np.unique(part_of):
            inside = part_of == part
            vectors[inside] = self.parts[part][rows[inside] - self.starts[part]]
        return vectors

    def names(self, rows: np.ndarray) -> pa.ChunkedArray:
        """The ids of rows."""
        return self.ids.take(pa.array(rows))

    def search(self, queries: np.ndarray, k: int) -> list[Ranking]:
        """Exact search: for each row of ``queries`` [m, dimension] the ``k`` nearest, ties by descending doc_id."""
        k = min(k, len(self))
        if k < 1 or not len(queries):
            return [[] for _ in queries]
        nearest = Nearest(queries, k, self.names)
        for block in self.blocks():
            nearest.add(block)
        return self.hits(len(queries), *nearest.best())

    def hits(self, count: int, queries: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> list[Ranking]:
        """The ranking of each of ``count`` queries, from entries that are sorted by query."""
        entries = list(zip(self.names(rows).to_pylist(), scores.tolist(), strict=True))
        ends = np.searchsorted(queries, np.arange(count + 1)).tolist()
        return [entries[start:stop] for start, stop in pairwise(ends)]
