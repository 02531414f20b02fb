"""How long engines stand idle at the end of a run: four workers, an engine that takes its time, shards of one size.

    python -m benchmarks.scale.tail [--workers 4] [--shards 60] [--json FILE]

The bound: the last worker finishes at most one shard after the first (a shard takes a worker ``shard_rows`` x
``pause_s``; with two in flight, each takes twice that and they overlap). Exits 1 where it does not.
"""

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.faults.chaos import write_set
from benchmarks.faults.slow_engine import SlowCrop
from benchmarks.harness import Benchmark
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.ray_start import connect
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop

SHARD_ROWS, PAUSE_S = 20, 0.05


def main() -> int:
    """Runs the stage and prints when each worker finished."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--workers", type=int, default=4)
    bench.add("--shards", type=int, default=60)
    args = bench.parse()
    with tempfile.TemporaryDirectory() as home:
        write_set(Path(home, "set"), args.shards * SHARD_ROWS)
        engine = SlowCrop(pause_s=PAUSE_S, log=f"{home}/log")
        stage = Generate(corpus=Beir(path=f"{home}/set"), strategy=Crop(), engine=engine)
        connect()
        pool = Pool(workers=args.workers, cpus=0.4, shard_rows=SHARD_ROWS)
        folder = materialize(stage, f"{home}/runs", Placement(generate=pool))
        last: dict[str, float] = {}
        done: dict[str, int] = {}
        for receipt in folder.receipts().values():
            worker = f"{receipt['on']}/{receipt['pid']}"
            last[worker] = max(last.get(worker, 0.0), receipt["at"])
            done[worker] = done.get(worker, 0) + 1
    ends = sorted(last.values())
    shard_s = SHARD_ROWS * PAUSE_S * pool.in_flight
    spread = ends[-1] - ends[0]
    report = {"workers": len(ends), "shards": sorted(done.values()), "spread_s": spread, "shard_s": shard_s}
    shards = ", ".join(map(str, sorted(done.values())))
    head = ["workers", "shards of each", "last end after the first", "one shard takes", "bound"]
    bench.table(head, [[len(ends), shards, f"{spread:.2f} s", f"{shard_s:.2f} s", "1 shard"]], left=(1,))
    bench.bound("workers", len(ends), at_least=args.workers, at_most=args.workers)
    bench.bound("seconds between the first and the last end", spread, at_most=shard_s)
    return bench.finish(report | {"at": time.time()})


if __name__ == "__main__":
    sys.exit(main())
