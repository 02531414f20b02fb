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
    """A subset of mined examples by volume, nested: a smaller one lies inside a larger one of the same seed.

    ``coverage`` keeps that share of the positive passages, ``density`` that many queries for each of them, ``n`` that
    many examples; in this order where several are set. All is drawn by hash, so neither the order of the rows nor the
    number of workers matters. Examples stand in the order drawn, so the first k rows are ``Take(n=k)``.
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
            # each draw has a name: a hash shared with the sampling of the corpus would draw the same passages again
            drawn = [tables.unit_of("take", self.seed, query_id) for query_id in queries]
            order = sorted(range(len(queries)), key=lambda i: (drawn[i], queries[i], positives[i]))
            left_out = Counter[str]()
            if self.coverage is not None:
                inside = {p for p in set(positives) if tables.unit_of("coverage", self.seed, p) < self.coverage}
                left_out["coverage"] = sum(p not in inside for p in positives)
                order = [i for i in order if positives[i] in inside]
            if self.density is not None:
                taken, before = Counter[str](), len(order)
                dense = []
                for i in order:
                    taken[positives[i]] += 1
                    if taken[positives[i]] <= self.density:
                        dense.append(i)
                order, left_out["density"] = dense, before - len(dense)
            if self.n is not None:
                if len(order) < self.n:
                    log.warning("take: n = %d, but only %d examples are there", self.n, len(order))
                left_out["n"] = max(len(order) - self.n, 0)
                order = order[: self.n]
            made = examples.take(pa.array(order, pa.int64())).combine_chunks()
            short = max((self.n or 0) - len(order), 0)
            counts = {"in": len(queries), "out": len(order), "short": short, "left_out": dict(left_out)}
            return Output({"examples": made}, counts=counts)

        return run
