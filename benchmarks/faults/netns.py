"""Three machines in network namespaces: separate `ray start`, one cable pulled in the middle, one machine added.

    sudo python -m benchmarks.faults.netns [--passages 4000]

Each machine has its own network (a namespace with one end of a veth pair; the bridge lies inside the head's namespace,
so nothing of the host's network is touched) and shares the disk. Pulling the cable is worse than killing a node: its
worker lives on, and goes on writing to the shared disk, while its shards are done again elsewhere. Needs root and `ip`.
Prints and writes benchmarks/faults/netns.md, and exits 1 where a row is lost, there twice or damaged, or a node did not work.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from benchmarks.faults.slow_engine import selected
from benchmarks.harness import ROOT, Benchmark
from benchmarks.harness.collections import numbered
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool

NET, PORT = "10.77.0", 6399
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
# what `ray start` asks of everyone who joins
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
RAY = str(Path(sys.executable).parent / "ray")


def ip(*words: str) -> None:
    """Runs `ip`; raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Machine:
    """A namespace with an address, and what runs in it."""

    def __init__(self, number: int) -> None:
        self.number, self.name, self.address = number, f"dagr-{os.getpid()}-{number}", f"{NET}.{number}"
        self.processes: list[subprocess.Popen[bytes]] = []
        ip("netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    def ip(self, *words: str) -> None:
        """Runs `ip` inside."""
        ip("-n", self.name, *words)

    def plug(self, head: Machine) -> None:
        """Lays a cable to the head's bridge; the head plugs into itself by making the bridge."""
        if head is self:
            self.ip("link", "add", "bridge", "type", "bridge")
            self.ip("addr", "add", f"{self.address}/24", "dev", "bridge")
            self.ip("link", "set", "bridge", "up")
            return
        port = f"port{self.number}"
        self.ip("link", "add", "eth0", "type", "veth", "peer", "name", port)
        self.ip("link", "set", port, "netns", head.name)
        head.ip("link", "set", port, "master", "bridge")
        head.ip("link", "set", port, "up")
        self.ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("link", "set", "eth0", "up")

    def run(self, words: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a program inside."""
        with open(log, "ab") as out:
            started = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *words],
                stdout=out, stderr=out, cwd=ROOT, start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | TOKEN | environment,
            )  # fmt: skip
        self.processes.append(started)
        return started

    def start_ray(self, head: Machine, logs: Path) -> None:
        """`ray start --block`, a node of one CPU. Comes back when it runs."""
        words = [RAY, "start", "--block", "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
        words += [f"--node-ip-address={self.address}"]
        if head is self:
            words += ["--head", f"--port={PORT}", "--include-dashboard=false", f"--system-config={json.dumps(HEALTH)}"]
        else:
            words += [f"--address={head.address}:{PORT}"]
        log = logs / f"ray-{self.number}.log"
        started = self.run(words, log)
        wait_for(lambda: "runtime started" in log.read_text(), f"machine {self.number} joins", started)

    def remove(self) -> None:
        """Ends every process in the namespace and takes it away."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for process in self.processes:
            process.wait()
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)


@contextlib.contextmanager
def machines() -> Iterator[Callable[[], Machine]]:
    """A function that makes one more machine, on one network with those before; all are gone at the end."""
    made: list[Machine] = []

    def more() -> Machine:
        machine = Machine(len(made) + 1)
        made.append(machine)
        machine.plug(made[0])
        return machine

    try:
        yield more
    finally:
        for machine in reversed(made):
            machine.remove()


def wait_for(condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes]) -> float:
    """Seconds until it holds. Raises AssertionError after 120 of them, and where the process ended."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 120, f"not within 120 s: {what}"
        assert process.poll() is None, f"its process ended before: {what}"
        time.sleep(0.1)
    return time.monotonic() - began


def receipts_of(runs: Path) -> dict[int, dict]:
    """The receipts of the generation in a runs folder."""
    return next((Artifact(str(runs), p.name).receipts() for p in runs.glob("generate-*")), {})


def nodes_of(runs: Path) -> Counter[str]:
    """Receipts by node."""
    return Counter(receipt["on"] for receipt in receipts_of(runs).values())


def scenario(home: Path, passages: int) -> dict:
    """Runs it all; returns what was seen."""
    data, runs, log = numbered(home / "set", passages), home / "spread", home / "log"
    (home / "placement.toml").write_text("[generate]\nworkers = 3\ncpus = 1\nshard_rows = 10\n")
    command = [
        sys.executable,
        "-m",
        "dagr_ray.cli.main",
        "run",
        "benchmarks/faults/slow_engine.py",
        f"data={data}",
        f"log={log}",
    ]
    command += ["--quiet", f"--runs={runs}", f"--placement={home / 'placement.toml'}"]
    with machines() as more:
        head = more()
        head.start_ray(head, home)
        others = [more(), more()]
        for machine in others:
            machine.start_ray(head, home)
        driver = head.run(command, home / "driver.log", RAY_ADDRESS=f"{head.address}:{PORT}")
        wait_for(lambda: len(nodes_of(runs)) == 3, "three nodes at work", driver)
        before = set(nodes_of(runs))

        cut = others[0]
        at_cut = set(receipts_of(runs))
        pulled = time.time()
        head.ip("link", "set", f"port{cut.number}", "down")
        new = more()
        new.start_ray(head, home)
        replaced = wait_for(lambda: len(set(nodes_of(runs)) - before) == 1, "the new node at work", driver)
        head.ip("link", "set", f"port{cut.number}", "up")
        assert driver.wait(timeout=300) == 0, "the driver failed"

    by_node = nodes_of(runs)
    found = {"nodes": len(by_node), "shards": sum(by_node.values()), "new_node_after_s": round(replaced, 1)}
    late = {n: r for n, r in receipts_of(runs).items() if n not in at_cut and r["at"] > pulled + 1}
    lost_node = Counter(r["on"] for r in late.values())
    found["shards_by_the_cut_node_after_it_was_cut"] = min((lost_node.get(n, 0) for n in before), default=0)
    generate = next(Artifact(str(runs), p.name) for p in runs.glob("generate-*"))
    found["receipts_that_came_second"] = len(generate.revoked())
    return found | compare(home, runs, home / "alone")


def compare(home: Path, runs: Path, alone: Path) -> dict[str, int]:
    """Rows lost and twice, and damaged folders, beside the same stages in one process."""
    stage = selected(str(home / "set"), str(home / "log"), pause_s=0)
    materialize(stage, str(alone), Placement(generate=Pool(workers=0, shard_rows=10**6)))
    found = Counter(rows=0, lost=0, twice=0, damaged=0)
    for folder in (path for kind in ("generate", "parse", "select") for path in runs.glob(f"{kind}-*")):
        spread, calm = Artifact(str(runs), folder.name), Artifact(str(alone), folder.name)
        found["damaged"] += len(spread.damaged(deep=True))
        for table in calm.table_names():
            rows, expected = (rows_of(artifact.read(table)) for artifact in (spread, calm))
            found["rows"] += sum(rows.values())
            found["lost"] += sum((expected - rows).values())
            found["twice"] += sum((rows - expected).values())
    return dict(found)


def rows_of(table: pa.Table) -> Counter[str]:
    """How often each row is there."""
    return Counter(json.dumps(row, sort_keys=True) for row in table.to_pylist())


def main() -> int:
    """Runs the scenario and prints its table."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--passages", type=int, default=4000)
    args = bench.parse()
    if os.geteuid() != 0:
        print("netns: needs root, for `ip netns add`", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="dagr-netns-") as home:
        try:
            found = scenario(Path(home), args.passages)
        except AssertionError as failed:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted(Path(home).glob("*.log")))
            print(f"netns: {failed}\n{logs}", file=sys.stderr)
            return 1
    bounds = {"nodes": "4 worked", "lost": "0", "twice": "0", "damaged": "0"}
    rows = [[name.replace("_", " "), value, bounds.get(name, "")] for name, value in found.items()]
    bench.table(["what", "seen", "bound"], rows, left=(0, 2))
    for name in ("lost", "twice", "damaged"):
        bench.bound(name, found[name], at_most=0)
    bench.bound("nodes that worked", found["nodes"], at_least=4, at_most=4)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
