"""Memory and time of the leak scan and of the filter for near-duplicates on passages that have most of their words in common.

    python -m benchmarks.speed.boilerplate [--rows 5000 10000 20000] [--kinds closing ...]

Kinds: an own sentence with 60 closing words; own words with a disclaimer of 300; code under a licence of 200 words; tables of 20
attributes with six values each; one template with two names; 20 paragraphs of 30 words, ten of them each in an order of its own;
and the first kind with one passage of 4 MB that repeats itself. As many passages are trained on as are held out, other ones,
but for one in a hundred: equal, with a word replaced, or with the first words moved to the end. Their queries are a
template, too, and one in a hundred is a test query with a word added.

Each measurement is a process of its own that does all the work itself (no workers); peak memory is the kernel's high-water
mark of what that program held (VmHWM; ru_maxrss would count what its parent held, too). Bounds: at most 2 GiB; time grows with
the rows to the power of at most 1.3; all planted passages and queries are found by the leak scan, and the score of a planted
near-duplicate is at least its similarity for 0.98 of them. Writes benchmarks/speed/boilerplate.md.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from typing import ClassVar

import numpy as np

from benchmarks.harness import Benchmark, in_own_process, peak_memory
from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.stages.leakage import LeakScan
from dagr_ray.stages.score import Score

GIB, EXPONENT, RECALL, DUPLICATES = 2.0, 1.3, 1.0, 0.98
ONE_IN = 100
HERE = Placement(light=Pool(workers=0), retrieve=Pool(workers=0))
CLOSING = " ".join(f"clause{i}" for i in range(60))
DISCLAIMER = " ".join(f"term{i % 170}of{i // 170}" for i in range(300))
LICENCE = " ".join(f"licensed{i}" for i in range(200))
KEYWORDS = "def return self if else for in import from class not none true false raise with as try except value".split()
VALUES = [[f"value{column}of{i}" for i in range(6)] for column in range(20)]
PARAGRAPHS = [" ".join(f"p{k}w{j}" for j in range(30)) for k in range(20)]


def own(kind: str, part: str, row: int) -> str:
    """The text of a passage."""
    rng = random.Random(f"{kind} {part} {row}")
    name = f"{part}{row}"
    sentence = f"Contract {name} covers item {name}x{row % 97} in hall {part}{row // 3} of building {row % 53}."
    if kind == "disclaimer":
        return f"{sentence} {' '.join(f'word{rng.randrange(3000)}' for _ in range(30))} {DISCLAIMER}"
    if kind == "licence":
        code = " ".join(f"{rng.choice(KEYWORDS)} v{rng.randrange(40)}" for _ in range(50))
        return f"{LICENCE} def {name}_run {code}"
    if kind == "table":
        return " ".join(f"attribute{column} {rng.choice(values)}" for column, values in enumerate(VALUES))
    if kind == "template":
        return f"The size of the part {row % 977} of the {name} is given in the manual of the maker, page {row % 53}."
    if kind == "paragraphs":
        return " ".join(PARAGRAPHS[i] for i in rng.sample(range(20), 10))
    if kind == "4MB" and row == 1:
        return " ".join([f"{sentence} {CLOSING}"] * (4_000_000 // len(f"{sentence} {CLOSING}")))
    return f"{sentence} {CLOSING}."


KINDS = ("closing", "disclaimer", "licence", "table", "template", "paragraphs", "4MB")


def copied(text: str, row: int) -> str:
    """What is planted for a text: equal, with its first word replaced, or with its first words at the end."""
    words, form = text.split(), row // ONE_IN % 3
    return text if form == 0 else " ".join(["another", *words[1:]] if form == 1 else [*words[5:], *words[:5]])


class Collection(Stage):
    """Passages with a query each. One in a hundred is copied: out of ``part`` "test" in "train", out of the next in "doubled"."""

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "benchmark-boilerplate"
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "queries", "qrels")
    kind: str
    part: str
    rows: int

    def text(self, row: int) -> str:
        if row % ONE_IN or self.part == "test":
            return own(self.kind, self.part, row)
        return copied(own(self.kind, "test", row) if self.part == "train" else self.text(row + 1), row)

    def query(self, row: int) -> str:
        asked = f"which hall of the building has the item {{0}}x{row % 97} of contract {{0}}"
        copy = row % ONE_IN == 0 and self.part != "test"
        return asked.format(f"test{row}") + " now" if copy else asked.format(f"{self.part}{row}")

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            every = range(self.rows)
            texts, ids, docs = [self.text(i) for i in every], [f"q{i}" for i in every], [f"d{i}" for i in every]
            asked = texts if self.part == "doubled" else [self.query(i) for i in every]
            made = {"queries": tables.columns("queries", self.rows, query_id=ids, text=asked)}
            made["corpus"] = tables.columns("corpus", self.rows, doc_id=docs, title="", text=texts)
            for name in ("qrels", "qrels.test"):
                made[name] = tables.columns("qrels", self.rows, query_id=ids, doc_id=docs, relevance=1)
            return Output(made, counts={"in": self.rows, "out": self.rows})

        return run


def stage_of(task: str, kind: str, rows: int) -> LeakScan | Score:
    if task == "duplicates":
        made = Collection(kind=kind, part="doubled", rows=rows)
        return Score(parsed=made, corpus=made, filter=Duplicate(by="minhash"))
    train = Collection(kind=kind, part="train", rows=rows)
    return LeakScan(selected=train, corpus=train, held_out=(Collection(kind=kind, part="test", rows=rows),))


def measure(runs: str, task: str, kind: str, rows: int) -> None:
    """In a process of its own: prints seconds and peak memory."""
    began = time.monotonic()
    materialize(stage_of(task, kind, rows), runs, HERE)
    seconds = time.monotonic() - began
    print(json.dumps({"seconds": seconds, "gib": peak_memory() / 2**30}))


def found(runs: str, task: str, kind: str, rows: int) -> float:
    """The share of what was planted that was found."""
    folder = stage_of(task, kind, rows).folder(runs)
    planted = range(0, rows, ONE_IN)
    if task == "duplicates":
        scores = folder.read("scores")["score"].to_numpy()
        made = Collection(kind=kind, part="doubled", rows=rows)
        pairs = [(set(made.text(i).casefold().replace(".", "").split()), i) for i in planted]
        others = [set(made.text(i + 1).casefold().replace(".", "").split()) for i in planted]
        alike = [len(a & b) / len(a | b) for (a, _), b in zip(pairs, others, strict=True)]
        return float(
            np.mean([max(scores[i], scores[i + 1]) >= s - 0.02 for (_, i), s in zip(pairs, alike, strict=True)])
        )
    leaks = folder.read("leaks", ["id", "kind", "held_out_id"]).to_pylist()
    hits = {(row["kind"], row["id"], row["held_out_id"]) for row in leaks}
    wanted = [("positive-passage", f"q{i}", f"d{i}") for i in planted]
    wanted += [("query-query", f"q{i}", f"q{i}") for i in planted]
    return sum(each in hits for each in wanted) / len(wanted)


def main() -> int:
    """Prints and writes the table."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--rows", type=int, nargs="*", default=[5_000, 10_000, 20_000])
    bench.add("--kinds", nargs="*", default=KINDS, choices=KINDS)
    bench.add("--measure", nargs=4, metavar=("RUNS", "TASK", "KIND", "ROWS"), help=argparse.SUPPRESS)
    args = bench.parse()
    if args.measure:
        runs, task, kind, rows = args.measure
        measure(runs, task, kind, int(rows))
        return 0
    sizes = sorted(args.rows)
    columns = [f"{what}, {n:,}" for n in sizes for what in ("s", "GiB", "found")]
    bounds = ["", f"{GIB:g}", f"{RECALL:g} or {DUPLICATES:g}"] * len(sizes)
    bench.table(["", "passages", *columns, "exponent"], [["bound", "", *bounds, f"{EXPONENT:g}"]], left=(0, 1))
    for task in ("leak scan", "duplicates"):
        for kind in args.kinds:
            cells, seconds = [], []
            for rows in sizes:
                with tempfile.TemporaryDirectory() as runs:
                    for made in stage_of(task, kind, rows).inputs().values():
                        if isinstance(made, Collection):
                            materialize(made, runs, HERE)
                    spent = in_own_process(__file__, "--measure", runs, task, kind, str(rows))
                    share = found(runs, task, kind, rows)
                seconds.append(spent["seconds"])
                what = f"{task}, {kind}, {rows:,} rows"
                bench.bound(f"{what}: GiB", spent["gib"], at_most=GIB)
                bench.bound(f"{what}: found", share, at_least=RECALL if task == "leak scan" else DUPLICATES)
                cells += [f"{spent['seconds']:.1f}", f"{spent['gib']:.2f}", f"{share:.3f}"]
            grown = math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0]) if len(sizes) > 1 else 0.0
            bench.bound(f"{task}, {kind}: exponent", grown, at_most=EXPONENT)
            bench.say(f"| {task} | {kind} | {' | '.join(cells)} | {grown:.2f} |")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
