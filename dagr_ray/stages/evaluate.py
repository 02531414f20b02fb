"""Evaluates a run: nDCG@10, recall, reciprocal rank, AP and success by ir_measures, by query and as means, and a TREC run."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError, OmitWhenDefault
from dagr_ray.core.paths import word_of
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.core.words import wording
from dagr_ray.formats import trec
from dagr_ray.retrieval.vectors import Ranking, best_first

MEASURES = ("nDCG@10", "R@100", "RR@10", "AP", "Success@1", "Success@5", "Success@10")
TREC_RUN = "run.trec"

Qrels = dict[str, dict[str, int]]
Rankings = dict[str, Ranking]


def measure(qrels: Qrels, run: Rankings) -> dict[str, dict[str, float]]:
    """Measure -> query -> value, for each query of ``qrels``; a query that ``run`` lacks has 0.

    A run is ordered as trec_eval orders it: by score, ties by falling doc_id. The implementations behind ir_measures
    break ties differently, so each gets the final order as scores without ties. ``AP`` is trec_eval's ``map`` over the
    whole run, so over 100 passages for a search of depth 100.

    >>> measure({"q": {"a": 1}}, {"q": [("b", 1.0), ("a", 1.0)]})["RR@10"]
    {'q': 0.5}
    """
    import ir_measures

    metrics = {name: ir_measures.parse_measure(name) for name in MEASURES}
    qrel_list = [ir_measures.Qrel(q, d, relevance) for q, docs in qrels.items() for d, relevance in docs.items()]
    ranked = [
        ir_measures.ScoredDoc(q, doc_id, float(-rank))
        for q, hits in run.items()
        if q in qrels
        for rank, (doc_id, _) in enumerate(best_first(hits))
    ]
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(qrels, 0.0) for name in MEASURES}
    if ranked:
        name_of = {parsed: name for name, parsed in metrics.items()}
        for metric in ir_measures.iter_calc(list(name_of), qrel_list, ranked):
            values[name_of[metric.measure]][metric.query_id] = float(metric.value)
    return values


class Evaluate(Stage):
    """The measures of a search on the judgements ``qrels.<split>`` of ``data``, under the name ``name``.

    ``search`` is any stage with ``candidates``: a ``Search``, a fusion of several, or another system's ``TrecRun``. The
    ``metrics`` hold a row for each measure and query, and one with the mean, whose ``query_id`` is null.

    As in BEIR (Thakur et al., arXiv 2104.08663), a passage with its query's id is not an answer, unless it was judged as
    one; a judged query without results scores 0. Queries of ``exclude`` (exemplars shown in a prompt), by id or by equal
    wording, are excluded and counted, because the model was trained from them. With ``leaks`` (a ``LeakGate``), queries
    that resemble training queries or exemplars are excluded too.

    ``depth``: how many passages of a query are evaluated, after the query itself is removed. Search one more, as BEIR does.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "evaluate"
    rows_from: ClassVar[str] = "search"
    version: ClassVar[int] = 2  # AP and success@k
    outputs: ClassVar[tuple[str, ...]] = ("metrics", "candidates")
    judged: ClassVar[dict[str, str]] = {"data": "split"}
    search: Stage
    data: Stage
    split: str = "test"
    exclude: Stage | None = None
    leaks: Annotated[Stage | None, OmitWhenDefault()] = None
    name: str = "data"
    depth: Annotated[Annotated[int, Field(ge=1)] | None, OmitWhenDefault()] = None

    def label(self) -> str:
        return word_of(f"{self.name}_{self.split}")

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            all_qrels = qrels_of(inputs["data"], self.split)
            excluded = (_exemplars(inputs) | _touched(inputs)) & all_qrels.keys()
            qrels = {query_id: docs for query_id, docs in all_qrels.items() if query_id not in excluded}
            if not qrels:
                raise ConfigError(
                    f"evaluate: split = {self.split!r} of {inputs['data'].name} has no judged query to evaluate"
                )
            ranked, self_hits = rankings(inputs["search"].read("candidates"), qrels)
            ranked = {query_id: hits[: self.depth] for query_id, hits in ranked.items()}
            candidates = _table(ranked)
            lines = trec.run_lines(
                zip(*(c.to_pylist() for c in candidates.columns), strict=True), self.search.label() or "dagr"
            )
            folder.write_bytes(TREC_RUN, "".join(f"{line}\n" for line in lines).encode())
            counts = {
                "in": len(all_qrels),
                "out": len(qrels),
                "excluded": len(excluded),
                "no_hits": sum(not ranked.get(query_id) for query_id in qrels),
                "itself": self_hits,
            }
            metrics = self._metrics(measure(qrels, ranked))
            return Output({"metrics": metrics, "candidates": candidates}, [TREC_RUN], counts)

        return run

    def _metrics(self, values: dict[str, dict[str, float]]) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for name, by_query in values.items():
            base = {"measure": name, "data": self.name, "split": self.split}
            rows.append(base | {"query_id": None, "value": float(np.mean(list(by_query.values())))})
            rows += [base | {"query_id": query_id, "value": value} for query_id, value in sorted(by_query.items())]
        return tables.table("metrics", rows)


def qrels_of(data: Artifact, split: str) -> Qrels:
    """The judgements of a split. Raises ConfigError if there are none."""
    return as_qrels(data.qrels(split, "evaluate"))


def as_qrels(table: pa.Table) -> Qrels:
    """A ``qrels`` table as query -> passage -> relevance."""
    qrels: Qrels = defaultdict(dict)
    for query_id, doc_id, relevance in zip(*(column.to_pylist() for column in table.columns), strict=True):
        qrels[query_id][doc_id] = relevance
    return dict(qrels)


def _exemplars(inputs: Inputs) -> set[str]:
    """Ids of the exemplars' queries, and of queries of ``data`` with the same wording."""
    if "exclude" not in inputs:
        return set()
    exemplars = inputs["exclude"].read("exemplars", ["query_id", "query"]).to_pylist()
    wordings = {wording(row["query"]) for row in exemplars}
    # judgements from a TREC file come without query texts
    texts = tables.texts_of(inputs["data"].read("queries")) if "queries" in inputs["data"].table_names() else {}
    similar = {query_id for query_id, text in texts.items() if wording(text) in wordings}
    return similar | {row["query_id"] for row in exemplars}


def _touched(inputs: Inputs) -> set[str]:
    """Ids of the queries that training queries or exemplars resemble."""
    if "leaks" not in inputs:
        return set()
    found: set[str] = set()
    kinds = pa.array(["query-query", "exemplar-query"], tables.TEXT)
    for part in inputs["leaks"].scan("leaks", ["kind", "data", "held_out_id"]):
        # compared by fingerprint: the gate may have seen the data under another name
        same = pc.ends_with(part["data"], pattern=f"-{inputs['data'].name.rpartition('-')[2]}")
        mine = pc.and_(pc.is_in(part["kind"], value_set=kinds), same)
        found |= set(tables.texts(part.filter(mine)["held_out_id"]))
    return found


def rankings(candidates: pa.Table, qrels: Qrels) -> tuple[Rankings, int]:
    """The judged queries' hits, best first, without the query itself; and how often the query itself was removed.

    As in BEIR (``ignore_identical_ids``), except for passages that were judged for the query of the same id.
    """
    hits: dict[str, Ranking] = defaultdict(list)
    self_hits = 0
    columns = (candidates[name].to_pylist() for name in ("query_id", "doc_id", "score"))
    for query_id, doc_id, score in zip(*columns, strict=True):
        if query_id not in qrels:
            continue
        # in numbered collections, a query and a passage of the same id are unrelated
        if query_id == doc_id and doc_id not in qrels[query_id]:
            self_hits += 1
        else:
            hits[query_id].append((doc_id, score))
    return {query_id: best_first(query_hits) for query_id, query_hits in hits.items()}, self_hits


def _table(ranked: Rankings) -> pa.Table:
    rows = [(q, doc_id, rank, score) for q, hits in ranked.items() for rank, (doc_id, score) in enumerate(hits, 1)]
    columns = zip(*rows, strict=True) if rows else ([], [], [], [])
    schema = tables.schema("candidates")
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


class Scorecard(Stage):
    """One retriever's metrics on several data sets or splits, means and single queries, in one table."""

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "scorecard"
    rows_from: ClassVar[str] = "evaluations"
    outputs: ClassVar[tuple[str, ...]] = ("metrics",)
    evaluations: tuple[Evaluate, ...]

    @model_validator(mode="after")
    def _distinct(self) -> Scorecard:
        names = [f"{evaluation.name}/{evaluation.split}" for evaluation in self.evaluations]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not names:
            raise ConfigError(f"scorecard: evaluations = {names}: give at least one, each with its own name and split")
        return self

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            metric_tables = [inputs[f"evaluations.{i}"].read("metrics") for i in range(len(self.evaluations))]
            metrics = pa.concat_tables(metric_tables)
            return Output({"metrics": metrics}, counts={"in": len(metric_tables), "out": metrics.num_rows})

        return run
