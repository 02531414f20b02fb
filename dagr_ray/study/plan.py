"""Plans the trials of a study: one scorecard for each combination of the axes, and the baselines to compare with."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.config import ConfigError, digest, fingerprint_cache
from dagr_ray.core.stage import Stage, walk
from dagr_ray.miners.bm25 import BM25
from dagr_ray.report.decision import ALPHA, WORTH
from dagr_ray.stages.evaluate import Scorecard
from dagr_ray.stages.retrieve import Search
from dagr_ray.study.job import Job


@dataclass
class Trial:
    """One row of a study's table."""

    name: str
    params: Json
    kind: str
    card: Scorecard
    state: str = "pending"
    error: str | None = None
    seconds: float = 0.0

    @cached_property
    def _stages(self) -> list[tuple[Stage, str]]:
        with fingerprint_cache():
            return [(stage, stage.fingerprint()) for stage in walk(self.card)]

    @cached_property
    def _judged(self) -> list[Json]:
        """The data of each evaluation, by content: a path may change, or point to another folder later."""
        with fingerprint_cache():
            return [
                {
                    "name": evaluation.name,
                    "split": evaluation.split,
                    "data": evaluation.data.fingerprint(),
                    "leaks": evaluation.leaks.fingerprint() if evaluation.leaks else None,
                    "miners": [search.index.miner.fingerprint() for search in _searches(evaluation.search)],
                }
                for evaluation in self.card.evaluations
            ]

    def to_json(self, runs: str) -> Json:
        stages = {stage.folder(runs).name: fingerprint for stage, fingerprint in self._stages}
        described = {
            "trial": self.name,
            "params": self.params,
            "kind": self.kind,
            "state": self.state,
            "error": self.error,
        }
        contents = {"folder": self.card.folder(runs).name, "stages": stages, "judged": self._judged}
        return {**described, **contents, "seconds": self.seconds}


@dataclass
class Study:
    """Trials of one job over its axes."""

    job: Job
    axes: dict[str, list[Any]]
    trials: list[Trial]
    worth: float = WORTH
    alpha: float = ALPHA

    def folder(self, runs: str) -> Artifact:
        # the margin and the level are fixed before the first result: another one is another study
        usual = {"worth": WORTH, "alpha": ALPHA}
        rule = {name: value for name, value in self.rule().items() if value != usual[name]}
        trials = sorted(trial.card.fingerprint() for trial in self.trials)
        key = digest([self.job.name, trials, *([rule] if rule else [])])
        return Artifact(runs, f"study-{self.job.name}-{key}")

    def rule(self) -> Json:
        """What a gain must be to be worth having, and the share of studies that may claim what is not so."""
        return {"worth": self.worth, "alpha": self.alpha}

    def stages(self) -> list[Stage]:
        return walk(*(trial.card for trial in self.trials))

    def shared(self) -> list[Stage]:
        """The stages that are built before the trials: those that two trials need, and those that a baseline needs."""
        used = Counter(stage.fingerprint() for trial in self.trials for stage in walk(trial.card))
        simple = {s.fingerprint() for t in self.trials if t.kind != "augmented" for s in walk(t.card)}
        return [s for s in self.stages() if used[s.fingerprint()] > 1 or s.fingerprint() in simple]

    def unshared(self) -> list[list[Stage]]:
        """The stages that each trial builds itself, which are not ``shared``; trials without such stages are left out."""
        shared = {stage.fingerprint() for stage in self.shared()}
        own = [[stage for stage in walk(trial.card) if stage.fingerprint() not in shared] for trial in self.trials]
        return [stages for stages in own if stages]


def plan_study(job: Job, axes: Mapping[str, Sequence[Any]], worth: float = WORTH, alpha: float = ALPHA) -> Study:
    """Every combination of the axes, without duplicates, and the baselines that each combination is compared with.

    ``worth`` is the smallest gain worth having, ``alpha`` the level of every claim (see ``report.decision.outcomes``).
    Raises ConfigError for one that is out of range.
    """
    for name, value, most in (("worth", worth, 1.0), ("alpha", alpha, 0.5)):
        if not 0 < value < most:
            raise ConfigError(f"{name} = {value:g}; give a number above 0 and below {most:g}")
    trials: dict[str, Trial] = {}

    def add(params: Json, kind: str, card: Stage) -> None:
        if not isinstance(card, Scorecard):
            raise ConfigError(f"{job.path} returns a {card.type!r}; a study needs a recipe that returns a scorecard")
        key = card.fingerprint()
        if key not in trials:
            trials[key] = Trial(f"t{len(trials):03d}-{key[:8]}", params, kind, card)

    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    with fingerprint_cache():
        cards = [(params, job.stage(**params)) for params in combinations]
        for params, card in cards:
            for kind, baseline_params, baseline in _baselines(params, card):
                add(baseline_params, kind, baseline)
        for params, card in cards:
            add(params, "augmented", card)
    return Study(job, {k: list(v) for k, v in axes.items()}, list(trials.values()), worth, alpha)


def _baselines(params: Json, card: Stage) -> Iterable[tuple[str, Json, Stage]]:
    """BM25 and the frozen base, evaluated exactly as ``card`` evaluates its own retriever. None if ``card`` evaluates runs of
    other systems.
    """
    if not isinstance(card, Scorecard) or not all(_searches(e.search) for e in card.evaluations):
        return

    def with_search(change: Callable[[Stage], Stage]) -> Scorecard:
        evaluations = (e.model_copy(update={"search": change(e.search)}) for e in card.evaluations)
        return card.model_copy(update={"evaluations": tuple(evaluations)})

    yield "bm25", {}, with_search(lambda search: _indexed(_searches(search)[0], miner=BM25(), trained=None))
    frozen = {name: value for name, value in params.items() if name == "base"}
    yield "frozen", frozen, with_search(lambda search: _indexed(search, trained=None))


def _searches(stage: Stage) -> list[Search]:
    """The index searches in ``stage``: itself, or the searches that it fuses."""
    if isinstance(stage, Search):
        return [stage]
    return [search for value in _tuple_fields(stage).values() for inner in value for search in _searches(inner)]


def _indexed(stage: Stage, **change: Any) -> Stage:
    """A copy of a search, or of a fusion of searches, with these fields of each ``Index`` replaced."""
    if isinstance(stage, Search):
        return stage.model_copy(update={"index": stage.index.model_copy(update=change)})
    fields = {name: tuple(_indexed(inner, **change) for inner in value) for name, value in _tuple_fields(stage).items()}
    return stage.model_copy(update=fields)


def _tuple_fields(stage: Stage) -> dict[str, tuple[Stage, ...]]:
    """The fields of a stage that are tuples of stages."""
    fields = {name: getattr(stage, name) for name in stage.__class__.model_fields}
    return {n: v for n, v in fields.items() if isinstance(v, tuple) and v and all(isinstance(x, Stage) for x in v)}
