"""The filter for near-duplicates over a whole data set: what it finds of planted ones, its memory and its speed.

    python -m benchmarks.speed.duplicates [--rows 1000000 10000000] [--by minhash] [--embedding 10000]

Queries of 6 to 14 words, some words frequent and two of them names, with 4 % copies of others anywhere in the data: as
they are, in other case, with a word more, with one replaced, in reverse order. Each size is scored by a process of its own
on two cores; peak memory is that process's, with Python and the libraries. Bounds: precision and recall at least 0.98 for
pairs of similarity 0.8 and more, at most 2 GiB at any size, at least 20,000 queries/s. Writes benchmarks/speed/duplicates.md.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.harness import Benchmark, in_own_process, peak_memory
from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.leakage.minhash import mix_bits
from dagr_ray.quickstart.models import minilm
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.score import Score

RECALL, PRECISION, GIB, RATE = 0.98, 0.98, 2.0, 20_000
SIMILARITY = 0.8
LONGEST, COMMON, NAMES, COPIES = 14, 4000, 300_000, 25  # one row in 25 is a copy
FORMS = ("as it is", "other case", "one word more", "one replaced", "reversed")
HERE = Placement(light=Pool(workers=0, shard_rows=250_000), retrieve=Pool(workers=0))
Numbers = npt.NDArray[np.int64]
Words = npt.NDArray[np.int64]


def hashed(*parts: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """A number of 64 bits from numbers, the same everywhere."""
    found: npt.NDArray[np.uint64] = np.zeros((), np.uint64)
    for part in parts:
        found = mix_bits(np.asarray(part).astype(np.uint64) + found * np.uint64(31) + np.uint64(17))
    return np.asarray(found)


def originals(rows: Numbers) -> Numbers:
    """For each row the row that it is a copy of, or itself."""
    other = (hashed(rows, 1) % np.maximum(rows, 1).astype(np.uint64)).astype(np.int64)
    is_copy = (hashed(rows, 2) % np.uint64(COPIES) == 0) & (hashed(other, 2) % np.uint64(COPIES) != 0) & (rows > 0)
    return np.where(is_copy, other, rows)


def written(rows: Numbers) -> tuple[Words, Numbers]:
    """Words [n, LONGEST] by number and how many of them each row has; frequent words come from a Zipf distribution."""
    count = (6 + hashed(rows, 3) % np.uint64(LONGEST - 5)).astype(np.int64)
    places = np.arange(LONGEST)
    unit = hashed(rows[:, None], 4, places[None, :]) / np.float64(2**64)
    words = (COMMON**unit).astype(np.int64)
    for place in (2, 4):
        words[:, place] = COMMON + (hashed(rows, 5, place) % np.uint64(NAMES)).astype(np.int64)
    return words, count


def forms(rows: Numbers) -> Numbers:
    return (hashed(rows, 6) % np.uint64(len(FORMS))).astype(np.int64)


def texts(rows: Numbers) -> tuple[pa.Array, Words, Numbers]:
    """The texts of rows, and their words as numbers."""
    of, form = originals(rows), forms(rows)
    words, count = written(of)
    copied = of != rows
    longer = copied & (form == 2)
    words[longer, np.minimum(count[longer], LONGEST - 1)] = COMMON + NAMES + 1
    count = np.where(longer, np.minimum(count + 1, LONGEST), count)
    words[copied & (form == 3), 0] = COMMON + NAMES + 2
    back = copied & (form == 4)
    inside = np.arange(LONGEST)[None, :] < count[:, None]
    turned = np.take_along_axis(words, np.maximum(count[:, None] - 1 - np.arange(LONGEST)[None, :], 0), 1)
    words = np.where(back[:, None], turned, words)
    known = pa.array([f"w{i:x}" for i in range(COMMON)] + [f"name{i:x}" for i in range(NAMES + 3)])
    starts = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    flat = known.take(pa.array(words[inside]))
    made = pc.binary_join(pa.ListArray.from_arrays(pa.array(starts), flat), " ")
    loud = pa.array(copied & (form == 1))
    made = pc.if_else(loud, pc.binary_join_element_wise(pc.utf8_upper(made), "?", " "), made)
    return made.cast(pa.large_string()), words, count


class GeneratedQueries(Stage):
    """Queries made by hash, with copies."""

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "benchmark-queries"
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels")
    rows: int

    def size(self, inputs: Inputs) -> int:
        return self.rows

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            rows = np.arange(start, stop)
            ids, docs = [f"q{i}" for i in rows.tolist()], [f"d{i // 3}" for i in rows.tolist()]
            made = {"queries": tables.columns("queries", len(rows), query_id=ids, text=texts(rows)[0])}
            made["qrels"] = tables.columns("qrels", len(rows), query_id=ids, doc_id=docs, relevance=1)
            return Output(made, counts={"in": len(rows), "out": len(rows)})

        return run


def alike(rows: Numbers) -> npt.NDArray[np.float64]:
    """The Jaccard similarity of each row to the row that it is a copy of."""
    found = []
    for start in range(0, len(rows), 100_000):
        some = rows[start : start + 100_000]
        (_, mine, count), (_, other, others) = texts(some), texts(originals(some))
        for a, n, b, m in zip(mine, count, other, others, strict=True):
            left, right = set(a[:n].tolist()), set(b[:m].tolist())
            found.append(len(left & right) / len(left | right))
    return np.array(found)


def score(rows: int, kind: Duplicate) -> Score:
    made = GeneratedQueries(rows=rows)
    return Score(parsed=made, corpus=made, filter=kind)


def kind_of(by: str) -> Duplicate:
    if by == "embedding":
        return Duplicate(by="embedding", encoder=Encoder(model=str(minilm()), max_length=32), similarity=0.95)
    return Duplicate.model_validate({"by": by})


def forget(runs: str, stage: Score) -> None:
    """Removes what an earlier measurement left."""
    for each in (stage, *stage.inputs().values()):
        if not isinstance(each, GeneratedQueries):
            shutil.rmtree(each.folder(runs).path, ignore_errors=True)


def measure(runs: str, rows: int, by: str) -> None:
    """In a process of its own: scores the queries, and prints seconds, those of its cores, and peak memory."""
    began = time.monotonic()
    materialize(score(rows, kind_of(by)), runs, HERE)
    seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "gib": peak_memory() / 2**30}))


def judged(runs: str, rows: int, by: str) -> dict[str, float]:
    """Recall of planted pairs, and the share of what is refused that is in a planted pair."""
    kind = kind_of(by)
    scores = np.concatenate(
        [part["score"].to_numpy() for part in score(rows, kind).folder(runs).scan("scores", ["score"])]
    )
    every = np.arange(rows)
    of = originals(every)
    copies = np.flatnonzero(of != every)
    planted = copies[alike(copies) >= SIMILARITY] if by != "embedding" else copies[forms(copies) < 2]
    refused = scores >= (SIMILARITY if by == "minhash" else kind.similarity if by == "embedding" else 1)
    if by not in ("minhash", "embedding"):
        planted = copies[forms(copies) < 2]
    member = np.zeros(rows, bool)
    member[copies] = member[of[copies]] = True
    hit = refused[planted] | refused[of[planted]]
    return {
        "planted": len(planted),
        "recall": hit.mean(),
        "precision": member[refused].mean(),
        "refused": refused.sum(),
    }


def main() -> int:
    """Prints and writes the table."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--rows", type=int, nargs="*", default=[1_000_000, 10_000_000])
    bench.add("--by", nargs="*", default=["minhash"])
    bench.add("--embedding", type=int, default=10_000, help="rows to compare by cosine; 0 for none")
    bench.add("--runs", free=True, help="keep the generated queries here, for the next time")
    bench.add("--measure", nargs=3, metavar=("RUNS", "ROWS", "BY"), help=argparse.SUPPRESS)
    args = bench.parse()
    if args.measure:
        measure(args.measure[0], int(args.measure[1]), args.measure[2])
        return 0
    head = ["queries", "by", "planted", "recall", "precision", "queries/s", "for a second of one core", "peak GiB"]
    bench.table(head, [["", "bound", "", RECALL, PRECISION, f"{RATE:,} (not embedding)", "", GIB]], left=(1,))
    cores = set(sorted(os.sched_getaffinity(0))[:2])
    cases = [(rows, by) for rows in args.rows for by in args.by]
    cases += [(args.embedding, "embedding")] if args.embedding else []
    for rows, by in cases:
        with tempfile.TemporaryDirectory() as scratch:
            runs = args.runs or scratch
            forget(runs, score(rows, kind_of(by)))
            materialize(GeneratedQueries(rows=rows), runs, HERE)
            words = ["--measure", runs, str(rows), by]
            spent = in_own_process(__file__, *words, preexec_fn=lambda: os.sched_setaffinity(0, cores))
            found = judged(runs, rows, by)
        rate = rows / spent["seconds"]
        what = f"{rows:,} rows by {by}"
        bench.bound(f"{what}: peak GiB", spent["gib"], at_most=GIB)
        if by != "embedding":  # made-up words mean nothing: only its speed and memory are told
            bench.bound(f"{what}: recall", found["recall"], at_least=RECALL)
            bench.bound(f"{what}: precision", found["precision"], at_least=PRECISION)
            bench.bound(f"{what}: queries/s", rate, at_least=RATE)
        bench.say(
            f"| {rows:,} | {by} | {found['planted']:,} | {found['recall']:.4f} | {found['precision']:.4f} | {rate:,.0f} | "
            f"{rows / spent['cpu']:,.0f} | {spent['gib']:.2f} |"
        )
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
