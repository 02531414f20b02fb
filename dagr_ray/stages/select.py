"""Which generated queries become training data: Score once, Select by thresholds, Take a nested subset."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Annotated, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray import tables
from dagr_ray.artifact import Artifact
from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError
from dagr_ray.filters import Candidate, Filter
from dagr_ray.stage import Inputs, Output, Run, Stage

log = logging.getLogger("dagr")


class Score(Stage):
    """The score that a filter gives to each generated query. Thresholds of the filter are no part of the fingerprint.

    ``corpus`` holds the passages that the queries were written for. With a ``search``, passages of ``corpus`` that are
    equal but for case and spacing count as one: a search that returns a passage's twin has found the passage. Give the
    searched corpus there, so that twins outside the sample that was asked about are known too.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("scores",)
    parsed: Stage
    corpus: Stage
    filter: Filter
    search: Stage | None = None

    @model_validator(mode="after")
    def _search_as_needed(self) -> Score:
        if self.filter.needs_search and self.search is None:
            raise ConfigError(f"score: search is not set, and {self.filter.type!r} ranks with it; give a search")
        if not self.filter.needs_search and self.search is not None:
            raise ConfigError(f"score: the filter {self.filter.type!r} reads no search; leave search out")
        return self

    def label(self) -> str:
        return self.filter.type

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"filter": self.filter.scoring_identity()}

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            qrels = inputs["parsed"].read("qrels", ["query_id", "doc_id"])
            text_of = _texts(inputs["parsed"].read("queries"), "query_id")
            corpus = inputs["corpus"].read("corpus")
            passages = corpus.filter(pc.is_in(corpus["doc_id"], value_set=qrels["doc_id"].unique()))
            passage_of = {p["doc_id"]: tables.passage_text(p["title"], p["text"]) for p in passages.to_pylist()}
            same = qrels["doc_id"]
            search = None
            if "search" in inputs:
                search = inputs["search"].read("candidates")
                twins = _Twins(corpus, passages)
                search = search.set_column(1, search.schema.field("doc_id"), twins.first(search["doc_id"]))
                same = twins.first(same)
            rows = [
                Candidate(query_id, text_of[query_id], first, passage_of[doc_id])
                for query_id, doc_id, first in zip(*(c.to_pylist() for c in (*qrels.columns, same)), strict=True)
            ]
            scores = self.filter.score(rows, search)
            assert len(scores) == len(rows), f"{self.filter.type} gave {len(scores)} scores for {len(rows)} rows"
            scorer = pa.array([self.filter.type] * len(rows), tables.TEXT)
            columns = [qrels["query_id"], qrels["doc_id"], scorer, pa.array(scores, pa.float32())]
            made = pa.table(columns, schema=tables.schema("scores"))
            return Output({"scores": made}, counts={"in": len(rows), "out": len(rows)})

        return run


def _texts(queries: pa.Table, key: str) -> dict[str, str]:
    return dict(zip(queries[key].to_pylist(), queries["text"].to_pylist(), strict=True))


class _Twins:
    """Maps the ids of passages with one and the same text to the first of them; other ids stay."""

    def __init__(self, corpus: pa.Table, passages: pa.Table) -> None:
        # titles differ where one text is documented under several names; a query cannot tell such passages apart
        texts = tables.folded(corpus["text"])
        twin = pc.and_(pc.is_in(texts, value_set=tables.folded(passages["text"]).unique()), pc.not_equal(texts, ""))
        among = pa.table({"doc_id": corpus["doc_id"], "text": texts}).filter(twin)
        firsts = among.group_by("text").aggregate([("doc_id", "min")])
        self.ids = among["doc_id"].combine_chunks()
        place = pc.index_in(among["text"], value_set=firsts["text"].combine_chunks())
        self.firsts = firsts["doc_id_min"].take(place).combine_chunks()

    def first(self, ids: pa.ChunkedArray) -> pa.ChunkedArray:
        place = pc.index_in(ids, value_set=self.ids).combine_chunks()
        return pc.coalesce(self.firsts.take(place), ids.combine_chunks())


class Select(Stage):
    """The queries that every filter keeps, asked in the order of ``scores``; the first refusal is the reason.

    Cheap: reads stored scores, so another threshold makes another folder of this stage and no new scoring.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage", "rejected")
    parsed: Stage
    scores: tuple[Score, ...] = ()

    @model_validator(mode="after")
    def _same_queries(self) -> Select:
        other = next((s for s in self.scores if s.parsed.fingerprint() != self.parsed.fingerprint()), None)
        if other is not None:
            raise ConfigError(
                f"select: the scores of {other.filter.type!r} are for {other.parsed.folder_name()}, not for "
                f"{self.parsed.folder_name()}; score the queries that are selected from"
            )
        return self

    def label(self) -> str:
        return f"{len(self.scores)}filters"

    def identity(self) -> dict[str, Any]:
        """Scores by what they measure, and the filters with their thresholds."""
        return super().identity() | {"filters": [score.filter.identity() for score in self.scores]}

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            parsed = inputs["parsed"]
            qrels = parsed.read("qrels")
            pairs = list(zip(qrels["query_id"].to_pylist(), qrels["doc_id"].to_pylist(), strict=True))
            reasons: dict[tuple[str, str], dict[str, Any]] = {}
            for i, score in enumerate(self.scores):
                stored = inputs[f"scores.{i}"].read("scores").to_pylist()
                value_of = {(row["query_id"], row["doc_id"]): row["score"] for row in stored}
                for pair in pairs:
                    if pair not in reasons and (reason := score.filter.keep(value_of[pair])):
                        detail = f"score {value_of[pair]:g}"
                        reasons[pair] = {"id": pair[0], "by": score.filter.type, "reason": reason, "detail": detail}
            kept = qrels.filter(pa.array([pair not in reasons for pair in pairs], pa.bool_()))
            ids = kept["query_id"].unique()
            queries, lineage = parsed.read("queries"), parsed.read("lineage")
            made = {
                "queries": queries.filter(pc.is_in(queries["query_id"], value_set=ids)),
                "qrels": kept,
                "lineage": lineage.filter(pc.is_in(lineage["id"], value_set=ids)),
                "rejected": tables.table("rejected", reasons.values()),
            }
            rejected = Counter(f"{row['by']}/{row['reason']}" for row in reasons.values())
            return Output(made, counts={"in": len(pairs), "out": kept.num_rows, "rejected": dict(rejected)})

        return run


class Take(Stage):
    """A subset of mined examples by volume, nested: a smaller one lies inside a larger one of the same seed.

    ``coverage`` keeps that share of the positive passages, ``density`` that many queries for each of them, ``n`` that
    many examples; in this order where several are set. All is drawn by hash, so neither the order of the rows nor the
    number of workers matters. Examples stand in the order drawn, so the first k rows are ``Take(n=k)``.
    """

    abstract: ClassVar[bool] = False
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
