"""Fills a teacher's scores into examples, and removes relevant negatives."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage


class Relabel(Stage):
    """Mined examples with a teacher's scores, without the negatives that the teacher finds relevant.

    A negative is relevant if its score is at least ``share`` of the positive's score (for a positive below zero: as far
    below it), or at least ``threshold``; if neither is set, scores are only filled in. ``relevant`` decides what happens
    then, after RLHN (Thakur et al. 2025, arXiv 2505.16967):

    * ``positive``: it becomes a positive, in an example of its own with the query's other negatives;
    * ``drop``: it is removed from the example;
    * ``remove``: the whole example is removed.

    ``negatives`` keeps the first ones of those that remain: mine more than you need. An example whose negatives are all
    removed is rejected. ``labels`` holds one teacher's scores for the pairs of ``mined`` (``Label`` with ``examples``);
    they replace ``positive_score`` and ``negative_scores``, null if missing. A pair without a score is never relevant.
    Ids do not change. Counts: ``relevant`` negatives, ``added`` positives, ``dropped`` negatives, ``unscored`` pairs,
    ``short`` examples.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "relabel"
    rows_from: ClassVar[str] = "mined"
    outputs: ClassVar[tuple[str, ...]] = ("examples", "rejected")
    mined: Stage
    labels: Stage
    share: Annotated[float, Field(gt=0)] | None = None
    threshold: float | None = None
    relevant: Literal["positive", "drop", "remove"] = "positive"
    negatives: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _something_to_judge(self) -> Relabel:
        if self.relevant != "positive" and self.share is None and self.threshold is None:
            raise ConfigError(
                f"relabel: relevant = {self.relevant!r} has no effect without a limit; set share or threshold"
            )
        return self

    def label(self) -> str:
        return self.relevant if self.share is not None or self.threshold is not None else "scores"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            score_of = _scores(inputs["labels"])
            rows = inputs["mined"].read("examples").to_pylist()
            known_pairs = {(row["query_id"], row["positive_id"]) for row in rows}
            # a positive of a query, in any row, is not a negative in any row of that query
            relevant_ids = [self._relevant(row, score_of) for row in rows]
            positive: dict[str, set[str]] = {}
            for row, relevant_now in zip(rows, relevant_ids, strict=True):
                positive.setdefault(row["query_id"], {row["positive_id"]}).update([row["positive_id"], *relevant_now])
            counts = dict.fromkeys(("relevant", "added", "dropped", "unscored", "short"), 0)
            examples, rejected = [], tables.Rejected()
            for row, relevant_now in zip(rows, relevant_ids, strict=True):
                query_id = row["query_id"]
                counts["relevant"] += len(relevant_now)
                if relevant_now and self.relevant == "remove":
                    detail = f"{len(relevant_now)} of {len(row['negative_ids'])} negatives are relevant"
                    rejected.add(query_id, self.type, "relevant-negative", detail)
                    continue
                has_limit = self.share is not None or self.threshold is not None
                remaining = [d for d in row["negative_ids"] if not has_limit or d not in positive[query_id]]
                counts["dropped"] += len(row["negative_ids"]) - len(remaining)
                remaining = remaining[: self.negatives]
                counts["short"] += self.negatives is not None and 0 < len(remaining) < self.negatives
                positives = [row["positive_id"]]
                if self.relevant == "positive":
                    new_positives = [d for d in relevant_now if (query_id, d) not in known_pairs]
                    known_pairs.update((query_id, d) for d in new_positives)
                    counts["added"] += len(new_positives)
                    positives += new_positives
                for positive_id in positives:
                    if row["negative_ids"] and not remaining:
                        rejected.add(query_id, self.type, "no-negative", positive_id)
                        continue
                    scores = [score_of.get((query_id, d)) for d in (positive_id, *remaining)]
                    counts["unscored"] += sum(score is None for score in scores)
                    examples.append(
                        {
                            "query_id": query_id,
                            "positive_id": positive_id,
                            "negative_ids": remaining,
                            "positive_score": scores[0],
                            "negative_scores": scores[1:],
                        }
                    )
            output = {"examples": tables.table("examples", examples), "rejected": rejected.table()}
            counts |= {"in": len(rows), "out": len(examples)}
            return Output(output, counts={**counts, "rejected": rejected.counts_by_reason()})

        return run

    def _relevant(self, row: dict[str, Any], score_of: dict[tuple[str, str], float]) -> list[str]:
        """The negatives of an example that the teacher finds relevant."""
        positive_score = score_of.get((row["query_id"], row["positive_id"]))
        limits = [] if self.threshold is None else [self.threshold]
        if self.share is not None and positive_score is not None:
            limits.append(_share_of(positive_score, self.share))
        scores = {doc_id: score_of.get((row["query_id"], doc_id)) for doc_id in row["negative_ids"]}
        return [doc_id for doc_id, score in scores.items() if limits and score is not None and score >= min(limits)]


def _share_of(positive_score: float, share: float) -> float:
    """share x score for a positive score; as far below a negative one, which some teachers give."""
    return positive_score - (1 - share) * abs(positive_score)


def _scores(labels: Artifact) -> dict[tuple[str, str], float]:
    """(query id, passage id) -> score. Raises ConfigError if several teachers gave scores."""
    rows = labels.read("scores")
    scorers = rows["scorer"].unique().to_pylist()
    if len(scorers) > 1:
        raise ConfigError(f"relabel: {labels.name} holds scores of {', '.join(scorers)}; give those of one teacher")
    pairs = zip(rows["query_id"].to_pylist(), rows["doc_id"].to_pylist(), strict=True)
    return dict(zip(pairs, rows["score"].to_pylist(), strict=True))
