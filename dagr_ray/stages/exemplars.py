"""Passages with queries that people wrote for them, to be shown in prompts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import OmitWhenDefault
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.core.words import folded, long, pieces


class Exemplars(Stage):
    """Up to ``k`` human queries of a split with their passages, to show in prompts; none where there is no such split.

    ``otherwise`` names the split that is taken where the first is not there: some collections have no dev split.

    Drawn by hash, one for a passage. Passages of up to ``max_words`` words come first, longer ones are cut to that;
    then the highest grade, and queries that share ``grounded`` of their words (of four letters or more) with the
    passage. A small model copies a query that could stand under any passage: with one such among four, it wrote
    "which operating system is this running on" for a fifth of the standard library.
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # words of any script, with their marks
    outputs: ClassVar[tuple[str, ...]] = ("exemplars",)
    corpus: Stage
    split: str = "dev"
    k: Annotated[int, Field(ge=1, le=32)] = 8
    seed: int = 0
    max_words: Annotated[int, Field(ge=8)] = 60
    grounded: Annotated[float, Field(ge=0, le=1)] = 0.5
    otherwise: Annotated[str | None, OmitWhenDefault()] = None

    def label(self) -> str:
        return f"{self.split}{self.k}"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            source = inputs["corpus"]
            splits = [name.removeprefix("qrels.") for name in source.table_names() if name.startswith("qrels.")]
            found = [tables.split_of(splits, split) for split in (self.split, self.otherwise) if split]
            split = next((split for split in found if split is not None), None)
            if split is None:
                return Output({"exemplars": tables.empty("exemplars")}, counts={"in": 0, "out": 0})
            judged = [row for row in source.read(f"qrels.{split}").to_pylist() if row["relevance"] > 0]
            text_of = {row["query_id"]: row["text"] for row in source.read("queries").to_pylist()}
            wanted = {row["doc_id"] for row in judged}
            passage_of = {}
            for part in source.scan("corpus"):
                for row in part.to_pylist():
                    if row["doc_id"] in wanted:
                        passage_of[row["doc_id"]] = pieces(tables.passage_text(row["title"], row["text"]))
            usable = [
                row for row in judged if passage_of.get(row["doc_id"]) and text_of.get(row["query_id"], "").strip()
            ]
            usable.sort(
                key=lambda row: (
                    len(passage_of[row["doc_id"]]) > self.max_words,
                    -row["relevance"],
                    _shared(text_of[row["query_id"]], passage_of[row["doc_id"]]) < self.grounded,
                    tables.unit_of("exemplars", self.seed, row["query_id"], row["doc_id"]),
                )
            )
            # the same query for two passages, or two queries for one passage, would show one thing twice
            drawn: list[dict[str, Any]] = []
            seen: set[str] = set()
            for row in usable:
                keys = {f"q{row['query_id']}", f"d{row['doc_id']}"}
                if len(drawn) < self.k and not keys & seen:
                    seen |= keys
                    passage = "".join(passage_of[row["doc_id"]][: self.max_words]).rstrip()
                    drawn.append(
                        {
                            "query_id": row["query_id"],
                            "doc_id": row["doc_id"],
                            "query": text_of[row["query_id"]],
                            "passage": passage,
                        }
                    )
            return Output(
                {"exemplars": tables.table("exemplars", drawn)}, counts={"in": len(judged), "out": len(drawn)}
            )

        return run


def _shared(query: str, passage: list[str]) -> float:
    """The share of a query's longer words that start a word of the passage, or are started by one."""
    asked = {word for word in folded(query) if long(word)}
    there = {word for word in folded("".join(passage)) if long(word)}
    return sum(any(w.startswith(a) or a.startswith(w) for w in there) for a in asked) / max(len(asked), 1)
