"""Estimates of `dagr check` before anything is built, and the remaining time that a study shows."""

import io
import json
import time
from pathlib import Path

import pytest

from dagr_ray.cli import progress
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.attempt import Progress
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.quickstart.models import minilm
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.retrieve import Index
from dagr_ray.stages.sources import Beir, PyDocs
from dagr_ray.stages.train import Train
from dagr_ray.study.estimate import estimate, remaining_seconds
from tests.conftest import tiny_beir

HERE = Placement(retrieve=Pool(workers=0), light=Pool(workers=0))


def test_bytes_of_models_and_indexes_are_estimated(tmp_path) -> None:
    corpus = Beir(path=str(tiny_beir(tmp_path / "set", docs=400)))
    encoder = Encoder(model=str(minilm()))
    dense, lexical = Index(corpus=corpus, miner=Dense(encoder=encoder)), Index(corpus=corpus, miner=BM25())
    train = Train(examples=corpus, queries=corpus, corpus=corpus, base=encoder)
    estimates = estimate([dense, lexical, train], str(tmp_path / "runs"), HERE)
    weights = (Path(minilm()) / "model.safetensors").stat().st_size
    assert weights < estimates[train.fingerprint()]["bytes"] < 1.2 * weights
    assert estimates[dense.fingerprint()]["bytes"] == pytest.approx(400 * 384 * 4, rel=0.05)
    for index in (dense, lexical):
        files = materialize(index, str(tmp_path / "runs"), HERE).manifest["files"].values()
        stored = sum(entry["bytes"] for entry in files)
        assert stored / 2 < estimates[index.fingerprint()]["bytes"] < 6 * stored  # these passages are short


def _trained(runs: str, name: str, rows: int, seconds: float, size: int) -> None:
    """A finished training, by its manifest."""
    spent = {"start": 4.0, "busy": seconds, "idle": 0.0, "wall": seconds + 5.0, "held": seconds + 5.0}
    bill = {
        "seconds": spent,
        "attempts": 1,
        "usd": {},
        "rates": {},
        "waste": {"seconds": 0.0},
        "tokens": dict.fromkeys(("prompt", "cached", "completion"), 0),
    }
    stage = {"type": "train", "base": {"model": "m"}, "epochs": 1, "examples": {"type": "take", "n": rows}}
    file = {"file": "model/model.safetensors", "bytes": size, "sha256": "0" * 64}
    manifest = {
        "stage": stage, "fingerprint": name[-12:], "inputs": {}, "tables": {}, "files": {file["file"]: file}, "bill": bill,
        "counts": {"in": rows, "out": rows}, "placement": Placement().to_json(), "cost": {}, "price": 0.0,
        "finished": 1.0, "attempts": 1, "code": "0", "packages": {},
    }  # fmt: skip
    Artifact(runs, name).write_json("manifest.json", manifest)


def test_the_size_of_a_model_does_not_depend_on_its_rows(tmp_path) -> None:
    corpus, runs = Beir(path=str(tiny_beir(tmp_path / "set"))), str(tmp_path / "runs")
    _trained(runs, "train-0123456789ab", rows=4000, seconds=100.0, size=90_000_000)
    train = Train(examples=corpus, queries=corpus, corpus=corpus, base=Encoder(model=str(minilm())))
    [estimated] = estimate([train], runs, HERE).values()
    assert estimated["basis"] == "its type" and estimated["bytes"] == pytest.approx(90_000_000, rel=0.01)


def test_remaining_time_depends_on_the_size_of_the_trials(tmp_path) -> None:
    runs = str(tmp_path / "runs")
    corpora = {docs: Beir(path=str(tiny_beir(tmp_path / f"set{docs}", docs=docs))) for docs in (100, 1000)}
    large, small = (
        Train(examples=corpora[docs], queries=corpora[docs], corpus=corpora[docs], base=Encoder(model=str(minilm())))
        for docs in (1000, 100)
    )
    alone, beside = HERE.model_copy(update={"trials": 1}), HERE.model_copy(update={"trials": 2})
    assert remaining_seconds([[small], [large]], runs, alone) is None  # nothing was measured on this machine
    _trained(runs, "train-0123456789ab", rows=50, seconds=5.0, size=1)
    expected = {small: 5 + 100 * 0.1, large: 5 + 1000 * 0.1}
    assert remaining_seconds([[small], [large]], runs, alone) == pytest.approx(sum(expected.values()))
    assert remaining_seconds([[small], [large]], runs, beside) == pytest.approx(expected[large])  # the longest trial
    assert remaining_seconds([[small]] * 4, runs, beside) == pytest.approx(2 * expected[small])
    folder = large.folder(runs)
    plan = {"stage": large.to_json(), "fingerprint": large.fingerprint(), "inputs": {}, "rows": 1000}
    folder.write_json("plan.json", plan | {"shards": [{"shard": 0, "start": 0, "stop": 1000}]})
    folder.write_bytes("attempts/001-aaaa.jsonl", json.dumps({"at": time.time() - 60, "event": "start"}).encode())
    assert remaining_seconds([[large]], runs, alone) == pytest.approx(expected[large] - 60, abs=1)


def test_progress_shows_the_estimated_time_left(monkeypatch) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "time", lambda: now)
    stream = io.StringIO()
    reporter = progress.Reporter(stream)
    corpus = PyDocs()
    for now, answer in ((1031.0, None), (1062.0, 300.0)):
        reporter.remaining = lambda answer=answer: answer
        reporter(Progress(corpus, "trials", 3, 4, seconds=now - 1000))
    first, second = stream.getvalue().splitlines()
    assert first.endswith("3 of 4 done") and second.endswith("3 of 4 done, about 5m00s left")
