"""Turns completions about pairs, and completions that are passages, into tables that training can use."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage, derived
from dagr_ray.prompts import Parsed, Passage
from dagr_ray.strategies import Strategy
from dagr_ray.strategies._control_checks import controls_of, first_violation
from dagr_ray.strategies._controls import Controls

if TYPE_CHECKING:
    from dagr_ray.stages.generate import Generate


class Rewrite(Stage):
    """Queries, passages, negatives or triples from completions, by what the strategy ``writes``.

    * ``queries``: each is relevant to the passages of its pair. The old query is dropped.
    * ``passages``: new rows of ``corpus``, relevant (1) to the pair's query.
    * ``negatives``: new rows of ``corpus``, not relevant (0) to the pair's query; ``changes`` has what was changed.
    * ``triples``: a query, a passage relevant to it and one that is not.

    New ids are derived from the completion's id; a pair's query keeps its id. A completion without content is rejected,
    and so is one with a text that misses one of its strategy's controls, by ``control``.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "parse"
    rows_from: ClassVar[str] = "generations"
    outputs: ClassVar[tuple[str, ...]] = ("queries", "corpus", "qrels", "lineage", "changes", "rejected")
    generations: Stage

    @model_validator(mode="after")
    def _completions(self) -> Rewrite:
        if "generations" not in self.generations.outputs:
            raise ConfigError(f"rewrite: {self.generations.type!r} has no completions; give a Generate")
        return self

    @property
    def generate(self) -> Generate:
        """The stage that generated the completions."""
        return cast("Generate", self.generations)

    def label(self) -> str:
        return self.generate.strategy.type

    def identity(self) -> dict[str, Any]:
        identity = super().identity() | {"parse_version": self.generate.strategy.parse_version}
        return identity | ({"check_version": Controls.check_version} if controls_of(self.generate.strategy) else {})

    @derived("sources")
    def _sources(self) -> Stage:
        """The pairs or topics of the prompts are read again."""
        return self.generate.corpus

    def size(self, inputs: Inputs) -> int:
        return inputs["generations"].count("generations")

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """Whole shards of the completions, each read once with its pairs."""
        return inputs["generations"].ranges("generations", step)

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        strategy, engine = self.generate.strategy, self.generate.engine
        controls = controls_of(strategy)
        made_by = {"strategy": strategy.type, "engine": engine.type, "model": self.generate.model_name()}

        def run(start: int, stop: int) -> Output:
            answers = inputs["generations"].slice("generations", start, stop, ["gen_id", "source_id", "raw", "error"])
            rows = inputs["sources"].slice(
                strategy.reads, *inputs["generations"].source_rows("generations", start, stop)
            )
            pair_of = dict(zip(rows["doc_id"].to_pylist(), rows.to_pylist(), strict=True))
            passage_of = {
                row[0]: Passage(*row)
                for row in zip(*map(tables.texts, tables.prompt_source(rows).columns), strict=True)
            }
            output_rows, rejected = _Rows(strategy), tables.Rejected()
            for answer in answers.to_pylist():
                if answer["error"] is not None or answer["raw"] is None:
                    rejected.add(answer["gen_id"], "generate", "error", answer["error"])
                    continue
                parsed = strategy.parse(passage_of[answer["source_id"]], answer["raw"])
                for reason, detail in parsed.rejected:
                    rejected.add(answer["gen_id"], "parse", reason, tables.clean(detail))
                misses = (first_violation(controls, text) for text in parsed.kept) if controls else ()
                if miss := next(filter(None, misses), None):
                    rejected.add(answer["gen_id"], "control", miss[0], tables.clean(miss[1]))
                    continue
                if parsed.kept:
                    output_rows.add(answer["gen_id"], pair_of[answer["source_id"]], parsed)
            output = output_rows.tables(made_by) | {"rejected": rejected.table()}
            counts = {
                "in": answers.num_rows,
                "out": output["lineage"].num_rows,
                "rejected": rejected.counts_by_reason(),
            }
            return Output(output, counts=counts)

        return run


class _Rows:
    """Collects the rows that completions of one strategy yield."""

    def __init__(self, strategy: Strategy) -> None:
        self.writes = strategy.writes
        self.queries: dict[str, str] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {"corpus": [], "qrels": [], "lineage": [], "changes": []}

    def add(self, gen_id: str, pair: dict[str, Any], parsed: Parsed) -> None:
        """Adds the rows of one completion."""
        clean = [tables.clean(text) for text in parsed.kept]
        if self.writes == "triples":
            query_id = self._query(gen_id, 0, clean[0], pair)
            for i, (text, relevance) in enumerate(zip(clean[1:], (1, 0), strict=True), 1):
                self._passage(gen_id, i, text, pair, query_id, relevance)
            return
        for i, (text, change) in enumerate(zip_longest(clean, parsed.changes)):
            if self.writes == "queries":
                query_id = self._query(gen_id, i, text, pair)
                for doc_id in filter(None, (pair["passage_id"], pair["other_id"])):
                    self.rows["qrels"].append({"query_id": query_id, "doc_id": doc_id, "relevance": 1})
                continue
            self.queries[pair["query_id"]] = pair["query"]
            doc_id = self._passage(gen_id, i, text, pair, pair["query_id"], int(self.writes == "passages"))
            if change is not None:
                before, after = map(tables.clean, change)
                self.rows["changes"].append({"doc_id": doc_id, "before": before, "after": after})

    def _query(self, gen_id: str, i: int, text: str, pair: dict[str, Any]) -> str:
        query_id = tables.id_of(gen_id, i)
        self.queries[query_id] = text
        self.rows["lineage"].append({"id": query_id, "gen_id": gen_id, "source_id": pair["doc_id"]})
        return query_id

    def _passage(self, gen_id: str, i: int, text: str, pair: dict[str, Any], query_id: str, relevance: int) -> str:
        doc_id = tables.id_of(gen_id, i)
        self.rows["corpus"].append({"doc_id": doc_id, "title": "", "text": text})
        self.rows["qrels"].append({"query_id": query_id, "doc_id": doc_id, "relevance": relevance})
        self.rows["lineage"].append({"id": doc_id, "gen_id": gen_id, "source_id": pair["doc_id"]})
        return doc_id

    def tables(self, made_by: dict[str, str]) -> dict[str, pa.Table]:
        """The checked tables."""
        rows = self.rows | {"lineage": [row | made_by for row in self.rows["lineage"]]}
        queries = [{"query_id": query_id, "text": text} for query_id, text in self.queries.items()]
        return {name: tables.table(name, table_rows) for name, table_rows in {**rows, "queries": queries}.items()}


class ConcatCorpora(Stage):
    """The passages of several corpora as one, in order; an id that occurs in two of them must name the same passage."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("corpus",)
    corpora: tuple[Stage, ...]

    def label(self) -> str:
        return f"{len(self.corpora)}corpora"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            parts: list[pa.Table] = [tables.empty("corpus")]
            seen = pa.array([], tables.TEXT)
            rows = 0
            for i in range(len(self.corpora)):
                corpus = inputs[f"corpora.{i}"].read("corpus")
                rows += corpus.num_rows
                is_known = pc.is_in(corpus["doc_id"], value_set=seen)
                clashing = corpus.filter(is_known)
                if clashing.num_rows:
                    known = pa.concat_tables(parts)
                    known = known.filter(pc.is_in(known["doc_id"], value_set=clashing["doc_id"].combine_chunks()))
                    if clashing.sort_by("doc_id") != known.sort_by("doc_id"):
                        raise ConfigError(
                            f"concat-corpora: {clashing['doc_id'][0].as_py()!r} names two passages; give each corpus its own ids"
                        )
                parts.append(corpus.filter(pc.invert(is_known)))
                seen = pa.concat_tables(parts)["doc_id"].combine_chunks()
            joined = pa.concat_tables(parts)
            return Output({"corpus": joined}, counts={"in": rows, "out": joined.num_rows})

        return run


class WithNegatives(Stage):
    """Mined examples in which written negatives replace or precede the mined ones.

    ``written`` are stages whose ``qrels`` judge passages 0 for a query. Each example gets ``total`` negatives; a share of
    ``written_share``, rounded up, are written ones if there are enough, in turn with the mined ones. An example with
    fewer negatives is kept and counted as ``short``; one without any is rejected.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "relabel"
    rows_from: ClassVar[str] = "mined"
    outputs: ClassVar[tuple[str, ...]] = ("examples", "rejected")
    mined: Stage
    written: tuple[Stage, ...]
    total: Annotated[int, Field(ge=1)] = 5
    written_share: Annotated[float, Field(ge=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _something_written(self) -> WithNegatives:
        if not self.written:
            raise ConfigError("with-negatives: written is empty; give at least one stage that writes negatives")
        return self

    def label(self) -> str:
        return f"{self.total}-{self.written_share:g}"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            negatives: dict[str, list[str]] = {}
            for i in range(len(self.written)):
                qrels = inputs[f"written.{i}"].read("qrels")
                for row in qrels.filter(pc.equal(qrels["relevance"], 0)).to_pylist():
                    negatives.setdefault(row["query_id"], []).append(row["doc_id"])
            examples, rejected, short = [], tables.Rejected(), 0
            written_total = -int(-self.total * self.written_share // 1)
            for row in inputs["mined"].read("examples").to_pylist():
                written = negatives.get(row["query_id"], [])[:written_total]
                mined = list(zip_longest(row["negative_ids"], row["negative_scores"] or []))[
                    : self.total - written_total
                ]
                if not written and not mined:
                    rejected.add(row["query_id"], "with-negatives", "no-negatives")
                    continue
                short += len(written) + len(mined) < self.total
                ids = [*written, *(doc_id for doc_id, _ in mined)]
                scores = [*(None for _ in written), *(score for _, score in mined)]
                examples.append(row | {"negative_ids": ids, "negative_scores": scores})
            counts = {"in": len(examples) + len(rejected.ids), "out": len(examples), "short": short}
            output = {"examples": tables.table("examples", examples), "rejected": rejected.table()}
            return Output(output, counts=counts | {"rejected": rejected.counts_by_reason()})

        return run


class Expand(Stage):
    """Passages with queries appended that were generated for them: document expansion for BM25 (doc2query, arXiv 1904.08375).

    ``queries`` is a stage with ``queries`` and ``qrels``. The first ``per_passage`` by hash are appended.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("corpus",)
    corpus: Stage
    queries: Stage
    per_passage: Annotated[int, Field(ge=1)] = 40

    def label(self) -> str:
        return f"{self.per_passage}"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            text_of = tables.texts_of(inputs["queries"].read("queries"))
            query_ids_of: dict[str, list[str]] = {}
            for row in tables.relevant(inputs["queries"].read("qrels")).to_pylist():
                query_ids_of.setdefault(row["doc_id"], []).append(row["query_id"])
            parts, expanded, rows = [tables.empty("corpus")], 0, 0
            for part in inputs["corpus"].scan("corpus"):
                texts = []
                for doc_id, text in zip(part["doc_id"].to_pylist(), part["text"].to_pylist(), strict=True):
                    appended = sorted(query_ids_of.get(doc_id, ()), key=lambda q: tables.unit_of("expand", q))[
                        : self.per_passage
                    ]
                    expanded += bool(appended)
                    texts.append("\n".join([text, *(text_of[query_id] for query_id in appended)]))
                rows += part.num_rows
                parts.append(part.set_column(2, part.schema.field("text"), pa.array(texts, tables.TEXT)))
            return Output({"corpus": pa.concat_tables(parts)}, counts={"in": rows, "out": rows, "expanded": expanded})

        return run
