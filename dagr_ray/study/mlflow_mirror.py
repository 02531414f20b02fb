"""Mirrors finished folders to MLflow. The store may be down, slow or deleted: no result depends on it.

A pass reads a study's folder and logs the runs that the store lacks: one parent run for each study, one child run for each
trial. Runs are identified by tags, so passes can be repeated, interrupted, and started from several machines at once: if
a trial has two runs, the run with the smaller id is kept. The values of a child depend on the other arms (for example,
corrected p values), so each pass compares all values with the values that were logged.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psutil

from dagr_ray import __version__
from dagr_ray.core import environment
from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.config import digest
from dagr_ray.core.markdown import markdown
from dagr_ray.core.terminal import shown
from dagr_ray.packages import pip_install
from dagr_ray.report.lineage import Folders
from dagr_ray.report.summary import study_of, summarise

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LOCK_S = 30
STUDY, TRIAL, COMPLETE = "dagr.study", "dagr.trial", "dagr.complete"
LOGGED = "dagr.seen"  # a digest of the values that were logged


@dataclass
class Mirrored:
    """The result of a pass. If the store failed, ``problem`` is one line and the counts may be partial."""

    uri: str
    parents: int = 0
    children: int = 0
    skipped: int = 0
    problem: str | None = None


def store(runs: str) -> str | None:
    """The store's URI: MLFLOW_TRACKING_URI, or else a SQLite file in the runs folder if it is on this machine's disk."""
    folder = Artifact(runs, "mlflow.db")
    return environment.get("MLFLOW_TRACKING_URI") or (_sqlite(folder.path) if folder.local else None)


def _sqlite(path: str) -> str:
    """The URI of a SQLite file. SQLAlchemy decodes percent signs in it, but MLflow does not.

    MLflow would create the parent folder under its encoded name, unless the URI names the driver too.
    """
    encoded = re.sub("[%?#]", lambda match: quote(match[0]), path)
    return f"sqlite:///{path}" if encoded == path else f"sqlite+pysqlite:///{encoded}"


def check() -> None:
    """Raises ModuleNotFoundError if MLflow is not installed."""
    import mlflow  # noqa: F401


def mirror(runs: str, study_folder: str, uri: str | None = None) -> Mirrored:
    """Logs the finished trials of a study that the store lacks. Errors of the store are returned, never raised."""
    uri = uri or store(runs)
    result = Mirrored(uri or "")
    if uri is None:
        result.problem = f"runs folder {runs!r} is not on this machine's disk; set MLFLOW_TRACKING_URI to a server"
        return result
    environment.set_defaults(environment.MLFLOW)
    try:
        with _write_lock(runs, uri):
            from mlflow import MlflowClient

            logging.getLogger("alembic").setLevel(logging.WARNING)
            logging.getLogger("mlflow").setLevel(logging.ERROR)
            _Pass(MlflowClient(tracking_uri=uri), runs, study_folder, result).run()
    except ModuleNotFoundError as error:
        package = (error.name or "mlflow").partition(".")[0]
        result.problem = f"{package} is not installed; run: {pip_install(package)}"
    except Exception as error:  # a failed mirror is only a message: all results are in the folders
        message = " ".join(f"{type(error).__name__} at {uri}: {error}".split())
        result.problem = _without_password(message)[:400]
    return result


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


@contextlib.contextmanager
def _write_lock(runs: str, uri: str) -> Iterator[None]:
    """Allows one writer at a time to a SQLite store: two processes that create its tables at once would break it."""
    folder = Artifact(runs, "")
    if not uri.startswith("sqlite") or not folder.local:
        yield
        return
    import fcntl

    os.makedirs(folder.path, exist_ok=True)
    with open(f"{folder.path}/.mlflow.lock", "w") as handle:
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held the lock for {LOCK_S} s") from None
                time.sleep(0.1)
        yield


class _Pass:
    """One pass over one study."""

    def __init__(self, client: MlflowClient, runs: str, study_folder: str, result: Mirrored) -> None:
        self.client, self.result = client, result
        self.folder = Artifact(runs, study_folder)
        self.folders = Folders(runs)
        self.study: Json = study_of(self.folder)
        self.summary = summarise(runs, study_folder)

    def run(self) -> None:
        self.experiment = self._experiment()
        known = self._known()
        parent = known.pop("", None) or self._parent()
        for trial in self.study["trials"]:
            run = known.get(trial["trial"])
            if trial["state"] != "done" or self.folders.manifest(trial["folder"]) is None:
                continue
            metrics = _metrics(_trial_row(self.summary, trial))
            if run is not None and run.data.tags.get(COMPLETE):
                self._refresh(run, metrics)
                self.result.skipped += 1
            else:  # an interrupted pass may have created the run; it is completed here
                self._child(trial, parent.info.run_id, metrics, run)
                self.result.children += 1
        self._finish(parent)
        self._known()  # deletes duplicates that another pass has created meanwhile

    def _refresh(self, run: Run, values: dict[str, float]) -> None:
        """Logs values that have changed: the corrected p values of an arm depend on arms that end after it."""
        from mlflow.entities import Metric, RunTag

        if run.data.tags.get(LOGGED) != digest(values):
            # MLflow shows the value with the latest time; a worker's clock may be ahead of this one
            now = max(int(time.time() * 1000), (run.info.end_time or 0) + 1)
            metrics = [Metric(key, value, now, 0) for key, value in values.items()]
            self.client.log_batch(run.info.run_id, metrics=metrics, tags=[RunTag(LOGGED, digest(values))])

    def _experiment(self) -> str:
        name = f"dagr-{self.study['name']}"
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            if experiment.lifecycle_stage == "deleted":
                self.client.restore_experiment(experiment.experiment_id)
            return experiment.experiment_id
        # a server stores artifacts itself; with a SQLite file they would be written to the current folder
        local = self.result.uri.startswith("sqlite") and self.folder.local
        place = Artifact(self.folder.runs, "mlflow-artifacts").path
        return self.client.create_experiment(name, artifact_location=Path(place).as_uri() if local else None)

    def _known(self) -> dict[str, Run]:
        """Runs of this study by trial; the parent's key is the empty name.

        Passes from two machines may create several runs for a trial. The run with the smallest id is kept, and the others
        are deleted once it is complete.
        """
        by_trial: dict[str, list[Run]] = {}
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment], f"tags.`{STUDY}` = '{self.folder.name}'", max_results=500, page_token=token
            )
            for run in page:
                by_trial.setdefault(run.data.tags.get(TRIAL, ""), []).append(run)
            token = page.token
            if not token:
                break
        kept: dict[str, Run] = {}
        for trial, runs in by_trial.items():
            kept[trial], *others = sorted(runs, key=lambda run: run.info.run_id)
            if not trial or kept[trial].data.tags.get(COMPLETE):
                for run in others:
                    self.client.delete_run(run.info.run_id)
        return kept

    def _create(self, start: int, tags: Json, trial: str = "") -> str:
        """The id of a new run. If another pass creates a run for the same trial at the same time, the smaller id is kept."""
        created = self.client.create_run(self.experiment, start_time=start, tags=tags).info.run_id
        same = f"tags.`{STUDY}` = '{self.folder.name}'" + (f" and tags.`{TRIAL}` = '{trial}'" if trial else "")
        runs = self.client.search_runs([self.experiment], same, max_results=1000 if not trial else 100)
        others = [run.info.run_id for run in runs if run.data.tags.get(TRIAL, "") == trial]
        kept = min([created, *others])
        if kept != created:
            self.client.delete_run(created)
        return kept

    def _parent(self) -> Run:
        study = self.study
        tags = {STUDY: self.folder.name, "mlflow.runName": self.folder.name, "dagr.version": __version__}
        run = self.client.get_run(self._create(int(study["created"] * 1000), tags))
        params = {"job": study["job"]} | {f"axis.{k}": ", ".join(map(str, v)) for k, v in study["axes"].items()}
        self.client.log_batch(run.info.run_id, params=_params(params))
        self.result.parents += 1
        return run

    def _child(self, trial: Json, parent: str, values: dict[str, float], unfinished: Run | None) -> None:
        from mlflow.entities import Metric, RunTag

        row = _trial_row(self.summary, trial)
        finished = self.folders.manifest_or_empty(trial["folder"])["finished"]
        name = " ".join(str(x) for x in (row["base"], row["label"], row["used"] or "") if x)
        tags = {
            STUDY: self.folder.name,
            TRIAL: trial["trial"],
            "mlflow.parentRunId": parent,
            "mlflow.runName": shown(name, lines=False),
            "dagr.kind": trial["kind"],
            "dagr.folder": trial["folder"],
        }
        start = int((finished - trial["seconds"]) * 1000)
        run_id = unfinished.info.run_id if unfinished is not None else self._create(start, tags, trial["trial"])
        fingerprints = [RunTag(f"dagr.stage.{folder}", fingerprint) for folder, fingerprint in trial["stages"].items()]
        params = {"kind": trial["kind"], "base": row["base"], "generator": row["label"], **trial["params"]}
        metrics = [Metric(key, value, int(finished * 1000), 0) for key, value in values.items()]
        fingerprints.append(RunTag(LOGGED, digest(values)))
        self.client.log_batch(run_id, metrics=metrics, params=_params(params), tags=fingerprints)
        self._inputs(run_id, row)
        self.client.log_dict(run_id, trial, "trial.json")
        for folder in self._evaluations(trial["folder"]):
            artifact = self.folders.artifact(folder)
            if "run.trec" in self.folders.manifest_or_empty(folder).get("files", {}):
                name = self.folders.manifest_or_empty(folder)["stage"]["name"]
                self.client.log_artifact(run_id, artifact.local_path("run.trec"), f"runs/{_artifact_folder(name)}")
        self.client.set_tag(run_id, COMPLETE, "1")
        self.client.set_terminated(run_id, end_time=int(finished * 1000))

    def _evaluations(self, card: str) -> list[str]:
        return self.folders.main(card)

    def _inputs(self, run_id: str, row: Json) -> None:
        """Logs the data sets that the retriever was evaluated on, and the examples that it was trained on."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        contexts = {
            data: "evaluation"
            for evaluation in self._evaluations(row["folder"])
            if (data := self.folders.judged_data(evaluation)) is not None
        }
        for name in self.folders.ancestors(row["folder"]):
            if self.folders.role(name) == "train":
                contexts |= dict.fromkeys(self.folders.main(name), "training")
        datasets = []
        for name, context in contexts.items():
            manifest = self.folders.manifest_or_empty(name)
            profile = {table: entry["rows"] for table, entry in manifest["tables"].items()}
            source = shown({"uri": self.folders.artifact(name).path})
            dataset = Dataset(name, manifest["fingerprint"][:36], "local", source, profile=str(profile))
            datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        self.client.log_inputs(run_id, datasets=datasets)

    def _finish(self, parent: Run) -> None:
        """Updates the parent: totals, verdict, page and status. It is ended when every trial has ended."""
        from mlflow.entities import Metric

        run_id, total, now = parent.info.run_id, self.summary["total"], int(time.time() * 1000)
        states = [trial["state"] for trial in self.study["trials"]]
        status = _status(self.study)
        page = self.folder.read_bytes("report.html")
        state = digest([states, status, hashlib.sha256(page or b"").hexdigest(), self.summary["wall_s"]])
        if parent.data.tags.get(LOGGED) == state:
            return
        values = {**total, "wall_seconds": self.summary["wall_s"], "trials_done": states.count("done")}
        self.client.log_batch(run_id, metrics=[Metric(k, float(v), now, 0) for k, v in values.items()])
        self.client.set_tag(run_id, "mlflow.note.content", shown(_note(self.summary)))
        if page is not None:
            self.client.log_artifact(run_id, self.folder.local_path("report.html"))
        self.client.set_tag(run_id, LOGGED, state)
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)  # a stopped study was resumed
        else:
            self.client.set_terminated(run_id, status)


def _status(study: Json) -> str:
    """A study's state as an MLflow status. If the driver's process no longer exists on this machine, the study was killed."""
    states = {trial["state"] for trial in study["trials"]}
    if states <= {"done", "failed"}:
        return "FAILED" if "failed" in states else "FINISHED"
    if study.get("state") == "failed":
        return "FAILED"
    driver = study.get("driver", {})
    gone = driver.get("host") == platform.node() and not psutil.pid_exists(driver.get("pid", 0))
    return "KILLED" if gone or study.get("state") == "stopped" else "RUNNING"


def _note(summary: Json) -> str:
    verdict = summary["verdict"]
    return "\n".join([markdown(verdict["headline"]), *(f"* {markdown(s)}" for s in verdict["sentences"])])[:5000]


def _trial_row(summary: Json, trial: Json) -> Json:
    """The summary's row of a trial. For one of several seeds it has only the trial's own means: the tests cover all seeds."""
    arm = next(t for t in summary["trials"] if trial["trial"] in {seed["trial"] for seed in t["seeds"]})
    row = {**arm, "folder": trial["folder"], "seconds": trial["seconds"]}
    if len(arm["seeds"]) > 1:
        means = next(seed["means"] for seed in arm["seeds"] if seed["trial"] == trial["trial"])
        row["scores"] = {data: {m: {"mean": mean} for m, mean in measures.items()} for data, measures in means.items()}
    return row


def _artifact_folder(name: str) -> str:
    """A data set's name as a folder for artifacts. MLflow rejects some names; different names get different folders.

    >>> _artifact_folder("scifact"), _artifact_folder("../set")
    ('scifact', '_set-bba6')
    """
    plain = re.sub(r"[^\w\-. ]", "_", name).strip(". ")[:80]
    return plain if plain and plain == name else f"{plain}-{digest(name)[:4]}"


def _params(values: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, shown(value)[:6000]) for key, value in values.items()]


def _metrics(row: Json) -> dict[str, float]:
    """Means, intervals and gains for each data set, and the arm's cost. MLflow does not allow ``@`` in names."""
    values: dict[str, float] = {"rows": row["used"], "trial_seconds": row["seconds"], **(row["cost"] or {})}
    for data, measures in row["scores"].items():
        for measure, score in measures.items():
            stem = re.sub(r"[^\w\-. /]", "_", f"{data}/{measure}")
            values[stem] = score["mean"]
            for key in ("low", "high", "delta", "delta_low", "delta_high", "p_holm"):
                if key in score:
                    values[f"{stem}.{key}"] = score[key]
    return {key: float(value) for key, value in values.items()}
