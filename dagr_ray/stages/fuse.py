"""Fuses several searches, by reciprocal ranks or by weights, which may be tuned on judged queries."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage, derived
from dagr_ray.retrieval import fusion


class Fuse(Stage):
    """Fuses several searches of the same queries: the ``depth`` best ``candidates`` of each query over all searches.

    ``rrf``: reciprocal ranks, sum of 1 / (``k`` + rank). Source: Cormack, Clarke and Buettcher, SIGIR 2009.
    ``weights``: the weighted sum of the searches' scores, each scaled over the query's hits to mean 0 and deviation 1
    (``z-score``) or to [0, 1] (``min-max``); a passage missing from a search gets its lowest score. ``weights`` are given,
    or tuned on the split ``dev_split`` of ``dev``, with the same searches of its queries: the point of a grid of ``steps``
    on the simplex with the best nDCG@10. Source: Bruch, Gai and Ingber, arXiv 2210.11934.

    The counts have ``weights`` by search and, if they were tuned, ``dev_ndcg`` of the fusion and of each search alone.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "search"
    rows_from: ClassVar[str] = "searches"
    outputs: ClassVar[tuple[str, ...]] = ("candidates",)
    judged: ClassVar[dict[str, str]] = {"dev": "dev_split"}
    searches: tuple[Stage, ...]
    method: Literal["rrf", "weights"] = "rrf"
    k: Annotated[int, Field(ge=1)] = 60
    scale: Literal["z-score", "min-max"] = "min-max"
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    dev: Stage | None = None
    dev_split: str = "dev"
    steps: Annotated[int, Field(ge=1, le=100)] = 20
    depth: Annotated[int, Field(ge=1)] = 100

    @model_validator(mode="after")
    def _fields_agree(self) -> Fuse:
        if len(self.searches) < 2:
            raise ConfigError(f"fuse: {len(self.searches)} searches; give at least two")
        wrong = next(
            (search.type for search in self.searches if not {"queries", "split"} <= type(search).model_fields.keys()),
            None,
        )
        if wrong is not None:
            raise ConfigError(f"fuse: searches[i] must be a search stage, got {wrong!r}")
        query_sets = {_query_set(search) for search in self.searches}
        if len(query_sets) > 1:
            raise ConfigError("fuse: the searches differ in queries or split; give searches of the same queries")
        if self.weights is not None and len(self.weights) != len(self.searches):
            raise ConfigError(f"fuse: weights = {self.weights} for {len(self.searches)} searches; give one for each")
        if self.weights is not None and not any(self.weights):
            raise ConfigError(f"fuse: weights = {self.weights} are all 0; give one that is not")
        if self.method == "rrf" and (self.weights is not None or self.dev is not None):
            raise ConfigError(
                "fuse: method = 'rrf' has no weights; leave weights and dev out, or set method = 'weights'"
            )
        if self.method == "weights" and (self.weights is None) == (self.dev is None):
            raise ConfigError("fuse: method = 'weights' needs either weights, or dev (judged queries) to tune them on")
        if self.dev is not None and (self.dev.fingerprint(), self.dev_split) in query_sets:
            raise ConfigError(
                f"fuse: dev_split = {self.dev_split!r} is the searched split; weights must be tuned on another one"
            )
        return self

    def label(self) -> str:
        tuned = "tuned" if self.dev is not None else self.method
        return "-".join([tuned, *(search.label() for search in self.searches)])[:60]

    @derived("tuning.{}")
    def _tuning(self) -> list[Stage]:
        """The same searches over the queries for tuning."""
        if self.dev is None:
            return []
        change = {"queries": self.dev, "split": self.dev_split}
        return [search.model_copy(update=change) for search in self.searches]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            names = [f"{i} {search.label()}" for i, search in enumerate(self.searches)]
            counts: dict[str, Any] = {}
            weights = self.weights
            if self.dev is not None:
                qrels = inputs["dev"].qrels(self.dev_split, self.type)
                lists = fusion.Lists([inputs[f"tuning.{i}"].read("candidates") for i in range(len(names))])
                weights, dev_ndcg, single_ndcg = fusion.tune(lists, qrels, self.scale, self.steps)
                counts["dev_ndcg"] = {"fused": dev_ndcg} | dict(zip(names, single_ndcg, strict=True))
            lists = fusion.Lists([inputs[f"searches.{i}"].read("candidates") for i in range(len(names))])
            if weights is None:
                candidates = lists.ranked(lists.reciprocal(self.k), self.depth)
            else:
                counts["weights"] = dict(zip(names, weights, strict=True))
                candidates = lists.ranked(lists.weighted(weights, self.scale), self.depth)
            counts |= {"in": lists.rows, "out": candidates.num_rows}
            return Output({"candidates": candidates}, counts=counts)

        return run


def _query_set(search: Any) -> tuple[str, str | None]:
    return search.queries.fingerprint(), search.split
