"""What each filter finds of planted defects, what it refuses besides, and what it costs.

    python -m benchmarks.quality.filters [--data BEIR_FOLDER ...] [--rows 2000] [--scale 1000000]

Three rows in ten are bad, in a way that the filter is for (`benchmarks/quality/planted.py`); precision is the share of bad rows
among those refused, recall the share of the bad ones that are refused. Good queries are made up, and with ``--data`` also
people's own of a collection. Seconds are the processor's, of the filter alone, on one core. Then the filters that look at
one row at a time score ``--scale`` queries and a tenth of them through the stage: rows a second, and memory that does
not grow. The round trip is BM25's; a teacher's scores and log-probabilities
are drawn. Bounds: precision and recall of 0.95 on made-up queries.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.harness import Benchmark, in_own_process, peak_memory
from benchmarks.quality.planted import CASES, Planted, pairs
from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.config import from_json
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage
from dagr_ray.filters import Filter, ScoredQuery
from dagr_ray.miners.bm25 import BM25
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select

BOUND = 0.95
SHARD = 50_000
SCALED = ("length", "format", "refusal", "template", "repetition", "language", "pii", "copied")


def scored(planted: Planted, filter: Filter) -> Score:
    """The scores of a planted case; a round trip is BM25's."""
    beside: dict[str, Stage] = {}
    if filter.reads == "candidates":
        beside["search"] = Search(index=Index(corpus=planted, miner=BM25()), queries=planted, depth=30)
    elif filter.reads == "scores":
        beside["labels"] = planted
    return Score(parsed=planted, corpus=planted, filter=filter, **beside)


def chosen(planted: Planted, filter: Filter) -> Select:
    """What one filter leaves of a planted case."""
    return Select(parsed=planted, scores=(scored(planted, filter),))


def measured(planted: Planted, runs: str) -> dict:
    """Precision and recall through the stages, seconds of the filter by itself."""
    case = planted.made()
    folder = materialize(chosen(planted, case.filter), runs, Placement())
    kept = set(folder.read("queries")["query_id"].to_pylist())
    precision, recall = case.judge([f"q{i}" not in kept for i in range(len(case.texts))])
    stage = scored(planted, case.filter)
    cost = (stage.folder(runs).manifest or {})["cost"].get("cpu_s", 0.0)
    if case.filter.rowwise and not case.filter.reads:
        good = pairs(planted.data)
        rows = [
            ScoredQuery(f"q{i}", t, f"d{d}", good[d].passage)
            for i, (t, d) in enumerate(zip(case.texts, case.passages, strict=True))
        ]
        case.filter.score(rows[:10], None)
        began = time.process_time()
        case.filter.score(rows, None)
        cost = time.process_time() - began
    elif case.filter.streams:
        cost += (stage.inputs()["whole"].folder(runs).manifest or {})["cost"].get("cpu_s", 0.0)
    refused = sum(f"q{i}" not in kept for i in range(len(case.texts)))
    return {"rows": len(case.texts), "refused": refused, "precision": precision, "recall": recall, "cost": cost}


class Many(Stage):
    """Any number of made-up queries, in shards, with the passages that they are for."""

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "many-queries"
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage", "corpus")
    n: int

    def size(self, inputs):
        return self.n

    def open(self, inputs, folder, pool):
        good = pairs(None)

        def run(start, stop):
            numbers = range(start, stop)
            ids, docs = [f"q{i}" for i in numbers], [f"d{i}" for i in numbers]
            lineage = {"gen_id": ids, "source_id": docs, "strategy": "s", "engine": "e", "model": "m"}
            size = stop - start
            queries = [f"{good[i % len(good)].query} {i}" for i in numbers]
            passages = [f"{good[i % len(good)].passage} {i}" for i in numbers]
            return Output(
                {
                    "queries": tables.columns("queries", size, query_id=ids, text=queries),
                    "qrels": tables.columns("qrels", size, query_id=ids, doc_id=docs, relevance=1),
                    "lineage": tables.columns("lineage", size, id=ids, **lineage),
                    "corpus": tables.columns("corpus", size, doc_id=docs, title="", text=passages),
                }
            )

        return run


def scale(n: int, filters: list[dict]) -> dict:
    """Run by itself: seconds of scoring and selecting ``n`` queries in this process, and its peak memory."""
    placement = Placement(light=Pool(workers=0, shard_rows=SHARD))
    made = [from_json(each, Filter) for each in filters]
    with tempfile.TemporaryDirectory() as runs:
        many = Many(n=n)
        materialize(many, runs, placement)
        before = peak_memory()
        found: dict[str, Any] = {"n": n, "before_mb": before >> 20, "seconds": {}}
        scores = tuple(Score(parsed=many, corpus=many, filter=each) for each in made)
        for score in scores:
            began = time.time()
            materialize(score, runs, placement)
            found["seconds"][score.filter.type] = time.time() - began
        began = time.time()
        materialize(Select(parsed=many, scores=scores), runs, placement)
        found["seconds"]["select"] = time.time() - began
    return found | {"peak_mb": peak_memory() >> 20}


def scaled(n: int) -> dict:
    """``scale`` in a process of its own."""
    filters = [CASES[name][0](random.Random(0), pairs(None)[:20]).filter.to_json() for name in SCALED]
    return in_own_process(__file__, "--measure", json.dumps([n, filters]))


def main() -> int:
    """Runs all cases, prints and writes the tables; 1 where a bound does not hold."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--data", free=True, action="append", default=[], metavar="BEIR_FOLDER")
    bench.add("--rows", type=int, default=2000)
    bench.add("--scale", free=True, type=int, default=0, help="queries; 0 leaves this part out")
    bench.add("--measure", help=argparse.SUPPRESS)
    args = bench.parse()
    if args.measure:
        print(json.dumps(scale(*json.loads(args.measure))))
        return 0
    sources = [None, *args.data]
    names = ["made up", *(Path(folder).name for folder in args.data)]
    head = ["filter", *(column for name in names for column in (f"{name}: precision", "recall")), "s per 1,000 rows"]
    table: list[list[str]] = []
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as runs:
        for name, cases in CASES.items():
            for which in range(len(cases)):
                found = [measured(Planted(case=name, which=which, rows=args.rows, data=data), runs) for data in sources]
                bench.bound(f"{name}: precision", found[0]["precision"], at_least=BOUND)
                bench.bound(f"{name}: recall", found[0]["recall"], at_least=BOUND)
                figures += [
                    {"case": name, "which": which, "data": data, **each}
                    for data, each in zip(names, found, strict=True)
                ]
                shown = [f"{each[what]:.3f}" for each in found for what in ("precision", "recall")]
                cost = found[-1]["cost"] / found[-1]["rows"] * 1000
                own = Planted(case=name, which=which).made().filter
                variant = f" ({getattr(own, 'measure', getattr(own, 'by', which))})" if len(cases) > 1 else ""
                table.append([f"`{name}`{variant}", *shown, f"{cost:.4f}"])
                print(*table[-1], flush=True)
    rows = ", ".join(f"{len(pairs(data)[: args.rows]):,} of {name}" for data, name in zip(sources, names, strict=True))
    bench.say(f"Rows: {rows}. Three in ten are bad. The costs are those on the last collection.\n")
    bench.table(head, table)
    if args.scale:
        small, large = scaled(args.scale // 10), scaled(args.scale)
        bench.say(
            f"\nThrough the stages, one process, shards of {SHARD:,} rows; `select` reads the scores of all of them:\n"
        )
        bench.table(
            ["stage", "rows/s"], [[f"`{name}`", f"{large['n'] / s:,.0f}"] for name, s in large["seconds"].items()]
        )
        peaks = " and ".join(f"{each['peak_mb']:,} MB for {each['n']:,} queries" for each in (small, large))
        bench.say(f"\nPeak memory of that process: {peaks}.")
    return bench.finish(figures)


if __name__ == "__main__":
    sys.exit(main())
