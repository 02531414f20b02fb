"""Selects generated queries for training, by thresholds on stored scores."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.joins import beside
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage, derived
from dagr_ray.filters import Filter
from dagr_ray.stages.score import Score

log = logging.getLogger("dagr")


class Select(Stage):
    """The queries that all filters keep, in the order of ``scores``; the first filter that rejects gives the reason.

    Cheap: reads stored scores, so another threshold needs a new folder of this stage but no new scoring. A filter with
    a ``quota`` keeps this many of the best rows that all filters before it keep; ties are broken by hash. If a
    filter rewrites a text, the query keeps its id, and ``masked`` records the change.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "select"
    rows_from: ClassVar[str] = "parsed"
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
        """The scores, and the filters with their thresholds."""
        return super().identity() | {"filters": [score.filter.identity() for score in self.scores]}

    @derived("scores.{}.corpus")
    def _sized(self) -> list[Stage | None]:
        """The corpus of each filter that is stricter on a large one."""
        return [score.corpus if score.filter.needs_corpus_size else None for score in self.scores]

    def size(self, inputs: Inputs) -> int:
        return inputs["parsed"].count("qrels")

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """Whole shards of the queries, small ones joined."""
        return inputs["parsed"].ranges("qrels", step) or [(0, 0)]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        decisions = _Decisions(self, inputs)

        def run(start: int, stop: int) -> Output:
            part = decisions.of(start, stop)
            rejected = tables.Rejected()
            for row in np.flatnonzero(part.by >= 0):
                by = self.scores[part.by[row]].filter.type
                rejected.add(part.ids[row], by, part.reasons[row], f"score {part.values[row]:g}")
            qrels = part.qrels.filter(pa.array(part.by < 0))
            ids = qrels["query_id"].unique()
            queries, lineage = (beside(inputs["parsed"], "qrels", name, start, stop) for name in ("queries", "lineage"))
            queries = queries.filter(pc.is_in(queries["query_id"], value_set=ids))
            output = {
                "queries": queries,
                "qrels": qrels,
                "lineage": lineage.filter(pc.is_in(lineage["id"], value_set=ids)),
                "rejected": rejected.table(),
            }
            if any(_rewrites_texts(score.filter) for score in self.scores):
                output["queries"], output["masked"] = decisions.rewritten(queries, part)
            counts = {"in": len(part.ids), "out": qrels.num_rows, "rejected": rejected.counts_by_reason()}
            if "masked" in output:
                counts["masked"] = output["masked"].num_rows
            return Output(output, counts=counts)

        return run


def _rewrites_texts(filter: Filter) -> bool:
    return type(filter).rewrite is not Filter.rewrite


class _Cut(NamedTuple):
    """The last row within a quota: a better score passes, an equal one passes up to the hash ``draw``."""

    score: float
    draw: float


class _Part(NamedTuple):
    """Decisions about rows: ``by`` is the filter that rejects a row, -1 if none does."""

    qrels: pa.Table
    ids: list[str]
    by: np.ndarray
    reasons: dict[int, str]
    values: dict[int, float]
    scores: list[np.ndarray]


class _Decisions:
    """Applies a selection's filters to any range of rows."""

    def __init__(self, stage: Select, inputs: Inputs) -> None:
        self.parsed = inputs["parsed"]
        self.filters = [score.filter for score in stage.scores]
        self.stored = [inputs[f"scores.{i}"] for i in range(len(self.filters))]
        passages = [
            inputs[name].count("corpus") if (name := f"scores.{i}.corpus") in inputs else 0
            for i in range(len(self.filters))
        ]
        self.filters_for = [
            lru_cache(maxsize=None)(lambda query_type, f=f, n=n: f.with_thresholds_for(query_type, n))
            for f, n in zip(self.filters, passages, strict=True)
        ]
        self.by_query_type = any(type(f).with_thresholds_for is not Filter.with_thresholds_for for f in self.filters)
        self.cuts: list[_Cut | None] = []
        for i in range(len(self.filters)):
            self.cuts.append(self._cut(i))

    def of(self, start: int, stop: int, filters: int | None = None) -> _Part:
        """The decisions of the first ``filters`` filters (None: of all) about rows ``start`` to ``stop`` of ``qrels``."""
        qrels = self.parsed.slice("qrels", start, stop)
        ids = tables.texts(qrels["query_id"])
        by = np.full(len(ids), -1, np.int32)
        part = _Part(qrels, ids, by, {}, {}, [])
        query_types = self._rows_by_query_type(ids, start, stop)
        for i in range(len(self.filters) if filters is None else filters):
            scores = self._scores(i, qrels, start, stop)
            part.scores.append(scores)
            for query_type, rows in query_types.items():
                remaining = rows[by[rows] < 0]
                self._apply_filter(part, i, self.filters_for[i](query_type), remaining, scores[remaining])
            self._cut_off(part, i, scores)
        return part

    def _rows_by_query_type(self, ids: list[str], start: int, stop: int) -> dict[str, np.ndarray]:
        if not self.by_query_type:
            return {"": np.arange(len(ids))}
        lineage = beside(self.parsed, "qrels", "lineage", start, stop)
        query_type_of = dict(zip(tables.texts(lineage["id"]), tables.texts(lineage["strategy"]), strict=True))
        query_types = np.array([query_type_of[query_id] for query_id in ids], object)
        return {query_type: np.flatnonzero(query_types == query_type) for query_type in sorted(set(query_types))}

    def _scores(self, i: int, qrels: pa.Table, start: int, stop: int) -> np.ndarray:
        rows = self.stored[i].slice("scores", start, stop, ["query_id", "doc_id", "score"])
        pairs = qrels.select(["query_id", "doc_id"]).combine_chunks()
        assert rows.select(["query_id", "doc_id"]).combine_chunks().equals(pairs), f"{self.stored[i].path}: other rows"
        return rows["score"].to_numpy()

    def _apply_filter(self, part: _Part, i: int, judge: Filter, rows: np.ndarray, scores: np.ndarray) -> None:
        """Decides each distinct score once: most filters have few."""
        values, places = np.unique(scores, return_inverse=True)
        reasons = [judge.keep(value) for value in values.tolist()]
        refused = np.array([reason is not None for reason in reasons], bool)[places] if len(rows) else places
        for row, place in zip(rows[refused.astype(bool)].tolist(), places[refused.astype(bool)].tolist(), strict=True):
            part.by[row], part.reasons[row], part.values[row] = i, str(reasons[place]), float(values[place])

    def _cut_off(self, part: _Part, i: int, scores: np.ndarray) -> None:
        cut = self.cuts[i] if i < len(self.cuts) else None
        if cut is None:
            return
        signed = scores if self.filters[i].best == "high" else -scores
        alive = part.by < 0
        for row in np.flatnonzero(alive & (signed <= cut.score)).tolist():
            if signed[row] < cut.score or _draw(part.ids[row]) > cut.draw:
                part.by[row], part.reasons[row], part.values[row] = i, "not-among-best", float(scores[row])

    def _cut(self, i: int) -> _Cut | None:
        """The last score that filter ``i`` keeps; None if it has no quota, or its quota is not reached."""
        filter, total = self.filters[i], self.parsed.count("qrels")
        if filter.quota(total) is None:
            return None
        sign, score_parts = 1 if filter.best == "high" else -1, [np.empty(0, np.float32)]
        for part in self._parts_before_cut(i):
            score_parts.append(sign * part.scores[i][part.by < 0])
        scores = np.concatenate(score_parts)
        quota = filter.quota(len(scores))
        if quota is None or quota >= len(scores):
            return None
        if quota == 0:
            return _Cut(float("inf"), -1.0)
        last = float(np.partition(scores, len(scores) - quota)[len(scores) - quota])
        spare = quota - int((scores > last).sum())
        draws = sorted(
            _draw(part.ids[row])
            for part in self._parts_before_cut(i)
            for row in np.flatnonzero((part.by < 0) & (sign * part.scores[i] == last)).tolist()
        )
        return _Cut(last, draws[spare - 1])

    def _parts_before_cut(self, i: int) -> Iterator[_Part]:
        """All rows, with the decisions of the filters up to ``i`` (its own cut is not known yet)."""
        for start, stop in self.parsed.ranges("qrels", 1):
            yield self.of(start, stop, i + 1)

    def rewritten(self, queries: pa.Table, part: _Part) -> tuple[pa.Table, pa.Table]:
        """The queries as the filters rewrite them, and a row of ``masked`` for each change."""
        row_of = {query_id: row for row, query_id in enumerate(part.ids) if part.by[row] < 0}
        ids, texts = (tables.texts(queries[name]) for name in ("query_id", "text"))
        changed: dict[str, list[str]] = {"id": [], "by": [], "detail": []}
        for i, filter in enumerate(self.filters):
            if not _rewrites_texts(filter):
                continue
            for place, query_id in enumerate(ids):
                change = filter.rewrite(texts[place], float(part.scores[i][row_of[query_id]]))
                if change is not None:
                    texts[place] = tables.clean(change[0])
                    for column, value in zip(changed.values(), (query_id, filter.type, change[1]), strict=True):
                        column.append(value)
        rewritten = tables.columns("queries", len(ids), query_id=queries["query_id"], text=texts)
        return rewritten, tables.columns("masked", len(changed["id"]), **changed)


def _draw(query_id: str) -> float:
    return tables.unit_of("best", query_id)
