"""Computes a filter's score for every query once, whatever thresholds follow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError, OmitWhenDefault
from dagr_ray.core.joins import Lookup, SearchResults, Twins, beside, rows_beside, rows_with
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage, derived
from dagr_ray.filters import Filter, ScoredQuery


class Score(Stage):
    """A filter's score for each generated query. The filter's thresholds are not part of the fingerprint.

    ``corpus`` holds the passages for which the queries were generated. With a ``search``, passages of ``corpus`` that are
    equal except for case and spacing count as one: a search that returns a passage's twin has found the passage. In that
    case give the searched corpus, so that twins outside the sample are known too. ``labels`` (a stage with ``scores``) is
    for filters that read a teacher's scores; completions are the ones from which ``parsed`` was made. ``scores`` has its
    rows in the order of ``parsed``'s ``qrels``. A ``rowwise`` filter works shard by shard (if it reads a search: if the
    search's shards are ranges of queries), any other filter on all rows at once.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "score"
    rows_from: ClassVar[str] = "parsed"
    outputs: ClassVar[tuple[str, ...]] = ("scores",)
    parsed: Stage
    corpus: Stage
    filter: Filter
    search: Stage | None = None
    labels: Annotated[Stage | None, OmitWhenDefault()] = None

    @model_validator(mode="after")
    def _given_what_it_reads(self) -> Score:
        fields = {"candidates": "search", "scores": "labels"}
        for table, name in fields.items():
            is_set = getattr(self, name) is not None
            if self.filter.reads == table and not is_set:
                raise ConfigError(f"score: {name} is not set, but {self.filter.type!r} reads its {table}; set it")
            if self.filter.reads != table and is_set:
                raise ConfigError(f"score: the filter {self.filter.type!r} reads no {name}; remove {name}")
        if self.filter.reads == "generations" and self._completions() is None:
            raise ConfigError(
                f"score: {self.parsed.folder_name()} was not parsed from completions, but {self.filter.type!r} reads them; "
                "give the output of Parse"
            )
        if self.filter.reads == "generations" and not getattr(self._completions(), "keeps_logprob", True):
            raise ConfigError(
                f"score: the completions of {self.parsed.folder_name()} have no log-probabilities, but {self.filter.type!r} "
                "reads them; give Generate sampling=Sampling(logprob=True)"
            )
        return self

    def _completions(self) -> Stage | None:
        """The completions from which the queries were parsed, also if queries were selected since."""
        stage: Any = self.parsed
        while stage is not None and not hasattr(stage, "generations"):
            stage = getattr(stage, "parsed", None)
        return None if stage is None else stage.generations

    def label(self) -> str:
        return self.filter.type

    def identity(self) -> dict[str, Any]:
        """The filter enters only with the fields that decide its scores."""
        return super().identity() | {"filter": self.filter.scoring_identity()}

    @derived("whole")
    def _whole(self) -> Stage | None:
        """A filter that compares all queries scores them in a stage of its own; its scores are cut into shards here."""
        return StreamScores(queries=self.parsed, filter=self.filter) if self.filter.streams else None

    @derived("generations")
    def _read_completions(self) -> Stage | None:
        return self._completions() if self.filter.reads == "generations" else None

    @derived("search.queries")
    def _searched(self) -> Stage | None:
        """The order of these queries tells in which shards of the search the hits are."""
        return None if self.search is None else self.search.shards_of()

    @property
    def _sharded(self) -> bool:
        return self.filter.rowwise or self.filter.streams

    def size(self, inputs: Inputs) -> int | None:
        return inputs["parsed"].count("qrels") if self._sharded else None

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """Whole shards of the queries, small ones joined; all rows at once for a filter that compares them."""
        parsed = inputs["parsed"]
        cut = self._sharded and ("search" not in inputs or "search.queries" in inputs)
        return (parsed.ranges("qrels", step) if cut else []) or [(0, parsed.count("qrels"))]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        parsed, total = inputs["parsed"], max(inputs["parsed"].count("qrels"), 1)
        passages = Lookup(inputs["corpus"], "corpus", "doc_id") if self.filter.needs_passage else None
        completions = Lookup(inputs["generations"], "generations", "gen_id") if "generations" in inputs else None
        hits = SearchResults(inputs["search"], inputs.get("search.queries"), parsed) if "search" in inputs else None
        twins = lru_cache(maxsize=1)(lambda: Twins(inputs["corpus"]))

        def run(start: int, stop: int) -> Output:
            qrels = parsed.slice("qrels", start, stop, ["query_id", "doc_id"])
            if "whole" in inputs:
                return self._stored(qrels, stored_scores(parsed, inputs["whole"], qrels["query_id"], start))
            queries = beside(parsed, "qrels", "queries", start, stop)
            text_of = dict(zip(*map(tables.texts, queries.select(["query_id", "text"]).columns), strict=True))
            passage_of: dict[str, str] = {}
            if passages is not None:
                passage_rows = passages.of(qrels["doc_id"], start / total, ["title", "text"])
                passage_of = {key: tables.passage_text(title, text) for key, title, text in passage_rows}
            first_ids, evidence = qrels["doc_id"], None
            if hits is not None:
                candidates = hits.of(qrels["query_id"], *rows_beside(parsed, "qrels", "queries", start, stop))
                place = candidates.schema.get_field_index("doc_id")
                twin_ids = twins().first(candidates["doc_id"])
                evidence, first_ids = (
                    candidates.set_column(place, candidates.schema.field(place), twin_ids),
                    twins().first(first_ids),
                )
            if "labels" in inputs:
                evidence = rows_with(inputs["labels"], "scores", "query_id", qrels["query_id"].unique())
            if completions is not None:
                lineage = beside(parsed, "qrels", "lineage", start, stop)
                evidence = _logprobs(lineage, completions, start / total)
            ids = map(tables.texts, (*qrels.columns, first_ids))
            rows = [
                ScoredQuery(q, text_of[q], twin_ids, passage_of.get(d, "")) for q, d, twin_ids in zip(*ids, strict=True)
            ]
            scores = self.filter.score(rows, evidence)
            assert len(scores) == len(rows), f"{self.filter.type} gave {len(scores)} scores for {len(rows)} rows"
            return self._stored(qrels, scores)

        return run

    def _stored(self, qrels: pa.Table, scores: Any) -> Output:
        scores_table = tables.columns(
            "scores",
            len(qrels),
            query_id=qrels["query_id"],
            doc_id=qrels["doc_id"],
            scorer=self.filter.type,
            score=pa.array(scores, pa.float32()),
        )
        return Output({"scores": scores_table}, counts={"in": len(qrels), "out": len(qrels)})


def _logprobs(lineage: pa.Table, made_by: Lookup, hint: float) -> pa.Table:
    value_of = dict(made_by.of(lineage["gen_id"], hint, ["logprob"]))
    values = pa.array([value_of[gen_id] for gen_id in tables.texts(lineage["gen_id"])], pa.float32())
    return pa.table({"query_id": lineage["id"], "logprob": values})


SCORES = "scores.npy"


class StreamScores(Stage):
    """The scores of a filter that ``streams``: ``scores.npy``, float32, in the order of the queries.

    Not sharded, because all queries are compared; they are read part by part, as often as the filter needs. Thresholds
    are not part of the fingerprint.
    """

    abstract: ClassVar[bool] = False
    pool: ClassVar[str] = "retrieve"
    outputs: ClassVar[tuple[str, ...]] = ()
    queries: Stage
    filter: Filter

    def label(self) -> str:
        return self.filter.type

    def identity(self) -> dict[str, Any]:
        """The filter enters only with the fields that decide its scores."""
        return super().identity() | {"filter": self.filter.scoring_identity()}

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def parts() -> Iterator[pa.Table]:
            return inputs["queries"].scan("queries")

        def run(start: int, stop: int) -> Output:
            rows = inputs["queries"].count("queries")
            scores = self.filter.score_stream(parts, rows)
            assert scores.shape == (rows,), f"{self.filter.type} gave {scores.shape} scores for {rows} queries"
            buffer = io.BytesIO()
            np.save(buffer, scores.astype(np.float32, copy=False))
            folder.write_bytes(SCORES, pa.py_buffer(buffer.getbuffer()))
            return Output({}, [SCORES], {"in": rows, "out": rows})

        return run


def stored_scores(queries: Artifact, whole: Artifact, ids: pa.ChunkedArray, start: int) -> np.ndarray:
    """Scores, float32, of queries by id. They are looked up from row ``start`` on, where most are."""
    scores = np.load(whole.local_path(SCORES), mmap_mode="r" if queries.count("queries") else None)
    if queries.slice("queries", start, start + len(ids), ["query_id"])["query_id"].equals(ids):
        return np.array(scores[start : start + len(ids)])
    rows = pc.index_in(ids, value_set=queries.read("queries", ["query_id"])["query_id"])
    return np.array(scores[rows.to_numpy()])
