"""Inputs of strategies besides single passages: queries with their passages, linked passages, topics without a corpus."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.joins import rows_with
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.core.words import first_words, wording


class Pairs(Stage):
    """Each relevant judgement of ``queries`` as a pair of query and passage, for strategies that rewrite one of them.

    ``split`` reads ``qrels.<split>`` of a data set instead of ``qrels``. ``n`` draws this many pairs by hash, so that a
    smaller draw is part of a larger one.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("pairs",)
    judged: ClassVar[dict[str, str]] = {"queries": "split"}
    queries: Stage
    corpus: Stage
    split: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0

    def label(self) -> str:
        return self.split or "all"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            relevant = tables.relevant(inputs["queries"].qrels(self.split, self.type))
            query_ids, passage_ids = relevant["query_id"].to_pylist(), relevant["doc_id"].to_pylist()
            order = list(range(len(query_ids)))
            if self.n is not None and self.n < len(order):
                hashes = [tables.unit_of("pairs", self.seed, *ids) for ids in zip(query_ids, passage_ids, strict=True)]
                order = sorted(sorted(order, key=hashes.__getitem__)[: self.n])
            text_of = tables.texts_of(inputs["queries"].read("queries"))
            rows = [
                {"query_id": query_ids[i], "query": text_of[query_ids[i]], "passage_id": passage_ids[i], "other": ""}
                for i in order
            ]
            pairs = _with_passages(rows, inputs["corpus"])
            return Output({"pairs": pairs}, counts={"in": len(query_ids), "out": pairs.num_rows})

        return run


class AsQueries(Stage):
    """The first ``words`` words of each passage as a query, to search for passages that are near it."""

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # words of any script, with their marks
    outputs: ClassVar[tuple[str, ...]] = ("queries",)
    corpus: Stage
    words: Annotated[int, Field(ge=4)] = 64

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            rows = inputs["corpus"].read("corpus")
            passages = map(tables.passage_text, rows["title"].to_pylist(), rows["text"].to_pylist())
            texts = [first_words(text, self.words) for text in passages]
            queries = tables.columns("queries", rows.num_rows, query_id=rows["doc_id"], text=texts)
            return Output({"queries": queries}, counts={"in": rows.num_rows, "out": rows.num_rows})

        return run


class LinkedPairs(Stage):
    """Each passage of ``passages`` with one near it in ``corpus``, for multi-hop strategies.

    ``search`` is a search of ``corpus`` for ``AsQueries(passages)``. The link is the first hit from rank ``first`` to rank
    ``last`` with another text; a passage without one makes no pair and is counted.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("pairs", "rejected")
    passages: Stage
    corpus: Stage
    search: Stage
    first: Annotated[int, Field(ge=1)] = 1
    last: Annotated[int, Field(ge=1)] = 10

    @model_validator(mode="after")
    def _in_order(self) -> LinkedPairs:
        if self.first > self.last:
            raise ConfigError(
                f"linked-pairs: first = {self.first} is after last = {self.last}; set first at most {self.last}"
            )
        return self

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            ids = inputs["passages"].read("corpus", ["doc_id"])["doc_id"].to_pylist()
            hits: dict[str, list[str]] = {}
            for part in inputs["search"].scan("candidates"):
                links = part.filter(
                    pc.and_(pc.greater_equal(part["rank"], self.first), pc.less_equal(part["rank"], self.last))
                )
                for query_id, doc_id in zip(links["query_id"].to_pylist(), links["doc_id"].to_pylist(), strict=True):
                    hits.setdefault(query_id, []).append(doc_id)
            wanted_ids = set(ids) | {doc_id for links in hits.values() for doc_id in links}
            text_of = _passages(inputs["corpus"], wanted_ids)
            rows, rejected = [], tables.Rejected()
            for doc_id in ids:
                own_text = _folded(text_of[doc_id]) if doc_id in text_of else None
                linked = next(
                    (i for i in hits.get(doc_id, ()) if i != doc_id and _folded(text_of[i]) != own_text), None
                )
                if linked is None or own_text is None:
                    rejected.add(doc_id, "linked", "no-link")
                    continue
                other = tables.passage_text(text_of[linked]["title"], text_of[linked]["text"])
                rows.append({"query": "", "passage_id": doc_id, "other_id": linked, "other": other})
            counts = {"in": len(ids), "out": len(rows), "rejected": rejected.counts_by_reason()}
            return Output(
                {"pairs": _with_passages(rows, inputs["corpus"]), "rejected": rejected.table()}, counts=counts
            )

        return run


def _folded(row: dict[str, Any]) -> str:
    return wording(tables.passage_text(row["title"], row["text"]))


def _passages(corpus: Artifact, ids: set[str]) -> dict[str, dict[str, Any]]:
    return {row["doc_id"]: row for row in rows_with(corpus, "corpus", "doc_id", ids).to_pylist()}


def _with_passages(rows: list[dict[str, Any]], corpus: Artifact) -> pa.Table:
    """The ``pairs`` table of rows with a ``passage_id``; ids are derived from the ids of the parts."""
    text_of = _passages(corpus, {row["passage_id"] for row in rows})
    missing = next((row["passage_id"] for row in rows if row["passage_id"] not in text_of), None)
    if missing is not None:
        raise ConfigError(
            f"pairs: passage {missing!r} is judged but not in {corpus.name}; give the corpus that was judged"
        )
    pairs = []
    for row in rows:
        passage = text_of[row["passage_id"]]
        doc_id = tables.id_of("pair", row.get("query_id"), row["passage_id"], row.get("other_id"))
        pairs.append({"doc_id": doc_id, "title": passage["title"], "text": passage["text"], **row})
    return tables.table("pairs", pairs)


FIELDS = (
    "cooking", "gardening", "personal finance", "tax law", "employment law", "astronomy", "organic chemistry", "oncology",
    "cardiology", "nutrition", "veterinary medicine", "dentistry", "car repair", "cycling", "railways", "aviation safety",
    "home insurance", "renting a flat", "plumbing", "electric wiring", "solar panels", "software testing", "databases",
    "computer networks", "web design", "machine learning", "statistics", "geometry", "ancient history", "art history",
    "music theory", "film making", "photography", "board games", "football", "swimming", "mountaineering", "sailing",
    "meteorology", "geology", "oceanography", "forestry", "agriculture", "beekeeping", "fishing", "wine making", "textiles",
    "carpentry", "metal working", "3D printing", "museums", "libraries", "schools", "university admission", "child care",
    "elderly care", "psychology", "sociology", "elections", "customs and shipping",
)  # fmt: skip
ANGLES = (
    "an encyclopedia", "a user manual", "a frequently asked question", "a forum thread", "a scientific abstract",
    "a news report", "a company's terms", "a product review", "a textbook section", "an error report", "a law",
    "a how-to guide",
)  # fmt: skip


class Topics(Stage):
    """``n`` topics to write about without a corpus: fields of knowledge, each with a kind of text, in hash order.

    ``fields`` and ``angles`` can be set; every combination occurs once before any occurs again, with a number.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("corpus",)
    n: Annotated[int, Field(ge=1)]
    fields: tuple[str, ...] = FIELDS
    angles: tuple[str, ...] = ANGLES
    seed: int = 0

    def label(self) -> str:
        return f"{self.n}"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            combinations = [f"{field}, as in {angle}" for field in self.fields for angle in self.angles]
            combinations.sort(key=lambda text: tables.unit_of("topics", self.seed, text))
            ids, texts = [], []
            for i in range(self.n):
                text = combinations[i % len(combinations)]
                ids.append(tables.id_of("topic", text, i // len(combinations)))
                texts.append(text)
            corpus = tables.columns("corpus", self.n, doc_id=ids, title="", text=texts)
            return Output({"corpus": corpus}, counts={"in": self.n, "out": self.n})

        return run
