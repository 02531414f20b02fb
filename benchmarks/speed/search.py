"""Exact search beside the machine's own matrix product, and approximate search beside exact, on made-up vectors.

    python -m benchmarks.speed.search [--vectors 1000000] [--queries 10000] [--rounds 2] [--approximate 100000]

Vectors of 384 dimensions in 2,000 clusters, read from disk as a search reads them; the best 100 of each query. The
product is that of the same numbers in float32 by the faster of NumPy's and PyTorch's libraries, measured before and after
each search on a part of the queries; faiss's own exact search stands beside them. A sample of queries is compared with
scores in float64. Bound: the search, everything included, does at least 0.9 of the product's operations per second.
Writes benchmarks/speed/search.md.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import faiss  # noqa: TID253
import numpy as np
import torch  # noqa: TID253

from benchmarks.harness import Benchmark
from dagr_ray.retrieval import approximate
from dagr_ray.retrieval.approximate import Hnsw, IvfPq
from dagr_ray.retrieval.vectors import BLOCK_ROWS, VectorIndex, VectorWriter

BOUND, DIMENSION, CLUSTERS, K = 0.9, 384, 2000, 100
SAMPLE = 50


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def drawn(rng: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    """Vectors around centres: two of one cluster have a cosine of about 0.5, two others of about 0.1."""
    return unit(
        centres[rng.integers(len(centres), size=count)] + unit(rng.standard_normal((count, DIMENSION), np.float32))
    )


def product_rate(queries: np.ndarray, index: VectorIndex) -> float:
    """Operations per second of the product of queries and all vectors, by the faster library; only products are timed."""
    best = []
    for multiply in (np.matmul, _torch):
        spent, done = 0.0, 0
        for block in index.blocks(BLOCK_ROWS // 4):
            right = np.ascontiguousarray(block.T) if multiply is np.matmul else block.T
            began = time.perf_counter()
            multiply(queries, right)
            spent += time.perf_counter() - began
            done += 2 * queries.shape[0] * block.shape[0] * DIMENSION
        best.append(done / spent)
    return max(best)


def _torch(left: np.ndarray, right: np.ndarray) -> None:
    torch.mm(torch.from_numpy(left), torch.from_numpy(right))


def faiss_rate(queries: np.ndarray, index: VectorIndex) -> float:
    """The same of faiss.knn, block by block, without merging."""
    spent, done = 0.0, 0
    for block in index.blocks():
        began = time.perf_counter()
        faiss.knn(queries, block, K, metric=faiss.METRIC_INNER_PRODUCT)
        spent += time.perf_counter() - began
        done += 2 * queries.shape[0] * block.shape[0] * DIMENSION
    return done / spent


def wrong(queries: np.ndarray, index: VectorIndex) -> int:
    """Queries of a sample whose hits are not the best that there are."""
    truth = np.concatenate(
        [queries.astype(np.float64) @ block.T.astype(np.float64) for block in index.blocks()], axis=1
    )
    best = -np.sort(-truth, axis=1)[:, :K]
    found = [[score for _, score in hits] for hits in index.search(queries, K)]
    named = [[truth[i, int(doc_id)] for doc_id, _ in hits] for i, hits in enumerate(index.search(queries, K))]
    return int((~(np.isclose(found, best, atol=3e-6) & np.isclose(named, best, atol=3e-6)).all(axis=1)).sum())


def approximated(queries: np.ndarray, index: VectorIndex, exact_s: float) -> list[str]:
    """Rows for the approximate methods: what they find, and how fast."""
    truth, lines = index.search(queries, K), []
    for method in (IvfPq(), Hnsw()):
        with tempfile.TemporaryDirectory(prefix="dagr-search-") as folder:
            began = time.perf_counter()
            approximate.write(method, index, Path(folder))
            built = time.perf_counter() - began
            find = approximate.opened(method, index, Path(folder) / approximate.FILE)
            began = time.perf_counter()
            hits = find(queries, K)
            rate = len(queries) / (time.perf_counter() - began)
            found = approximate.recall(hits, truth)
            size = (Path(folder) / approximate.FILE).stat().st_size / len(index)
        lines.append(
            f"| `{method.type}` | {found:.3f} | {rate:,.0f} | {len(queries) / exact_s:,.0f} | {built:.0f} | {size:.0f} |"
        )
    return lines


def main() -> int:
    """Prints figures and bound."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--vectors", type=int, default=1_000_000)
    bench.add("--queries", type=int, default=10_000)
    bench.add("--rounds", type=int, default=2)
    bench.add("--approximate", type=int, default=100_000, help="vectors for the approximate methods; 0: none")
    args = bench.parse()
    rng = np.random.default_rng(0)
    centres = unit(rng.standard_normal((CLUSTERS, DIMENSION), np.float32) + 0.35 * rng.standard_normal(DIMENSION))
    with tempfile.TemporaryDirectory(prefix="dagr-search-") as home:
        with VectorWriter(Path(home), DIMENSION) as writer:
            for start in range(0, args.vectors, BLOCK_ROWS):
                count = min(BLOCK_ROWS, args.vectors - start)
                writer.add([str(i) for i in range(start, start + count)], drawn(rng, centres, count))
        index, queries = VectorIndex.open(Path(home)), drawn(rng, centres, args.queries)
        part = queries[: max(args.queries // 5, 1)]
        index.search(part[:64], K)
        work = 2.0 * args.queries * args.vectors * DIMENSION
        rates, seconds, before = [], [], product_rate(part, index)
        for _ in range(args.rounds):
            began = time.perf_counter()
            index.search(queries, K)
            seconds.append(time.perf_counter() - began)
            after = product_rate(part, index)
            rates.append((work / seconds[-1]) / ((before + after) / 2))
            before = after
        other = faiss_rate(part[:1000], index)
        bad = wrong(queries[:SAMPLE], index)
        share = median(rates)
        bench.say(
            f"{args.queries:,} queries over {args.vectors:,} vectors of {DIMENSION} dimensions, the best {K}, exact.\n"
        )
        bench.say("| | operations/s | of the product's | bound |\n|---|---:|---:|---:|")
        bench.say(f"| float32 product | {before / 1e9:.0f} G | 1.00 | |")
        bench.say(
            f"| this search, {median(seconds):.1f} s | {work / median(seconds) / 1e9:.0f} G | {share:.2f} | {BOUND} |"
        )
        bench.say(f"| `faiss.knn` | {other / 1e9:.0f} G | {other / before:.2f} | |")
        bench.say(
            f"\nRatios of the rounds: {', '.join(f'{r:.2f}' for r in rates)}. Wrong among {SAMPLE} queries: {bad}."
        )
        if args.approximate:
            few = VectorIndex([str(i) for i in range(args.approximate)], index.rows(0, args.approximate))
            some = queries[:1000]
            began = time.perf_counter()
            few.search(some, K)
            exact_s = time.perf_counter() - began
            bench.say(f"\nApproximate search of {args.approximate:,} of them:\n")
            bench.say(
                f"| | recall@{K} | queries/s | exact: queries/s | s to build | bytes a vector |\n|---|---:|---:|---:|---:|---:|"
            )
            for line in approximated(some, few, exact_s):
                bench.say(line)
    bench.bound("share of the product's operations", share, at_least=BOUND)
    bench.bound("wrong queries", bad, at_most=0)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
