"""Training pairs of several sources as one set: people's and generated ones, or those of several corpora' generators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray import tables
from dagr_ray.artifact import Artifact
from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError
from dagr_ray.stage import Inputs, Output, Run, Stage


class Human(Stage):
    """The relevant pairs of ``data``'s split ``split``, as queries that were selected: what ``Mine`` and ``LeakGate`` read.

    ``n`` draws so many pairs by hash, smaller draws inside larger ones; a query comes with all of its pairs that are
    drawn. The pairs have no lineage. Raises ConfigError where the split is not there.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage")
    judged: ClassVar[dict[str, str]] = {"data": "split"}
    data: Stage
    split: str = "train"
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0

    def label(self) -> str:
        return self.split

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            data = inputs["data"]
            judged = tables.relevant(data.read(tables.judgements(data.table_names(), self.split, "human", data.name)))
            order = _drawn(judged["query_id"].to_pylist(), judged["doc_id"].to_pylist(), self.seed)[: self.n]
            qrels = judged.take(pa.array(sorted(order), pa.int64()))
            queries = data.read("queries")
            queries = queries.filter(pc.is_in(queries["query_id"], value_set=qrels["query_id"].unique()))
            made = {"queries": queries, "qrels": qrels, "lineage": tables.empty("lineage")}
            return Output(made, counts={"in": judged.num_rows, "out": qrels.num_rows})

        return run


class Blend(Stage):
    """The ``examples`` of several sources as one set, by weight; ``queries[i]`` holds the queries of ``examples[i]``.

    ``n`` examples in all, of which source ``i`` gives its share of ``weights``. Without weights, a source of ``m``
    examples weighs ``m ** (1 / temperature)``: at 1 by size, above 1 small sources more than their size (Arivazhagan et
    al. 2019, arXiv 1907.05019, section 4). Without ``n``, as many as the weights allow. Drawn by hash and dealt out in
    turn (Webster's method), so a smaller set lies inside a larger one of the same sources and weights. A source that has
    too few gives all it has, and ``short`` counts what is missing: the others do not make it up, because then the weights
    would not be those that were asked for.

    What comes out is for ``Train(examples=blend, queries=blend)``; the sources' passages are of one corpus. ``qrels`` holds
    the positives, ``lineage`` that of the queries which have one. Raises ConfigError where one id is two different queries.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("examples", "queries", "qrels", "lineage")
    examples: Annotated[tuple[Stage, ...], Field(min_length=1)]
    queries: Annotated[tuple[Stage, ...], Field(min_length=1)]
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> Blend:
        if len(self.queries) != len(self.examples):
            raise ConfigError(
                f"blend: {len(self.examples)} examples and {len(self.queries)} queries; give a queries stage for each"
            )
        if self.weights is not None and (len(self.weights) != len(self.examples) or not sum(self.weights)):
            raise ConfigError(
                f"blend: weights = {self.weights} for {len(self.examples)} sources; give one each, not all of them 0"
            )
        if self.weights is not None and self.temperature != 1:
            raise ConfigError(
                f"blend: temperature = {self.temperature} means nothing where weights are given; leave one of them out"
            )
        return self

    def label(self) -> str:
        return f"{len(self.examples)}sources-{self.n or 'all'}"

    def wanted(self, there: Sequence[int]) -> list[int]:
        """Examples to take of each source, of which there are so many.

        >>> from dagr_ray.stages.pairs import Topics
        >>> two = (Topics(n=1), Topics(n=2))
        >>> def of(**fields): return Blend(examples=two, queries=two, **fields).wanted([900, 100])
        >>> of(n=100), of(n=100, temperature=2), of(n=100, weights=(1, 1)), of(weights=(1, 3)), of()
        ([90, 10], [75, 25], [50, 50], [33, 100], [900, 100])
        """
        weights = np.array(self.weights or [count ** (1 / self.temperature) if count else 0 for count in there], float)
        if not weights.sum():
            return [0] * len(there)
        share = weights / weights.sum()
        total = self.n
        if total is None:
            total = int(min(t / s for t, s in zip(there, share, strict=True) if s) + 1e-9)
        return _dealt(share, total)

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            sources = [inputs[f"examples.{i}"].read("examples") for i in range(len(self.examples))]
            wanted = self.wanted([rows.num_rows for rows in sources])
            taken, drawn = [], []
            for rows, k in zip(sources, wanted, strict=True):
                order = _drawn(rows["query_id"].to_pylist(), rows["positive_id"].to_pylist(), self.seed)[:k]
                drawn.append(rows.take(pa.array(order, pa.int64())))
                taken.append(len(order))
            examples = pa.concat_tables(drawn)
            queries, lineage = _Queries(), [tables.empty("lineage")]
            for i, rows in enumerate(drawn):
                source = inputs[f"queries.{i}"]
                ids = rows["query_id"].unique()
                queries.add(source, ids)
                if "lineage" in source.table_names():
                    own = source.read("lineage")
                    lineage.append(own.filter(pc.is_in(own["id"], value_set=ids)))
            # in the order drawn over all sources, so that the first k rows are about the blend of k
            mixed = _drawn(examples["query_id"].to_pylist(), examples["positive_id"].to_pylist(), self.seed)
            examples = examples.take(pa.array(mixed, pa.int64())).combine_chunks()
            pairs = examples.group_by(["query_id", "positive_id"], use_threads=False).aggregate([])
            made = {
                "examples": examples,
                "queries": queries.table(),
                "qrels": tables.columns(
                    "qrels", pairs.num_rows, query_id=pairs["query_id"], doc_id=pairs["positive_id"], relevance=1
                ),
                "lineage": pa.concat_tables(lineage),
            }
            counts = {
                "in": sum(rows.num_rows for rows in sources),
                "out": sum(taken),
                "short": sum(wanted) - sum(taken),
                "taken": {f"{i}-{self.examples[i].folder_name()}": k for i, k in enumerate(taken)},
            }
            return Output(made, counts=counts)

        return run


def _dealt(share: np.ndarray, total: int) -> list[int]:
    """``total`` seats by Webster's method (Sainte-Lague): one more in all never takes one from anybody."""
    # rounding is Webster's for some number of seats near the total; a hair below, so that only the turns decide on ties
    seats = np.floor(share * total + 0.5 - 1e-9).astype(int)
    while seats.sum() < total:
        seats[np.argmax(share / (seats + 0.5))] += 1
    while seats.sum() > total:
        last = np.where(seats > 0, share / np.maximum(seats - 0.5, 0.5), np.inf)
        seats[len(seats) - 1 - np.argmin(last[::-1])] -= 1
    return [int(k) for k in seats]


def _drawn(query_ids: Sequence[str], doc_ids: Sequence[str], seed: int) -> list[int]:
    """Places in the order of a hash of what stands there."""
    hashes = [tables.unit_of("blend", seed, *ids) for ids in zip(query_ids, doc_ids, strict=True)]
    return sorted(range(len(hashes)), key=lambda i: (hashes[i], query_ids[i], doc_ids[i]))


class _Queries:
    """Queries of several sources, each id once."""

    def __init__(self) -> None:
        self.text_of: dict[str, str] = {}
        self.source_of: dict[str, str] = {}

    def add(self, source: Artifact, ids: pa.ChunkedArray) -> None:
        """Those of ``ids``. Raises ConfigError where an id is there with another text."""
        rows = source.read("queries")
        found = tables.texts_of(rows.filter(pc.is_in(rows["query_id"], value_set=ids)))
        missing = next((each for each in ids.to_pylist() if each not in found), None)
        if missing is not None:
            raise ConfigError(
                f"blend: {source.name} has no query {missing!r}; give the queries that the examples are of"
            )
        for query_id, text in found.items():
            if self.text_of.setdefault(query_id, text) != text:
                raise ConfigError(
                    f"blend: {query_id!r} is one query in {self.source_of[query_id]} and another in {source.name}; "
                    "give sources whose ids differ"
                )
            self.source_of.setdefault(query_id, source.name)

    def table(self) -> pa.Table:
        return tables.columns(
            "queries", len(self.text_of), query_id=list(self.text_of), text=list(self.text_of.values())
        )
