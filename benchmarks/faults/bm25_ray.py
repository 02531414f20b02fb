"""Lucene and Ray in one process: rounds of indexing and searching in one actor, with faults. Does one crash the other?

    python -m benchmarks.faults.bm25_ray [--rounds 200]

Each round writes an index of 300 passages in two parts, opens it, and asks 60 queries; every answer must be that of the
first round. Before or during each there is a fault, in turn: a neighbour that runs Lucene too is killed (SIGKILL), Java
raises exceptions, another handler of SIGSEGV is installed, Java's memory is filled until it is refused and collected,
large objects go through Ray's store. The actor keeps Ray's own handler of SIGSEGV and is never restarted.
Bound: no crash, no other answer. Writes benchmarks/faults/bm25_ray.md.
"""

import contextlib
import faulthandler
import gc
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import ray  # noqa: TID253

from benchmarks.harness import Benchmark
from dagr_ray.core import tables
from dagr_ray.core.ray_start import connect
from dagr_ray.miners.bm25 import BM25, start_java
from dagr_ray.retrieval.vectors import Ranking

FAULTS = ("neighbour killed", "exceptions in Java", "handler of SIGSEGV", "memory of Java", "large objects")
WORDS = (
    "amber birch cedar dune ember fjord grove heath islet jetty knoll lagoon marsh naval otter pearl quill reef".split()
)


class Lucene:
    """An actor that indexes and searches."""

    def __init__(self) -> None:
        rng = random.Random(0)
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 40))) for _ in range(300)]
        rows = [{"doc_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
        self.parts = [tables.table("corpus", rows[:100]), tables.table("corpus", rows[100:])]
        self.queries = [" ".join(rng.sample(WORDS, 3)) for _ in range(60)]
        self.java = start_java()

    def pid(self) -> int:
        """Of the actor's process."""
        return os.getpid()

    def round(self, fault: str = "") -> list[Ranking]:
        """The hits of all queries in a new index."""
        {
            "exceptions in Java": self._exceptions,
            "handler of SIGSEGV": faulthandler.enable,
            "memory of Java": self._memory,
            "large objects": self._objects,
        }.get(fault, int)()
        with tempfile.TemporaryDirectory(prefix="dagr-bm25-") as home:
            for i, part in enumerate(self.parts):
                BM25().build([part], Path(home) / str(i))
            searcher = BM25().open(*(Path(home) / str(i) for i in range(len(self.parts))))
            return searcher.search(self.queries, 20)

    def _exceptions(self) -> None:
        raised = 0
        for _ in range(200):
            for wrong in (
                lambda: self.java("java.util.ArrayList")().get(3),
                lambda: self.java("java.util.TreeMap")().put(None, "a"),
                lambda: self.java("io.anserini.search.SimpleSearcher")("/there/is/no/index"),
            ):
                try:
                    wrong()
                except Exception:
                    raised += 1
        assert raised == 600

    def _memory(self) -> None:
        made: list[Any] = []
        with contextlib.suppress(Exception):  # an OutOfMemoryError of Java, sooner or later
            while len(made) < 100:
                made.append(self.java("java.nio.ByteBuffer").allocate(64 << 20))
        assert len(made) < 100
        del made
        gc.collect()
        self.java("java.lang.System").gc()

    def _objects(self) -> None:
        held = [ray.put(np.full(2_000_000, i)) for i in range(4)]
        assert [int(ray.get(each)[0]) for each in held] == [0, 1, 2, 3]


def rounds(count: int) -> tuple[Counter[str], int]:
    """Rounds survived by fault, and how many gave other answers. Raises where the actor dies."""
    env = {"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "0"}
    actor = ray.remote(Lucene).options(num_cpus=0, max_restarts=0, runtime_env={"env_vars": env})
    subject, neighbour = actor.remote(), actor.remote()
    expected = ray.get(subject.round.remote())
    survived: Counter[str] = Counter()
    others = 0
    for number in range(count):
        fault = FAULTS[number % len(FAULTS)]
        pid = ray.get(neighbour.pid.remote())
        running = subject.round.remote(fault)
        if fault == "neighbour killed":
            neighbour.round.remote()
            time.sleep(0.05)
            os.kill(pid, signal.SIGKILL)
            neighbour = actor.remote()
        others += ray.get(running) != expected
        survived[fault] += 1
    ray.kill(subject)
    return survived, others


def main() -> int:
    """Prints a line for each fault."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--rounds", type=int, default=200)
    args = bench.parse()
    connect()
    began = time.time()
    try:
        survived, others = rounds(args.rounds)
        crashed = ""
    except ray.exceptions.RayActorError as error:
        survived, others, crashed = Counter(), 0, str(error).split("\n")[0]
    bench.table(["fault", "rounds survived"], [[fault, survived[fault]] for fault in FAULTS])
    bench.say(f"\nCrashes: {crashed or 0}. Rounds with other answers: {others}. {time.time() - began:.0f} s.")
    if crashed:
        bench.fail(f"crashed: {crashed}")
    bench.bound("rounds with other answers", others, at_most=0)
    bench.bound("rounds survived", sum(survived.values()), at_least=args.rounds)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
