"""A study: axes -> one scorecard a combination -> shared stages first -> Ray Tune trials for what differs.

Trials with equal fingerprints are one trial; BM25 and each frozen base join by themselves. Everything a trial makes is
a stage's folder, so a study that was stopped goes on where it was, and a finished one costs nothing to run again.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dagr_ray import blame, cluster
from dagr_ray.artifact import Artifact, Json
from dagr_ray.cluster import Placement
from dagr_ray.config import ConfigError, digest, fingerprints_held
from dagr_ray.job import Job, load_job, parse_axes
from dagr_ray.miners.bm25 import BM25
from dagr_ray.stage import Observer, Progress, Stage, materialize, survey, walk
from dagr_ray.stages.evaluate import Scorecard
from dagr_ray.stages.retrieve import Search

__all__ = ["Job", "Study", "Trial", "load_job", "parse_axes", "plan_study", "run_study"]
log = logging.getLogger("dagr")


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
        with fingerprints_held():
            return [(stage, stage.fingerprint()) for stage in walk(self.card)]

    @cached_property
    def _judged(self) -> list[Json]:
        """What each evaluation is of, by content: a path may change, and lead to another folder later."""
        with fingerprints_held():
            return [
                {
                    "name": each.name,
                    "split": each.split,
                    "data": each.data.fingerprint(),
                    "leaks": each.leaks.fingerprint() if each.leaks else None,
                    "miners": [search.index.miner.fingerprint() for search in _searches(each.search)],
                }
                for each in self.card.evaluations
            ]

    def to_json(self, runs: str) -> Json:
        stages = {stage.folder(runs).name: fingerprint for stage, fingerprint in self._stages}
        shown = {"trial": self.name, "params": self.params, "kind": self.kind, "state": self.state, "error": self.error}
        made = {"folder": self.card.folder(runs).name, "stages": stages, "judged": self._judged}
        return {**shown, **made, "seconds": self.seconds}


@dataclass
class Study:
    """Trials of one job over its axes."""

    job: Job
    axes: dict[str, list[Any]]
    trials: list[Trial]

    def folder(self, runs: str) -> Artifact:
        key = digest([self.job.name, sorted(trial.card.fingerprint() for trial in self.trials)])
        return Artifact(runs, f"study-{self.job.name}-{key}")

    def stages(self) -> list[Stage]:
        return walk(*(trial.card for trial in self.trials))

    def shared(self) -> list[Stage]:
        """What is built before the trials: all that two trials need, and all that a baseline needs."""
        used = Counter(stage.fingerprint() for trial in self.trials for stage in walk(trial.card))
        simple = {s.fingerprint() for t in self.trials if t.kind != "augmented" for s in walk(t.card)}
        return [s for s in self.stages() if used[s.fingerprint()] > 1 or s.fingerprint() in simple]

    def unshared(self) -> list[list[Stage]]:
        """What each trial builds itself: all that is not ``shared``. Only trials that build something."""
        shared = {stage.fingerprint() for stage in self.shared()}
        own = [[stage for stage in walk(trial.card) if stage.fingerprint() not in shared] for trial in self.trials]
        return [stages for stages in own if stages]


def plan_study(job: Job, axes: Mapping[str, Sequence[Any]]) -> Study:
    """Every combination of the axes, without repeats, and the baselines that each of them is compared with."""
    trials: dict[str, Trial] = {}

    def add(params: Json, kind: str, card: Stage) -> None:
        if not isinstance(card, Scorecard):
            raise ConfigError(f"{job.path} returns a {card.type!r}; a study needs a recipe that returns a scorecard")
        key = card.fingerprint()
        if key not in trials:
            trials[key] = Trial(f"t{len(trials):03d}-{key[:8]}", params, kind, card)

    arms = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    with fingerprints_held():
        cards = [(arm, job.stage(**arm)) for arm in arms]
        for arm, card in cards:
            for kind, params, baseline in _baselines(arm, card):
                add(params, kind, baseline)
        for arm, card in cards:
            add(arm, "augmented", card)
    return Study(job, {k: list(v) for k, v in axes.items()}, list(trials.values()))


def _baselines(arm: Json, card: Stage) -> Iterable[tuple[str, Json, Stage]]:
    """BM25 and the frozen base, judged exactly as ``card`` judges its own retriever; none for runs of other systems."""
    if not isinstance(card, Scorecard) or not all(_searches(e.search) for e in card.evaluations):
        return

    def with_search(change: Callable[[Stage], Stage]) -> Scorecard:
        swapped = (e.model_copy(update={"search": change(e.search)}) for e in card.evaluations)
        return card.model_copy(update={"evaluations": tuple(swapped)})

    yield "bm25", {}, with_search(lambda search: _indexed(_searches(search)[0], miner=BM25(), trained=None))
    frozen = {name: value for name, value in arm.items() if name == "base"}
    yield "frozen", frozen, with_search(lambda search: _indexed(search, trained=None))


def _searches(stage: Stage) -> list[Search]:
    """The searches of an index that a search is, or that it puts together."""
    if isinstance(stage, Search):
        return [stage]
    return [found for value in _several(stage).values() for inner in value for found in _searches(inner)]


def _indexed(stage: Stage, **change: Any) -> Stage:
    """A search, or what puts several together, with other fields of each ``Index``."""
    if isinstance(stage, Search):
        return stage.model_copy(update={"index": stage.index.model_copy(update=change)})
    found = {name: tuple(_indexed(inner, **change) for inner in value) for name, value in _several(stage).items()}
    return stage.model_copy(update=found)


def _several(stage: Stage) -> dict[str, tuple[Stage, ...]]:
    """The fields of a stage that hold several stages."""
    held = {name: getattr(stage, name) for name in stage.__class__.model_fields}
    return {n: v for n, v in held.items() if isinstance(v, tuple) and v and all(isinstance(x, Stage) for x in v)}


def run_study(
    study: Study,
    runs: str,
    placement: Placement,
    observe: Observer,
    on_trial: Callable[[Artifact], None] = lambda folder: None,
) -> Artifact:
    """Runs what is not finished; returns the study's folder. A failed trial is recorded and does not stop the others."""
    folder = study.folder(runs)
    begun = time.time()
    earlier = folder.read_json("study.json") or {}
    spent = {t["trial"]: t["seconds"] for t in earlier.get("trials", [])}
    missing = {line.stage.fingerprint() for line in survey(study.stages(), runs) if line.state != "cached"}
    for trial in study.trials:
        trial.seconds = spent.get(trial.name, 0.0)
        # the scorecard alone does not say it: a folder behind it may have been damaged or deleted since
        if missing.isdisjoint(stage.fingerprint() for stage in walk(trial.card)):
            trial.state = "done"
    worked = any(trial.state != "done" for trial in study.trials)

    def save(state: str = "running") -> None:
        wall = earlier.get("wall_s", 0.0) + (time.time() - begun if worked else 0.0)
        for trial in (
            study.trials if state != "running" else ()
        ):  # a baseline may be complete before the work ends early
            if trial.state == "pending" and trial.card.folder(runs).manifest is not None:
                trial.state = "done"
        _set_seconds(study, runs)
        ended = "ended" if all(trial.state in ("done", "failed") for trial in study.trials) else state
        described = _described(study, runs, earlier, wall, worked) | {"state": ended, "driver": _driver()}
        folder.write_json("study.json", described | {"created": earlier.get("created", begun)})
        on_trial(folder)

    save()
    if not worked:
        return folder
    try:
        for stage in study.shared():
            materialize(stage, runs, placement, observe)
        for trial in study.trials:
            if trial.kind != "augmented" and trial.state != "done":
                trial.state = "done"
        save()
        waiting = [trial for trial in study.trials if trial.state != "done"]
        if waiting:
            _tune(waiting, folder, placement, observe, save)
    except Exception:
        save("failed")
        raise
    except BaseException:
        save("stopped")
        raise
    return folder


def _set_seconds(study: Study, runs: str) -> None:
    """Gives each finished trial that has no time of its own yet (a baseline, one that another study has built) what the
    folders took that not all trials need."""
    without = [trial for trial in study.trials if trial.state == "done" and not trial.seconds]
    if not without:
        return
    used = Counter(stage.fingerprint() for trial in study.trials for stage in walk(trial.card))
    for trial in without:
        stages = walk(trial.card)
        own = [stage for stage in stages if used[stage.fingerprint()] < len(study.trials)] or stages
        manifests = [stage.folder(runs).manifest for stage in own]
        trial.seconds = sum(found["cost"].get("wall_s", 0.0) for found in manifests if found)


def _driver() -> Json:
    """The process that runs a study: whether it is still alive can be seen on its own machine."""
    return {"host": platform.node(), "pid": os.getpid()}


def _described(study: Study, runs: str, earlier: Json, wall: float, worked: bool) -> Json:
    return {
        "name": study.job.name,
        "job": study.job.path,
        "axes": study.axes,
        "defaults": study.job.values_by_default(),
        # of a finished study that is only looked at again: where it was made
        "machine": _machine() if worked else earlier.get("machine") or _machine(),
        "wall_s": wall,
        "trials": [trial.to_json(runs) for trial in study.trials],
    }


def _machine() -> Json:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = platform.python_version()
    return {"cores": cores, "platform": platform.platform(), "python": python, "device": _device()}


def _device() -> str:
    """``4 x H200``: the GPUs of the cluster where Ray runs, else of this machine; ``no GPU`` where there is none."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        there = ray.cluster_resources()
        kinds = [name.partition(":")[2] for name in there if name.startswith("accelerator_type:")]
        gpus = int(there.get("GPU", 0))
    elif shutil.which("nvidia-smi"):
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        kinds = re.findall(r"^GPU \d+: (.+?) \(", said, re.MULTILINE)
        gpus = len(kinds)
    else:
        gpus, kinds = 0, []
    return f"{gpus} x {', '.join(sorted(set(kinds))) or 'GPU'}" if gpus else "no GPU"


def _tune(
    trials: list[Trial], folder: Artifact, placement: Placement, observe: Observer, save: Callable[[], None]
) -> None:
    from ray import tune

    if not os.environ.get("DAGR_DEBUG"):
        logging.getLogger("ray.tune").setLevel(
            logging.CRITICAL
        )  # its pages about a trial that failed: the reason is told below
    cluster.send_whole()
    # as they are, not as JSON: a class of the job's own file is known to nobody else
    cards = {trial.name: trial.card for trial in trials}
    by_name = {trial.name: trial for trial in trials}
    root = str(Path(folder.path).parent) if folder.local else folder.runs
    # Almost nothing: a trial mostly waits for its Ray Train workers, and Tune refuses a request of nothing.
    trainable = tune.with_resources(_Trainable(cards, root, placement, len(trials)), {"cpu": 0.01})
    scratch = tempfile.mkdtemp(prefix="dagr-tune-")
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(cards))},
        tune_config=tune.TuneConfig(max_concurrent_trials=placement.trials, reuse_actors=True),
        run_config=tune.RunConfig(
            name=folder.name, storage_path=scratch, verbose=0, callbacks=[_watcher(by_name, observe, save)]
        ),
    )
    try:
        results = tuner.fit()
    except BaseException:
        observe(Progress(trials[0].card, "failed"))
        raise
    for result in results:
        trial = by_name[result.config["trial"]] if result.config else None
        if trial is not None and result.error is not None:
            reason = blame.reason(result.error).removeprefix("ConfigError: ").removeprefix("StageFailed: ")
            trial.state, trial.error = "failed", reason
            log.error("trial %s (%s) failed: %s", trial.name, trial.params, trial.error)
    save()
    shutil.rmtree(scratch, ignore_errors=True)


class _Trainable:
    """A trial: builds its scorecard, then reports the means. Only what the trial does not share is left to build."""

    __name__ = "dagr_trial"

    def __init__(self, cards: dict[str, Scorecard], runs: str, placement: Placement, trials: int) -> None:
        self.cards, self.runs, self.placement = cards, runs, placement
        self.beside = cluster.beside()
        self.at_once = min(trials, placement.trials)

    def __call__(self, config: Json) -> None:
        from ray import tune

        _use_share_of_cores(self.at_once)
        started = time.time()
        cluster.import_beside(self.beside)
        folder = materialize(self.cards[config["trial"]], self.runs, self.placement)
        means = {
            f"{row['data']}/{row['measure']}": row["value"]
            for row in folder.read("metrics").to_pylist()
            if row["query_id"] is None
        }
        tune.report({**means, "seconds": time.time() - started})


def _use_share_of_cores(at_once: int) -> None:
    if "torch" in sys.modules or at_once > 1:
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // at_once))


def _watcher(by_name: dict[str, Trial], observe: Observer, save: Callable[[], None]) -> Any:
    from ray.tune import Callback

    class Watcher(Callback):
        """Keeps study.json up to date as trials end."""

        def __init__(self) -> None:
            self.ended = 0
            self.began = time.time()

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if trials:
                card = next(iter(by_name.values())).card
                observe(Progress(card, "trials", self.ended, len(by_name), seconds=time.time() - self.began))

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Json, **info: Any) -> None:
            mine = by_name[trial.config["trial"]]
            if "seconds" in result:
                mine.seconds, mine.state = result["seconds"], "done"

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.ended += 1
            mine = by_name[trial.config["trial"]]
            observe(Progress(mine.card, "trial", self.ended, len(by_name), seconds=mine.seconds))
            save()

        def __reduce__(self) -> tuple[Any, ...]:
            # Tune saves its callbacks, for a resume that is not used here; what this one calls holds locks
            return Callback, ()

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.ended += 1

    return Watcher()
