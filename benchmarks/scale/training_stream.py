"""Peak memory of a training by the size of its corpus: what it needs is fetched by id, and the corpus is never held.

    python -m benchmarks.scale.training_stream [--passages 10000000] [--examples 20000] [--runs DIR]

Trains for two steps on the same number of examples from a corpus of a tenth of the passages and from all of them, each in
a process of its own that is driver and worker at once; the passages are generated. Exits 1 where the peak grows by over
5 %. Writes benchmarks/scale/training_stream.md. With ``--runs`` the passages are kept and an interrupted run goes on.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from benchmarks.harness import Benchmark, in_own_process, peak_memory
from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage
from dagr_ray.quickstart import models
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.train import Train

BOUND = 1.05
SHARD = 131072
HERE = Placement(light=Pool(shard_rows=SHARD), train=Pool(workers=0))


class Generated(Stage):
    """``n`` passages of about 40 words each."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("corpus",)
    n: int

    def size(self, inputs):
        return self.n

    def open(self, inputs, folder, pool):
        words = np.array([f"word{i}" for i in range(5000)], dtype=object)

        def run(start: int, stop: int) -> Output:
            rng = np.random.default_rng(start)
            pieces = [" ".join(words[row]) for row in rng.integers(0, len(words), (4096, 20))]
            pairs = rng.integers(0, len(pieces), (stop - start, 2))
            texts = [f"{pieces[a]} {pieces[b]} {start + i}" for i, (a, b) in enumerate(pairs.tolist())]
            ids = pa.array([f"d{i:09}" for i in range(start, stop)], tables.TEXT)
            return Output({"corpus": tables.columns("corpus", stop - start, doc_id=ids, title="", text=texts)})

        return run


class Asked(Stage):
    """``n`` queries and examples over a corpus of ``passages``, four negatives each, from all over it."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("queries", "examples")
    n: int
    passages: int

    def open(self, inputs, folder, pool):
        def run(start: int, stop: int) -> Output:
            drawn = np.random.default_rng(0).choice(self.passages, (self.n, 5), replace=False).tolist()
            examples = [
                {"query_id": f"q{i}", "positive_id": f"d{row[0]:09}", "negative_ids": [f"d{d:09}" for d in row[1:]]}
                for i, row in enumerate(drawn)
            ]
            queries = [{"query_id": f"q{i}", "text": f"where is word{i % 5000}"} for i in range(self.n)]
            return Output({"queries": tables.table("queries", queries), "examples": tables.table("examples", examples)})

        return run


def child(passages: int, examples: int, runs: str) -> None:
    """Trains and prints seconds and peak memory in MiB."""
    asked, corpus = Asked(n=examples, passages=passages), Generated(n=passages)
    base = Encoder(model=str(models.minilm()), layers=1, max_length=32, dtype="float32")
    with tempfile.TemporaryDirectory() as fresh:
        for each in (asked, corpus):  # a training of its own each time, on the passages that are there
            materialize(each, runs, HERE)
            (Path(fresh) / each.folder_name()).symlink_to(Path(runs, each.folder_name()).resolve())
        started = time.time()
        stage = Train(examples=asked, queries=asked, corpus=corpus, base=base, steps=2, batch_size=8, max_length=32)
        materialize(stage, fresh, HERE)
    print(json.dumps({"seconds": time.time() - started, "mib": peak_memory() / 2**20}))


def main() -> int:
    """Prints the table and writes it."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--passages", type=int, default=10_000_000)
    bench.add("--examples", type=int, default=20_000)
    bench.add("--runs", free=True)
    bench.add("--child", type=int, help=argparse.SUPPRESS)
    args = bench.parse()
    if args.child:
        child(args.child, args.examples, args.runs)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        runs, found = args.runs or scratch, []
        for passages in (args.passages // 10, args.passages):
            # generated in a process of its own, so that it is no part of the peak
            materialize(Generated(n=passages), runs, HERE)
            words = ["--child", str(passages), "--runs", runs, "--examples", str(args.examples)]
            spent = in_own_process(__file__, *words)
            found.append((passages, spent["seconds"], spent["mib"]))
    growth = found[1][2] / found[0][2]
    rows = [[f"{n:,}", f"{seconds:.0f}", f"{peak:.0f}"] for n, seconds, peak in found]
    bench.table(["passages", "seconds", "peak memory, MiB"], rows, left=())
    bench.say(f"\n{args.examples:,} examples of 6 texts; the peak grows by {growth - 1:.1%} (bound {BOUND - 1:.0%}).")
    bench.bound("growth of the peak", growth, at_most=BOUND)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
