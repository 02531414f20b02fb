"""Passages encoded per second beside `SentenceTransformer.encode` at its defaults, and whether the ranking stays the same.

    python -m benchmarks.speed.encoding BEIR_FOLDER [--split test] [--rounds 3] [--workers 1 2]

Both encode the whole collection, in turns, in one process; the model is the packaged all-MiniLM-L6-v2. Then a stage
encodes it in shards on pools of Ray workers that share the machine's cores. Bounds on a CPU: at least 2.5 times the
passages per second, alone (the median of the rounds' ratios) and on each pool, and nDCG@10 that differs by at most 0.001.
On a machine with a GPU the peer is the best of several batch sizes, under autocast or with weights in bfloat16, and the
bound is 0.95 of it for each GPU.
Writes benchmarks/speed/encoding.md.
"""

import copy
import os
import sys
import tempfile
import time
from statistics import median
from typing import Any

import ir_measures
import numpy as np
import torch  # noqa: TID253

from benchmarks.harness import Benchmark
from dagr_ray.core import ray_start
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.tables import passage_text
from dagr_ray.formats import beir
from dagr_ray.miners.dense import Dense
from dagr_ray.quickstart.models import minilm
from dagr_ray.retrieval import encoder
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.retrieval.vectors import VectorIndex
from dagr_ray.stages.retrieve import Index
from dagr_ray.stages.sources import Beir

BOUND, SAME = 2.5, 0.001
GPU_BOUND, GPU_BATCHES = 0.95, (64, 256, 1024, 4096)
SHARD_ROWS = 4  # 128 passages a shard: enough to sort by length, and few enough that workers end together


def theirs(model: Any, texts: list[str]) -> tuple[np.ndarray, float]:
    """Vectors of the library's own loop, and seconds: on a GPU the best of many ways, of which the first gives the vectors."""
    ways: list[tuple[Any, bool, int]] = [(model, False, 32)]
    if torch.cuda.is_available():
        models = ((model, True), (copy.deepcopy(model).bfloat16(), False))
        ways = [(each, auto, batch) for each, auto in models for batch in GPU_BATCHES]
    best, vectors = float("inf"), np.empty(0)
    for each, auto, batch in ways:
        began = time.perf_counter()
        try:
            with torch.autocast("cuda", torch.bfloat16, enabled=auto):
                found = each.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)
        except torch.cuda.OutOfMemoryError:
            continue
        best = min(best, time.perf_counter() - began)
        vectors = vectors if len(vectors) else found
    return vectors, best


def ours(model: Any, texts: list[str]) -> tuple[np.ndarray, float]:
    """Vectors of `retriever.encode`, and seconds."""
    began = time.perf_counter()
    vectors = encoder.encode(model, texts)
    return vectors, time.perf_counter() - began


def ndcg(
    data: beir.BeirData, split: str, ids: list[str], passages: np.ndarray, queries: dict[str, np.ndarray]
) -> float:
    """nDCG@10 of exact search."""
    qrels = [ir_measures.Qrel(*row.values()) for row in data.tables[f"qrels.{split}"].to_pylist()]
    asked = sorted({row.query_id for row in qrels} & queries.keys())
    hits = VectorIndex(ids, passages).search(np.stack([queries[q] for q in asked]), 100)
    run = [
        ir_measures.ScoredDoc(q, d, float(-rank))
        for q, found in zip(asked, hits, strict=True)
        for rank, (d, _) in enumerate(found)
    ]
    return float(ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10])


def staged(path: str, workers: int, home: str) -> float:
    """Passages per second of the stage on so many workers, from its first shard to its last."""
    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    each = max(cores // workers, 1)
    pool = Pool(workers=workers, cpus=each, gpus=min(gpus / workers, 1), shard_rows=SHARD_ROWS)
    stage = Index(corpus=Beir(path=path), miner=Dense(encoder=Encoder(model=str(minilm()))))
    folder = materialize(stage, f"{home}/{workers}", Placement(retrieve=pool))
    receipts = folder.receipts().values()
    begun = min(receipt["at"] - receipt["cost"]["busy_s"] for receipt in receipts)
    return sum(receipt["counts"]["in"] for receipt in receipts) / (max(r["at"] for r in receipts) - begun)


def main() -> int:
    """Prints figures and bounds."""
    bench = Benchmark(__file__, __doc__)
    bench.add("data", free=True, metavar="BEIR_FOLDER")
    bench.add("--split", default="test")
    bench.add("--rounds", type=int, default=3)
    bench.add("--workers", type=int, nargs="*", default=[1, 2])
    args = bench.parse()
    data = beir.read(args.data)
    corpus, asked = data.tables["corpus"].to_pylist(), data.tables["queries"].to_pylist()
    texts = [passage_text(row["title"], row["text"]) for row in corpus]
    model = encoder.load(Encoder(model=str(minilm())))
    found = {}
    for encode in (theirs, ours):
        encode(model, texts[:64])
    ratios, rates = [], {theirs: 0.0, ours: 0.0}
    for _ in range(args.rounds):
        seconds = {}
        for encode in (theirs, ours):
            found[encode], seconds[encode] = encode(model, texts)
            rates[encode] = max(rates[encode], len(texts) / seconds[encode])
        ratios.append(seconds[theirs] / seconds[ours])
    values = {}
    for encode, passages in found.items():
        vectors, _ = encode(model, [row["text"] for row in asked])
        queries = dict(zip((row["query_id"] for row in asked), vectors, strict=True))
        values[encode] = ndcg(data, args.split, [row["doc_id"] for row in corpus], passages, queries)
    gpu = torch.cuda.is_available()
    bound, ratio, off = GPU_BOUND if gpu else BOUND, median(ratios), abs(values[ours] - values[theirs])
    name = Beir(path=args.data).label()
    bench.say(
        f"{len(texts):,} passages of {name}, {args.rounds} rounds, {'one GPU' if gpu else f'{os.cpu_count()} cores'}.\n"
    )
    bench.say("| | passages/s, best | ratio | nDCG@10 |\n|---|---:|---:|---:|")
    bench.say(f"| `SentenceTransformer.encode` | {rates[theirs]:.1f} | 1.00 | {values[theirs]:.4f} |")
    bench.say(f"| `retriever.encode` | {rates[ours]:.1f} | {ratio:.2f} | {values[ours]:.4f} |")
    bench.say(f"| bound | | {bound} | ±{SAME} |")
    bench.say(f"\nRatios of the rounds: {', '.join(f'{r:.2f}' for r in ratios)}.")
    bench.bound("ratio", ratio, at_least=bound)
    bench.bound("difference of nDCG@10", off, at_most=SAME)
    if args.workers:
        bench.say("\n| stage on Ray workers | passages/s |\n|---:|---:|")
        ray_start.connect()
        with tempfile.TemporaryDirectory(prefix="dagr-encoding-") as home:
            for workers in args.workers:
                rate = staged(args.data, workers, home)
                bench.say(f"| {workers} | {rate:.1f} |")
                least = GPU_BOUND * min(workers, torch.cuda.device_count()) if gpu else BOUND
                bench.bound(f"passages/s on {workers} workers", rate, at_least=least * rates[theirs])
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
