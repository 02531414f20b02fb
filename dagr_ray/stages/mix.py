"""Mixes several sources into one training set: queries of several generators, or training pairs of several sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage


class HumanPairs(Stage):
    """The relevant pairs of ``data``'s split ``split``, in the form of selected queries, as ``Mine`` and ``LeakGate`` read them.

    ``n`` draws this many pairs by hash, smaller draws inside larger ones; a query comes with all of its drawn pairs. The
    pairs have no lineage. Raises ConfigError if the split does not exist.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "human"
    rows_from: ClassVar[str] = "data"
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
            relevant = tables.relevant(data.qrels(self.split, self.type))
            order = _drawn(relevant["query_id"].to_pylist(), relevant["doc_id"].to_pylist(), self.seed)[: self.n]
            qrels = relevant.take(pa.array(sorted(order), pa.int64()))
            queries = data.read("queries")
            queries = queries.filter(pc.is_in(queries["query_id"], value_set=qrels["query_id"].unique()))
            output = {"queries": queries, "qrels": qrels, "lineage": tables.empty("lineage")}
            return Output(output, counts={"in": relevant.num_rows, "out": qrels.num_rows})

        return run


class MixExamples(Stage):
    """The ``examples`` of several sources as one set, by weight; ``queries[i]`` holds the queries of ``examples[i]``.

    Of ``n`` examples, source ``i`` contributes its share of ``weights``. Without weights, a source of ``m`` examples has
    the weight ``m ** (1 / temperature)``: proportional to size at 1; above 1, small sources get more (Arivazhagan et al.
    2019, arXiv 1907.05019, section 4). Without ``n``, as many as the weights allow. Examples are drawn by hash and places
    are shared out by ``apportion``, so a smaller set is part of a larger one of the same sources and weights. A source
    that is too small contributes all it has, and ``short`` counts what is missing. Other sources do not fill in, because
    that would change the weights.

    Use the result as ``Train(examples=mix, queries=mix)``; the sources' passages are of one corpus. ``qrels`` holds the
    positives, ``lineage`` the lineage of queries that have one. Raises ConfigError if one id names two different queries.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "mix"
    rows_from: ClassVar[str] = "queries"
    outputs: ClassVar[tuple[str, ...]] = ("examples", "queries", "qrels", "lineage")
    examples: Annotated[tuple[Stage, ...], Field(min_length=1)]
    queries: Annotated[tuple[Stage, ...], Field(min_length=1)]
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> MixExamples:
        if len(self.queries) != len(self.examples):
            raise ConfigError(
                f"mix-examples: {len(self.examples)} examples and {len(self.queries)} queries; give a queries stage for each"
            )
        if self.weights is not None and (len(self.weights) != len(self.examples) or not sum(self.weights)):
            raise ConfigError(
                f"mix-examples: weights = {self.weights} for {len(self.examples)} sources; give one each, not all of them 0"
            )
        if self.weights is not None and self.temperature != 1:
            raise ConfigError(
                f"mix-examples: temperature = {self.temperature} has no effect with weights; remove one of them"
            )
        return self

    def label(self) -> str:
        return f"{len(self.examples)}sources-{self.n or 'all'}"

    def shares(self, sizes: Sequence[int]) -> list[int]:
        """The number of examples from each source, for sources of these ``sizes``.

        >>> from dagr_ray.stages.pairs import Topics
        >>> two = (Topics(n=1), Topics(n=2))
        >>> def of(**fields): return MixExamples(examples=two, queries=two, **fields).shares([900, 100])
        >>> of(n=100), of(n=100, temperature=2), of(n=100, weights=(1, 1)), of(weights=(1, 3)), of()
        ([90, 10], [75, 25], [50, 50], [33, 100], [900, 100])
        """
        weights = self.weights or [count ** (1 / self.temperature) if count else 0 for count in sizes]
        if not sum(weights):
            return [0] * len(sizes)
        return apportion(weights, self.n or _most(weights, sizes))

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            sources = [inputs[f"examples.{i}"].read("examples") for i in range(len(self.examples))]
            shares = self.shares([rows.num_rows for rows in sources])
            sizes, samples = [], []
            for rows, share in zip(sources, shares, strict=True):
                order = _drawn(rows["query_id"].to_pylist(), rows["positive_id"].to_pylist(), self.seed)[:share]
                samples.append(rows.take(pa.array(order, pa.int64())))
                sizes.append(len(order))
            examples = pa.concat_tables(samples)
            queries, lineage = _Queries(), [tables.empty("lineage")]
            for i, rows in enumerate(samples):
                source = inputs[f"queries.{i}"]
                ids = rows["query_id"].unique()
                queries.add(source, ids)
                if "lineage" in source.table_names():
                    lineage_rows = source.read("lineage")
                    lineage.append(lineage_rows.filter(pc.is_in(lineage_rows["id"], value_set=ids)))
            # in hash order over all sources, so that the first k rows approximate the mixture of k
            mixed = _drawn(examples["query_id"].to_pylist(), examples["positive_id"].to_pylist(), self.seed)
            examples = examples.take(pa.array(mixed, pa.int64())).combine_chunks()
            pairs = examples.group_by(["query_id", "positive_id"], use_threads=False).aggregate([])
            output = {
                "examples": examples,
                "queries": queries.table(),
                "qrels": tables.columns(
                    "qrels", pairs.num_rows, query_id=pairs["query_id"], doc_id=pairs["positive_id"], relevance=1
                ),
                "lineage": pa.concat_tables(lineage),
            }
            counts = {
                "in": sum(rows.num_rows for rows in sources),
                "out": sum(sizes),
                "short": sum(shares) - sum(sizes),
                "taken": {f"{i}-{self.examples[i].folder_name()}": share for i, share in enumerate(sizes)},
            }
            return Output(output, counts=counts)

        return run


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Shares out ``total`` places by ``weights``, one after another (Webster's method, Sainte-Laguë).

    The next place goes to the source with the largest ``weight / (places + 1/2)``, to the first one in a tie. So a larger
    total takes no place from any source: a smaller mixture is part of a larger one with the same weights. No weight may
    be below 0, and not all of them may be 0.

    >>> apportion((6, 6, 2), 10), apportion((6, 6, 2), 11)
    ([5, 4, 1], [5, 5, 1])
    """
    share = np.asarray(weights, float) / sum(weights)
    # Rounding gives Webster's places for a smaller total. Up to two places per source remain, which settles ties.
    places = np.floor(share * max(total - 2 * len(share), 0) + 0.5).astype(int)
    for _ in range(total - int(places.sum())):
        places[np.argmax(share / (places + 0.5))] += 1
    return [int(k) for k in places]


def _most(weights: Sequence[float], there: Sequence[int]) -> int:
    """The largest total for which no source contributes more than it has."""
    return int(
        min(count * sum(weights) / weight for count, weight in zip(there, weights, strict=True) if weight) + 1e-9
    )


def _drawn(query_ids: Sequence[str], doc_ids: Sequence[str], seed: int) -> list[int]:
    """Places in the order of a hash of what stands there."""
    hashes = [tables.unit_of("blend", seed, *ids) for ids in zip(query_ids, doc_ids, strict=True)]
    return sorted(range(len(hashes)), key=lambda i: (hashes[i], query_ids[i], doc_ids[i]))


class _Queries:
    """The queries of several sources, each id once."""

    def __init__(self) -> None:
        self.text_of: dict[str, str] = {}
        self.source_of: dict[str, str] = {}

    def add(self, source: Artifact, ids: pa.ChunkedArray) -> None:
        """Adds queries by id. Raises ConfigError if an id is known with another text."""
        rows = source.read("queries")
        text_by_id = tables.texts_of(rows.filter(pc.is_in(rows["query_id"], value_set=ids)))
        missing = next((each for each in ids.to_pylist() if each not in text_by_id), None)
        if missing is not None:
            raise ConfigError(f"mix-examples: {source.name} has no query {missing!r}; give the queries of the examples")
        for query_id, text in text_by_id.items():
            if self.text_of.setdefault(query_id, text) != text:
                raise ConfigError(
                    f"mix-examples: {query_id!r} is one query in {self.source_of[query_id]} and another in {source.name}; "
                    "give sources whose ids differ"
                )
            self.source_of.setdefault(query_id, source.name)

    def table(self) -> pa.Table:
        return tables.columns(
            "queries", len(self.text_of), query_id=list(self.text_of), text=list(self.text_of.values())
        )


class MixQueries(Stage):
    """The selected queries of several arms, by weight: of ``n`` queries, arm ``i`` contributes its share of ``weights``.

    Without ``weights``, all arms have the same weight; without ``n``, as many are taken as the weights allow. Queries are
    drawn by hash and places are shared out by ``apportion``, so a smaller mixture is part of a larger one of the same
    weights. An arm that is too small contributes all it has, and ``short`` counts what is missing. Other arms do not fill
    in, because that would change the weights. To mix by budget, give arms that stop at a cost (``GenerateUntil`` with
    ``max_cost``) and neither weights nor ``n``.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "mix"
    rows_from: ClassVar[str] = "arms"
    version: ClassVar[int] = 2  # shares by Webster's method
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage")
    arms: tuple[Stage, ...]
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _weights_fit(self) -> MixQueries:
        if not self.arms:
            raise ConfigError("mix-queries: arms is empty; give at least one stage of selected queries")
        if self.weights is not None and (len(self.weights) != len(self.arms) or not sum(self.weights)):
            raise ConfigError(
                f"mix-queries: weights = {self.weights} for {len(self.arms)} arms; give one each, not all of them 0"
            )
        return self

    def label(self) -> str:
        return f"{len(self.arms)}arms-{self.n or 'all'}"

    def identity(self) -> dict[str, Any]:
        """A mixture of all queries has no shares: its fingerprint is that of version 1."""
        return super().identity() | ({"version": 1} if self.n is None and self.weights is None else {})

    def shares(self, sizes: Sequence[int]) -> list[int]:
        """The number of queries from each arm, for arms of these ``sizes``.

        >>> from dagr_ray.stages.pairs import Topics
        >>> two = (Topics(n=1), Topics(n=2))
        >>> MixQueries(arms=two, weights=(3, 1), n=10).shares([100, 100]), MixQueries(arms=two, weights=(3, 1)).shares([100, 10])
        ([8, 2], [30, 10])
        >>> MixQueries(arms=two).shares([100, 10])
        [100, 10]
        """
        if self.n is None and self.weights is None:
            return list(sizes)
        weights = self.weights or [1.0] * len(self.arms)
        return apportion(weights, self.n or _most(weights, sizes))

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            arms = [inputs[f"arms.{i}"] for i in range(len(self.arms))]
            ids = [arm.read("queries", ["query_id"])["query_id"].to_pylist() for arm in arms]
            wanted, sizes, used_ids = self.shares([len(arm_ids) for arm_ids in ids]), [], set[str]()
            rows_by_table: dict[str, list[pa.Table]] = {name: [tables.empty(name)] for name in self.outputs}
            for arm, query_ids, k in zip(arms, ids, wanted, strict=True):
                fresh = [query_id for query_id in query_ids if query_id not in used_ids]
                sample = sorted(fresh, key=lambda query_id: (tables.unit_of("mix", self.seed, query_id), query_id))[:k]
                used_ids |= set(sample)
                sizes.append(len(sample))
                sample_ids = pa.array(sample, tables.TEXT)
                for name, rows in rows_by_table.items():
                    table = arm.read(name)
                    rows.append(
                        table.filter(pc.is_in(table["id" if name == "lineage" else "query_id"], value_set=sample_ids))
                    )
            counts = {"in": sum(map(len, ids)), "out": sum(sizes), "short": sum(wanted) - sum(sizes)}
            shares = {self.arms[i].folder_name(): sizes[i] for i in range(len(sizes))}
            return Output({k: pa.concat_tables(v) for k, v in rows_by_table.items()}, counts=counts | {"taken": shares})

        return run
