"""Faults at random moments of a generation on a three-node cluster, and what is lost, twice and paid for in the end.

    python -m benchmarks.faults.chaos [--kills 40] [--seed 0] [--arms ours,ray] [--json FILE]

A pass generates from a few thousand passages (an engine without a model, with a child process and a log of all that it
was asked), parses and filters; as soon as it is complete the next one begins, until the faults are used up. Then every
table is compared with that of an undisturbed run. The arm ``ray`` is the same generation, fan-out and filter as a Ray
Data pipeline with CheckpointConfig, under the same faults; it has no checksums, so nothing mends its parts. Writes
benchmarks/faults/chaos.md. Exits 1 where a row of ours is lost, twice or different, or more was spent than 1.05 of one pass
plus one shard per fault and worker.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.nodes import Nodes
from benchmarks.harness import ROOT, Benchmark

WORKERS, SHARD_ROWS, SAMPLES, PAUSE_S = 2, 20, 2, 0.02
PLACEMENT = f"""[generate]
workers = {WORKERS}
cpus = 1
shard_rows = {SHARD_ROWS}
in_flight = 2
"""


def write_set(folder: Path, passages: int) -> None:
    """A BEIR folder of short passages; every seventh sentence comes twice, so that filters have work."""
    (folder / "qrels").mkdir(parents=True)
    words = "amber birch cedar dune ember fjord grove heath islet jetty knoll lagoon marsh oasis pond reef".split()
    drawn = random.Random(1)
    with open(folder / "corpus.jsonl", "w") as corpus:
        for i in range(passages):
            text = " ".join(" ".join(drawn.choices(words, k=drawn.randint(5, 14))).capitalize() + "." for _ in range(3))
            if i % 7 == 0:
                text = "The same sentence stands in many of the passages here today."
            corpus.write(json.dumps({"_id": f"d{i}", "title": "", "text": text}) + "\n")
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q0", "text": "amber"}) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")


class Arm(ABC):
    """A program that can be started again and again until it is done."""

    def __init__(self, home: Path, data: Path) -> None:
        self.home, self.data, self.log = home, data, home.parent / f"{home.name}.log"
        self.log.write_text("")
        self.number = 0
        self.ends: Counter[str] = Counter()

    @abstractmethod
    def words(self) -> list[str]:
        """The command."""

    @abstractmethod
    def parts(self) -> list[Path]:
        """Files of data that are finished."""

    @abstractmethod
    def mend(self) -> bool:
        """Takes back what the disk did to parts; false where nothing can."""

    @abstractmethod
    def compare(self, passes: int) -> dict[str, Any]:
        """Rows lost, twice and different over all tables of all passes, beside an undisturbed run."""

    def start(self, nodes: Nodes) -> subprocess.Popen[str]:
        env = os.environ | {"RAY_ADDRESS": nodes.cluster.address, "PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"}
        env["RAY_gcs_rpc_server_reconnect_timeout_s"] = "15"  # how long a driver waits for a head that is gone
        with open(self.home.parent / f"{self.home.name}.err", "a") as errors:
            return subprocess.Popen(
                self.words(), cwd=ROOT, env=env, stdout=errors, stderr=errors, text=True, start_new_session=True
            )

    def spent(self) -> int:
        return sum(int(line) for line in self.log.read_text().split())


class Ours(Arm):
    name = "DAGR-Ray"
    job = ROOT / "benchmarks" / "faults" / "slow_engine.py"

    def words(self) -> list[str]:
        placement = self.home.parent / "placement.toml"
        placement.write_text(PLACEMENT)
        words = [
            f"data={self.data}",
            f"log={self.log}",
            f"seed={self.number}",
            f"samples={SAMPLES}",
            f"pause_s={PAUSE_S}",
        ]
        more = ["--runs", str(self.home), "--placement", str(placement)]
        return [sys.executable, "-m", "dagr_ray.cli.main", "run", str(self.job), *words, *more]

    def parts(self) -> list[Path]:
        return sorted(self.home.glob("generate-*/generations/part-*.parquet"))

    def mend(self) -> bool:
        """What the disk did to parts is found by `dagr check --deep`, which takes the damaged shards back."""
        words = [*self.words(), "--deep"]
        words[words.index("run")] = "check"
        subprocess.run(words, cwd=ROOT, capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
        return True

    def compare(self, passes: int) -> dict[str, Any]:
        from benchmarks.faults.slow_engine import selected
        from dagr_ray.core.build import materialize
        from dagr_ray.core.placement import Placement, Pool
        from dagr_ray.core.stage import walk

        found: dict[str, Any] = {"lost": 0, "twice": 0, "different": 0, "rows": 0, "other_bytes": 0, "one_pass": 0}
        calm_log = self.home.parent / "calm.log"
        for number in range(passes):
            stage = selected(str(self.data), str(calm_log), number, SAMPLES, 0.0)
            calm_log.write_text("")
            placement = Placement(generate=Pool(workers=0, shard_rows=SHARD_ROWS))
            materialize(stage, str(self.home.parent / "calm"), placement)
            found["one_pass"] += sum(int(line) for line in calm_log.read_text().split())
            for each in walk(stage):
                ours, calm = (each.folder(str(self.home.parent / name)) for name in (self.home.name, "calm"))
                for table in calm.table_names():
                    key = calm.read(table).column_names[0]
                    wanted, made = (Counter(f.read(table)[key].to_pylist()) for f in (calm, ours))
                    found["rows"] += wanted.total()
                    found["lost"] += (wanted - made).total()
                    found["twice"] += (made - wanted).total()
                    found["different"] += not ours.read(table).equals(calm.read(table))
                parts = [
                    {p["file"]: p["sha256"] for t in (f.manifest or {})["tables"].values() for p in t["parts"]}
                    for f in (ours, calm)
                ]
                found["other_bytes"] += parts[0] != parts[1]
        return found


class RayCheckpoints(Arm):
    """The same generation, fan-out and filter with Ray Data's own checkpoints."""

    name = "Ray Data CheckpointConfig"

    def words(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            "benchmarks.faults.chaos_peer",
            *map(str, (self.data, self.home, self.log, self.number)),
        ]

    def parts(self) -> list[Path]:
        return sorted(self.home.glob("out-*/*.parquet"))

    def mend(self) -> bool:
        """It has no checksums of its own."""
        return False

    def compare(self, passes: int) -> dict[str, Any]:
        from benchmarks.faults.chaos_peer import calm, made

        found: dict[str, Any] = {"lost": 0, "twice": 0, "different": 0, "rows": 0, "other_bytes": 0, "one_pass": 0}
        for number in range(passes):
            wanted, spent = calm(self.data, number)
            rows = made(self.home, number)
            there = Counter(each for each, _ in rows)
            found["rows"] += len(wanted)
            found["lost"] += len(wanted.keys() - there.keys())
            found["twice"] += sum(count - (each in wanted) for each, count in there.items())
            found["different"] += sum(wanted.get(each, query) != query for each, query in rows)
            found["one_pass"] += spent
        return found


class Chaos:
    """One arm under faults."""

    def __init__(self, arm: Arm, rng: random.Random, kinds: list[str], full_disk: Path | None) -> None:
        self.arm, self.rng, self.kinds, self.full_disk = arm, rng, kinds, full_disk
        self.done: Counter[str] = Counter()
        self.nodes = Nodes()
        self.driver = arm.start(self.nodes)

    def run(self, kills: int, limit_s: float) -> dict[str, Any]:
        began = time.time()
        order = (self.kinds * kills)[:kills]
        self.rng.shuffle(order)
        for kind in order:
            for _ in range(3):  # at times there is nothing to strike: the work has just ended, or not begun
                self._wait()
                struck = getattr(self, f"_{kind}")() is not False
                self._revive()
                if struck:
                    self.done[kind] += 1
                    break
        finished, last = self._finish(limit_s), self.arm.number
        for number in range(last + 1):  # damage may have come to a pass that was complete
            self.arm.number = number
            if self.arm.mend():
                self.driver = self.arm.start(self.nodes)
                finished &= self._finish(limit_s)
        self.nodes.stop()
        return {"seconds": time.time() - began, "finished": finished, "faults": dict(self.done)}

    def _wait(self) -> None:
        """Until there is something to disturb: mostly into the middle of the work, at times while it starts."""
        before, until = self.arm.log.stat().st_size, time.time() + 60
        while self.rng.random() < 0.95 and time.time() < until and self.driver.poll() is None:
            time.sleep(0.2)
            if self.arm.log.stat().st_size > before:
                break
        time.sleep(self.rng.uniform(0, 1.5))

    def _revive(self) -> None:
        """Cluster and driver are there again, as an operator or a job controller sees to; a finished pass is followed."""
        self.nodes.mend()
        code = self.driver.poll()
        if code is None:
            return
        self.arm.ends[str(code)] += 1
        if code == 0 and self._complete():
            self.arm.number += 1
        self.driver = self.arm.start(self.nodes)

    def _complete(self) -> bool:
        tail = (self.arm.home.parent / f"{self.arm.home.name}.err").read_text()[-300:]
        return "Resume with" not in tail

    def _finish(self, limit_s: float) -> bool:
        for _ in range(8):
            try:
                code = self.driver.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                self._kill(self.driver.pid)
                self.arm.ends["no end"] += 1
                return False
            self.arm.ends[str(code)] += 1
            if code == 0 and self._complete():
                return True
            self.nodes.mend()
            self.driver = self.arm.start(self.nodes)
        return False

    def _kill(self, pid: int) -> None:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.driver.wait()

    # -- the faults; False where there was nothing to do it to ------------------------------------------------------

    def _driver_killed(self) -> bool | None:
        if self.driver.poll() is not None:
            return False
        os.kill(self.driver.pid, signal.SIGKILL)
        self.driver.wait()
        return None

    def _driver_told_to_stop(self) -> bool | None:
        if self.driver.poll() is not None:
            return False
        os.kill(self.driver.pid, signal.SIGTERM)
        try:
            self.driver.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.arm.ends["deaf to SIGTERM"] += 1
            self._kill(self.driver.pid)
        return None

    def _signalled(self, text: str, number: int) -> psutil.Process | None:
        found, until = self.nodes.processes(text), time.time() + 20
        while not found and time.time() < until and self.driver.poll() is None:
            time.sleep(0.3)
            found = self.nodes.processes(text)
        if not found:
            return None
        victim = self.rng.choice(found)
        try:
            victim.send_signal(number)
        except psutil.NoSuchProcess:
            return None
        return victim

    def _actor_killed(self) -> bool | None:
        return None if self._signalled("ray::MapWorker", signal.SIGKILL) else False

    def _engine_killed(self) -> bool | None:
        return None if self._signalled("time.sleep(float(line))", signal.SIGKILL) else False

    def _actor_stopped(self) -> bool | None:
        victim = self._signalled("ray::MapWorker", signal.SIGSTOP)
        if victim is None:
            return False
        time.sleep(4)
        if victim.is_running():
            victim.send_signal(signal.SIGCONT)
        return None

    def _raylet_killed(self) -> None:
        self.nodes.raylet(self.rng).kill()

    def _raylet_stopped(self) -> None:
        process = self.nodes.raylet(self.rng)
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)  # over the health check: the node is dead to the others, and does not know it
        process.send_signal(signal.SIGCONT)

    def _head_killed(self) -> None:
        self.nodes.kill_head()
        try:
            self.driver.wait(timeout=100)  # Ray waits a minute for its head to come back
        except subprocess.TimeoutExpired:
            self.arm.ends["no end after its head"] += 1
            self._kill(self.driver.pid)

    def _node_removed(self) -> None:
        self.nodes.remove(self.rng)

    def _node_added(self) -> None:
        self.nodes.add()

    def _second_driver(self) -> None:
        other = self.arm.start(self.nodes)
        time.sleep(self.rng.uniform(4, 8))
        if other.poll() is None:
            os.killpg(other.pid, signal.SIGKILL)
            other.wait()

    def _disk_full(self) -> bool | None:
        if self.full_disk is None:
            return False
        filler = self.full_disk / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 18))
            except OSError:
                pass
        time.sleep(self.rng.uniform(1, 3))
        filler.unlink()
        return None

    def _part_truncated(self) -> bool | None:
        return self._damage(lambda data: data[: len(data) // 2])

    def _part_flipped(self) -> bool | None:
        def flip(data: bytes) -> bytes:
            place = self.rng.randrange(len(data))
            return data[:place] + bytes([data[place] ^ (1 << self.rng.randrange(8))]) + data[place + 1 :]

        return self._damage(flip)

    def _damage(self, change: Callable[[bytes], bytes]) -> bool | None:
        until = time.time() + 20
        while not (parts := self.arm.parts()):
            if time.time() > until:
                return False
            time.sleep(0.3)
        victim = self.rng.choice(parts)
        victim.write_bytes(change(victim.read_bytes()))
        return None


KINDS = [
    name[1:]
    for name in vars(Chaos)
    if name[0] == "_"
    and name.split("_")[-1]
    in ("killed", "stop", "stopped", "removed", "added", "driver", "full", "truncated", "flipped")
]


def disk(folder: Path, mib: int) -> Iterator[Path | None]:
    """A small disk of its own at ``folder``, where this machine lets us mount one; None and a plain folder elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def largest_shard(data: Path) -> int:
    """The most words that a shard of the set has."""
    words = [len(json.loads(line)["text"].split()) for line in (data / "corpus.jsonl").open()]
    return max(sum(words[i : i + SHARD_ROWS]) for i in range(0, len(words), SHARD_ROWS))


def measure(
    arm_name: str, kills: int, seed: int, passages: int, kinds: list[str] | None = None, limit_s: float = 200
) -> dict[str, Any]:
    """One arm: faults, then the comparison and the bound on what was spent."""
    with tempfile.TemporaryDirectory() as home:
        data = Path(home, "set")
        write_set(data, passages)
        runs = Path(home, arm_name)
        for mounted in disk(runs, 400):
            arm = Ours(runs, data) if arm_name == "ours" else RayCheckpoints(runs, data)
            chaos = Chaos(arm, random.Random(seed), kinds or KINDS, mounted)
            try:
                report = chaos.run(kills, limit_s)
                report |= arm.compare(arm.number + 1)
            except BaseException:
                print((runs.parent / f"{runs.name}.err").read_text()[-4000:], file=sys.stderr)
                raise
            finally:
                if chaos.nodes.cluster is not None:
                    chaos.nodes.stop()
        hits = sum(report["faults"].values())
        report |= {"passes": arm.number + 1, "ends": dict(arm.ends), "spent": arm.spent()}
        report["bound"] = 1.05 * report["one_pass"] + hits * WORKERS * largest_shard(data)
        report["exact"] = not (report["lost"] or report["twice"] or report["different"] or report["other_bytes"])
        report["within"] = report["spent"] <= report["bound"]
        return report


def table(found: dict[str, Any]) -> str:
    """Markdown of the arms' reports."""
    head = ["", "faults", "passes", "rows", "lost", "twice", "tables (Ray: rows) that differ", "spent / one pass"]
    lines = [f"| {' | '.join([*head, 'bound', 'seconds', 'finished'])} |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"]
    for name, one in found.items():
        label = Ours.name if name == "ours" else RayCheckpoints.name
        lines.append(
            f"| {label} | {sum(one['faults'].values())} | {one['passes']} | {one['rows']:,} | {one['lost']:,} | {one['twice']:,} "
            f"| {one['different'] + one['other_bytes']} | {one['spent'] / one['one_pass']:.3f} "
            f"| {one['bound'] / one['one_pass']:.3f} | {one['seconds']:.0f} | {'yes' if one['finished'] else 'no'} |"
        )
    for name, one in found.items():
        kinds = ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in sorted(one["faults"].items()))
        lines += ["", f"Faults of {Ours.name if name == 'ours' else RayCheckpoints.name}: {kinds}."]
    return "\n".join(lines)


def main() -> int:
    """Runs the arms, prints and writes the table."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--kills", type=int, default=40)
    bench.add("--seed", type=int, default=0)
    bench.add("--passages", type=int, default=3000)
    bench.add("--arms", default="ours,ray")
    bench.add("--limit", type=float, default=200, help="seconds that the last start may take")
    bench.add("--kinds", help="only these faults, with commas between")
    bench.add(
        "--table", free=True, metavar="FILE", help="only write the table again, from a JSON file of an earlier run"
    )
    args = bench.parse()
    found = json.loads(Path(args.table).read_text()) if args.table else {}
    for name in [] if args.table else args.arms.split(","):
        kinds = args.kinds.split(",") if args.kinds else None
        found[name] = measure(name, args.kills, args.seed, args.passages, kinds, args.limit)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    bench.say(table(found))
    ours = found.get("ours", {})
    for what in ("exact", "within", "finished"):
        if ours and not ours[what]:
            bench.fail(f"{Ours.name} is not {what}")
    return bench.finish(found)


if __name__ == "__main__":
    sys.exit(main())
