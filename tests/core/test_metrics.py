"""Ray's metrics while a stage runs, read from a node's metrics port as Prometheus would."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import tiny_beir
from tests.support.endpoint import USAGE, reply, served

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.cluster

CODE = """
import sys, time
import ray
from dagr_ray.study import run as study
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.core.build import materialize
from dagr_ray.stages.sources import Beir
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.strategies.crop import Crop

home, port, url = sys.argv[1:]
ray.init(
    address="local", include_dashboard=False, num_cpus=2, num_gpus=3, resources={"accelerator_type:H200": 1},
    _metrics_export_port=int(port), log_to_driver=False,
    _system_config={"metrics_report_interval_ms": 500},
)
corpus, engine = Beir(path=f"{home}/set"), OpenAIServer(model="m", base_url=url)
stage = Generate(corpus=corpus, strategy=Crop(), engine=engine, samples=2)
pool = Pool(workers=1, cpus=1, shard_rows=5)
folder = materialize(Parse(generations=stage, corpus=corpus), f"{home}/runs", Placement(generate=pool))
print(stage.folder_name(), folder.name, study._device(), sep="\t", flush=True)
time.sleep(60)
"""


def half(body, nth):
    """Of the two samples of a passage one is no query."""
    choice = {"text": "when was it seen" if body["seed"] % 2 else "no", "finish_reason": "stop"}
    return lambda handler, body: reply(handler, 200, {"choices": [choice], "usage": USAGE})


@pytest.fixture
def metrics(tmp_path):
    """The page of metrics once it holds the last shard, and the names of a stage on Ray and of one in the driver."""
    tiny_beir(tmp_path / "set", docs=60)
    from tests.support.ray_head import free_ports

    [port] = free_ports(1)
    env = os.environ | {"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}
    with served(half) as server:
        words = [sys.executable, "-c", CODE, str(tmp_path), str(port), server.url]
        driver = subprocess.Popen(
            words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert driver.stdout is not None
            *names, device = driver.stdout.readline().strip().split("\t")
            assert len(names) == 2, "the stages did not end"
            assert device == "3 x H200"  # what a study records of its cluster
            page, until = "", time.time() + 30
            while time.time() < until and not re.search(r"dagr_rows_rejected\S*\{[^}]*\} 60", page):
                time.sleep(0.5)
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
            yield page, *names
        finally:
            driver.terminate()
            driver.wait(timeout=20)


def test_stage_metrics_are_on_the_port_of_their_node(metrics):
    page, name, parsed = metrics

    def value(metric: str, name: str = name, **tags: str) -> list[float]:
        lines = [line for line in page.splitlines() if re.match(rf"ray_{metric}(_total)?\{{", line)]
        wanted = [f'{key}="{tag}"' for key, tag in {"stage": name, **tags}.items()]
        return [float(line.rsplit(" ", 1)[1]) for line in lines if all(tag in line for tag in wanted)]

    assert value("dagr_rows") == [60.0]
    assert value("dagr_rows_accepted") == [120.0]
    assert value("dagr_shards_queued") == [0.0]
    assert value("dagr_shards_in_flight") == [0.0]
    [share] = value("dagr_busy_share")
    assert 0 < share <= 1
    for kind, tokens in (("prompt", 30), ("cached", 16), ("completion", 5)):
        assert value("dagr_tokens", kind=kind) == [120.0 * tokens]
    assert value("dagr_rows_rejected") == []
    assert value("dagr_rows", parsed) == [120.0]
    assert value("dagr_rows_accepted", parsed) == [60.0]
    assert value("dagr_rows_rejected", parsed, reason="parse/too-short") == [60.0]
    assert value("dagr_shards_queued", parsed) == [0.0]
