"""Paths and values as people type them: where they lead, which are one, which are refused and how."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy

from dagr_ray import report
from dagr_ray.cli import main, run
from dagr_ray.core import environment, paths
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.storage import filesystem
from dagr_ray.engines._vllm_arguments import check_arguments
from dagr_ray.engines.vllm import VLLM
from dagr_ray.recipes.evaluation import named_sets
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.human_labels import People
from dagr_ray.stages.sources import Beir, Parquet
from dagr_ray.stages.trec import TrecQrels, TrecRun
from dagr_ray.strategies.prefix import Prefix
from dagr_ray.study.job import load_job, parse_axes
from dagr_ray.study.mlflow_mirror import _sqlite
from dagr_ray.teachers.cross_encoder import CrossEncoder
from tests.conftest import tiny_beir
from tests.support.studies import made_study

ROOT = Path(__file__).parents[2]
ODD = [
    "my set", "it's", 'say "x"', "a,b", "a+b", "a#1", "a?x=1", "50%41", "a=b", "a*b[0]", "line\nend", "tab\tin", "-set", "~set",
    "ümlaut", "u\u0308mlaut", "हिन्दी", "ไทย", "中文", "عربي", "🎉", "a&b;c|d", "$HOME", "x" * 255, "é" * 120, "...", " lead", "a:b",
    "a\\b", "!x", "{y}", "a\u200bb", "a\u202eb",
]  # fmt: skip


def check(monkeypatch, *words: str) -> int:
    """``dagr check`` in this process; the exit code."""
    for name in environment.FOLDERS:
        if name in os.environ:
            monkeypatch.setenv(name, os.environ[name])
    args, late = main.parser().parse_known_args(["check", *words])
    args.values += late
    try:
        main.make_absolute(args)
        return run.check(args) or 0
    except Exception as error:
        return main._explain(error)


@pytest.mark.parametrize("name", ODD)
def test_a_folder_of_any_name_is_read_by_its_relative_path(name, tmp_path, monkeypatch, capsys) -> None:
    tiny_beir(tmp_path / name, docs=16)
    monkeypatch.chdir(tmp_path)
    job = str(ROOT / "jobs/beir.py")
    assert check(monkeypatch, job, f"data={name}", "volume=0", "--one", "--runs", f"runs {name}"[:200]) == 0
    assert "0 cached" in capsys.readouterr().out
    stage = load_job(job).stage(data=name, volume=0)
    data = stage.evaluations[0].data
    assert data.path == str(tmp_path / name)
    folder = data.folder(str(tmp_path / "runs"))
    assert Path(folder.path).parent == tmp_path / "runs"
    assert len(os.path.basename(folder.path).encode()) < 200


def test_one_content_is_one_data_set_by_any_path(tmp_path, monkeypatch) -> None:
    tiny_beir(tmp_path / "deep/er/set")
    (tmp_path / "link").symlink_to(tmp_path / "deep/er")
    (tmp_path / "other").symlink_to("deep/er/set")
    shutil.copytree(tmp_path / "deep/er/set", tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "deep")
    ways = ["er/set", "./er//set/", "er/../er/set", str(tmp_path / "deep/er/set"), "../link/set", "../link/../er/set",
            "../other", "../moved", f"file://{tmp_path}/deep/er/set"]  # fmt: skip
    found = [Beir(path=way) for way in ways]
    assert len({each.fingerprint() for each in found}) == 1
    assert all(os.path.isabs(each.path) for each in found)
    sets = named_sets(*found)
    assert list(sets) == ["set"]


def test_a_folder_keeps_its_place_if_its_data_are_renamed(tmp_path) -> None:
    tiny_beir(tmp_path / "before")
    runs = str(tmp_path / "runs")
    first = Beir(path=str(tmp_path / "before")).folder(runs)
    first.write_json("plan.json", {})
    os.rename(tmp_path / "before", tmp_path / "after")
    assert Beir(path=str(tmp_path / "after")).folder(runs).name == first.name


def test_two_folders_of_one_last_name_stay_two(tmp_path) -> None:
    for i, name in enumerate("abc"):
        tiny_beir(tmp_path / name / "set", docs=20 + i)
    sets = named_sets(*(Beir(path=str(tmp_path / name / "set")) for name in "abc"))
    assert list(sets) == ["set", "b_set", "c_set"]
    assert list(named_sets(Beir(path=str(tmp_path / "a/set")), f"{tmp_path}/b/set+{tmp_path}/c/set")) == list(sets)


def test_every_field_that_names_a_file_is_absolute(tmp_path, monkeypatch) -> None:
    for name in ("model", "org/name"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    named = [Beir(path="x").path, Parquet(path="x").path, TrecRun(path="x").path, TrecQrels(path="x").path]
    named += [*People(files=("x", "~/y")).files, str(Prefix(log="x").log), Encoder(model="model").model]
    named += [CrossEncoder(model="./none").model, VLLM(model="model", lora="x").model, Encoder(model="org/name").model]
    named += [str(VLLM(model="model", lora="~/x").lora)]
    assert all(each.startswith(f"{tmp_path}/") for each in named), named
    assert Encoder(model="org/other").model == "org/other"
    assert Beir(path="s3://bucket/set").path == "s3://bucket/set"


def test_what_a_worker_gets_leads_where_the_driver_stood(tmp_path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps([Artifact("runs", "x"), Beir(path="set"), Encoder(model="./model")])
    monkeypatch.setenv("TMPDIR", "tmp")
    monkeypatch.setenv("DAGR_SCRATCH", "~/scratch")
    monkeypatch.setenv("HOME", "home")
    for name in ("RAY_TMPDIR", "HF_HOME", "DAGR_CACHE"):
        monkeypatch.delenv(name, raising=False)
    paths.make_environment_absolute()
    assert os.environ["TMPDIR"] == f"{tmp_path}/tmp"
    assert os.environ["HOME"] == f"{tmp_path}/home"
    assert os.environ["DAGR_SCRATCH"] == f"{tmp_path}/home/scratch"
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder, data, model = pickle.loads(sent)
    assert [folder.path, data.path, model.model] == [f"{tmp_path}/{each}" for each in ("runs/x", "set", "model")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data=set/corpus.jsonl"], "set/corpus.jsonl"),
        (["data=none"], "none"),
        (["data=dangling"], "dangling"),
        (["data=loop"], "loop"),
        (["data=s3://bucket/my set"], "%20"),
        (["data=nothing://x/y"], "nothing://x/y"),
        (["data="], "data"),
        (["data=" + "x" * 300], "x" * 40),
        (["data=" + "y/" * 2200], "y/y"),
        (["data=bad\udcff"], "unicode"),
        (["data=file://other/set"], "another machine"),
        (["data=set", "--runs", ""], "empty path"),
        (["data=set", "--placement", "set"], "placement"),
        (["data=set", "--placement", ""], "placement"),
        (["data=set", "volume=1,000"], "write 1000"),
        (["data=set", "volume=0,1,024"], "separators or leading zeros"),
        (["data=set", "volume=8", "volume=16"], "volume=8,16"),
        (["data=set", "volume=8,8"], "'8' twice"),
        (["data=set", "lr=1e-5,0.00001"], "same as '1e-5'"),
        (["data=set,./set"], "twice"),
        (["data=set,other"], "same as 'set'"),
        (["data=set", "volume=08"], "leading zeros"),
        (["data=set", "volume=1.000"], "whole number"),
        (["data=set", "volume=1k"], "volume = '1k'"),
        (["data=set", "volume=8,"], "volume = ''"),
        (["data=set", "volume==8"], "volume = '=8'"),
        (["data=set", "Volume=8"], "no parameter 'Volume'"),
    ],
)
def test_a_wrong_path_or_value_ends_in_one_line(words, said, tmp_path, monkeypatch, capsys) -> None:
    tiny_beir(tmp_path / "set", docs=16)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "other").symlink_to("set")
    monkeypatch.chdir(tmp_path)
    more = [] if any(word.startswith("volume") for word in words) else ["volume=0"]
    more += [] if "--runs" in words else ["--runs", "runs"]
    assert check(monkeypatch, str(ROOT / "jobs/beir.py"), "generator=crop", *words, *more) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("dagr: error: ") and said in last
    assert "Traceback" not in last


def test_underscores_in_numbers_and_commas_in_paths(tmp_path, monkeypatch) -> None:
    job = load_job(str(ROOT / "jobs/beir.py"))
    assert parse_axes(job, ["volume=1_000,2000"], sweep=True)["volume"] == [1000, 2000]
    for name in ("a,b", "c"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_axes(job, ["data=a,b,c"], sweep=True)["data"] == [f"{tmp_path}/a,b", f"{tmp_path}/c"]
    assert paths.split_values("a,b+c", "+") == ("a,b", "c")


def test_a_job_imports_what_lies_beside_it(tmp_path) -> None:
    for place, samples in (("one", 2), ("two", 3)):
        (tmp_path / place / "parts").mkdir(parents=True)
        (tmp_path / place / "my_helper.py").write_text(f"from my_parts import N\nSAMPLES = N + {samples}\n")
        (tmp_path / place / "my_parts.py").write_text("N = 0\n")
        (tmp_path / place / "job.py").write_text(
            "import my_helper\nfrom dagr_ray.stages.sources import PyDocs, Sample\n"
            "def job():\n    return Sample(corpus=PyDocs(), n=my_helper.SAMPLES)\n"
        )
        assert load_job(str(tmp_path / place / "job.py")).stage().n == samples
    assert sys.path[0] != str(tmp_path / "two")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import my_promts", "'my_promts', which is neither installed nor a file in the job's folder"),
        ("from . import x", "correct the job file"),
        ("x = 1 / 0", "line 1: ZeroDivisionError"),
        ("import nothing_of.inner", "'nothing_of'"),
    ],
)
def test_a_job_that_cannot_be_loaded_names_no_strangers_package(text, said, tmp_path) -> None:
    (tmp_path / "job.py").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_job(str(tmp_path / "job.py"))
    assert said in str(refused.value)
    assert "pip" not in str(refused.value)


def test_a_store_of_mlflow_lies_below_any_name(tmp_path) -> None:
    for name in ("a#1?x", "50%41", "plain in", "ती🎉"):
        (tmp_path / name).mkdir()
        sqlalchemy.create_engine(_sqlite(str(tmp_path / name / "mlflow.db"))).connect().close()
        assert (tmp_path / name / "mlflow.db").is_file()


def test_an_address_with_a_space_is_quoted_as_it_was_typed() -> None:
    with pytest.raises(ConfigError, match="write a space as %20") as caught:
        filesystem("s3://bucket/my runs")
    assert "allow_delayed_open" not in str(caught.value)


def test_renamed_data_are_one_set_in_the_report(tmp_path) -> None:
    runs, study = made_study(tmp_path, {"in": [0.1, 0.2, 0.3]}, {8: {"in": [0.2, 0.3, 0.4]}})
    folder = Artifact(runs, study)
    value = folder.read_json("study.json")
    arm = next(trial for trial in value["trials"] if trial["kind"] == "augmented")
    arm["judged"][0]["data"], data = "another", arm["judged"][0]["data"]
    folder.write_json("study.json", value)
    assert len(report.summarise(runs, study)["sets"]) == 2
    arm["judged"][0]["data"] = data
    folder.write_json("study.json", value)
    assert len(report.summarise(runs, study)["sets"]) == 1


def test_an_address_is_an_address_and_a_path_a_path() -> None:
    assert filesystem("/a/b://c")[1] == "/a/b:/c"
    assert paths.last_name("/sets/a?b") == "a?b" and paths.last_name("s3://b/set?region=x") == "set"


@pytest.mark.cluster
def test_a_study_runs_from_another_folder_with_relative_paths(tmp_path) -> None:
    """Data, job and the default runs folder are relative and have a space; then the data move, and are the same."""
    tiny_beir(tmp_path / "my set", docs=32)
    (tmp_path / "the jobs").mkdir()
    text = (ROOT / "jobs/beir.py").read_text().replace("def beir(", "def mine(").replace(" = Take(", " = MyTake(")
    (tmp_path / "the jobs/mine.py").write_text(f"{text}\n\nfrom my_stage import MyTake\n")
    stage = "from dagr_ray.stages.take import Take\n\nclass MyTake(Take):\n    abstract = False\n"
    (tmp_path / "the jobs/my_stage.py").write_text(stage.replace("abstract =", "abstract: ClassVar[bool] =").replace(
        "from dagr", "from typing import ClassVar\nfrom dagr", 1
    ))  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "DAGR_RUNS")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    words = [
        sys.executable,
        "-m",
        "dagr_ray.cli.main",
        "study",
        "the jobs/mine.py",
        "generator=crop",
        "--no-track",
        "--quiet",
    ]
    words += ["passages=16", "max_rank=50", "data=my set"]
    for volume, moved in (("volume=0,8", False), ("volume=0", True)):
        if moved:
            os.rename(tmp_path / "my set", tmp_path / "moved")
            words[-1] = f"data={tmp_path}/moved"
        done = subprocess.run([*words, volume], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "runs").glob("beir-*"))) == 1
    assert len(list((tmp_path / "runs").glob("train-*"))) == 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"download_dir": "weights"}, "download_dir"),
        ({"hf_config_path": "./model"}, "hf_config_path"),
        ({"speculative_config": {"model": "./draft", "num_speculative_tokens": 3}}, "speculative_config.model"),
        ({"speculative_config": {"model": "~/draft"}}, "speculative_config.model"),
        ({"compilation_config": {"cache_dir": "../cache"}}, "compilation_config.cache_dir"),
        ({"logits_processors": ["./mine.py"]}, "logits_processors"),
    ],
)
def test_a_relative_path_in_engine_args_is_refused(given, named) -> None:
    for placement in (True, False):
        with pytest.raises(ConfigError, match="is relative") as refused:
            check_arguments(given, placement=placement)
        assert named in str(refused.value) and "\n" not in str(refused.value)
