"""The leak gate: compares training data with the evaluation sets, and removes training queries that leak."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.joins import beside, rows_with
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.leakage.joins import count_matching, matching
from dagr_ray.leakage.matching import BEST, FLOORS, MECHANISMS, SAME, HeldOut, Matches, SharedAnswers, WordInformation
from dagr_ray.leakage.minhash import Floats, Places, split_words
from dagr_ray.retrieval.encoder import TASKS, Encoder, encode, load

Kind = Literal[
    "query-query", "query-passage", "positive-query", "positive-passage", "exemplar-query", "exemplar-passage"
]
PASSAGE_NGRAM = (
    13  # words in a row that two passages do not share by chance (Brown et al., arXiv 2005.14165, appendix C)
)
PASSAGES = 20_000  # of an evaluation corpus, to learn which words are distinctive
AT_ONCE = 16384  # queries
SHOWN = 300  # characters of a text that are stored for people to read


class LeakScan(Stage):
    """Training data that resembles test queries or their relevant passages: the table ``leaks``.

    ``held_out`` are the evaluation sets (stages with ``corpus``, ``queries`` and ``qrels.<split>``). Compared are, by
    ``kind``: each query of ``selected`` with the test queries, and as a copy from a relevant passage; its positive
    passage with the relevant ones, and as one that contains a test query; and the ``exemplars`` with both. ``HeldOut``
    describes how; with an ``encoder`` (the frozen base) also by cosine. ``data`` names the evaluation set's folder.

    Scores are stored from low thresholds on, so another threshold of the ``LeakGate`` needs no new comparison. A training
    text is paired with the few held-out texts that it resembles most by each mechanism, and each held-out text with the
    training text that resembles it most; ``left_out`` counts the other pairs. ``common`` counts n-grams of the held-out
    texts that are boilerplate and are not used to find pairs (see ``HeldOut``): time and memory grow with the texts, not
    with the pairs of texts that share a template. Xu et al. 2024 (arXiv 2406.04244) survey evaluation sets in training
    data and the measures that find them.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "leak-scan"
    rows_from: ClassVar[str] = "selected"
    version: ClassVar[int] = 5  # text shared by many others finds nothing; the best pairs of each text
    pool: ClassVar[str] = "retrieve"
    outputs: ClassVar[tuple[str, ...]] = ("leaks",)
    judged: ClassVar[dict[str, str]] = {"held_out": "split"}
    selected: Stage
    corpus: Stage
    held_out: Annotated[tuple[Stage, ...], Field(min_length=1)]
    split: str = "test"
    exemplars: Stage | None = None
    encoder: Encoder | None = None

    def label(self) -> str:
        return f"{len(self.held_out)}sets"

    def size(self, inputs: Inputs) -> int:
        return inputs["selected"].count("queries")

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """Whole shards of the queries, small ones joined: each reads the passages once."""
        return inputs["selected"].ranges("queries", max(step, AT_ONCE)) or [(0, 0)]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        encoded = _Encoded(self.encoder)
        sets = [_held(inputs[f"held_out.{i}"], self.split, self.encoder) for i in range(len(self.held_out))]

        def run(start: int, stop: int) -> Output:
            leaks = _Found()
            queries = inputs["selected"].slice("queries", start, stop, ["query_id", "text"])
            ids, texts = _flat(queries["query_id"]), _flat(queries["text"])
            positives = _Positives(inputs, start, stop, ids)
            vectors, passage_vectors = encoded(texts, True), encoded(positives.texts, False)
            for held_set in sets:
                similar = positives.by_query(held_set.passages.find_similar(positives.texts, passage_vectors))
                answered = held_set.asked_of(similar[0], pc.index_in(similar[1], value_set=ids).to_numpy())
                leaks.add("query-query", held_set, held_set.queries.find_similar(texts, vectors, answered), ids, texts)
                leaks.add("query-passage", held_set, held_set.passages.quoted(texts), ids, texts)
                leaks.add("positive-query", held_set, *positives.by_query(held_set.queries.quoting(positives.texts)))
                leaks.add("positive-passage", held_set, *similar)
            if start == 0 and "exemplars" in inputs:
                exemplars = inputs["exemplars"].read("exemplars")
                ids, texts, passages = (_flat(exemplars[name]) for name in ("query_id", "query", "passage"))
                vectors, passage_vectors = encoded(texts, True), encoded(passages, False)
                for held_set in sets:
                    shared = held_set.passages.find_similar(passages, passage_vectors)
                    answered = held_set.asked_of(shared, np.arange(len(ids)))
                    leaks.add(
                        "exemplar-query", held_set, held_set.queries.find_similar(texts, vectors, answered), ids, texts
                    )
                    leaks.add("exemplar-passage", held_set, shared, ids, passages)
            leak_table = leaks.table()
            counts: dict[str, Any] = {
                "in": queries.num_rows,
                "out": leak_table.num_rows,
                "compared": _by_mechanism(leak_table),
            }
            counts["left_out"] = leaks.left_out
            if start == 0:  # once, because the shards' counts are added up
                counts["common"] = {held_set.name: held_set.common() for held_set in sets}
            return Output({"leaks": leak_table}, counts=counts)

        return run


class _Encoded:
    """The vectors of texts by an encoder; None without one."""

    def __init__(self, encoder: Encoder | None) -> None:
        self.encoder, self.model = encoder, load(encoder) if encoder else None

    def __call__(self, texts: pa.Array, queries: bool) -> Floats | None:
        if self.model is None or self.encoder is None:
            return None
        prefix = self.encoder.prompts()[0 if queries else 1]
        task = TASKS[0 if queries else 1]
        return encode(self.model, tables.texts(texts), prefix, self.encoder.dtype, task)


@lru_cache(maxsize=4)
def _held(data: Artifact, split: str, encoder: Encoder | None) -> _Set:
    """An evaluation set, cached in this process: each arm of a study scans with one."""
    return _Set(data, split, _Encoded(encoder))


class _Positives:
    """The distinct passages of some queries, with the queries of each."""

    def __init__(self, inputs: Inputs, start: int, stop: int, ids: pa.Array) -> None:
        qrels = beside(inputs["selected"], "queries", "qrels", start, stop)
        qrels = qrels.filter(pc.is_in(qrels["query_id"], value_set=ids))
        docs = qrels["doc_id"].unique()
        passages = rows_with(inputs["corpus"], "corpus", "doc_id", docs)
        self.texts = _texts(passages)
        self._shown = _shown(self.texts)
        index = pc.index_in(qrels["doc_id"], value_set=_flat(passages["doc_id"]))
        assert index.null_count == 0, f"positives are not in {inputs['corpus'].path}; give the corpus that holds them"
        self._passage = index.to_numpy().astype(np.int64)
        self._queries = _flat(qrels["query_id"])

    def by_query(self, found: Matches) -> tuple[Matches, pa.Array, pa.Array]:
        """Matches of passages as matches of (query, passage) pairs, with the pairs' ids and the beginnings of their texts.

        Each pair gets the best match of its passage, and each match of a passage belongs to at least one pair.
        """
        order = np.argsort(-found.scores, kind="stable")
        rows, passages = found.rows[order].astype(np.uint64), self._passage.astype(np.uint64)
        match, pair = matching(rows, passages, BEST * len(MECHANISMS))
        left_out = np.zeros(len(MECHANISMS), np.int64)
        for how in np.unique(found.how[order]):
            is_mechanism = found.how[order] == how
            left_out[how] = count_matching(rows[is_mechanism], passages) - np.count_nonzero(is_mechanism[match])
        match = order[match]
        expanded = Matches(
            pair, found.held_out[match], found.how[match], found.scores[match], found.left_out + left_out
        )
        return expanded, self._queries, self._shown.take(pa.array(self._passage))


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


def _of_rows(scan: Artifact, shards: list[dict[str, Any]], start: int, stop: int) -> pa.Table:
    """The leaks from the scan's shards that hold any of the queries ``start`` to ``stop``."""
    rows = (scan.manifest or {})["tables"]["leaks"]["parts"]
    ends = list(accumulate(part["rows"] for part in rows))
    at = [
        i
        for i, shard in enumerate(shards)
        if (shard["start"] < stop and shard["stop"] > start) or shard["start"] == start
    ]
    return scan.slice("leaks", ends[at[0]] - rows[at[0]]["rows"], ends[at[-1]]) if at else tables.empty("leaks")


class _Set:
    """An evaluation set: its judged queries and their relevant passages, as texts to compare with."""

    def __init__(self, data: Artifact, split: str, encoded: Any) -> None:
        self.name = data.name
        qrels = data.qrels(split, "leak-scan")
        pairs = qrels.filter(pc.greater(qrels["relevance"], 0))
        relevant = pairs["doc_id"].unique()
        queries = data.read("queries")
        queries = queries.filter(pc.is_in(queries["query_id"], value_set=qrels["query_id"].unique()))
        passages = rows_with(data, "corpus", "doc_id", relevant)
        self.query_ids, self.passage_ids = _flat(queries["query_id"]), _flat(passages["doc_id"])
        asks = pc.index_in(pairs["query_id"], value_set=self.query_ids).to_numpy().astype(np.int64)
        answers = pc.index_in(pairs["doc_id"], value_set=self.passage_ids).fill_null(-1).to_numpy().astype(np.int64)
        texts, bodies = _flat(queries["text"]), _texts(passages)
        word_weights = WordInformation(split_words(texts), [split_words(_texts(data.slice("corpus", 0, PASSAGES)))])
        self.queries = HeldOut(texts, telling=word_weights, vectors=encoded(texts, True))
        self.passages = HeldOut(bodies, ngram=PASSAGE_NGRAM, vectors=encoded(bodies, False))
        in_corpus = answers >= 0
        # passages with equal words count as one
        self._asks, self._answers = asks[in_corpus], self.passages.same[answers[in_corpus]]
        self.shown = {"query": _shown(texts), "passage": _shown(bodies)}

    def common(self) -> dict[str, dict[str, int]]:
        """The number of n-grams that are common to many of the texts."""
        return {"query": self.queries.common(), "passage": self.passages.common()}

    def asked_of(self, alike: Matches, rows: Places) -> SharedAnswers:
        """Which test queries a passage answers that ``alike`` finds the same as a text's; ``rows`` has the text's place."""
        same = alike.over(SAME)
        of = self.passages.same[same.held_out]
        return SharedAnswers(rows[same.rows].astype(np.int64), of, self._asks, self._answers)

    def ids(self, kind: str) -> tuple[pa.Array, pa.Array]:
        """Ids and beginnings of the held-out texts, for a kind of comparison."""
        if kind.endswith("-query"):
            return self.query_ids, self.shown["query"]
        return self.passage_ids, self.shown["passage"]


def _texts(corpus: pa.Table) -> pa.Array:
    rows = zip(tables.texts(corpus["title"]), tables.texts(corpus["text"]), strict=True)
    return pa.array([tables.passage_text(title, text) for title, text in rows], tables.TEXT)


def _shown(texts: pa.Array) -> pa.Array:
    """The beginnings of texts, for people to read: a text is in ``leaks`` once for each text that it resembles."""
    return pc.utf8_slice_codeunits(texts, 0, SHOWN)


class _Found:
    """Rows of ``leaks``; ``left_out`` counts pairs of which each text has better ones."""

    def __init__(self) -> None:
        self._parts = [tables.empty("leaks")]
        self.left_out: Counter[str] = Counter()

    def add(self, kind: Kind, held: _Set, found: Matches, ids: pa.Array, texts: pa.Array) -> None:
        held_ids, held_texts = held.ids(kind)
        rows, others = pa.array(found.rows, pa.int64()), pa.array(found.held_out, pa.int64())
        made = tables.columns(
            "leaks",
            len(found),
            id=ids.take(rows),
            kind=kind,
            mechanism=pa.array(MECHANISMS, tables.TEXT).take(pa.array(found.how)),
            data=held.name,
            held_out_id=held_ids.take(others),
            score=pa.array(found.scores, pa.float32()),
            text=_shown(texts).take(rows),
            held_out=held_texts.take(others),
        )
        self._parts.append(made)
        more = {f"{kind}/{name}": int(n) for name, n in zip(MECHANISMS, found.left_out, strict=True) if n}
        self.left_out.update(more)

    def table(self) -> pa.Table:
        return pa.concat_tables(self._parts).combine_chunks()


def _by_mechanism(leaks: pa.Table) -> dict[str, int]:
    return dict(Counter(map("/".join, zip(tables.texts(leaks["kind"]), tables.texts(leaks["mechanism"]), strict=True))))


class LeakGate(Stage):
    """The training queries without those that leak, by thresholds on a ``LeakScan``; ``leaks`` holds rows above them.

    ``drop`` names the kinds that reject a query; () only reports. A positive that is a relevant passage is no reason
    unless it is named: queries are generated for passages of the searched corpus on purpose (InPars, Promptagator, GPL),
    and only the test questions must stay unknown. ``minhash``, ``edited``, ``rearranged``, ``contained``, ``embedding``
    and ``paraphrase`` are the lowest scores that count; equal words, in any order, always count. Questions of nearly equal
    meaning leak if the training query's own passage also answers the test query (``paraphrase``: among SciFact's training
    claims it finds those that restate or deny a test claim), and seldom if it does not: "What type of pans are these?" is
    asked about many products. With these thresholds, 0.49 % of the real training queries of four collections were rejected
    wrongly, nearly all of them in one whose questions depend on context (benchmarks/quality/leak.py).
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "leak-gate"
    rows_from: ClassVar[str] = "selected"
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage", "rejected", "leaks")
    selected: Stage
    scan: LeakScan
    drop: tuple[Kind, ...] = ("query-query",)
    edited: Annotated[float, Field(ge=FLOORS["edited"])] = 0.6
    rearranged: Annotated[float, Field(ge=FLOORS["rearranged"])] = 0.75
    contained: Annotated[float, Field(ge=FLOORS["contained"])] = 0.9
    minhash: Annotated[float, Field(ge=FLOORS["minhash"])] = 0.9
    embedding: Annotated[float, Field(ge=FLOORS["embedding"])] = 0.98
    paraphrase: Annotated[float, Field(ge=FLOORS["paraphrase"])] = 0.95

    @model_validator(mode="after")
    def _same_queries(self) -> LeakGate:
        if self.scan.selected.fingerprint() != self.selected.fingerprint():
            raise ConfigError(
                f"leak-gate: the scan is of {self.scan.selected.folder_name()}, not of {self.selected.folder_name()}; "
                "scan the queries that go through the gate"
            )
        return self

    def label(self) -> str:
        return "drop" if self.drop else "report"

    def size(self, inputs: Inputs) -> int:
        return inputs["selected"].count("queries")

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """Whole shards of the queries, small ones joined."""
        return inputs["selected"].ranges("queries", step) or [(0, 0)]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        selected, scan = inputs["selected"], inputs["scan"]
        scanned = scan.plan["shards"]

        def run(start: int, stop: int) -> Output:
            queries = selected.slice("queries", start, stop)
            qrels = beside(selected, "queries", "qrels", start, stop)
            lineage = beside(selected, "queries", "lineage", start, stop)
            ids = _flat(queries["query_id"])
            leaks = self._over(_of_rows(scan, scanned, start, stop))
            of_shard = pc.is_in(leaks["id"], value_set=ids)
            if start == 0:  # the first shard also gets the exemplars, which belong to no query
                of_shard = pc.or_(of_shard, pc.starts_with(leaks["kind"], "exemplar"))
            leaks = leaks.filter(of_shard)
            reasons = self._reasons(leaks)
            rejected = tables.Rejected()
            for query_id in tables.texts(queries["query_id"]):
                if query_id in reasons:
                    rejected.add(query_id, "leak", *reasons[query_id])
            rejected_ids = pa.array(rejected.ids, tables.TEXT)
            output = {
                name: rows.filter(
                    pc.and_(pc.is_in(rows[key], value_set=ids), pc.invert(pc.is_in(rows[key], value_set=rejected_ids)))
                )
                for name, key, rows in (
                    ("queries", "query_id", queries),
                    ("qrels", "query_id", qrels),
                    ("lineage", "id", lineage),
                )
            }
            output |= {"rejected": rejected.table(), "leaks": leaks}
            counts: dict[str, Any] = {"in": queries.num_rows, "out": output["queries"].num_rows}
            counts |= {"rejected": rejected.counts_by_reason(), "leaks": _by_mechanism(leaks)}
            return Output(output, counts=counts)

        return run

    def _over(self, leaks: pa.Table) -> pa.Table:
        """What is over the thresholds."""
        mechanisms, scores = np.array(tables.texts(leaks["mechanism"])), leaks["score"].to_numpy()
        least = {name: getattr(self, name) for name in FLOORS}
        limits = np.array([least.get(name, 0.0) for name in mechanisms], np.float32)
        return leaks.filter(pa.array(scores >= limits - 1e-6, pa.bool_()))

    def _reasons(self, leaks: pa.Table) -> dict[str, tuple[str, str]]:
        """Query id -> reason and detail, by the strictest mechanism."""
        reason_of: dict[str, tuple[str, str]] = {}
        order = {name: place for place, name in enumerate(MECHANISMS)}
        rows = leaks.filter(pc.is_in(leaks["kind"], value_set=pa.array(self.drop, tables.TEXT))).to_pylist()
        for row in sorted(rows, key=lambda r: (order[r["mechanism"]], -r["score"], r["held_out_id"])):
            detail = f"{row['kind']}, {row['data']} {row['held_out_id']}, score {row['score']:g}"
            reason_of.setdefault(row["id"], (row["mechanism"], detail))
        return reason_of
