"""Scores (query, passage) pairs by a teacher: the pairs of searches, of judgements, or of mined examples."""

from __future__ import annotations

import atexit
import math
import time
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.cost import with_remaining_budget
from dagr_ray.core.joins import RowsByQuery, rows_with
from dagr_ray.core.placement import Pool, PricedEngine
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.teachers import QueryPassage, ScoreSpread, SearchHit, Teacher, by_query
from dagr_ray.teachers.attention_rerank import AttentionRerank, AttentionSession, LabelledQuery, best_heads, head_scores


class Label(Stage):
    """The score of ``teacher`` for each pair, in ``scores``; higher is more relevant.

    The pairs of a query are its judgements (``qrels``, or ``qrels.<split>``) and the first ``depth`` hits of each of
    ``searches``, each passage once; with ``examples``, they are only the examples' positives and negatives, and a teacher
    that fuses searches reads its scores from them. Sharded over the queries; a worker holds the passages of all pairs. A
    query that breaks the teacher's engine is skipped and in ``rejected``, and so is a pair without a score. ``heads`` (a
    stage ``RetrievalHeads``) selects the heads of an attention re-ranker.

    The counts are of pairs, except for ``queries``. Cost: ``label_s`` and what the teacher counts.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "label"
    concurrent: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ("scores", "rejected")
    judged: ClassVar[dict[str, str]] = {"queries": "split"}
    teacher: Teacher
    queries: Stage
    corpus: Stage
    searches: tuple[Stage, ...] = ()
    examples: Stage | None = None
    heads: Stage | None = None
    split: str | None = None
    depth: Annotated[int, Field(ge=1)] = 100
    seed: int = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> Label:
        if len(self.searches) < self.teacher.needs_searches:
            raise ConfigError(
                f"label: {len(self.searches)} searches, but the teacher {self.teacher.type!r} fuses at least "
                f"{self.teacher.needs_searches}; give more searches"
            )
        if self.heads is not None and not self.teacher.reads_heads:
            raise ConfigError(f"label: heads have no effect on the teacher {self.teacher.type!r}; remove them")
        if self.examples is not None and self.split is not None:
            raise ConfigError(f"label: split = {self.split!r} has no effect with examples; remove one of them")
        return self

    @property
    def pool(self) -> str:  # type: ignore[override]
        """The placement's pool for the teacher."""
        return self.teacher.pool

    def label(self) -> str:
        return self.teacher.scorer()

    def engine_asked(self) -> PricedEngine | None:
        return self.teacher.engine_asked()

    def main_inputs(self) -> list[str]:
        """The examples, if their pairs are labelled."""
        return ["queries" if self.examples is None else "examples"]

    def size(self, inputs: Inputs) -> int:
        return inputs["queries"].count("queries")

    def skip_row(self, inputs: Inputs, row: int, reason: str, detail: str) -> Output:
        """A skipped query: none of its pairs has a score."""
        pairs = _PairTexts(self, inputs).of(row, row + 1)
        rejected = tables.Rejected()
        for pair in pairs:
            rejected.add(pair.query_id, self.type, reason, f"{pair.doc_id}: {tables.clean(detail)}")
        made = {"scores": tables.empty("scores"), "rejected": rejected.table()}
        counts = {"in": len(pairs), "out": 0, "errors": 0, "queries": 1, "rejected": rejected.counts_by_reason()}
        return Output(made, counts=counts)

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        opening = time.time()
        source = _PairTexts(self, inputs)
        teacher = self.teacher
        if "heads" in inputs:
            teacher = teacher.model_copy(update={"heads": _heads(inputs["heads"])})
        scorer = _affordable(teacher, folder, pool.workers).open(pool)
        atexit.register(scorer.close)
        start_s = [time.time() - opening]

        def run(start: int, stop: int) -> Output:
            scoring = time.time()
            pairs = source.of(start, stop)
            cost: dict[str, float] = {}
            scores = scorer.score(pairs, cost) if pairs else []
            assert len(scores) == len(pairs), f"{self.teacher.type} gave {len(scores)} scores for {len(pairs)} pairs"
            rejected = tables.Rejected()
            has_score = [not math.isnan(score) for score in scores]
            for pair in (pair for pair, scored in zip(pairs, has_score, strict=True) if not scored):
                rejected.add(pair.query_id, self.type, "no-score", pair.doc_id)
            scored_pairs = [
                (pair, score) for pair, score, scored in zip(pairs, scores, has_score, strict=True) if scored
            ]
            scores_table = tables.columns(
                "scores",
                len(scored_pairs),
                query_id=[pair.query_id for pair, _ in scored_pairs],
                doc_id=[pair.doc_id for pair, _ in scored_pairs],
                scorer=self.teacher.scorer(),
                score=[score for _, score in scored_pairs],
            )
            counts = {
                "in": len(pairs),
                "out": len(scored_pairs),
                "errors": len(pairs) - len(scored_pairs),
                "queries": stop - start,
                "rejected": rejected.counts_by_reason(),
            }
            spent = {"label_s": time.time() - scoring, "teacher_start_s": start_s.pop() if start_s else 0.0}
            return Output({"scores": scores_table, "rejected": rejected.table()}, counts=counts, cost=cost | spent)

        return run


def _affordable(teacher: Teacher, folder: Artifact, workers: int) -> Teacher:
    """The teacher, its engine (if any) with what earlier runs left of its budget."""
    engine = teacher.engine_asked()
    return teacher if engine is None else teacher.with_engine(with_remaining_budget(engine, folder, workers))


class RetrievalHeads(Stage):
    """The contrastive retrieval heads of an attention re-ranker, found on judged queries: see ``AttentionRerank``.

    ``sample`` queries of ``split`` are drawn by hash; their hits in ``searches`` that nobody judged relevant are the hard
    negatives. The metrics hold the ``keep`` best heads, best first, as ``core@<layer>.<head>``. The queries should not be
    training queries: use a split that is used neither for testing nor for training.
    """

    abstract: ClassVar[bool] = False
    rows_from: ClassVar[str] = "queries"
    pool: ClassVar[str] = "retrieve"
    outputs: ClassVar[tuple[str, ...]] = ("metrics",)
    judged: ClassVar[dict[str, str]] = {"queries": "split"}
    teacher: AttentionRerank
    queries: Stage
    corpus: Stage
    searches: tuple[Stage, ...]
    split: str | None = "dev"
    depth: Annotated[int, Field(ge=2)] = 40
    sample: Annotated[int, Field(ge=1)] = 24
    keep: Annotated[int, Field(ge=1)] = 8
    temperature: Annotated[float, Field(gt=0)] = 0.01
    seed: int = 0

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            source = _PairTexts(self, inputs)
            qrels = inputs["queries"].qrels(self.split, self.type)
            relevant: dict[str, set[str]] = {}
            for query_id, doc_id, relevance in zip(*(column.to_pylist() for column in qrels.columns), strict=True):
                if relevance > 0:
                    relevant.setdefault(query_id, set()).add(doc_id)
            order = sorted(relevant, key=lambda query_id: tables.unit_of("heads", self.seed, query_id))
            pairs = {
                query_pairs[0].query_id: query_pairs for query_pairs in by_query(source.of_ids(order[: self.sample]))
            }
            session = AttentionSession(self.teacher.model_copy(update={"heads": ()}))
            examples = [
                LabelledQuery(query_pairs, frozenset(relevant[query_id])) for query_id, query_pairs in pairs.items()
            ]
            scores = head_scores([(session.masses(example.pairs), example) for example in examples], self.temperature)
            rows = [
                {"measure": f"core@{layer}.{head}", "value": float(scores[layer, head])}
                for layer, head in best_heads(scores, self.keep)
            ]
            cost = {"prompt_tokens": session.tokens}
            return Output({"metrics": tables.table("metrics", rows)}, [], {"in": len(examples), "out": len(rows)}, cost)

        return run


def _heads(folder: Artifact) -> tuple[tuple[int, int], ...]:
    """The heads in the output of ``RetrievalHeads``."""
    names = [name.removeprefix("core@").split(".") for name in folder.read("metrics")["measure"].to_pylist()]
    return tuple((int(layer), int(head)) for layer, head in names)


class _PairTexts:
    """The pairs of any range of queries, with their texts."""

    def __init__(self, stage: Label | RetrievalHeads, inputs: Inputs) -> None:
        self.stage, self.queries = stage, inputs["queries"]
        self.searches = [
            RowsByQuery(inputs[f"searches.{i}"], "candidates", ["query_id", "doc_id", "rank", "score"])
            for i in range(len(stage.searches))
        ]
        self.examples = self.judged = None
        if "examples" in inputs:
            self.examples = RowsByQuery(inputs["examples"], "examples", ["query_id", "positive_id", "negative_ids"])
        else:
            self.judged = RowsByQuery(
                self.queries, self.queries.qrels_table(stage.split, stage.type), ["query_id", "doc_id"]
            )
        self.passages = _Passages(inputs["corpus"], self._wanted())

    def _wanted(self) -> pa.Array:
        """The passages of all pairs."""
        if self.examples is not None:
            parts = list(self.examples.source.scan("examples", ["positive_id", "negative_ids"]))
            columns = [column for part in parts for column in (part["positive_id"], _flat(part["negative_ids"]))]
        else:
            assert self.judged is not None
            columns = [part["doc_id"] for part in self.judged.source.scan(self.judged.name, ["doc_id"])]
            for search in self.searches:
                for part in search.source.scan("candidates", ["doc_id", "rank"]):
                    columns.append(part["doc_id"].filter(pc.less_equal(part["rank"], self.stage.depth)))
        return pa.chunked_array([column.unique() for column in columns], tables.TEXT).unique()

    def of(self, start: int, stop: int) -> list[QueryPassage]:
        """The pairs of queries ``start`` to ``stop``, grouped by query."""
        return self._of(self.queries.slice("queries", start, stop))

    def of_ids(self, query_ids: list[str]) -> list[QueryPassage]:
        """The pairs of these queries."""
        rows = self.queries.read("queries")
        return self._of(rows.filter(pc.is_in(rows["query_id"], value_set=pa.array(query_ids, tables.TEXT))))

    def _of(self, rows: pa.Table) -> list[QueryPassage]:
        texts = dict(zip(rows["query_id"].to_pylist(), rows["text"].to_pylist(), strict=True))
        hits_by_search = [search.of(texts) for search in self.searches]
        keys: list[tuple[str, str, Any, Any]] = []
        own_rows = (self.examples or self.judged).of(texts)  # type: ignore[union-attr]
        for query_id in texts:
            lists = [self._hits(hits_of.get(query_id, [])) for hits_of in hits_by_search]
            spreads = tuple(_spread(hits) for hits in lists)
            for doc_id in self._docs(own_rows.get(query_id, []), lists):
                keys.append((query_id, doc_id, tuple(hits.get(doc_id) for hits in lists), spreads))
        passages = self.passages.of([doc_id for _, doc_id, _, _ in keys])
        return [
            QueryPassage(query_id, texts[query_id], doc_id, passage, hits, spreads)
            for (query_id, doc_id, hits, spreads), passage in zip(keys, passages, strict=True)
        ]

    def _hits(self, rows: list[dict[str, Any]]) -> dict[str, SearchHit]:
        return {row["doc_id"]: SearchHit(row["rank"], row["score"]) for row in rows if row["rank"] <= self.stage.depth}

    def _docs(self, own: list[dict[str, Any]], lists: list[dict[str, SearchHit]]) -> list[str]:
        if self.examples is not None:
            return list(dict.fromkeys(doc for row in own for doc in (row["positive_id"], *row["negative_ids"])))
        return list(dict.fromkeys([row["doc_id"] for row in own] + [doc for hits in lists for doc in hits]))


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([pc.list_flatten(chunk) for chunk in column.chunks], tables.TEXT)


def _spread(hits: dict[str, SearchHit]) -> ScoreSpread | None:
    if not hits:
        return None
    scores = np.array([hit.score for hit in hits.values()], np.float64)
    return ScoreSpread(float(scores.mean()), float(scores.std()), float(scores.min()), float(scores.max()))


class _Passages:
    """The texts of some passages of a corpus."""

    def __init__(self, corpus: Artifact, wanted: pa.Array) -> None:
        self.rows = rows_with(corpus, "corpus", "doc_id", wanted).combine_chunks()
        self.ids, self.path = self.rows["doc_id"].combine_chunks(), corpus.path

    def of(self, ids: list[str]) -> list[str]:
        """The retriever's text of each passage, in order."""
        places = pc.index_in(pa.array(ids, tables.TEXT), value_set=self.ids)
        missing = [doc_id for doc_id, place in zip(ids, places.to_pylist(), strict=True) if place is None]
        assert not missing, f"{len(missing)} passages of the pairs are not in {self.path}, such as {missing[0]!r}"
        rows = self.rows.take(places)
        titles, bodies = rows["title"].to_pylist(), rows["text"].to_pylist()
        return [tables.passage_text(title, text) for title, text in zip(titles, bodies, strict=True)]
