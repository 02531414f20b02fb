"""A Ray cluster of three nodes as processes of this machine, to take apart and mend."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import psutil

# A node whose raylet is silent for this long is dead to Ray.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """A head without CPUs and two nodes with two each, as processes of this machine."""

    def __init__(self) -> None:
        self.cluster: Any = None
        self.start()

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        if self.cluster is not None:
            self.stop()
        small = {"object_store_memory": 80 << 20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": HEALTH, **small})
        self.workers = [self.cluster.add_node(num_cpus=2, object_store_memory=80 << 20) for _ in range(2)]

    def stop(self) -> None:
        for node in self.cluster.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        self.cluster = None

    def add(self) -> None:
        self.workers.append(self.cluster.add_node(num_cpus=2, object_store_memory=80 << 20))

    def remove(self, rng: random.Random) -> None:
        node = self.workers.pop(rng.randrange(len(self.workers)))
        self.cluster.remove_node(node, allow_graceful=False)

    def raylet(self, rng: random.Random) -> Any:
        """The raylet of one of the two nodes."""
        return rng.choice(self.workers).all_processes["raylet"][0].process

    def kill_head(self) -> None:
        self.cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)

    def mend(self) -> None:
        """The number of nodes is as before, whatever was taken."""
        if not self.cluster.head_node.any_processes_alive():
            self.start()
            return
        for node in [n for n in self.workers if not n.live_processes()]:
            self.workers.remove(node)
        alive = [n for n in self.workers if any(name == "raylet" for name, _ in n.live_processes())]
        for node in [n for n in self.workers if n not in alive]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        self.workers = alive
        while len(self.workers) < 2:
            self.add()

    def processes(self, text: str) -> list[psutil.Process]:
        """Processes that these nodes started, whose command line holds ``text``."""
        found = []
        for node in self.cluster.list_all_nodes():
            for name, process in node.live_processes():
                if name != "raylet":
                    continue
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if text in " ".join(child.cmdline()):
                            found.append(child)
        return found
