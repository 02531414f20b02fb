"""A teacher's scores in the examples; relevant negatives are taken out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage


class Relabel(Stage):
    """Mined examples with a teacher's scores, and without the negatives that it finds relevant.

    A negative is relevant where it scores at or above ``share`` of what the query's positive scores (of a positive under
    zero: as far below it), or at or above ``threshold``; with neither, only the scores are filled in. Then ``relevant``
    says, after RLHN (Thakur et al. 2025, arXiv 2505.16967):

    * ``positive``: it becomes a positive, in an example of its own with the other negatives of that query;
    * ``drop``: it is left out, and the example stays;
    * ``remove``: the whole example is left out.

    ``negatives`` keeps the first so many of what is left: mine more than are wanted. An example that is left without any
    negative is rejected, unless it had none. ``labels`` holds scores for the pairs of ``mined`` (``Label`` with
    ``examples``) by one teacher; ``positive_score`` and ``negative_scores`` become those, null where there is none, and a
    pair without a score is never relevant. Ids stay. Counts: ``relevant`` negatives, ``added`` positives, ``dropped``
    negatives, ``unscored`` pairs, ``short`` examples.
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
                f"relabel: relevant = {self.relevant!r} and nothing says what is relevant; set share or threshold"
            )
        return self

    def label(self) -> str:
        return self.relevant if self.share is not None or self.threshold is not None else "scores"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            score_of = _scores(inputs["labels"])
            rows = inputs["mined"].read("examples").to_pylist()
            known = {(row["query_id"], row["positive_id"]) for row in rows}
            # what is a positive of a query, here or in a row below, is no negative in any row of it
            found = [self._relevant(row, score_of) for row in rows]
            positive: dict[str, set[str]] = {}
            for row, own in zip(rows, found, strict=True):
                positive.setdefault(row["query_id"], {row["positive_id"]}).update([row["positive_id"], *own])
            counts = dict.fromkeys(("relevant", "added", "dropped", "unscored", "short"), 0)
            examples, rejected = [], tables.Rejected()
            for row, own in zip(rows, found, strict=True):
                query_id = row["query_id"]
                counts["relevant"] += len(own)
                if own and self.relevant == "remove":
                    detail = f"{len(own)} of {len(row['negative_ids'])} negatives are relevant"
                    rejected.add(query_id, self.type, "relevant-negative", detail)
                    continue
                judged = self.share is not None or self.threshold is not None
                left = [d for d in row["negative_ids"] if not judged or d not in positive[query_id]]
                counts["dropped"] += len(row["negative_ids"]) - len(left)
                left = left[: self.negatives]
                counts["short"] += self.negatives is not None and 0 < len(left) < self.negatives
                positives = [row["positive_id"]]
                if self.relevant == "positive":
                    new = [d for d in own if (query_id, d) not in known]
                    known.update((query_id, d) for d in new)
                    counts["added"] += len(new)
                    positives += new
                for positive_id in positives:
                    if row["negative_ids"] and not left:
                        rejected.add(query_id, self.type, "no-negative", positive_id)
                        continue
                    scores = [score_of.get((query_id, d)) for d in (positive_id, *left)]
                    counts["unscored"] += sum(score is None for score in scores)
                    examples.append(
                        {
                            "query_id": query_id,
                            "positive_id": positive_id,
                            "negative_ids": left,
                            "positive_score": scores[0],
                            "negative_scores": scores[1:],
                        }
                    )
            made = {"examples": tables.table("examples", examples), "rejected": rejected.table()}
            counts |= {"in": len(rows), "out": len(examples)}
            return Output(made, counts={**counts, "rejected": rejected.counts_by_reason()})

        return run

    def _relevant(self, row: dict[str, Any], score_of: dict[tuple[str, str], float]) -> list[str]:
        """The negatives of an example that the teacher finds relevant."""
        own = score_of.get((row["query_id"], row["positive_id"]))
        limits = [] if self.threshold is None else [self.threshold]
        if self.share is not None and own is not None:
            limits.append(_share_of(own, self.share))
        scores = {doc_id: score_of.get((row["query_id"], doc_id)) for doc_id in row["negative_ids"]}
        return [doc_id for doc_id, score in scores.items() if limits and score is not None and score >= min(limits)]


def _share_of(own: float, share: float) -> float:
    """share x own where own is positive; as far below it where it is not, as scores of some teachers are."""
    return own - (1 - share) * abs(own)


def _scores(labels: Artifact) -> dict[tuple[str, str], float]:
    """(query id, passage id) -> score. Raises ConfigError where several teachers have given some."""
    rows = labels.read("scores")
    scorers = rows["scorer"].unique().to_pylist()
    if len(scorers) > 1:
        raise ConfigError(f"relabel: {labels.name} holds scores of {', '.join(scorers)}; give those of one teacher")
    pairs = zip(rows["query_id"].to_pylist(), rows["doc_id"].to_pylist(), strict=True)
    return dict(zip(pairs, rows["score"].to_pylist(), strict=True))
