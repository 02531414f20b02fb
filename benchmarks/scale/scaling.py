"""Writes docs/scaling.md: one billion passages with eight queries each, computed from what was measured at small size.

    python -m benchmarks.scale.scaling [--measure]

``--measure`` first runs ``scaling_measure.py`` (6 minutes) and keeps its figures in ``scaling.json``; without it, the
kept ones are used. What was not measured is an assumption with its source, all in ``ASSUMED``. Also runs
the simulation, draws both charts, and exits 1 where the simulation's bound is missed or a step has no figure.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import ROOT, Benchmark
from benchmarks.scale import scaling_measure, scaling_simulation as simulation
from dagr_ray.core.artifact import READERS

PASSAGES, QUERIES, WORKERS = 10**9, 8, 1000
MEMORY, DAY = 64 * 2**30, 86_400
SHARD_ROWS = 8192
MEASURED = ROOT / "benchmarks" / "scale" / "scaling.json"
Json = dict[str, Any]


@dataclass(frozen=True)
class Assumption:
    """A number that was not measured here, and where it comes from."""

    value: float
    what: str
    source: str


MLPERF = "Red Hat, Efficient and reproducible LLM inference (MLPerf Inference v5.1): vLLM 0.10, FP8, one H100, offline"
ASSUMED = {
    "prompt": Assumption(130, "prompt tokens computed for a passage", "a passage of 100 tokens and what follows it; the "
                         "exemplars before it come from the prefix cache"),
    "completion": Assumption(16, "tokens of a query", "a choice; the limit of the recipes is 32"),
    "out_s": Assumption(5777, "output tokens/s of an 8B model", MLPERF),
    "mlperf_in": Assumption(780, "prompt tokens there", "a news article of CNN/DailyMail; our estimate"),
    "mlperf_out": Assumption(128, "completion tokens there", "the benchmark's limit"),
    "small": Assumption(3.21 / 8.03, "cost of a 3B model's token beside an 8B one's", "parameters: 3.21 to 8.03 billion"),
    "gpu_hour": Assumption(2.5, "$ for an hour of an H100", "between 1.99 and 5.00 in May 2026 (mercatus-ai.com)"),
    "core_hour": Assumption(0.05, "$ for an hour of a core", "the default of this project's placements"),
    "put": Assumption(0.005, "$ for 1,000 PUT or LIST requests", "S3 Standard's price list"),
    "get": Assumption(0.0004, "$ for 1,000 GET or HEAD requests", "S3 Standard's price list"),
    "month": Assumption(0.023, "$ for a GB and month", "S3 Standard's price list"),
    "latency": Assumption(0.03, "seconds of a small request to an object store", "a round figure; 10 to 100 ms are usual"),
    "lucene_bytes": Assumption(12e9 / 138_364_198, "bytes a passage of Lucene's index without positions and texts",
                               "Anserini's MS MARCO v2 page: 12 GB for 138,364,198 passages"),
    "lucene_s": Assumption(30 * 60 * 18 / 138_364_198, "thread-seconds a passage to build it",
                           "the same page: 30 minutes with 18 threads"),
    "bm25_s": Assumption(0.055, "seconds of a BM25 query over 8.8 million passages", "docTTTTTquery's results page"),
    "bm25_of": Assumption(8_841_823, "passages there", "MS MARCO v1"),
    "flops": Assumption(989e12 * 0.2, "useful FLOP/s of an H100 for a small encoder", "a fifth of its bfloat16 peak"),
    "encoder": Assumption(2 * 10.6e6 * 130, "FLOP to encode a passage", "2 x parameters of MiniLM's layers x tokens"),
}  # fmt: skip
REPLACED = {
    "mine": "the hashes of queries and passages dealt into buckets on disk, as `Duplicate` deals its queries",
    "select": "sharded already: more workers",
    "whole": "sharded over the buckets into which it deals queries by the hash of their text",
    "score round-trip": "the hashes of passages dealt into buckets on disk, as `Duplicate` deals its queries",
    "score": "sharded already: more workers",
    "search": "queries are sharded already, and each shard asks all parts of the index: parts of 10 million passages, one to a "
    "worker; the best of each part merged",
    "index": "sharded already: more workers",
    "sample": "sharded; with `n`, a first pass over the hashes alone finds the threshold",
    "py-docs": "`Parquet`, which is read part by part",
    "parse": "sharded already: more workers",
    "generate": "sharded already: more workers",
    "driver": "hand out ranges of shards, which a worker walks through alone; receipts of many shards in one file",
    "resume": "receipts kept by the hundred in one file",
}

PROSE = """# One billion passages

What happens to this design at {passages} passages with {each} queries each, on {workers} workers. Nothing here was run at
that size: `benchmarks/scale/scaling.py` writes this page from constants measured on two CPU cores (`benchmarks/scale/scaling.json`)
and from the assumptions listed at the end, and multiplies. Read the figures as orders of magnitude.

In short: generation scales; {queries} queries are at most ${most} of GPU time with an 8B model. {under} of {of} steps
break before that size, `{first}` first, at {first_at} passages. Beside the generator, what costs most is the round trip of
every query through one index of everything: {bm25} core-hours of BM25.

## Which step breaks first

Seconds and memory for a passage are the slope between {few} and {many} passages with {each} queries each, every stage in a
process of its own. A step breaks where it needs more than {memory} of memory in one process, or more than a day: on
{workers} workers where it is sharded, on one where it is not. Of a sharded step the memory is what each worker holds of
everything: hashes of the passages, and of the queries, that are to be seen to recur. Slopes of what grows faster than its
rows (the query time of a search, the terms of an index) make this page too kind, not too strict.{unseen}

![Passages at which each step breaks](scaling_steps.svg)

{steps}

## Tables

{tables}

Accepted here are the crops of the measured run, filtered as in the recipes; a language model's share differs.
`candidates` holds 100 hits for each query and is {candidates} of all: at this size a search should write the rank of the
query's own passage and ten hits for mining.

## Shards, objects and requests

Of `Generate` alone. A shard writes two parts and a receipt; a resume lists the receipts and reads each of them, {readers} at once.

{objects}

{rows} passages in a shard keep all that the driver does small. Shards of 1,024 are millions of objects and hours of
handing out; with shards of 65,536 a failure loses tens of minutes of a GPU.

## Indexes

{indexes}

One thread does not index a billion passages in a day; a hundred indexes of 10 million take less than two hours each. A flat
index of everything fits no machine's memory; IVF-PQ fits one.

## Searching: the round trip

{search}

What replaces it: search a query only in the part of the corpus that holds its passage, with a rank threshold scaled to
the part; or draw the training set first (`Take` before `Score`), because no retriever is trained on {queries} queries.

## Generators

Passages a second of a GPU are the source's output tokens a second, turned into ours at two ends: *least* charges every
token alike, read or written; *most* charges all of the source's time to the tokens written. Money = passages /
(passages/s) / efficiency of the simulation ({efficiency}) x ${gpu_hour} an hour. No GPU was measured for this.

{generators}

The prefix cache is assumed to hold the exemplars. Without it 480 more prompt tokens are computed for a passage, which
makes the *least* lines {uncached} times as long.

## Failures and stragglers: a simulation

{shards} shards of {minutes} minutes on {workers} workers (`benchmarks/scale/scaling_simulation.py`, event by event, seed {seed}).
A worker dies every {mtbf} h on average and is replaced after {replaced} min; an engine starts in {start} min; {straggle} of
the tries are slowed by 1 + a lognormal factor (sigma {tail}); a try that takes {patience} times as long as usual is ended
by the watchdog and done again. Efficiency is the time spent on what is kept, over the time of all workers until the last
shard has ended.

![Where the worker-seconds go](scaling_simulation.svg)

{simulated}

Efficiency of the first line over {seeds} seeds: {least} to {best} (bound: at least {bound}). What costs most is the end,
where {workers} workers wait for the last few slow shards: {end}. The deadline keeps that small ("no deadline"); shards of a
minute do so too, at ten times the objects; long shards make the losses and the end worse. More than one shard in flight
takes the half-empty edges of shards away and pays for it with more that is begun and lost.

## What was measured

{measured}

## What was assumed

{assumed}
"""


def a(name: str) -> float:
    """An assumption's value."""
    return ASSUMED[name].value


def size(number: float) -> str:
    """Bytes for people: 1.5 TB."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(number) < 1000 or unit == "PB":
            return f"{number:.3g} {unit}" if number < 100 else f"{number:,.0f} {unit}"
        number /= 1000
    raise AssertionError


def span(seconds: float) -> str:
    """Seconds for people: 3.2 h, 12 days, 4 years."""
    for unit, length in (("years", 365 * DAY), ("days", 2 * DAY), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= length:
            return f"{seconds / (DAY if unit == 'days' else length):,.3g} {unit}"
    return f"{seconds * 1000:.2g} ms"


def count(number: float) -> str:
    """A number for people: 8.0 billion."""
    for unit, length in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if number >= length:
            return f"{number / length:.3g} {unit}"
    return f"{number:.3g}"


def rows(head: list[str], lines: list[list[Any]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    shown = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in shown)


def tables(m: Json) -> tuple[str, dict[str, float]]:
    """Rows and bytes of every table at full size; and the bytes by name."""
    found: dict[str, list[float]] = {}
    for key, each in m["tables"].items():
        stage, name = key.split("/")
        label = f"{stage.split()[0]}: {name}" if stage.startswith("score") else f"{stage}: {name}"
        entry = found.setdefault(label, [0.0, 0.0])
        entry[0] += each["rows"] * PASSAGES
        entry[1] += each["rows"] * PASSAGES * each["bytes"]
    skip = ("py-docs", "exemplars")
    lines = [[k, count(r), f"{b / r:.1f}", size(b)] for k, (r, b) in found.items() if not k.startswith(skip) and r]
    total = sum(b for k, (_, b) in found.items() if not k.startswith(skip))
    lines.append(["all", "", "", f"{size(total)}, ${total / 1e9 * a('month'):,.0f} a month"])
    return rows(["stage: table", "rows", "bytes a row", "size"], lines), {k: b for k, (_, b) in found.items()}


def objects(m: Json) -> str:
    """Shards, objects, requests and driver costs by the number of passages in a shard of ``Generate``."""
    lines = []
    part = m["tables"]["generate/generations"]
    ask, again, keep = m["requests"]["shard"], m["requests"]["resumed"], m["receipts"]
    for each in (1024, SHARD_ROWS, 65_536):
        shards = math.ceil(PASSAGES / each)
        puts = shards * (ask.get("PUT", 0) + ask.get("POST", 0) + ask.get("LIST", 0))
        gets = shards * (ask.get("GET", 0) + ask.get("HEAD", 0))
        resume = shards * (again.get("GET", 0) + again.get("HEAD", 0))
        lines.append([
            f"{each:,}", f"{shards:,}", f"{shards * 3:,}", size(each * part["rows"] * part["bytes"]),
            f"{count(puts + gets)}, ${puts / 1e3 * a('put') + gets / 1e3 * a('get'):,.0f}",
            f"{math.ceil(shards / m['requests']['keys_per_listing']):,}",
            size(shards * keep["plan"]), size(shards * keep["manifest"]),
            size(shards * (m["driver"]["bytes"] + keep["memory"])),
            span(shards * m["driver"]["seconds"]), span(resume * a("latency") / READERS),
            span(each / per_second(True)),
        ])  # fmt: skip
    head = ["passages a shard", "shards", "objects", "a part of generations", "requests", "calls to list receipts",
            "plan.json", "manifest.json", "driver's memory", "handing out", "resume on an object store",
            "a shard on a GPU (8B)"]  # fmt: skip
    return rows(head, lines)


def per_second(fast: bool, model: float = 1.0) -> float:
    """Passages a second of one GPU with an 8B model (``model`` 1) or a smaller one.

    ``fast``: a token costs the same whether it is read or written, as where a large batch keeps the GPU computing. Else
    all of the time that was measured is charged to the tokens written.
    """
    written = QUERIES * a("completion")
    if not fast:
        return a("out_s") / written / model
    tokens = a("out_s") / a("mlperf_out") * (a("mlperf_in") + a("mlperf_out"))
    return tokens / (a("prompt") + written) / model


def generators(efficiency: float) -> str:
    """GPU-hours and money of both models, with and without the prefix cache, at both ends."""
    lines = []
    for name, model in (("3B", a("small")), ("8B", 1.0)):
        for kind, fast in (("least", True), ("most", False)):
            hours = PASSAGES / per_second(fast, model) / 3600 / efficiency
            money = hours * a("gpu_hour")
            lines.append([f"{name}, {kind}", f"{per_second(fast, model):,.0f}", f"{hours:,.0f}", f"${money:,.0f}",
                          f"${money / PASSAGES / QUERIES * 1e6:.2f}", span(hours * 3600 / WORKERS)])  # fmt: skip
    return rows(["model", "passages/s a GPU", "GPU-hours", "money", "per million queries", "on 1,000 GPUs"], lines)


def indexes(m: Json) -> str:
    """Lucene and faiss at full size."""
    lucene, vectors = m["lucene"], m["vectors"]
    encode_gpu = PASSAGES * a("encoder") / a("flops")
    lines = [
        ["Lucene, measured", f"{lucene['bytes']:.0f}", size(lucene["bytes"] * PASSAGES),
         span(lucene["build_s"] * PASSAGES) + " on one thread"],
        ["Lucene, published", f"{a('lucene_bytes'):.0f}", size(a("lucene_bytes") * PASSAGES),
         span(a("lucene_s") * PASSAGES) + " on one thread"],
        ["vectors (MiniLM, 384)", "1536", size(1536 * PASSAGES),
         f"{span(PASSAGES / m['encode']['passages_s'])} on this machine, {span(encode_gpu)} on one H100"],
        ["faiss flat", f"{vectors['flat']['bytes']:.0f}", size(vectors["flat"]["bytes"] * PASSAGES),
         span(vectors["flat"]["add_s"] * PASSAGES)],
        ["faiss IVF-PQ (48 bytes)", f"{vectors['ivf_pq']['bytes']:.0f}", size(vectors["ivf_pq"]["bytes"] * PASSAGES),
         f"{span(vectors['ivf_pq']['add_s'] * PASSAGES)} with 256 lists; more with more"],
    ]  # fmt: skip
    return rows(["index", "bytes a passage", "size", "time to build"], lines)


def searching(m: Json) -> tuple[str, float]:
    """What a round trip of every query costs; and the core-seconds of BM25."""
    asked = PASSAGES * QUERIES
    linear = a("bm25_s") * PASSAGES / a("bm25_of")
    ten = a("bm25_s") * 1e7 / a("bm25_of")
    flat = m["vectors"]["flat"]["query_s"] * PASSAGES / 60_000
    lines = []
    for name, seconds in (("BM25, one index of all (linear from 8.8 million)", linear),
                          ("BM25, only the 10 million passages around its own", ten),
                          ("faiss flat, all (linear from 60,000, this machine)", flat)):  # fmt: skip
        whole = asked * seconds
        money = whole / 3600 * a("core_hour")
        lines.append([name, span(seconds), f"{whole / 3600:,.0f}", f"${money:,.0f}", span(whole / WORKERS / 64)])
    return rows(["search", "a query", "core-hours", "money", "on 1,000 machines of 64 cores"], lines), asked * linear


def breaking(m: Json) -> list[tuple[str, float, str, str]]:
    """(step, passages at which it breaks, why, what replaces it), the first to break first."""
    found = []
    for name, each in m["stages"].items():
        workers = WORKERS if each["sharded"] else 1
        limits = {}
        if each["seconds"]:
            limits[f"{span(DAY)} on {'1,000 workers' if each['sharded'] else 'one process'}"] = (
                DAY * workers / each["seconds"]
            )
        held = m["held"].get(name, 0.0) if each["sharded"] else each["memory"]
        if held:
            limits[f"{size(MEMORY)} of memory" + " in each worker" * each["sharded"]] = MEMORY / held
        if not limits:
            continue
        why = min(limits, key=lambda key: limits[key])
        kind = name if name in REPLACED else name.split()[0]
        found.append((name, limits[why], why, REPLACED[kind]))
    driver = m["driver"]["bytes"] + m["receipts"]["memory"]
    found.append(("driver", MEMORY / driver * SHARD_ROWS, f"{size(MEMORY)} of memory", REPLACED["driver"]))
    again = sum(m["requests"]["resumed"].get(kind, 0) for kind in ("GET", "HEAD")) * a("latency") / READERS
    found.append(
        ("resume", 3600 / again * SHARD_ROWS, "an hour to read receipts from an object store", REPLACED["resume"])
    )
    return sorted(found, key=lambda line: line[1])


def unseen(m: Json, broken: list[tuple[str, float, str, str]]) -> str:
    """Says which steps grew neither in time nor in memory."""
    names = sorted(m["stages"].keys() - {name for name, *_ in broken})
    return f" Nothing of {', '.join(f'`{name}`' for name in names)} was seen to grow." if names else ""


def charts(broken: list[tuple[str, float, str, str]], results: list[simulation.Result]) -> None:
    """docs/scaling_steps.svg and docs/scaling_simulation.svg."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "scaling", "font.family": "DejaVu Sans", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 0.3 * len(broken) + 1.1), layout="constrained")
    names = [f"{name}" for name, *_ in reversed(broken)]
    values = [min(value, 1e14) for _, value, *_ in reversed(broken)]
    axes.barh(names, values, color=["#b2452f" if value < PASSAGES else "#4c78a8" for value in values], height=0.7)
    axes.axvline(PASSAGES, color="#222222", linewidth=1, linestyle="--")
    axes.text(PASSAGES, len(broken) - 0.3, " 1 billion", va="center", ha="left", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("passages at which a step passes 64 GiB or a day")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "scaling_steps.svg", metadata={"Date": None})

    figure, axes = plt.subplots(figsize=(7.5, 0.32 * len(results) + 1.3), layout="constrained")
    colours = ["#4c78a8", "#f2cf5b", "#9ecae9", "#b2452f", "#8c6bb1", "#bdbdbd", "#e6862e"]
    left = [0.0] * len(results)
    names = [result.setting.name for result in reversed(results)]
    for cause, colour in zip(("useful", *simulation.CAUSES), colours, strict=True):
        shares = [100 * result.share(cause) for result in reversed(results)]
        axes.barh(names, shares, left=left, color=colour, height=0.7, label=cause)
        left = [x + share for x, share in zip(left, shares, strict=True)]
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of worker-seconds until the last shard has ended")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "scaling_simulation.svg", metadata={"Date": None})
    plt.close("all")


def measured(m: Json) -> str:
    """The constants themselves."""
    ask, again = m["requests"]["shard"], m["requests"]["resumed"]
    lines = [
        [
            "passages of the standard library",
            f"{m['text']['words']:.0f} words, {m['text']['characters']:.0f} characters",
        ],
        ["requests of a shard of `Generate`", ", ".join(f"{n:g} {kind}" for kind, n in sorted(ask.items()))],
        ["requests of a finished shard at a resume", ", ".join(f"{n:g} {k}" for k, n in sorted(again.items()) if n)],
        ["keys of one listing call", f"{m['requests']['keys_per_listing']:,.0f}"],
        ["a receipt", f"{m['receipts']['receipt']:.0f} bytes; {m['receipts']['memory']:,.0f} read back"],
        ["reading one, local disk", span(m["receipts"]["read_s"])],
        [
            "a shard in plan.json and manifest.json",
            f"{m['receipts']['plan']:.0f} and {m['receipts']['manifest']:.0f} bytes",
        ],
        [
            "a shard handed out through Ray Data",
            f"{span(m['driver']['seconds'])}, {size(m['driver']['bytes'])} of the driver",
        ],
        ["a BM25 query", f"{span(m['lucene']['query_s'])} over {m['lucene']['passages']:,} passages"],
        ["an IVF-PQ query", f"{span(m['vectors']['ivf_pq']['query_s'])} over 60,000 vectors, 1 of 256 lists"],
        ["encoding with MiniLM", f"{m['encode']['passages_s']:.0f} passages/s on two cores"],
    ]
    return rows(["what", "measured"], lines)


def write(m: Json, results: list[simulation.Result], spread: tuple[float, float]) -> str:
    """The document."""
    broken = breaking(m)
    first = broken[0]
    efficiency = results[0].share("useful")
    listed, sizes = tables(m)
    search, core_seconds = searching(m)
    most = PASSAGES / per_second(False) / 3600 / efficiency * a("gpu_hour")
    under = sum(value < PASSAGES for _, value, *_ in broken)
    steps = [[name, count(value), why, then] for name, value, why, then in broken]
    base = results[0].setting
    written = a("prompt") + QUERIES * a("completion")
    return PROSE.format(
        passages=count(PASSAGES), each=QUERIES, workers=f"{WORKERS:,}", queries=count(PASSAGES * QUERIES), most=f"{most:,.0f}",
        under=under, of=len(broken), first=first[0], first_at=count(first[1]), bm25=f"{core_seconds / 3600:,.0f}",
        unseen=unseen(m, broken),
        few=scaling_measure.SIZES[0], readers=READERS, many=f"{scaling_measure.SIZES[1]:,}", memory=size(MEMORY),
        steps=rows(["step", "breaks at (passages)", "because of", "what replaces it"], steps), tables=listed,
        candidates=f"{sizes['search: candidates'] / sum(sizes.values()):.0%}", objects=objects(m), rows=f"{SHARD_ROWS:,}",
        indexes=indexes(m), search=search, efficiency=f"{efficiency:.1%}", gpu_hour=f"{a('gpu_hour'):.2f}",
        generators=generators(efficiency), uncached=f"{(written + 480) / written:.1f}", shards=f"{base.shards:,}",
        minutes=f"{base.shard_s / 60:.0f}", seed=base.seed, mtbf=f"{base.mtbf_h:.0f}", replaced=f"{base.replace_s / 60:.0f}",
        start=f"{base.start_s / 60:.0f}", straggle=f"{base.straggle:.0%}", tail=f"{base.tail:g}", patience=f"{base.patience:g}",
        simulated=simulation.table(results), seeds=simulation.SEEDS, least=f"{spread[0]:.1%}", best=f"{spread[1]:.1%}",
        bound=f"{simulation.BOUND:.0%}", end=f"{results[0].share('tail'):.1%}", measured=measured(m),
        assumed=rows(["value", "what", "source"], [[f"{x.value:,.6g}", x.what, x.source] for x in ASSUMED.values()]),
    )  # fmt: skip


def main() -> int:
    """Writes the page; returns the exit code."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--measure", action="store_true", help="measure anew, for 10 minutes")
    args = bench.parse()
    if args.measure or not MEASURED.is_file():
        MEASURED.write_text(json.dumps(scaling_measure.measure(), indent=1) + "\n")
    m = json.loads(MEASURED.read_text())
    results = [simulation.simulate(setting) for setting in simulation.settings(100_000, WORKERS)]
    least, most = simulation.seeds(results[0].setting)
    (ROOT / "docs" / "scaling.md").write_text(write(m, results, (least, most)))
    charts(breaking(m), results)
    print(simulation.table(results))
    print(f"efficiency over {simulation.SEEDS} seeds: {least:.3f} to {most:.3f}, bound {simulation.BOUND:.2f}")
    for name, value, why, _ in breaking(m)[:5]:
        print(f"{name}: breaks at {count(value)} passages ({why})")
    bench.bound("efficiency", least, at_least=simulation.BOUND)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
