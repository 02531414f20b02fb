"""MLflow as a mirror of finished folders: it may be down, slow or deleted, and nothing is lost.

A pass reads a study's folder and logs what the store does not have: one parent run a study, one child a trial. Runs are
found again by tags, so passes may be repeated, interrupted, and made from several machines, also at once: of two runs of
one trial the one with the smaller id stands. What a child says depends on the other arms (a corrected p value does), so
each pass compares all of it with what was logged.
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
SEEN = "dagr.seen"  # a digest of what was logged


@dataclass
class Mirrored:
    """What a pass did. ``problem`` is one line where the store could not be used, and the rest may be partial."""

    uri: str
    parents: int = 0
    children: int = 0
    skipped: int = 0
    problem: str | None = None


def store(runs: str) -> str | None:
    """Where runs are logged: MLFLOW_TRACKING_URI, else a SQLite file in a runs folder on this machine's disk."""
    folder = Artifact(runs, "mlflow.db")
    return environment.get("MLFLOW_TRACKING_URI") or (_sqlite(folder.path) if folder.local else None)


def _sqlite(path: str) -> str:
    """The URI of a SQLite file: SQLAlchemy reads percent signs in it as a URI has them."""
    return f"sqlite:///{re.sub('[%?#]', lambda found: quote(found[0]), path)}"


def check() -> None:
    """Raises ModuleNotFoundError where MLflow is not installed."""
    import mlflow  # noqa: F401


def mirror(runs: str, study_folder: str, uri: str | None = None) -> Mirrored:
    """Logs the finished trials of a study that the store lacks. Never raises for what the store does."""
    uri = uri or store(runs)
    result = Mirrored(uri or "")
    if uri is None:
        result.problem = f"runs folder {runs!r} is not on this machine's disk; set MLFLOW_TRACKING_URI to a server"
        return result
    environment.set_defaults(environment.MLFLOW)
    try:
        with _alone(runs, uri):
            from mlflow import MlflowClient

            logging.getLogger("alembic").setLevel(logging.WARNING)
            logging.getLogger("mlflow").setLevel(logging.ERROR)
            _Pass(MlflowClient(tracking_uri=uri), runs, study_folder, result).run()
    except ModuleNotFoundError as error:
        package = (error.name or "mlflow").partition(".")[0]
        result.problem = f"{package} is not installed; run: {pip_install(package)}"
    except Exception as error:  # any failure of a mirror is a line of text: the work is in the folders
        shown = " ".join(f"{type(error).__name__} at {uri}: {error}".split())
        result.problem = _without_password(shown)[:400]
    return result


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


@contextlib.contextmanager
def _alone(runs: str, uri: str) -> Iterator[None]:
    """One writer at a time to a SQLite store: two that create its tables at once would break it."""
    folder = Artifact(runs, "")
    if not uri.startswith("sqlite:") or not folder.local:
        yield
        return
    import fcntl

    os.makedirs(folder.path, exist_ok=True)
    with open(f"{folder.path}/.mlflow.lock", "w") as handle:
        until = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process has been writing for {LOCK_S} s") from None
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
            found = known.get(trial["trial"])
            if trial["state"] != "done" or self.folders.manifest(trial["folder"]) is None:
                continue
            measured = _measured(_row(self.summary, trial))
            if found is not None and found.data.tags.get(COMPLETE):
                self._refresh(found, measured)
                self.result.skipped += 1
            else:  # a pass that ended in its middle left a run, which is completed
                self._child(trial, parent.info.run_id, measured, found)
                self.result.children += 1
        self._finish(parent)
        self._known()  # of what another pass has made meanwhile, one of each stands

    def _refresh(self, run: Run, measured: dict[str, float]) -> None:
        """Logs what has changed since: the corrected p values of an arm depend on the arms that ended after it."""
        from mlflow.entities import Metric, RunTag

        if run.data.tags.get(SEEN) != digest(measured):
            # the latest time stands; a worker's clock may be ahead of this one
            now = max(int(time.time() * 1000), (run.info.end_time or 0) + 1)
            metrics = [Metric(key, value, now, 0) for key, value in measured.items()]
            self.client.log_batch(run.info.run_id, metrics=metrics, tags=[RunTag(SEEN, digest(measured))])

    def _experiment(self) -> str:
        name = f"dagr-{self.study['name']}"
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            return found.experiment_id
        # a server has a place of its own for artifacts; beside a SQLite file they would land in the current folder
        local = self.result.uri.startswith("sqlite:") and self.folder.local
        place = Artifact(self.folder.runs, "mlflow-artifacts").path
        return self.client.create_experiment(name, artifact_location=Path(place).as_uri() if local else None)

    def _known(self) -> dict[str, Run]:
        """Runs of this study by trial; the parent's is the empty name. Of several runs of one trial, which passes from two
        machines make, the one with the smallest id stands, and the others are deleted once it is complete."""
        found: dict[str, list[Run]] = {}
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment], f"tags.`{STUDY}` = '{self.folder.name}'", max_results=500, page_token=token
            )
            for run in page:
                found.setdefault(run.data.tags.get(TRIAL, ""), []).append(run)
            token = page.token
            if not token:
                break
        standing: dict[str, Run] = {}
        for trial, runs in found.items():
            standing[trial], *others = sorted(runs, key=lambda run: run.info.run_id)
            if not trial or standing[trial].data.tags.get(COMPLETE):
                for run in others:
                    self.client.delete_run(run.info.run_id)
        return standing

    def _create(self, start: int, tags: Json, trial: str = "") -> str:
        """The id of a new run or, if another pass makes one for the same trial at the same time, the smaller of the two."""
        mine = self.client.create_run(self.experiment, start_time=start, tags=tags).info.run_id
        same = f"tags.`{STUDY}` = '{self.folder.name}'" + (f" and tags.`{TRIAL}` = '{trial}'" if trial else "")
        found = self.client.search_runs([self.experiment], same, max_results=1000 if not trial else 100)
        others = [run.info.run_id for run in found if run.data.tags.get(TRIAL, "") == trial]
        standing = min([mine, *others])
        if standing != mine:
            self.client.delete_run(mine)
        return standing

    def _parent(self) -> Run:
        study = self.study
        tags = {STUDY: self.folder.name, "mlflow.runName": self.folder.name, "dagr.version": __version__}
        made = self.client.get_run(self._create(int(study["created"] * 1000), tags))
        params = {"job": study["job"]} | {f"axis.{k}": ", ".join(map(str, v)) for k, v in study["axes"].items()}
        self.client.log_batch(made.info.run_id, params=_params(params))
        self.result.parents += 1
        return made

    def _child(self, trial: Json, parent: str, measured: dict[str, float], begun: Run | None) -> None:
        from mlflow.entities import Metric, RunTag

        row = _row(self.summary, trial)
        finished = self.folders.found(trial["folder"])["finished"]
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
        run_id = begun.info.run_id if begun is not None else self._create(start, tags, trial["trial"])
        fingerprints = [RunTag(f"dagr.stage.{folder}", mark) for folder, mark in trial["stages"].items()]
        params = {"kind": trial["kind"], "base": row["base"], "generator": row["label"], **trial["params"]}
        metrics = [Metric(key, value, int(finished * 1000), 0) for key, value in measured.items()]
        fingerprints.append(RunTag(SEEN, digest(measured)))
        self.client.log_batch(run_id, metrics=metrics, params=_params(params), tags=fingerprints)
        self._inputs(run_id, row)
        self.client.log_dict(run_id, trial, "trial.json")
        for folder in self._evaluations(trial["folder"]):
            artifact = self.folders.artifact(folder)
            if "run.trec" in self.folders.found(folder).get("files", {}):
                named = self.folders.found(folder)["stage"]["name"]
                self.client.log_artifact(run_id, artifact.local_path("run.trec"), f"runs/{_place(named)}")
        self.client.set_tag(run_id, COMPLETE, "1")
        self.client.set_terminated(run_id, end_time=int(finished * 1000))

    def _evaluations(self, card: str) -> list[str]:
        return [f for n, f in self.folders.found(card)["inputs"].items() if n.startswith("evaluations")]

    def _inputs(self, run_id: str, row: Json) -> None:
        """The judged data sets, and the examples that the retriever was trained on."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        used = {
            f: "evaluation"
            for e in self._evaluations(row["folder"])
            if (f := self.folders.found(e)["inputs"].get("data"))
        }
        for name in self.folders.ancestors(row["folder"]):
            if examples := self.folders.found(name)["inputs"].get("examples"):
                used[examples] = "training"
        found = []
        for name, context in used.items():
            manifest = self.folders.found(name)
            profile = {table: entry["rows"] for table, entry in manifest["tables"].items()}
            source = shown({"uri": self.folders.artifact(name).path})
            dataset = Dataset(name, manifest["fingerprint"][:36], "local", source, profile=str(profile))
            found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        self.client.log_inputs(run_id, datasets=found)

    def _finish(self, parent: Run) -> None:
        """Brings the parent up to date: the totals, the answers, the page; ended when every trial has ended."""
        from mlflow.entities import Metric

        run_id, total, now = parent.info.run_id, self.summary["total"], int(time.time() * 1000)
        states = [trial["state"] for trial in self.study["trials"]]
        status = _status(self.study)
        page = self.folder.read_bytes("report.html")
        mark = digest([states, status, hashlib.sha256(page or b"").hexdigest(), self.summary["wall_s"]])
        if parent.data.tags.get(SEEN) == mark:
            return
        values = {**total, "wall_seconds": self.summary["wall_s"], "trials_done": states.count("done")}
        self.client.log_batch(run_id, metrics=[Metric(k, float(v), now, 0) for k, v in values.items()])
        self.client.set_tag(run_id, "mlflow.note.content", shown(_note(self.summary)))
        if page is not None:
            self.client.log_artifact(run_id, self.folder.local_path("report.html"))
        self.client.set_tag(run_id, SEEN, mark)
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)  # one that had stopped goes on
        else:
            self.client.set_terminated(run_id, status)


def _status(study: Json) -> str:
    """A study's state in MLflow's words. One whose driver was killed without a word has stopped: its process is gone."""
    states = {trial["state"] for trial in study["trials"]}
    if states <= {"done", "failed"}:
        return "FAILED" if "failed" in states else "FINISHED"
    if study.get("state") == "failed":
        return "FAILED"
    driver = study.get("driver", {})
    gone = driver.get("host") == platform.node() and not psutil.pid_exists(driver.get("pid", 0))
    return "KILLED" if gone or study.get("state") == "stopped" else "RUNNING"


def _note(summary: Json) -> str:
    words = summary["verdict"]
    return "\n".join([markdown(words["headline"]), *(f"* {markdown(s)}" for s in words["sentences"])])[:5000]


def _row(summary: Json, trial: Json) -> Json:
    """What the summary says of a trial; of one seed of several only its own means, because the tests are of all of them."""
    arm = next(t for t in summary["trials"] if trial["trial"] in {each["trial"] for each in t["seeds"]})
    row = {**arm, "folder": trial["folder"], "seconds": trial["seconds"]}
    if len(arm["seeds"]) > 1:
        means = next(each["means"] for each in arm["seeds"] if each["trial"] == trial["trial"])
        row["scores"] = {data: {m: {"mean": mean} for m, mean in found.items()} for data, found in means.items()}
    return row


def _place(name: str) -> str:
    """A data set's name as a folder of artifacts: MLflow refuses some, and two names stay two.

    >>> _place("scifact"), _place("../set")
    ('scifact', '_set-bba6')
    """
    plain = re.sub(r"[^\w\-. ]", "_", name).strip(". ")[:80]
    return plain if plain and plain == name else f"{plain}-{digest(name)[:4]}"


def _params(values: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(key, shown(value)[:6000]) for key, value in values.items()]


def _measured(row: Json) -> dict[str, float]:
    """Means, intervals and gains for each data set, and what the arm cost. MLflow wants names without ``@``."""
    values: dict[str, float] = {"rows": row["used"], "trial_seconds": row["seconds"], **(row["cost"] or {})}
    for data, measures in row["scores"].items():
        for measure, score in measures.items():
            stem = re.sub(r"[^\w\-. /]", "_", f"{data}/{measure}")
            values[stem] = score["mean"]
            for key in ("low", "high", "delta", "delta_low", "delta_high", "p_holm"):
                if key in score:
                    values[f"{stem}.{key}"] = score[key]
    return {key: float(value) for key, value in values.items()}
