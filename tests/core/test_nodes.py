"""A cluster of three nodes, all on this machine: every one works, one is taken away in the middle and another comes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from tests.conftest import tiny_beir
from tests.support.slow_engine import SlowCrop

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
DOCS = 1500
# A driver that joins the cluster of RAY_ADDRESS, as `dagr run` does: `python -c DRIVER data runs`.
DRIVER = """
import sys
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.ray_start import connect
from dagr_ray.core.build import materialize
from tests.core.test_nodes import parsed

data, runs = sys.argv[1:]
connect()
materialize(parsed(data), runs, Placement(generate=Pool(workers=3, cpus=1, shard_rows=10)))
"""


def parsed(data: str) -> Parse:
    corpus = Beir(path=data)
    engine = SlowCrop(pause_s=0.02)
    return Parse(generations=Generate(corpus=corpus, strategy=Crop(), engine=engine, samples=2), corpus=corpus)


@contextlib.contextmanager
def three_nodes() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    # a node is given up after 3 s without an answer, not after 30
    health = {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 3,
    }
    size = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1"}
    head = {**size, "include_dashboard": False, "_system_config": health}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.size = size
    try:
        for _ in range(2):
            made.add_node(**size)
        yield made
    finally:
        for node in made.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def at_work(folder: Artifact) -> dict[str, list[int]]:
    """Node -> the shards whose receipts name it."""
    found: dict[str, list[int]] = {}
    for shard, receipt in folder.receipts().items():
        found.setdefault(receipt["on"], []).append(shard)
    return found


def wait_for(condition: Any, driver: subprocess.Popen[str], what: str) -> None:
    until = time.monotonic() + 90
    while not condition():
        assert driver.poll() is None, f"the driver ended with {driver.returncode} before {what}"
        assert time.monotonic() < until, f"not in 90 s: {what}"
        time.sleep(0.2)


@contextlib.contextmanager
def joined(cluster: Any, code: str, words: Sequence[str], errors: Path) -> Iterator[subprocess.Popen[str]]:
    """A driver of the cluster, ``python -c code words``; what it says goes to ``errors``."""
    # the second: an address on localhost is taken as it is, as on other systems than Linux
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    environment["PYTHONPATH"] = str(ROOT)
    with open(errors, "w") as out:
        driver = subprocess.Popen(
            [sys.executable, "-c", code, *words], cwd=ROOT, env=environment, stdout=out, stderr=out, text=True
        )
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def by_itself(target: Callable[..., None], *args: Any) -> None:
    """Calls it in a process of its own: one that has made a cluster ends a minute after the cluster has."""
    alone = multiprocessing.get_context("spawn").Process(target=target, args=args)
    alone.start()
    alone.join()
    assert alone.exitcode == 0


def test_a_node_goes_and_another_comes(tmp_path: Path) -> None:
    by_itself(a_node_goes_and_another_comes, tmp_path)


def a_node_goes_and_another_comes(tmp_path: Path) -> None:
    data = str(tiny_beir(tmp_path / "set", docs=DOCS))
    stage = parsed(data)
    folder = stage.generations.folder(str(tmp_path / "spread"))
    with three_nodes() as cluster:
        words, errors = (data, str(tmp_path / "spread")), tmp_path / "errors"
        with joined(cluster, DRIVER, words, errors) as driver:
            wait_for(lambda: len(at_work(folder)) == 3, driver, "all three nodes had worked")
            three = {node.node_id for node in cluster.list_all_nodes()}
            assert set(at_work(folder)) == three
            gone = sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0]
            cluster.remove_node(gone, allow_graceful=False)
            before = at_work(folder)[gone.node_id]
            come = cluster.add_node(**cluster.size)
            wait_for(lambda: come.node_id in at_work(folder), driver, "the new node had worked")
            assert driver.wait(timeout=120) == 0, errors.read_text()[-2000:]

    worked = at_work(folder)
    assert set(worked) == {*three, come.node_id}
    # a receipt may have been on its way when its node was looked at
    assert len(worked[gone.node_id]) <= len(before) + 2
    assert folder.damaged(deep=True) == {}
    here = Placement(generate=Pool(workers=0, shard_rows=DOCS))
    quick = stage.model_copy(
        update={"generations": stage.generations.model_copy(update={"engine": SlowCrop(pause_s=0)})}
    )
    alone = materialize(quick, str(tmp_path / "alone"), here)
    for table in ("queries", "qrels", "lineage", "rejected"):
        spread = stage.folder(str(tmp_path / "spread")).read(table)
        assert spread.combine_chunks().equals(alone.read(table).combine_chunks()), table
    ids = folder.read("generations")["gen_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 2 * DOCS
    assert ids == Artifact(alone.runs, folder.name).read("generations")["gen_id"].to_pylist()
