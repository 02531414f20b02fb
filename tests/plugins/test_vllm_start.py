"""An engine that cannot start ends the run with one message, through Ray as in a real run, and leaves no process."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.ray_start import connect
from dagr_ray.engines import Engine
from dagr_ray.engines.vllm import VLLM
from dagr_ray.quickstart.models import smollm2
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.promptagator import Promptagator
from tests.conftest import tiny_beir

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

RAY = Placement(generate=Pool(workers=1, shard_rows=8))


class DiesAtStart(Engine):
    """Its process is killed while it is opened, as for lack of memory."""

    abstract: ClassVar[bool] = True
    log: str = ""

    def open(self, pool):
        with open(self.log, "a") as file:
            file.write("opened\n")
        os.kill(os.getpid(), signal.SIGKILL)


def stage(tmp_path, engine):
    if not (tmp_path / "set").is_dir():
        tiny_beir(tmp_path / "set", 16)
    return Generate(corpus=Beir(path=str(tmp_path / "set")), strategy=Promptagator(), engine=engine)


def copy_of_the_model(tmp_path, **config):
    folder = tmp_path / "model"
    shutil.copytree(smollm2(), folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | config))
    return folder


def workers():
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie
            found += ["MapWorker"] * ("MapWorker" in " ".join(process.cmdline()))
    return found


def gone(seconds=30):
    deadline = time.monotonic() + seconds
    while workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not workers()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"architectures": ["NoSuchModel"], "model_type": "nosuch"},
            r"`nosuch` .*; vLLM does not support this model: take one",
        ),
        ({"num_hidden_layers": 31}, r"config\.json and the weights do not match: copy both from one model"),
    ],
)
def test_an_engine_that_cannot_start_names_cause_and_remedy(tmp_path, config, said):
    connect()
    folder = copy_of_the_model(tmp_path, **config)
    with pytest.raises(ConfigError, match=said) as caught:
        materialize(stage(tmp_path, VLLM(model=str(folder))), str(tmp_path / "runs"), RAY)
    assert "\n" not in str(caught.value) and "does not start" in str(caught.value)
    assert gone()


def test_truncated_weights_are_refused_before_the_start(tmp_path):
    connect()
    folder = copy_of_the_model(tmp_path)
    os.truncate(folder / "model.safetensors", 10**8)
    with pytest.raises(ConfigError, match="has 100000000 bytes, not .*; copy the model again"):
        materialize(stage(tmp_path, VLLM(model=str(folder))), str(tmp_path / "runs"), RAY)
    assert gone()


def test_workers_that_die_at_the_start_end_the_stage(tmp_path):
    connect()
    log = tmp_path / "opened"
    with pytest.raises(Exception, match="2 workers died while they opened the stage, most often for lack of memory"):
        materialize(stage(tmp_path, DiesAtStart(log=str(log))), str(tmp_path / "runs"), RAY)
    assert len(log.read_text().splitlines()) == 2
    assert gone()
    # the next run begins to count anew
    with pytest.raises(Exception, match="2 workers died"):
        materialize(stage(tmp_path, DiesAtStart(log=str(log))), str(tmp_path / "runs"), RAY)
    assert len(log.read_text().splitlines()) == 4


BESIDE_OTHERS = """
import tempfile
from pathlib import Path
import torch.distributed
from dagr_ray.core import tables
from dagr_ray.core.placement import Pool
from dagr_ray.engines import Sampling
from dagr_ray.engines.vllm import VLLM
from dagr_ray.miners.bm25 import BM25
from dagr_ray.quickstart.models import smollm2
from dagr_ray.strategies import Prompt

rows = [{"doc_id": f"d{i}", "title": "", "text": f"amber bridge number {i} near the lake"} for i in range(300)]

def search():
    with tempfile.TemporaryDirectory() as folder:
        BM25().build([tables.table("corpus", rows)], Path(folder, "index"))
        opened = BM25().open(Path(folder, "index"))
        return [opened.search([f"amber number {i}" for i in range(100)], 50) for _ in range(10)][-1]

def said():
    session = VLLM(model=str(smollm2()), max_model_len=512).open(Pool())
    return session.generate([Prompt("The ", "capital of France", " is")], [1], Sampling(max_tokens=4, temperature=0), 1)

found, before = search(), said()
assert all(search() == found for _ in range(6))
torch.distributed.destroy_process_group()
assert said()[0][0].raw == before[0][0].raw
"""


def test_an_engine_works_beside_lucene_and_after_a_training():
    """vLLM's start brings a handler of SIGSEGV, the signal that a Java machine works with; and its groups are torch's."""
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_OTHERS], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
