"""Removes from passages the sentences that became queries."""

from __future__ import annotations

from typing import Annotated, ClassVar

import pyarrow.compute as pc
from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.core.words import word_count
from dagr_ray.strategies.crop import LEAST_REMAINDER, without

CLOZE = "crop/inverse-cloze"


class Cloze(Stage):
    """A corpus whose passages lack the sentences that ``Crop(mode="inverse-cloze")`` turned into queries; ids and order stay.

    For ``Train(corpus=...)`` only, so that a positive is not found by its query's own words (the inverse cloze task: Lee
    et al. 2019, arXiv 1906.00300, section 4). As there, a share ``keep`` of the sentences stays, drawn by hash, and so does
    a sentence without which fewer than 8 words would remain. ``selected`` has the queries. Search and mine in the full
    corpus.
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # words of any script
    outputs: ClassVar[tuple[str, ...]] = ("corpus",)
    corpus: Stage
    selected: Stage
    keep: Annotated[float, Field(ge=0, le=1)] = 0.1
    seed: int = 0

    def size(self, inputs: Inputs) -> int:
        return inputs["corpus"].count("corpus")

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        lineage = inputs["selected"].read("lineage", ["id", "source_id", "strategy"])
        source_of = lineage.filter(pc.equal(lineage["strategy"], CLOZE))
        doc_of = dict(zip(*(tables.texts(source_of[name]) for name in ("id", "source_id")), strict=True))
        sentences_of: dict[str, list[str]] = {}
        for part in inputs["selected"].scan("queries"):
            for query_id, text in zip(*map(tables.texts, part.columns), strict=True):
                if query_id in doc_of and tables.unit_of("cloze", self.seed, query_id) >= self.keep:
                    sentences_of.setdefault(doc_of[query_id], []).append(text)

        def run(start: int, stop: int) -> Output:
            rows = inputs["corpus"].slice("corpus", start, stop)
            texts, removed = tables.texts(rows["text"]), 0
            for row, doc_id in enumerate(tables.texts(rows["doc_id"])):
                for sentence in sentences_of.get(doc_id, ()):
                    rest = without(sentence, texts[row])
                    if word_count(rest) >= LEAST_REMAINDER:
                        texts[row], removed = rest, removed + 1
            ids, titles = (rows[name] for name in ("doc_id", "title"))
            corpus = tables.columns("corpus", rows.num_rows, doc_id=ids, title=titles, text=texts)
            counts = {"in": rows.num_rows, "out": rows.num_rows, "removed": removed}
            return Output({"corpus": corpus}, counts=counts)

        return run
