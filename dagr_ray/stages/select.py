"""Which generated queries become training data: Score once, Select by thresholds, Take a nested subset."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray import tables, whole
from dagr_ray.artifact import Artifact
from dagr_ray.beside import Candidates, Twins, rows_beside
from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError, Later
from dagr_ray.filters import Candidate, Filter
from dagr_ray.stage import Inputs, Output, Run, Stage
from dagr_ray.whole import Whole

log = logging.getLogger("dagr")
WINDOW = 8192  # rows of a table that are looked at together: a row group


class Score(Stage):
    """The score that a filter gives to each generated query. Thresholds of the filter are no part of the fingerprint.

    ``corpus`` holds the passages that the queries were written for. With a ``search``, passages of ``corpus`` that are
    equal but for case and spacing count as one: a search that returns a passage's twin has found the passage. Give the
    searched corpus there, so that twins outside the sample that was asked about are known too. ``labels`` (a stage with
    ``scores``) is for filters that read a teacher's; completions are those that ``parsed`` was made of. The rows of
    ``scores`` stand as those of ``parsed``'s ``qrels`` do. A filter that is ``rowwise`` works shard by shard (one that reads
    a search where its shards are ranges of queries), any other on all rows at once.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("scores",)
    parsed: Stage
    corpus: Stage
    filter: Filter
    search: Stage | None = None
    labels: Annotated[Stage | None, Later()] = None

    @model_validator(mode="after")
    def _given_what_it_reads(self) -> Score:
        fields = {"candidates": "search", "scores": "labels"}
        for table, name in fields.items():
            given = getattr(self, name) is not None
            if self.filter.reads == table and not given:
                raise ConfigError(f"score: {name} is not set, and {self.filter.type!r} reads its {table}; give one")
            if self.filter.reads != table and given:
                raise ConfigError(f"score: the filter {self.filter.type!r} reads no {name}; leave {name} out")
        if self.filter.reads == "generations" and self._completions() is None:
            raise ConfigError(
                f"score: {self.parsed.folder_name()} was not made of completions, and {self.filter.type!r} reads them; "
                "give what Parse made of them"
            )
        if self.filter.reads == "generations" and not getattr(self._completions(), "keeps_logprob", True):
            raise ConfigError(
                f"score: the completions of {self.parsed.folder_name()} keep no log-probabilities, and {self.filter.type!r} "
                "reads them; give Generate sampling=Sampling(logprob=True)"
            )
        return self

    def _completions(self) -> Stage | None:
        """What the queries were written in, also where they were selected since."""
        stage: Any = self.parsed
        while stage is not None and not hasattr(stage, "generations"):
            stage = getattr(stage, "parsed", None)
        return None if stage is None else stage.generations

    def label(self) -> str:
        return self.filter.type

    def identity(self) -> dict[str, Any]:
        """The filter by what decides its scores."""
        return super().identity() | {"filter": self.filter.scoring_identity()}

    def inputs(self) -> dict[str, Stage]:
        """A filter that compares all queries does so in a stage of its own, whose scores are cut into shards here."""
        given = super().inputs()
        if self.filter.streams:
            given["whole"] = Whole(queries=self.parsed, filter=self.filter)
        if self.filter.reads == "generations" and (completions := self._completions()) is not None:
            given["generations"] = completions
        return given

    @property
    def _sharded(self) -> bool:
        return self.filter.rowwise or self.filter.streams

    def size(self, inputs: Inputs) -> int | None:
        return inputs["parsed"].count("qrels") if self._sharded else None

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """Whole shards of the queries, several where they are small; all rows as one for a filter that compares them."""
        parsed = inputs["parsed"]
        cut = self._sharded and ("search" not in inputs or Candidates(inputs["search"], parsed).follows)
        return (parsed.ranges("qrels", step) if cut else []) or [(0, parsed.count("qrels"))]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        parsed, total = inputs["parsed"], max(inputs["parsed"].count("qrels"), 1)
        passages = _Lookup(inputs["corpus"], "corpus", "doc_id") if self.filter.needs_passage else None
        made_by = _Lookup(inputs["generations"], "generations", "gen_id") if "generations" in inputs else None
        found = Candidates(inputs["search"], parsed) if "search" in inputs else None
        twins = lru_cache(maxsize=1)(lambda: Twins(inputs["corpus"]))

        def run(start: int, stop: int) -> Output:
            qrels = parsed.slice("qrels", start, stop, ["query_id", "doc_id"])
            if "whole" in inputs:
                return self._stored(qrels, whole.of(parsed, inputs["whole"], qrels["query_id"], start))
            queries = _beside(parsed, "queries", start, stop)
            text_of = dict(zip(*map(tables.texts, queries.select(["query_id", "text"]).columns), strict=True))
            passage_of: dict[str, str] = {}
            if passages is not None:
                read = passages.of(qrels["doc_id"], start / total, ["title", "text"])
                passage_of = {key: tables.passage_text(title, text) for key, title, text in read}
            first, beside = qrels["doc_id"], None
            if found is not None:
                candidates = found.of(qrels["query_id"], *rows_beside(parsed, "queries", start, stop))
                place = candidates.schema.get_field_index("doc_id")
                same = twins().first(candidates["doc_id"])
                beside, first = candidates.set_column(place, candidates.schema.field(place), same), twins().first(first)
            if "labels" in inputs:
                wanted = qrels["query_id"].unique()
                beside = _rows(part for part in inputs["labels"].scan("scores") if len(part)) or tables.empty("scores")
                beside = beside.filter(pc.is_in(beside["query_id"], value_set=wanted))
            if made_by is not None:
                lineage = _beside(parsed, "lineage", start, stop)
                beside = _logprobs(lineage, made_by, start / total)
            ids = map(tables.texts, (*qrels.columns, first))
            rows = [Candidate(q, text_of[q], same, passage_of.get(d, "")) for q, d, same in zip(*ids, strict=True)]
            scores = self.filter.score(rows, beside)
            assert len(scores) == len(rows), f"{self.filter.type} gave {len(scores)} scores for {len(rows)} rows"
            return self._stored(qrels, scores)

        return run

    def _stored(self, qrels: pa.Table, scores: Any) -> Output:
        made = tables.columns(
            "scores",
            len(qrels),
            query_id=qrels["query_id"],
            doc_id=qrels["doc_id"],
            scorer=self.filter.type,
            score=pa.array(scores, pa.float32()),
        )
        return Output({"scores": made}, counts={"in": len(qrels), "out": len(qrels)})


def _rows(parts: Iterable[pa.Table]) -> pa.Table | None:
    found = list(parts)
    return pa.concat_tables(found) if found else None


def _beside(folder: Artifact, name: str, start: int, stop: int) -> pa.Table:
    return folder.slice(name, *rows_beside(folder, name, start, stop))


class _Lookup:
    """Rows of a large table by a key that is unique. Looks first where the last rows stood, then ever further away.

    The tables of one recipe stand in one order, so that shards read little besides what they want; a table in any other
    order is read through.
    """

    def __init__(self, folder: Artifact, name: str, key: str) -> None:
        self.folder, self.name, self.key = folder, name, key
        self.windows = -(-folder.count(name) // WINDOW)
        self.at: int | None = None
        self.read = lru_cache(maxsize=4)(self._read)

    def _read(self, window: int, columns: tuple[str, ...]) -> pa.Table:
        return self.folder.slice(self.name, window * WINDOW, (window + 1) * WINDOW, [self.key, *columns])

    def of(self, keys: pa.ChunkedArray, hint: float, columns: list[str]) -> Iterator[tuple[Any, ...]]:
        """(key, *columns) of each key, in any order. ``hint`` in [0, 1): about where the first may stand."""
        wanted = keys.unique()
        missing = set(wanted.to_pylist())
        near = int(hint * self.windows) if self.at is None else self.at
        for window in sorted(range(self.windows), key=lambda w: (abs(w - near), w)) if missing else ():
            rows = self.read(window, tuple(columns))
            rows = rows.filter(pc.is_in(rows[self.key], value_set=wanted))
            if len(rows):
                self.at = window
                missing.difference_update(rows[self.key].to_pylist())
                yield from zip(*(column.to_pylist() for column in rows.columns), strict=True)
            if not missing:
                return
        assert not missing, f"{len(missing)} rows of {self.name} are not in {self.folder.path}, such as {min(missing)}"


def _logprobs(lineage: pa.Table, made_by: _Lookup, hint: float) -> pa.Table:
    value_of = dict(made_by.of(lineage["gen_id"], hint, ["logprob"]))
    values = pa.array([value_of[gen_id] for gen_id in tables.texts(lineage["gen_id"])], pa.float32())
    return pa.table({"query_id": lineage["id"], "logprob": values})


class Select(Stage):
    """The queries that every filter keeps, asked in the order of ``scores``; the first refusal is the reason.

    Cheap: reads stored scores, so another threshold makes another folder of this stage and no new scoring. A filter that
    keeps so many of the best (``room``) counts among what all filters before it keep; equal scores are drawn by hash. A
    filter that mends texts leaves the query its id, and what it did is in ``masked``.
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

    def inputs(self) -> dict[str, Stage]:
        """A corpus is an input where a filter is stricter on a large one."""
        sized = {f"scores.{i}.corpus": s.corpus for i, s in enumerate(self.scores) if s.filter.by_size}
        return super().inputs() | sized

    def size(self, inputs: Inputs) -> int:
        return inputs["parsed"].count("qrels")

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """Whole shards of the queries, several where they are small."""
        return inputs["parsed"].ranges("qrels", step) or [(0, 0)]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        decisions = _Decisions(self, inputs)

        def run(start: int, stop: int) -> Output:
            part = decisions.of(start, stop)
            rejected = tables.Rejected()
            for row in np.flatnonzero(part.by >= 0):
                by = self.scores[part.by[row]].filter.type
                rejected.add(part.ids[row], by, part.reasons[row], f"score {part.values[row]:g}")
            kept = part.qrels.filter(pa.array(part.by < 0))
            ids = kept["query_id"].unique()
            queries, lineage = (_beside(inputs["parsed"], name, start, stop) for name in ("queries", "lineage"))
            queries = queries.filter(pc.is_in(queries["query_id"], value_set=ids))
            made = {
                "queries": queries,
                "qrels": kept,
                "lineage": lineage.filter(pc.is_in(lineage["id"], value_set=ids)),
                "rejected": rejected.table(),
            }
            if any(_mends(score.filter) for score in self.scores):
                made["queries"], made["masked"] = decisions.mended(queries, part)
            counts = {"in": len(part.ids), "out": kept.num_rows, "rejected": rejected.counted()}
            if "masked" in made:
                counts["masked"] = made["masked"].num_rows
            return Output(made, counts=counts)

        return run


def _mends(filter: Filter) -> bool:
    return type(filter).mend is not Filter.mend


class _Cut(NamedTuple):
    """The last that is kept of the best: a better score passes, an equal one passes up to the hash ``draw``."""

    score: float
    draw: float


class _Part(NamedTuple):
    """What is decided of some rows: ``by`` is the filter that refuses a row, -1 where none does."""

    qrels: pa.Table
    ids: list[str]
    by: np.ndarray
    reasons: dict[int, str]
    values: dict[int, float]
    scores: list[np.ndarray]


class _Decisions:
    """Asks the filters of a selection about any rows of it."""

    def __init__(self, stage: Select, inputs: Inputs) -> None:
        self.parsed = inputs["parsed"]
        self.filters = [score.filter for score in stage.scores]
        self.stored = [inputs[f"scores.{i}"] for i in range(len(self.filters))]
        passages = [
            inputs[name].count("corpus") if (name := f"scores.{i}.corpus") in inputs else 0
            for i in range(len(self.filters))
        ]
        self.settled = [
            lru_cache(maxsize=None)(lambda form, f=f, n=n: f.settled(form, n))
            for f, n in zip(self.filters, passages, strict=True)
        ]
        self.by_form = any(type(f).settled is not Filter.settled for f in self.filters)
        self.cuts: list[_Cut | None] = []
        for i in range(len(self.filters)):
            self.cuts.append(self._cut(i))

    def of(self, start: int, stop: int, filters: int | None = None) -> _Part:
        """The decisions of the first ``filters`` filters (None: of all) about rows ``start`` to ``stop`` of ``qrels``."""
        qrels = self.parsed.slice("qrels", start, stop)
        ids = tables.texts(qrels["query_id"])
        by = np.full(len(ids), -1, np.int32)
        part = _Part(qrels, ids, by, {}, {}, [])
        forms = self._forms(ids, start, stop)
        for i in range(len(self.filters) if filters is None else filters):
            scores = self._scores(i, qrels, start, stop)
            part.scores.append(scores)
            for form, rows in forms.items():
                asked = rows[by[rows] < 0]
                self._ask(part, i, self.settled[i](form), asked, scores[asked])
            self._cut_off(part, i, scores)
        return part

    def _forms(self, ids: list[str], start: int, stop: int) -> dict[str, np.ndarray]:
        if not self.by_form:
            return {"": np.arange(len(ids))}
        lineage = _beside(self.parsed, "lineage", start, stop)
        form_of = dict(zip(tables.texts(lineage["id"]), tables.texts(lineage["strategy"]), strict=True))
        forms = np.array([form_of[query_id] for query_id in ids], object)
        return {form: np.flatnonzero(forms == form) for form in sorted(set(forms))}

    def _scores(self, i: int, qrels: pa.Table, start: int, stop: int) -> np.ndarray:
        rows = self.stored[i].slice("scores", start, stop, ["query_id", "doc_id", "score"])
        pairs = qrels.select(["query_id", "doc_id"]).combine_chunks()
        assert rows.select(["query_id", "doc_id"]).combine_chunks().equals(pairs), f"{self.stored[i].path}: other rows"
        return rows["score"].to_numpy()

    def _ask(self, part: _Part, i: int, judge: Filter, rows: np.ndarray, scores: np.ndarray) -> None:
        """Each score once: most filters give few different ones."""
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
        """Where filter ``i`` ends what it keeps of the best; None where it keeps all or has room for all."""
        filter, total = self.filters[i], self.parsed.count("qrels")
        if filter.room(total) is None:
            return None
        sign, found = 1 if filter.best == "high" else -1, [np.empty(0, np.float32)]
        for part in self._survey(i):
            found.append(sign * part.scores[i][part.by < 0])
        scores = np.concatenate(found)
        room = filter.room(len(scores))
        if room is None or room >= len(scores):
            return None
        if room == 0:
            return _Cut(float("inf"), -1.0)
        last = float(np.partition(scores, len(scores) - room)[len(scores) - room])
        spare = room - int((scores > last).sum())
        draws = sorted(
            _draw(part.ids[row])
            for part in self._survey(i)
            for row in np.flatnonzero((part.by < 0) & (sign * part.scores[i] == last)).tolist()
        )
        return _Cut(last, draws[spare - 1])

    def _survey(self, i: int) -> Iterator[_Part]:
        """All rows, with the decisions of the filters up to ``i`` (its own cut is not known yet)."""
        for start, stop in self.parsed.ranges("qrels", 1):
            yield self.of(start, stop, i + 1)

    def mended(self, queries: pa.Table, part: _Part) -> tuple[pa.Table, pa.Table]:
        """The queries as the filters mend them, and a row of ``masked`` for each change."""
        row_of = {query_id: row for row, query_id in enumerate(part.ids) if part.by[row] < 0}
        ids, texts = (tables.texts(queries[name]) for name in ("query_id", "text"))
        changed: dict[str, list[str]] = {"id": [], "by": [], "detail": []}
        for i, filter in enumerate(self.filters):
            if not _mends(filter):
                continue
            for place, query_id in enumerate(ids):
                done = filter.mend(texts[place], float(part.scores[i][row_of[query_id]]))
                if done is not None:
                    texts[place] = tables.clean(done[0])
                    for column, value in zip(changed.values(), (query_id, filter.type, done[1]), strict=True):
                        column.append(value)
        made = tables.columns("queries", len(ids), query_id=queries["query_id"], text=texts)
        return made, tables.columns("masked", len(changed["id"]), **changed)


def _draw(query_id: str) -> float:
    return tables.unit_of("best", query_id)


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
