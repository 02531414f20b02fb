"""A generate-and-critique loop, unrolled into stages: each round can resume and has its own counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, cast

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError, OmitWhenDefault
from dagr_ray.core.joins import rows_with
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage, derived
from dagr_ray.core.words import first_words, folded
from dagr_ray.prompts import Passage
from dagr_ray.strategies.critique import FINE

if TYPE_CHECKING:
    from dagr_ray.stages.generate import Generate


class TopExemplars(Stage):
    """The ``k`` queries that a teacher scores highest, with their passages, as exemplars for the next round.

    ``scores`` is a stage with a ``scores`` table; only pairs of ``selected`` count. At most one query per passage, and none
    that shares over half of its words with a better one: uniform exemplars teach one kind of query.
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # words of any script, with their marks
    outputs: ClassVar[tuple[str, ...]] = ("exemplars",)
    selected: Stage
    corpus: Stage
    scores: Stage
    k: Annotated[int, Field(ge=1, le=32)] = 8
    max_words: Annotated[int, Field(ge=8)] = 60

    def label(self) -> str:
        return f"{self.k}"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            text_of = tables.texts_of(inputs["selected"].read("queries"))
            own = {
                (row["query_id"], row["doc_id"])
                for row in tables.relevant(inputs["selected"].read("qrels")).to_pylist()
            }
            ranked = [
                row for row in inputs["scores"].read("scores").to_pylist() if (row["query_id"], row["doc_id"]) in own
            ]
            ranked.sort(key=lambda row: (-row["score"], tables.unit_of("best", row["query_id"]), row["query_id"]))
            chosen: list[tuple[str, str]] = []
            chosen_words: list[set[str]] = []
            for row in ranked:
                own_words = set(folded(text_of[row["query_id"]]))
                alike = any(len(own_words & other) > len(own_words) / 2 for other in chosen_words)
                if own_words and not alike and row["doc_id"] not in {doc_id for _, doc_id in chosen}:
                    chosen.append((row["query_id"], row["doc_id"]))
                    chosen_words.append(own_words)
                if len(chosen) == self.k:
                    break
            passages = rows_with(inputs["corpus"], "corpus", "doc_id", {doc_id for _, doc_id in chosen}).to_pylist()
            passage_of = {
                row["doc_id"]: first_words(tables.passage_text(row["title"], row["text"]), self.max_words)
                for row in passages
            }
            exemplars = [
                {"query_id": query_id, "doc_id": doc_id, "query": text_of[query_id], "passage": passage_of[doc_id]}
                for query_id, doc_id in chosen
            ]
            return Output(
                {"exemplars": tables.table("exemplars", exemplars)}, counts={"in": len(ranked), "out": len(exemplars)}
            )

        return run


class CritiquedPairs(Stage):
    """Pairs in which ``Critique`` found a fault, which is in ``other``; pairs without a fault are accepted.

    Accepted pairs, and pairs with an unreadable critique, are in ``rejected`` with the reason; ``accepted`` counts the former.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("pairs", "rejected")
    critiques: Stage

    @property
    def generate(self) -> Generate:
        """The stage that generated the critiques."""
        return cast("Generate", self.critiques)

    @model_validator(mode="after")
    def _critiques(self) -> CritiquedPairs:
        if "generations" not in self.critiques.outputs:
            raise ConfigError(f"critiqued-pairs: {self.critiques.type!r} has no completions; give a Generate")
        strategy = self.generate.strategy
        if strategy.writes != "critiques":
            raise ConfigError(
                f"criticised: strategy {strategy.type!r} writes {strategy.writes}; give one that writes critiques"
            )
        return self

    @derived("pairs")
    def _pairs(self) -> Stage:
        """The criticised pairs are read again."""
        return self.generate.corpus

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            pair_of = {row["doc_id"]: row for row in inputs["pairs"].read("pairs").to_pylist()}
            answers = inputs["critiques"].read("generations", ["source_id", "sample", "raw", "error"]).to_pylist()
            pairs, rejected = [], tables.Rejected()
            for answer in answers:
                pair = pair_of[answer["source_id"]]
                if answer["sample"]:
                    continue
                passage = Passage(pair["doc_id"], pair["title"], pair["text"], pair["query"], pair["other"])
                critique = self.generate.strategy.parse(passage, answer["raw"] or "")
                if critique.kept and critique.kept[0] != FINE:
                    pairs.append(pair | {"other": tables.clean(critique.kept[0])})
                else:
                    reason = "accepted" if critique.kept else critique.rejected[0][0]
                    rejected.add(pair["doc_id"], "critique", reason, answer["error"])
            output = {"pairs": tables.table("pairs", pairs), "rejected": rejected.table()}
            return Output(
                output, counts={"in": len(pair_of), "out": len(pairs), "rejected": rejected.counts_by_reason()}
            )

        return run


class RemainingPassages(Stage):
    """The passages of ``corpus`` without a query in ``accepted``: the next round generates for these.

    Passages whose queries the critique accepts in ``verdicts`` are left out too: the loop ends for them, whatever the
    filters decide.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("corpus",)
    corpus: Stage
    accepted: tuple[Stage, ...]
    verdicts: Annotated[tuple[CritiquedPairs, ...], OmitWhenDefault()] = ()

    @derived("pairs.{}")
    def _pairs(self) -> list[Stage]:
        """The criticised pairs are read again."""
        return [verdict.generate.corpus for verdict in self.verdicts]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            columns = [
                tables.relevant(inputs[f"accepted.{i}"].read("qrels"))["doc_id"] for i in range(len(self.accepted))
            ]
            columns += [_fine(inputs[f"verdicts.{i}"], inputs[f"pairs.{i}"]) for i in range(len(self.verdicts))]
            served_ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks], tables.TEXT)
            rows = inputs["corpus"].read("corpus")
            remaining = rows.filter(pc.invert(pc.is_in(rows["doc_id"], value_set=served_ids.combine_chunks())))
            return Output({"corpus": remaining}, counts={"in": rows.num_rows, "out": remaining.num_rows})

        return run


def _fine(verdict: Artifact, pairs: Artifact) -> pa.ChunkedArray:
    """The passages with at least one faultless query and no faulty one."""
    rejected = verdict.read("rejected", ["id", "reason"])
    accepted = rejected.filter(pc.equal(rejected["reason"], "accepted"))["id"].combine_chunks()
    wrong = verdict.read("pairs", ["passage_id"])["passage_id"].combine_chunks()
    passage_ids = pairs.read("pairs", ["doc_id", "passage_id"])
    passage_ids = passage_ids.filter(pc.is_in(passage_ids["doc_id"], value_set=accepted))["passage_id"]
    return passage_ids.filter(pc.invert(pc.is_in(passage_ids, value_set=wrong)))
