"""Nested subsets of examples."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Annotated, ClassVar

import pyarrow as pa
from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage

log = logging.getLogger("dagr")


class Take(Stage):
    """A nested subset of mined examples: a smaller one is part of a larger one with the same seed.

    ``coverage`` keeps this share of the positive passages, ``density`` this many queries for each of them, ``n`` this many
    examples; they apply in this order. Everything is drawn by hash, so neither the order of the rows nor the number of
    workers matters. Examples are in the order drawn, so the first k rows are ``Take(n=k)``.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "take"
    rows_from: ClassVar[str] = "mined"
    outputs: ClassVar[tuple[str, ...]] = ("examples",)
    mined: Stage
    n: Annotated[int, Field(ge=1)] | None = None
    density: Annotated[int, Field(ge=1)] | None = None
    coverage: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int = 0

    def label(self) -> str:
        named = {"n": self.n, "d": self.density, "c": self.coverage}
        return "-".join(f"{name}{value:g}" for name, value in named.items() if value is not None) or "all"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            examples = inputs["mined"].read("examples")
            queries, positives = examples["query_id"].to_pylist(), examples["positive_id"].to_pylist()
            # each draw has its own key: with the corpus sample's hash it would select the same passages again
            hashes = [tables.unit_of("take", self.seed, query_id) for query_id in queries]
            order = sorted(range(len(queries)), key=lambda i: (hashes[i], queries[i], positives[i]))
            dropped = Counter[str]()
            if self.coverage is not None:
                covered = {p for p in set(positives) if tables.unit_of("coverage", self.seed, p) < self.coverage}
                dropped["coverage"] = sum(p not in covered for p in positives)
                order = [i for i in order if positives[i] in covered]
            if self.density is not None:
                counts_by_positive, size = Counter[str](), len(order)
                thinned = []
                for i in order:
                    counts_by_positive[positives[i]] += 1
                    if counts_by_positive[positives[i]] <= self.density:
                        thinned.append(i)
                order, dropped["density"] = thinned, size - len(thinned)
            if self.n is not None:
                if len(order) < self.n:
                    log.warning("take: n = %d, but there are only %d examples", self.n, len(order))
                dropped["n"] = max(len(order) - self.n, 0)
                order = order[: self.n]
            taken = examples.take(pa.array(order, pa.int64())).combine_chunks()
            short = max((self.n or 0) - len(order), 0)
            counts = {"in": len(queries), "out": len(order), "short": short, "left_out": dict(dropped)}
            return Output({"examples": taken}, counts=counts)

        return run
