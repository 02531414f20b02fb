"""What everything but the language model costs: passages to queries with the crop engine, beside plain Ray Data.

    python -m benchmarks.speed.orchestration [--rows 100000,1000000,10000000] [--shards 10000] [--json FILE] [--scratch DIR]

A generator script writes the passages (40 words each) as Parquet. `Parquet`, `Generate` and `Parse` read, prompt, answer,
parse, mint ids, keep lineage and write tables with checksums and receipts. The peer is
``ray.data.read_parquet().map_batches().write_parquet()`` with the same functions for the same rows and as many workers; it
writes one table and neither checksums nor receipts, and is tried with actors and with tasks. Memory is the peak of a
process's resident set. Last, the resume of a complete stage of 10,000 shards is planned.

Writes benchmarks/speed/orchestration.md. Exits 1 where the largest size is under 40,000 rows/s or under 0.9 of the faster peer,
where memory grows by over 1.2 times from the size before to it, the driver takes over 1 GiB, or planning over 5 s.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.harness import Benchmark, in_own_process, peak_memory
from dagr_ray.core import ray_start, tables
from dagr_ray.core.build import materialize, plan
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.engines.crop import CropEngine
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.sources import Parquet
from dagr_ray.strategies.crop import Crop

ROWS_PER_S, OVER_PEER, GROWTH, DRIVER_MIB, PLANNING_S = 40_000, 0.9, 1.2, 1024, 5.0
WORKERS, SHARD = 2, 20_000
WORDS = (
    "amber birch cedar dune ember fjord grove heath islet jetty knoll lagoon marsh north ocean prairie quarry river summit "
    "tundra upland valley willow yonder zephyr people visit every spring first seen near old stone bridge small boat light"
).split()


def write(folder: Path, rows: int) -> None:
    """Passages of three sentences drawn from 4,000, behind one that no other passage has; a file for each million."""
    folder.mkdir(parents=True)
    dice, drawn = random.Random(0), np.random.default_rng(0)
    texts = [f"The {' '.join(dice.choices(WORDS, k=dice.randint(8, 12)))}." for _ in range(4000)]
    known, space = pa.array(texts, tables.TEXT), _text(" ")
    for number, start in enumerate(range(0, rows, 1_000_000)):
        with pq.ParquetWriter(folder / f"{number:05d}.parquet", tables.schema("corpus"), compression="zstd") as file:
            stop = min(start + 1_000_000, rows)
            for first in range(start, stop, SHARD):
                n = min(SHARD, stop - first)
                numbers = pc.cast(pa.array(range(first, first + n)), tables.TEXT)
                own = pc.binary_join_element_wise(_text("Passage number"), numbers, _text("is about a place."), space)
                others = [known.take(pa.array(drawn.integers(0, len(known), n))) for _ in range(3)]
                text = pc.binary_join_element_wise(own, *others, space)
                doc_id = pc.binary_join_element_wise(_text("p"), numbers, _text(""))
                file.write_table(tables.columns("corpus", n, doc_id=doc_id, title="", text=text))


def _text(value: str) -> pa.Scalar:
    return pa.scalar(value, tables.TEXT)


def asked(source: str) -> Parse:
    """The stages that are measured."""
    corpus = Parquet(path=source)
    return Parse(generations=Generate(corpus=corpus, strategy=Crop(), engine=CropEngine()), corpus=corpus)


class Watch:
    """Peaks of the resident sets of this process and of the workers that it started, in MiB."""

    def __init__(self) -> None:
        self.workers: dict[int, float] = {}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.done.wait(2.0):
            for process in psutil.Process().children(recursive=True):
                try:
                    title = process.cmdline()[0]
                    # the idle ones that Ray keeps in store have opened nothing
                    if title.startswith("ray::") and "IDLE" not in title and "Agent" not in title:
                        self.workers[process.pid] = _peak(process.pid)
                except (psutil.Error, OSError, IndexError):
                    continue

    def stop(self) -> dict[str, float]:
        """The driver's peak and the largest of the workers'."""
        self.done.set()
        self.thread.join()
        return {"driver_mib": _peak("self"), "worker_mib": max(self.workers.values(), default=0.0)}


def _peak(pid: int | str) -> float:
    return peak_memory(pid) / 2**20


def ours(source: str, out: str) -> dict[str, Any]:
    """Our stages, from Parquet files to the tables of ``Parse``."""
    pool = Pool(workers=WORKERS, cpus=1, shard_rows=SHARD, in_flight=1)
    stage = asked(source)
    watch, began = Watch(), time.perf_counter()
    folder = materialize(stage, out, Placement(generate=pool, light=pool))
    seconds = time.perf_counter() - began
    spent = {
        each.type: sum((each.folder(out).manifest or {})["cost"][key] for key in ("busy_s", "idle_s"))
        for each in (stage.corpus, stage.generations, stage)
    }
    counts = (folder.manifest or {})["counts"]
    assert counts["in"] == counts["out"] + sum(counts["rejected"].values()), counts
    return {
        "seconds": seconds,
        "rows": counts["in"],
        "queries": folder.count("queries"),
        "stages_s": spent,
        **watch.stop(),
    }


class _Rows:
    """A batch of rows in place of the folders that ``Generate`` and ``Parse`` read."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint, self.tables = fingerprint, dict[str, pa.Table]()

    def read_json(self, name: str) -> dict[str, str]:
        return {"fingerprint": self.fingerprint}

    def slice(self, name: str, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        rows = self.tables[name]
        return rows if columns is None else rows.select(columns)

    def source_rows(self, name: str, start: int, stop: int) -> tuple[int, int]:
        return start, stop


class Functions:
    """The same functions for a batch of Ray Data: what both stages make of it, as one table."""

    def __init__(self, source: str, fingerprint: str) -> None:
        stage, self.rows = asked(source), _Rows(fingerprint)
        inputs: Any = {"corpus": self.rows, "generations": self.rows}
        folder: Any = self.rows
        self.generate = stage.generations.open(inputs, folder, Pool())
        self.parse = stage.open(inputs, folder, Pool())

    def __call__(self, batch: pa.Table) -> pa.Table:
        self.rows.tables["corpus"] = batch.cast(tables.schema("corpus"))
        made = self.rows.tables["generations"] = self.generate(0, len(batch)).tables["generations"]
        parsed = self.parse(0, len(made)).tables
        lineage = parsed["lineage"]
        place = pc.index_in(made["gen_id"], value_set=lineage["gen_id"].combine_chunks())
        for name, column in (
            ("query_id", lineage["id"]),
            ("query", parsed["queries"]["text"]),
            ("strategy", lineage["strategy"]),
            ("engine", lineage["engine"]),
            ("model", lineage["model"]),
        ):
            made = made.append_column(name, column.take(place))
        return made


def in_a_task(batch: pa.Table, source: str, fingerprint: str) -> pa.Table:
    """The same as a function: its process opens the stages once."""
    global _opened
    if _opened is None:
        _opened = Functions(source, fingerprint)
    return _opened(batch)


_opened: Functions | None = None


def peer(source: str, out: str, tasks: bool) -> dict[str, Any]:
    """Plain Ray Data."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    fingerprint = asked(source).generations.fingerprint()
    watch, began = Watch(), time.perf_counter()
    data = ray.data.read_parquet(source)
    batches: dict[str, Any] = {"batch_size": SHARD, "batch_format": "pyarrow", "zero_copy_batch": True}
    if tasks:
        data = data.map_batches(in_a_task, fn_args=(source, fingerprint), **batches)
    else:
        # half a CPU each, so that tasks that read and write find a place
        pool = ray.data.ActorPoolStrategy(size=WORKERS)
        data = data.map_batches(
            Functions, fn_constructor_args=(source, fingerprint), compute=pool, num_cpus=0.5, **batches
        )
    data.write_parquet(out, compression="zstd")
    seconds = time.perf_counter() - began
    made = pq.ParquetDataset(out)
    rows = sum(fragment.count_rows() for fragment in made.fragments)
    return {"seconds": seconds, "rows": rows, **watch.stop()}


def planning(scratch: Path, shards: int) -> dict[str, Any]:
    """Seconds to find that a stage of so many shards has nothing left to do, in three ways."""
    write(scratch / "few", shards)
    stage, runs = asked(str(scratch / "few")).generations, str(scratch / "runs")
    few = Placement(generate=Pool(workers=0, shard_rows=1))
    folder = materialize(stage, runs, few)
    assert len(folder.receipts()) == shards
    checked = in_own_process(__file__, "--one", "plan", "--source", str(scratch / "few"), "--out", runs)
    folder.remove("manifest.json")
    began = time.perf_counter()
    materialize(stage, runs, few)
    return {"shards": shards, **checked, "resume_s": time.perf_counter() - began}


def measure_planning(source: str, out: str) -> dict[str, float]:
    """In a process that has read nothing yet."""
    stage = asked(source).generations
    began = time.perf_counter()
    states = {status.state for status in plan([stage], out)}
    checked = time.perf_counter()
    materialize(stage, out)
    assert states == {"cached"}, states
    return {"check_s": checked - began, "run_s": time.perf_counter() - checked}


def one(arm: str, source: str, out: str) -> dict[str, Any]:
    """One measurement, in this process and workers that it starts."""
    if arm == "plan":
        return measure_planning(source, out)
    ray_start.connect()
    return ours(source, out) if arm == "ours" else peer(source, out, tasks=arm == "tasks")


def measure(arm: str, source: Path) -> dict[str, Any]:
    """One measurement in a process of its own; what it wrote is removed."""
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        found = in_own_process(__file__, "--one", arm, "--source", str(source), "--out", f"{out}/made")
    print(f"{source.name} rows, {arm}: {found}", file=sys.stderr, flush=True)
    return found | {"rows_per_s": found["rows"] / found["seconds"]}


ARMS = {"ours": "`Parquet`, `Generate`, `Parse`", "actors": "Ray Data, actors", "tasks": "Ray Data, tasks"}


def table(sizes: dict[int, dict[str, Any]], planned: dict[str, Any] | None) -> list[str]:
    """The figures as Markdown."""
    lines = ["| rows | arm | seconds | rows/s | driver's peak | a worker's peak |", "|---:|---|---:|---:|---:|---:|"]
    for rows, arms in sizes.items():
        for arm, found in arms.items():
            lines.append(
                f"| {rows:,} | {ARMS[arm]} | {found['seconds']:.1f} | {found['rows_per_s']:,.0f} | "
                f"{found['driver_mib']:.0f} MiB | {found['worker_mib']:.0f} MiB |"
            )
    if planned:
        lines += ["", f"| a complete stage of {planned['shards']:,} shards | seconds |", "|---|---:|"]
        named = {
            "check_s": "`dagr check`",
            "run_s": "`dagr run`",
            "resume_s": "resume, every receipt read, manifest written",
        }
        lines += [f"| {text} | {planned[key]:.2f} |" for key, text in named.items()]
    return lines


def verdicts(sizes: dict[int, dict[str, Any]], planned: dict[str, Any] | None) -> list[tuple[str, float, str, bool]]:
    """(what, value, bound, whether it holds)."""
    found = []
    largest = max(sizes)
    arms = sizes[largest]
    speed = arms["ours"]["rows_per_s"]
    found.append((f"rows/s, {largest:,} rows", speed, f"at least {ROWS_PER_S:,}", speed >= ROWS_PER_S))
    peers = [each["rows_per_s"] for arm, each in arms.items() if arm != "ours"]
    if peers:
        found.append(
            ("over the faster peer", speed / max(peers), f"at least {OVER_PEER}", speed >= OVER_PEER * max(peers))
        )
    smaller = [rows for rows in sizes if rows < largest]
    for who in ("driver", "worker") if smaller else ():
        grown = arms["ours"][f"{who}_mib"] / sizes[max(smaller)]["ours"][f"{who}_mib"]
        what = f"peak of {'the driver' if who == 'driver' else 'a worker'}, {largest:,} over {max(smaller):,} rows"
        found.append((what, grown, f"at most {GROWTH}", grown <= GROWTH))
    driver = arms["ours"]["driver_mib"]
    found.append(("driver's peak, MiB", driver, f"at most {DRIVER_MIB:,}", driver <= DRIVER_MIB))
    if planned:
        slowest = max(planned[key] for key in ("check_s", "run_s", "resume_s"))
        found.append(("planning, seconds", slowest, f"at most {PLANNING_S:g}", slowest <= PLANNING_S))
    return found


def main() -> int:
    """Runs the sizes, prints and writes the tables."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--rows", default="100000,1000000,10000000")
    bench.add("--arms", default="ours,actors,tasks")
    bench.add("--shards", type=int, default=10_000, help="of the stage whose resume is planned; 0 leaves that out")
    bench.add("--scratch", free=True, metavar="DIR", help="about 6 GB for 10 million rows")
    bench.add("--one", choices=[*ARMS, "plan"], help=argparse.SUPPRESS)
    bench.add("--source", help=argparse.SUPPRESS)
    bench.add("--out", help=argparse.SUPPRESS)
    args = bench.parse()
    if args.one:
        print(json.dumps(one(args.one, args.source, args.out)), flush=True)
        return 0
    sizes: dict[int, dict[str, Any]] = {}
    planned = None
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="dagr-bench-") as scratch:
        if args.shards:
            planned = planning(Path(scratch, "planning"), args.shards)
            print(f"planning: {planned}", file=sys.stderr, flush=True)
        for rows in map(int, args.rows.split(",")):
            write(source := Path(scratch, f"{rows}"), rows)
            sizes[rows] = {arm: measure(arm, source) for arm in args.arms.split(",")}
    held = verdicts(sizes, planned)
    bench.say("\n".join([*table(sizes, planned), ""]))
    cells = [[what, f"{value:,.2f}", bound, "holds" if ok else "MISSED"] for what, value, bound, ok in held]
    bench.table(["what", "value", "bound", ""], cells, left=(0, 2, 3))
    for what, value, bound, ok in held:
        if not ok:
            bench.fail(f"{what}: {value:,.2f} ({bound})")
    bounds = [dict(zip(("what", "value", "bound", "holds"), v, strict=True)) for v in held]
    return bench.finish({"sizes": sizes, "planning": planned, "bounds": bounds})


if __name__ == "__main__":
    sys.exit(main())
