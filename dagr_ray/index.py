"""Exact top-k search over vectors: blocks of a memory-mapped .npy through faiss, so that a corpus may exceed memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BLOCK_ROWS = 131072
SLACK = 32
# Scores equal to so many decimals count as a tie: the same vector scores differently by 1e-7 from block to block.
DECIMALS = 6
GPU_MAX_K = 2048
VECTORS, IDS = "vectors.npy", "ids.parquet"

Hits = list[tuple[str, float]]


def best_first(hits: Iterable[tuple[str, float]], k: int | None = None) -> Hits:
    """Hits by falling score, ties by falling doc_id, which is trec_eval's order; the first ``k``.

    >>> best_first([("a", 1.0), ("c", 1.0), ("b", 2.0)], 2)
    [('b', 2.0), ('c', 1.0)]
    """
    by_id = sorted(hits, key=lambda hit: hit[0], reverse=True)
    return sorted(by_id, key=lambda hit: -hit[1])[:k]


class VectorWriter:
    """Appends vectors to a folder: ``vectors.npy`` [n, dimension] and ``ids.parquet`` in the same order.

    A context manager; the number of rows is written into the header of the .npy at the end.
    """

    def __init__(self, folder: Path, dimension: int, dtype: str = "float32") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.dimension, self.dtype, self.rows = dimension, np.dtype(dtype), 0
        self._schema = pa.schema([pa.field("doc_id", pa.large_string(), nullable=False)])
        self._file = open(folder / VECTORS, "wb")
        self._ids = pq.ParquetWriter(folder / IDS, self._schema)
        self._write_header()

    def _write_header(self) -> None:
        # numpy leaves room in the header for the first dimension to grow, so this one is as long as the last
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
    """Vectors [n, dimension] (an array or a memory map) with their ids. Scores are inner products."""

    def __init__(self, ids: Sequence[str] | pa.ChunkedArray, vectors: np.ndarray) -> None:
        assert len(ids) == len(vectors), f"{len(ids)} ids for {len(vectors)} vectors"
        self.ids = ids if isinstance(ids, pa.ChunkedArray) else pa.chunked_array([pa.array(ids, pa.large_string())])
        self.vectors = vectors

    @classmethod
    def open(cls, folder: Path) -> VectorIndex:
        """The index that a VectorWriter wrote; the vectors stay on disk."""
        ids = pq.read_table(folder / IDS)["doc_id"]
        # a memory map of no rows is refused by the operating system
        return cls(ids, np.load(folder / VECTORS, mmap_mode="r" if len(ids) else None))

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: np.ndarray, k: int) -> list[Hits]:
        """For each row of ``queries`` [m, dimension] the ``k`` nearest, best first, ties by falling doc_id.

        Exact also where a tie spans the cut: such a query is searched again, deeper, until the tie ends.
        """
        k = min(k, len(self))
        if k < 1 or not len(queries):
            return [[] for _ in queries]
        found: list[Hits] = [[] for _ in queries]
        pending, depth = np.arange(len(queries)), min(k + SLACK, len(self))
        while len(pending):
            scores, rows = self._nearest(queries[pending], depth)
            scores = np.round(scores, DECIMALS)
            cut_in_tie = scores[:, k - 1] == scores[:, -1] if depth < len(self) else np.zeros(len(pending), bool)
            unique, inverse = np.unique(rows[~cut_in_tie], return_inverse=True)
            names = np.array(self.ids.take(pa.array(unique)).to_pylist(), dtype=object)[inverse].reshape(-1, depth)
            for query, ids, values in zip(pending[~cut_in_tie], names, scores[~cut_in_tie].tolist(), strict=True):
                found[query] = best_first(zip(ids, values, strict=True), k)
            pending, depth = pending[cut_in_tie], min(depth * 4, len(self))
        return found

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows [m, k] of the nearest vectors, best first, block by block."""
        queries = np.ascontiguousarray(queries, np.float32)
        best, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for start in range(0, len(self), BLOCK_ROWS):
            block = np.ascontiguousarray(self.vectors[start : start + BLOCK_ROWS], np.float32)
            near, where = _knn(queries, block, min(k, len(block)))
            best, rows = np.hstack([best, near]), np.hstack([rows, where + start])
            order = np.argsort(-best, axis=1, kind="stable")[:, :k]
            best, rows = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
        return best, rows


def _knn(queries: np.ndarray, block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    if k <= GPU_MAX_K and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        return faiss.knn_gpu(_gpu(faiss), queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    return faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)


_resources: list[Any] = []


def _gpu(faiss: Any) -> Any:
    # faiss sets aside scratch memory on the GPU with each of these objects, so a process has one
    if not _resources:
        _resources.append(faiss.StandardGpuResources())
    return _resources[0]
