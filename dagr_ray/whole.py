"""The pass of a filter over a whole data set, below the scores that are cut from it shard by shard."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.artifact import Artifact
from dagr_ray.cluster import Pool
from dagr_ray.filters import Filter
from dagr_ray.stage import Inputs, Output, Run, Stage

SCORES = "scores.npy"


class Whole(Stage):
    """The scores of a filter that ``streams``, float32 in the order of the queries: ``scores.npy``.

    In one piece, because all queries are compared; they are read part by part, as often as the filter likes.
    Thresholds are no part of the fingerprint.
    """

    abstract: ClassVar[bool] = False
    pool: ClassVar[str] = "retrieve"
    outputs: ClassVar[tuple[str, ...]] = ()
    queries: Stage
    filter: Filter

    def label(self) -> str:
        return self.filter.type

    def identity(self) -> dict[str, Any]:
        """The filter by what decides its scores."""
        return super().identity() | {"filter": self.filter.scoring_identity()}

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def parts() -> Iterator[pa.Table]:
            return inputs["queries"].scan("queries")

        def run(start: int, stop: int) -> Output:
            rows = inputs["queries"].count("queries")
            scores = self.filter.score_stream(parts, rows)
            assert scores.shape == (rows,), f"{self.filter.type} gave {scores.shape} scores for {rows} queries"
            written = io.BytesIO()
            np.save(written, scores.astype(np.float32, copy=False))
            folder.write_bytes(SCORES, pa.py_buffer(written.getbuffer()))
            return Output({}, [SCORES], {"in": rows, "out": rows})

        return run


def of(queries: Artifact, whole: Artifact, ids: pa.ChunkedArray, start: int) -> np.ndarray:
    """The scores, float32, of some queries by id. They are looked for from row ``start`` on, where they mostly stand."""
    stored = np.load(whole.local_path(SCORES), mmap_mode="r" if queries.count("queries") else None)
    if queries.slice("queries", start, start + len(ids), ["query_id"])["query_id"].equals(ids):
        return np.array(stored[start : start + len(ids)])
    place = pc.index_in(ids, value_set=queries.read("queries", ["query_id"])["query_id"])
    return np.array(stored[place.to_numpy()])
