"""Checks of a job's data before anything starts: missing splits, unreadable files."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.stage import walk
from dagr_ray.stages.evaluate import Evaluate
from dagr_ray.stages.human_labels import People
from dagr_ray.stages.leakage import LeakScan
from dagr_ray.stages.mix import HumanPairs
from dagr_ray.stages.sources import Beir, Parquet
from dagr_ray.stages.trec import TrecQrels, TrecRun
from dagr_ray.study.job import load_job
from dagr_ray.study.preflight import check_data
from tests.conftest import tiny_beir


def judged(path, run, split="test"):
    return Evaluate(search=TrecRun(path=str(run)), data=Beir(path=str(path)), split=split)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run.trec").write_text("q13 Q0 d13 1 2.5 x\n")
    return tmp_path / "run.trec"


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("built", [True, False])
def test_missing_and_unusable_splits_are_refused(tmp_path, run, whole, built):
    path, runs = tiny_beir(tmp_path / "set"), str(tmp_path / "runs")
    (path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0.5\n")
    (path / "qrels" / "none.tsv").write_text("query-id\tcorpus-id\tscore\n")
    if built:
        materialize(Beir(path=str(path)), runs)
    assert check_data(walk(judged(path, run)), runs, whole) == ["set (test): 48 judged queries, 48 judgements"]
    assert check_data(walk(judged(path, run, "validation")), runs, whole) == [
        "set (validation): 12 judged queries, 12 judgements"
    ]
    for split, message in {
        "best": "split 'best' is not in .*set'; allowed: dev, none, test(, train)?; choose one with split=dev",
        "train": r"train.tsv: 1 of 1 lines are bad.*line 2: broken-line .score 0.5 is not a whole number",
        "none": "split 'none' of .* has no judgements",
    }.items():
        with pytest.raises(ConfigError, match=message):
            check_data(walk(judged(path, run, split)), runs, whole)
    data = Beir(path=str(path))
    for stage in (HumanPairs(data=data), LeakScan(selected=data, corpus=data, held_out=(data,), split="train")):
        with pytest.raises(ConfigError, match="0.5 is not a whole number"):
            check_data(walk(stage), runs, whole)
    assert check_data(walk(data), runs, whole) == [], "a split that no stage reads was checked"


def test_queries_without_relevant_passages_are_warned_about(tmp_path, run, caplog):
    path = tiny_beir(tmp_path / "set")
    qrels = path / "qrels" / "test.tsv"
    qrels.write_text(qrels.read_text().replace("d20\t1", "d20\t0"))
    check_data(walk(judged(path, run)), str(tmp_path), True)
    assert "of 48 judged queries, 1 have no relevant passage: every retriever scores 0" in caplog.text
    qrels.write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    check_data(walk(judged(path, run)), str(tmp_path), True)
    assert "of 1 judged queries, none has a relevant passage" in caplog.text


def test_other_sources_are_checked_too(tmp_path, run):
    (tmp_path / "qrels").write_text("q13 0 d13 1.5\n")
    pq.write_table(pa.table({"doc_id": ["a", "a"], "text": ["x", "y"]}), tmp_path / "set.parquet")
    (tmp_path / "who.jsonl").write_text('{"query_id": "q", "doc_id": "d", "grade": 9}\n')
    for stage, message in {
        Evaluate(
            search=TrecRun(path=str(run)), data=TrecQrels(path=str(tmp_path / "qrels"))
        ): "score 1.5 is not a whole",
        Parquet(path=str(tmp_path / "set.parquet")): "duplicate-id",
        People(files=(str(tmp_path / "who.jsonl"),)): "grade = 9",
    }.items():
        with pytest.raises(ConfigError, match=message):
            check_data(walk(stage), str(tmp_path / "runs"), True)
    run.write_text("q13 d13 1 2.5\n")
    with pytest.raises(ConfigError, match="4 columns, not 6"):
        check_data(walk(judged(tiny_beir(tmp_path / "set"), run)), str(tmp_path / "runs"), True)


def test_check_reads_the_files_that_a_run_reads(tmp_path):
    path = tiny_beir(tmp_path / "set")
    (path / "qrels" / "test.tsv").unlink()

    def check(*words):
        command = [
            sys.executable,
            "-m",
            "dagr_ray.cli.main",
            "check",
            "jobs/beir.py",
            f"data={path}",
            "volume=0",
            *words,
        ]
        return subprocess.run([*command, "--runs", str(tmp_path / "runs")], capture_output=True, text=True)

    refused = check()
    assert refused.returncode == 2 and "split 'test' is not in" in refused.stderr and "split=dev" in refused.stderr
    passed = check("split=dev")
    assert passed.returncode == 0 and "set (dev): 12 judged queries, 12 judgements" in passed.stdout
    with open(path / "corpus.jsonl", "a") as corpus:
        corpus.write("not JSON\n" * 3)
    broken = check("split=dev")
    assert broken.returncode == 2 and "line 61: broken-json" in broken.stderr and "Traceback" not in broken.stderr


@pytest.mark.parametrize("job", ["beir", "catalogue", "filters", "ladder", "mixture", "negatives", "refine"])
def test_a_job_evaluates_on_the_split_that_is_asked_for(tmp_path, job):
    made = load_job(f"jobs/{job}.py")
    given = {"data": str(tiny_beir(tmp_path / "set"))} | ({"generator": "crop"} if job in ("beir", "ladder") else {})
    card = made.stage(**given, split="dev")
    assert {each.split for each in card.evaluations} == {"dev"}
    splits = {(type(s).__name__, s.split) for s in walk(card) if hasattr(s, "split")}
    assert ("LeakScan", "dev") in splits and not any(split == "test" for _, split in splits)
    assert ("Exemplars", "dev") not in splits, "test queries were shown in prompts"
    assert made.stage(**given).fingerprint() == made.stage(**given, split="test").fingerprint()
