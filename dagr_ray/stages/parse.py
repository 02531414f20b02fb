"""Parses completions into queries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.prompts import LazyRandom, Passage
from dagr_ray.stages.generate import Generate, strategies_of_samples
from dagr_ray.strategies import Strategy
from dagr_ray.strategies._control_checks import controls_of, first_violation
from dagr_ray.strategies._controls import Controls


def _strategies_of_rows(
    strategies: Sequence[Strategy], seeds: list[int], numbers: list[int], samples: int
) -> Iterator[Strategy]:
    """The strategy of each completion, from its seed and number. Those of a passage stand together: drawn once for all."""
    rng, last, found = LazyRandom(), -1, list[Strategy]()
    for seed, number in zip(seeds, numbers, strict=True):
        if seed - number != last:
            last, found = seed - number, strategies_of_samples(strategies, rng, seed - number, samples)
        yield found[number]


class Parse(Stage):
    """Queries parsed from completions, each judged relevant to its passage; a completion without one is rejected.

    A query that misses one of its strategy's controls is rejected by ``control``, with the missed attribute. ``corpus`` is
    the corpus of the completions. A changed parser (``parse_version``) makes a new folder of this stage and no new
    completions.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "parse"
    rows_from: ClassVar[str] = "generations"
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage", "rejected")
    generations: Generate
    corpus: Stage

    @model_validator(mode="after")
    def _same_corpus(self) -> Parse:
        strategy = self.generations.strategy
        if (strategy.reads, strategy.writes) != ("corpus", "queries"):
            raise ConfigError(
                f"parse: strategy {strategy.type!r} reads {strategy.reads} and writes {strategy.writes}; Rewrite reads its answers"
            )
        if self.corpus.fingerprint() != self.generations.corpus.fingerprint():
            raise ConfigError(
                f"parse: corpus is {self.corpus.folder_name()}, the completions are for "
                f"{self.generations.corpus.folder_name()}; give that one"
            )
        return self

    def label(self) -> str:
        return self.generations.strategy.type

    def identity(self) -> dict[str, Any]:
        versions = [strategy.parse_version for strategy in self.generations.strategy.members()]
        identity = super().identity() | {"parse_version": versions[0] if len(versions) == 1 else versions}
        if any(map(controls_of, self.generations.strategy.members())):
            identity["check_version"] = Controls.check_version
        return identity

    def size(self, inputs: Inputs) -> int:
        return inputs["generations"].count("generations")

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """Whole shards of the completions, small ones joined: each is read once, with its own passages."""
        return inputs["generations"].ranges("generations", step)

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        strategies, engine = self.generations.strategy.members(), self.generations.engine
        samples, columns = self.generations.samples, ["gen_id", "source_id", "raw", "error", "sample", "seed"]
        apart = any(strategy.per_sample() for strategy in strategies)
        made_by = {"engine": engine.type, "model": self.generations.model_name()}

        def run(start: int, stop: int) -> Output:
            rows = inputs["generations"].slice("generations", start, stop, columns)
            numbers = rows["sample"].to_pylist()
            strategy_of: Iterable[Strategy] = (strategies[number // samples] for number in numbers)
            if apart:
                strategy_of = _strategies_of_rows(strategies, rows["seed"].to_pylist(), numbers, samples)
            passages = inputs["corpus"].slice("corpus", *inputs["generations"].source_rows("generations", start, stop))
            ids, titles, texts = map(tables.texts, passages.columns)
            row_of = dict(zip(ids, range(len(ids)), strict=True))
            rejected = tables.Rejected()
            query_ids: list[str] = []
            queries: list[str] = []
            gen_ids: list[str] = []
            source_ids: list[str] = []
            types: list[str] = []
            texts_of = map(tables.texts, rows.select(columns[:4]).columns)
            last_strategy, controls = None, None
            for gen_id, source_id, raw, error, strategy in zip(*texts_of, strategy_of, strict=True):
                if error is not None or raw is None:
                    rejected.add(gen_id, "generate", "error", error)
                    continue
                row = row_of[source_id]
                parsed = strategy.parse(Passage(source_id, titles[row] or "", texts[row]), raw)
                if strategy is not last_strategy:
                    last_strategy, controls = strategy, controls_of(strategy)
                for i, text in enumerate(parsed.kept):
                    if controls and (miss := first_violation(controls, text)):
                        rejected.add(gen_id, "control", miss[0], tables.clean(f"{miss[1]}: {text}"[:200]))
                        continue
                    query_ids.append(tables.id_of(gen_id, i))
                    queries.append(tables.clean(text))
                    gen_ids.append(gen_id)
                    source_ids.append(source_id)
                    types.append(strategy.name())
                for reason, detail in parsed.rejected:
                    rejected.add(gen_id, "parse", reason, tables.clean(detail))
            size, ids, source_column = (
                len(queries),
                *(pa.array(values, tables.TEXT) for values in (query_ids, source_ids)),
            )
            output = {
                "queries": tables.columns("queries", size, query_id=ids, text=queries),
                "qrels": tables.columns("qrels", size, query_id=ids, doc_id=source_column, relevance=1),
                "lineage": tables.columns(
                    "lineage", size, id=ids, gen_id=gen_ids, source_id=source_column, strategy=types, **made_by
                ),
                "rejected": rejected.table(),
            }
            return Output(output, counts={"in": rows.num_rows, "out": size, "rejected": rejected.counts_by_reason()})

        return run
