"""Selects human queries with their passages as exemplars for prompts."""

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
    """Up to ``k`` human queries of a split with their passages, for prompts; none if the split does not exist.

    ``otherwise`` names a split to use if the first does not exist: some collections have no dev split.

    Drawn by hash, one per passage. Passages of up to ``max_words`` words come first, longer ones are cut to that length;
    then the highest grade, and queries that share ``grounded`` of their words (of four letters or more) with the
    passage. A small model copies a query that would fit any passage: with one such query among four, it wrote
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
            available = [tables.split_of(splits, split) for split in (self.split, self.otherwise) if split]
            split = next((split for split in available if split is not None), None)
            if split is None:
                return Output({"exemplars": tables.empty("exemplars")}, counts={"in": 0, "out": 0})
            relevant = [row for row in source.read(f"qrels.{split}").to_pylist() if row["relevance"] > 0]
            text_of = {row["query_id"]: row["text"] for row in source.read("queries").to_pylist()}
            doc_ids = {row["doc_id"] for row in relevant}
            passage_of = {}
            for part in source.scan("corpus"):
                for row in part.to_pylist():
                    if row["doc_id"] in doc_ids:
                        passage_of[row["doc_id"]] = pieces(tables.passage_text(row["title"], row["text"]))
            usable = [
                row for row in relevant if passage_of.get(row["doc_id"]) and text_of.get(row["query_id"], "").strip()
            ]
            usable.sort(
                key=lambda row: (
                    len(passage_of[row["doc_id"]]) > self.max_words,
                    -row["relevance"],
                    _shared(text_of[row["query_id"]], passage_of[row["doc_id"]]) < self.grounded,
                    tables.unit_of("exemplars", self.seed, row["query_id"], row["doc_id"]),
                )
            )
            # the same query for two passages, or two queries for one passage, would show the same thing twice
            chosen: list[dict[str, Any]] = []
            used: set[str] = set()
            for row in usable:
                keys = {f"q{row['query_id']}", f"d{row['doc_id']}"}
                if len(chosen) < self.k and not keys & used:
                    used |= keys
                    passage = "".join(passage_of[row["doc_id"]][: self.max_words]).rstrip()
                    chosen.append(
                        {
                            "query_id": row["query_id"],
                            "doc_id": row["doc_id"],
                            "query": text_of[row["query_id"]],
                            "passage": passage,
                        }
                    )
            return Output(
                {"exemplars": tables.table("exemplars", chosen)}, counts={"in": len(relevant), "out": len(chosen)}
            )

        return run


def _shared(query: str, passage: list[str]) -> float:
    """The share of a query's longer words that are a prefix of a passage word, or have one as their prefix."""
    query_words = {word for word in folded(query) if long(word)}
    passage_words = {word for word in folded("".join(passage)) if long(word)}
    return sum(
        any(theirs.startswith(ours) or ours.startswith(theirs) for theirs in passage_words) for ours in query_words
    ) / max(len(query_words), 1)
