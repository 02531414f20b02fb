"""Runs a study: first the shared stages, then one Ray Tune trial for each scorecard.

Trials with equal fingerprints are one trial. All results of a trial are folders of stages, so a stopped study can be
resumed, and running a finished study again costs nothing.
"""

from __future__ import annotations

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dagr_ray.core import blame, disk, environment, job_imports
from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.attempt import Observer, Progress
from dagr_ray.core.build import materialize, plan
from dagr_ray.core.placement import Placement
from dagr_ray.core.stage import walk
from dagr_ray.stages.evaluate import Scorecard
from dagr_ray.study.plan import Study, Trial

log = logging.getLogger("dagr")


def run_study(
    study: Study,
    runs: str,
    placement: Placement,
    observe: Observer,
    on_trial: Callable[[Artifact], None] = lambda folder: None,
) -> Artifact:
    """Runs all unfinished trials; returns the study's folder. A failed trial is recorded and does not stop the others."""
    folder = study.folder(runs)
    if folder.local:
        disk.remove_abandoned(folder.path)
    begun = time.time()
    earlier = folder.read_json("study.json") or {}
    spent = {t["trial"]: t["seconds"] for t in earlier.get("trials", [])}
    missing = {line.stage.fingerprint() for line in plan(study.stages(), runs) if line.state != "cached"}
    for trial in study.trials:
        trial.seconds = spent.get(trial.name, 0.0)
        # a finished scorecard is not enough: one of its inputs may have been damaged or deleted since
        if missing.isdisjoint(stage.fingerprint() for stage in walk(trial.card)):
            trial.state = "done"
    has_work = any(trial.state != "done" for trial in study.trials)

    def save(state: str = "running") -> None:
        wall = earlier.get("wall_s", 0.0) + (time.time() - begun if has_work else 0.0)
        # a baseline may be complete although the study ended early
        for trial in study.trials if state != "running" else ():
            if trial.state == "pending" and trial.card.folder(runs).manifest is not None:
                trial.state = "done"
        _set_seconds(study, runs)
        ended = "ended" if all(trial.state in ("done", "failed") for trial in study.trials) else state
        values = _study_values(study, runs, earlier, wall, has_work) | {"state": ended, "driver": _driver()}
        folder.write_json("study.json", values | {"created": earlier.get("created", begun)})
        on_trial(folder)

    save()
    if not has_work:
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
    """Sets the time of finished trials that were not timed: baselines, and trials that another study has built.

    It is the time of the folders that not every trial needs.
    """
    untimed = [trial for trial in study.trials if trial.state == "done" and not trial.seconds]
    if not untimed:
        return
    used = Counter(stage.fingerprint() for trial in study.trials for stage in walk(trial.card))
    for trial in untimed:
        stages = walk(trial.card)
        own = [stage for stage in stages if used[stage.fingerprint()] < len(study.trials)] or stages
        manifests = [stage.folder(runs).manifest for stage in own]
        trial.seconds = sum(manifest["cost"].get("wall_s", 0.0) for manifest in manifests if manifest)


def _driver() -> Json:
    """The process that runs the study, so that a program on its machine can check whether it is still alive."""
    return {"host": platform.node(), "pid": os.getpid()}


def _study_values(study: Study, runs: str, earlier: Json, wall: float, has_work: bool) -> Json:
    return {
        "name": study.job.name,
        "job": study.job.path,
        "axes": study.axes,
        **study.rule(),
        "defaults": study.job.values_by_default(),
        # a finished study that is only read again keeps the machine that ran it
        "machine": _machine() if has_work else earlier.get("machine") or _machine(),
        "wall_s": wall,
        "trials": [trial.to_json(runs) for trial in study.trials],
    }


def _machine() -> Json:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = platform.python_version()
    return {"cores": cores, "platform": platform.platform(), "python": python, "device": _device()}


def _device() -> str:
    """The GPUs of the Ray cluster, or of this machine if Ray is not running, such as ``4 x H200``; ``no GPU`` if there is none."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        resources = ray.cluster_resources()
        kinds = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
        gpus = int(resources.get("GPU", 0))
    elif shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        kinds = re.findall(r"^GPU \d+: (.+?) \(", listing, re.MULTILINE)
        gpus = len(kinds)
    else:
        gpus, kinds = 0, []
    return f"{gpus} x {', '.join(sorted(set(kinds))) or 'GPU'}" if gpus else "no GPU"


def _tune(
    trials: list[Trial], folder: Artifact, placement: Placement, observe: Observer, save: Callable[[], None]
) -> None:
    from ray import tune

    if not environment.debug():
        logging.getLogger("ray.tune").setLevel(
            logging.CRITICAL
        )  # its long tracebacks of failed trials: the reason is logged below
    job_imports.pickle_job_modules_by_value()
    # as objects, not as JSON: workers cannot import a class that is defined in the job's file
    cards = {trial.name: trial.card for trial in trials}
    by_name = {trial.name: trial for trial in trials}
    root = str(Path(folder.path).parent) if folder.local else folder.runs
    # A trial mostly waits for its Ray Train workers, so it needs almost no CPU; Tune does not accept a request for none.
    trainable = tune.with_resources(_Trainable(cards, root, placement, len(trials)), {"cpu": 0.01})
    scratch = tempfile.mkdtemp(prefix="dagr-tune-")
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(cards))},
        tune_config=tune.TuneConfig(max_concurrent_trials=placement.trials, reuse_actors=True),
        run_config=tune.RunConfig(
            name=folder.name, storage_path=scratch, verbose=0, callbacks=[_callback(by_name, observe, save)]
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
    """A trial: builds its scorecard, then reports the means. The stages that trials share are built before."""

    __name__ = "dagr_trial"

    def __init__(self, cards: dict[str, Scorecard], runs: str, placement: Placement, trials: int) -> None:
        self.cards, self.runs, self.placement = cards, runs, placement
        self.beside = job_imports.job_folders()
        self.concurrent = min(trials, placement.trials)

    def __call__(self, config: Json) -> None:
        from ray import tune

        _use_share_of_cores(self.concurrent)
        started = time.time()
        job_imports.add_job_folders(self.beside)
        folder = materialize(self.cards[config["trial"]], self.runs, self.placement)
        means = {
            f"{row['data']}/{row['measure']}": row["value"]
            for row in folder.read("metrics").to_pylist()
            if row["query_id"] is None
        }
        tune.report({**means, "seconds": time.time() - started})


def _use_share_of_cores(concurrent: int) -> None:
    if "torch" in sys.modules or concurrent > 1:
        import torch

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // concurrent))


def _callback(by_name: dict[str, Trial], observe: Observer, save: Callable[[], None]) -> Any:
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
            planned = by_name[trial.config["trial"]]
            if "seconds" in result:
                planned.seconds, planned.state = result["seconds"], "done"

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.ended += 1
            planned = by_name[trial.config["trial"]]
            observe(Progress(planned.card, "trial", self.ended, len(by_name), seconds=planned.seconds))
            save()

        def __reduce__(self) -> tuple[Any, ...]:
            # Tune pickles its callbacks for a resume, which is not used here; the functions of this one hold locks
            return Callback, ()

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.ended += 1

    return Watcher()
