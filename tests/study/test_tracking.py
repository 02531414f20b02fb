"""The mirror on a real MLflow store: complete, repeatable, interrupted, twice at once, and with a dead server."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from dagr_ray import report
from dagr_ray.core.artifact import Artifact
from dagr_ray.study import mlflow_mirror
from tests.conftest import tiny_beir
from tests.support.studies import made_study

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
SCORES = np.random.default_rng(3).uniform(0.2, 0.8, 40)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, str]:
    """A study that was mirrored once."""
    root = tmp_path_factory.mktemp("tracked")
    arms = {n: {"in": (SCORES + 0.1).tolist()} for n in (8, 16)}
    runs, study = made_study(root, {"in": SCORES.tolist()}, arms)
    report.write_page(report.summarise(runs, study), runs, study)
    result = mlflow_mirror.mirror(runs, study)
    assert result == mlflow_mirror.Mirrored(f"sqlite:///{runs}/mlflow.db", parents=1, children=4)
    return runs, study


def logged(runs: str) -> list:
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return sorted(found, key=lambda run: run.data.tags.get("dagr.trial", ""))


def test_everything_is_logged(made) -> None:
    runs, _ = made
    parent, *children = logged(runs)
    assert parent.info.status == "FINISHED"
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    largest = children[-1]
    assert largest.data.params == {"kind": "augmented", "base": "minilm", "generator": "crop", "volume": "16"}
    assert largest.data.metrics["in/nDCG_10"] == pytest.approx(SCORES.mean() + 0.1)
    assert largest.data.metrics["in/nDCG_10.delta"] == pytest.approx(0.1)
    assert {"price", "seconds", "prompt_tokens", "completion_tokens", "rows"} <= largest.data.metrics.keys()
    assert largest.data.tags["dagr.stage.scorecard-16"] == "scorecard-16"[-12:]
    used = {i.tags[0].value: i.dataset for i in largest.inputs.dataset_inputs}
    assert used.keys() == {"training", "evaluation"}
    assert all(len(dataset.digest) == 12 for dataset in used.values())
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["report.html"]
    assert Path(parent.info.artifact_uri.removeprefix("file://")).is_relative_to(runs)


def test_a_second_pass_adds_nothing(made) -> None:
    runs, study = made
    before = [r.info.run_id for r in logged(runs)]
    result = mlflow_mirror.mirror(runs, study)
    assert (result.parents, result.children, result.skipped, result.problem) == (0, 0, 4, None)
    assert [r.info.run_id for r in logged(runs)] == before


def test_an_interrupted_run_is_completed(made) -> None:
    runs, study = made
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    client.delete_tag(logged(runs)[2].info.run_id, mlflow_mirror.COMPLETE)
    result = mlflow_mirror.mirror(runs, study)
    assert (result.children, result.skipped) == (1, 3)
    assert len(logged(runs)) == 5


def test_p_values_are_updated_when_more_arms_end(tmp_path) -> None:
    noise = np.random.default_rng(5).normal(0, 0.1, 40)
    arms = {n: {"in": (SCORES + noise + 0.03).tolist()} for n in (8, 16, 24)}
    runs, study = made_study(tmp_path, {"in": SCORES.tolist()}, arms)
    folder, whole = Artifact(runs, study), Artifact(runs, study).read_json("study.json")
    waiting = [{**t, "state": "pending"} if t["params"].get("volume") in (16, 24) else t for t in whole["trials"]]
    folder.write_json("study.json", whole | {"trials": waiting, "state": "running"})
    hidden = [(Path(runs, t["folder"]), Path(runs, f".{t['folder']}")) for t in waiting if t["state"] == "pending"]
    for shown, away in hidden:
        shown.rename(away)
    assert mlflow_mirror.mirror(runs, study).children == 3
    [early] = [r for r in logged(runs) if r.data.params.get("volume") == "8"]
    for shown, away in hidden:
        away.rename(shown)
    folder.write_json("study.json", whole)
    assert mlflow_mirror.mirror(runs, study).children == 2
    on_page = {t["params"].get("volume"): t["scores"]["in"]["nDCG@10"] for t in report.summarise(runs, study)["trials"]}
    children = [r for r in logged(runs) if r.data.params.get("kind") == "augmented"]
    for run in children:
        assert run.data.metrics["in/nDCG_10.p_holm"] == on_page[int(run.data.params["volume"])]["p_holm"]
    assert early.data.metrics["in/nDCG_10.p_holm"] < on_page[8]["p_holm"], "the correction was to grow with the arms"


def test_the_next_pass_deletes_duplicate_children(tmp_path) -> None:
    runs, study = made_study(tmp_path, {"in": SCORES.tolist()}, {8: {"in": SCORES.tolist()}})
    mlflow_mirror.mirror(runs, study)
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    before = logged(runs)
    for run in before:  # as another machine logs them that looked before this one had written
        tags = {k: v for k, v in run.data.tags.items() if k != "dagr.seen"}
        client.create_run(run.info.experiment_id, start_time=run.info.start_time, tags=tags)
    assert len(logged(runs)) == 2 * len(before)
    assert mlflow_mirror.mirror(runs, study).problem is None
    after = logged(runs)
    assert [r.data.tags.get("dagr.trial") for r in after] == [r.data.tags.get("dagr.trial") for r in before]


def test_two_passes_at_the_same_moment_leave_one_run_each(tmp_path, monkeypatch) -> None:
    """The other pass creates its run between this one's look and its own creation, as no lock of a server prevents."""
    runs, study = made_study(tmp_path, {"in": SCORES.tolist()}, {8: {"in": SCORES.tolist()}})
    create = MlflowClient.create_run

    def twice(client, *args, **more):
        create(client, *args, **more)
        return create(client, *args, **more)

    monkeypatch.setattr(MlflowClient, "create_run", twice)
    assert mlflow_mirror.mirror(runs, study).problem is None
    monkeypatch.undo()
    assert mlflow_mirror.mirror(runs, study).problem is None
    assert len(logged(runs)) == 4 and all(r.data.tags.get("dagr.complete") for r in logged(runs)[1:])


@pytest.mark.parametrize(
    ("written", "status"),
    [
        ({"state": "stopped"}, "KILLED"),
        ({"state": "failed"}, "FAILED"),
        (
            {"state": "running", "driver": {"host": platform.node(), "pid": 2**22 + 5}},
            "KILLED",
        ),  # no process has this id
        ({"state": "running", "driver": {"host": "elsewhere", "pid": 2**22 + 5}}, "RUNNING"),
        ({"state": "running", "driver": {"host": platform.node(), "pid": os.getpid()}}, "RUNNING"),
    ],
)
def test_a_study_that_stopped_does_not_stay_running(tmp_path, written, status) -> None:
    runs, study = made_study(tmp_path, {"in": SCORES.tolist()}, {8: {"in": SCORES.tolist()}})
    folder, whole = Artifact(runs, study), Artifact(runs, study).read_json("study.json")
    trials = [*whole["trials"][:-1], whole["trials"][-1] | {"state": "pending"}]
    folder.write_json("study.json", whole | {"trials": trials} | written)
    mlflow_mirror.mirror(runs, study)
    assert logged(runs)[0].info.status == status
    folder.write_json("study.json", whole)  # it was run again, to its end
    mlflow_mirror.mirror(runs, study)
    assert logged(runs)[0].info.status == "FINISHED"


def test_a_folder_with_signs_of_a_uri_gets_no_stray_folder(made, tmp_path) -> None:
    home = tmp_path / "a#1?x%20"
    shutil.copytree(made[0], home / "runs", ignore=shutil.ignore_patterns("mlflow*"))
    result = mlflow_mirror.mirror(str(home / "runs"), made[1])
    assert result.problem is None and result.children == 4
    assert os.listdir(tmp_path) == [home.name] and (home / "runs" / "mlflow.db").is_file()


def test_two_processes_at_once_log_one_set(made) -> None:
    runs, study = made
    for path in Path(runs).glob("mlflow*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    code = "import sys; from dagr_ray.study import mlflow_mirror; print(mlflow_mirror.mirror(*sys.argv[1:]).problem)"
    words = [sys.executable, "-c", code, runs, study]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    assert [p.communicate(timeout=120)[0].strip() for p in both] == ["None", "None"]
    assert len(logged(runs)) == 5


def test_a_silent_server_costs_little_time_and_raises_nothing(made, monkeypatch) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "1")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        started = time.time()
        result = mlflow_mirror.mirror(*made, uri=f"http://user:secret@127.0.0.1:{server.getsockname()[1]}")
    assert time.time() - started < 60
    assert result.problem and "127.0.0.1" in result.problem
    assert "secret" not in result.problem
    assert "\n" not in result.problem


def test_runs_on_an_object_store_need_a_server(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(Artifact, "local", False)
    assert "set MLFLOW_TRACKING_URI" in (mlflow_mirror.mirror("/nowhere/runs", "study-x").problem or "")


def test_a_study_with_a_dead_server_ends_and_is_logged_later(tmp_path) -> None:
    data, runs = tiny_beir(tmp_path / "set"), str(tmp_path / "runs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def dagr(uri: str, *words: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"MLFLOW_TRACKING_URI": uri}
        words = (sys.executable, "-m", "dagr_ray.cli.main", *words)
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=env, timeout=200)

    done = dagr(dead, "study", "jobs/beir.py", f"data={data}", "volume=0", "--runs", runs, "--quiet")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"run `dagr track {runs}` later" in done.stderr and "not tracked: " in done.stderr and dead in done.stderr
    assert "page: " in done.stdout and "mlflow:" not in done.stdout
    assert dagr(dead, "track", runs).returncode == 1
    done = dagr(store, "track", runs)
    assert done.returncode == 0 and "1 parent and 2 child runs logged, 0 were logged before" in done.stdout, done.stdout
    client = MlflowClient(store)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parent, *children = sorted(found, key=lambda run: run.data.tags.get("dagr.trial", ""))
    assert parent.info.status == "FINISHED" and [f.path for f in client.list_artifacts(parent.info.run_id)] == [
        "report.html"
    ]
    for child in children:
        run_id = child.info.run_id
        [folder] = client.list_artifacts(run_id, "runs")
        [file] = client.list_artifacts(run_id, folder.path)
        assert Path(file.path).name == "run.trec"
        local = Path(client.download_artifacts(run_id, file.path, str(tmp_path)))
        written = Artifact(runs, child.data.tags["dagr.folder"]).manifest["inputs"]["evaluations.0"]
        assert local.read_bytes() == Path(runs, written, "run.trec").read_bytes() != b""
        assert any(name.endswith("nDCG_10") for name in child.data.metrics)
    assert {child.data.params["kind"] for child in children} == {"bm25", "frozen"}
    for child in children:
        assert child.info.end_time - child.info.start_time >= 100, "a baseline takes time, too"
    written = Artifact(runs, next(Path(runs).glob("study-*")).name).read_json("study.json")
    assert written["state"] == "ended" and written["created"] < min(
        t["seconds"] + written["created"] for t in written["trials"]
    )
    assert parent.info.start_time == int(written["created"] * 1000)
    assert written["created"] * 1000 < min(child.info.end_time for child in children)


def test_control_characters_of_others_reach_no_text_of_the_store(tmp_path) -> None:
    evil = "a\x1b]52;c;aGk=\x07b\x1b[2Jc\rd\u202ee\x00f\x9bg\nh"
    runs, study = made_study(tmp_path, {"in": SCORES.tolist()}, {8: {"in": SCORES.tolist()}})
    folder = Artifact(runs, study)
    whole = folder.read_json("study.json")
    for trial in whole["trials"]:
        trial["params"] = {name: evil if isinstance(value, str) else value for name, value in trial["params"].items()}
        trial["params"]["more"] = evil
    folder.write_json("study.json", whole | {"job": evil, "axes": {"volume": [evil]}})
    result = mlflow_mirror.mirror(runs, study)
    assert (result.problem, result.children) == (None, 3)
    for each in logged(runs):
        texts = [each.info.run_name, *each.data.tags.values(), *each.data.params.values()]
        assert any("u001b" in text for text in texts), "what was given is there, spelled out"
        assert not [
            text for text in texts for sign in text if sign != "\n" and (sign < " " or sign in "\x7f\x9b\u202e")
        ]
