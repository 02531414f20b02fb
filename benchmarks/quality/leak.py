"""What the leak gate finds of planted leaks, and how many real training queries it refuses for nothing.

    python -m benchmarks.quality.leak [DIR ...] [--no-embedding]

Plants copies of the test queries of PyDocs, and of each BEIR folder DIR, in eight forms. One word replaced: any but the one
that tells most, because with that one replaced the question is another; that case has a row of its own, and so has one word
replaced where the others are in another order. Translations are of 40 PyDocs queries into German and French
(benchmarks/quality/leak_translated.jsonl, by a language model).

False alarms: training and dev queries that are refused, though they have no relevant passage in common with the
test query that they resemble and other words. Bounds: recall at least 0.99 for the first four and 0.9 for the fifth,
false alarms at most 0.5 % over all folders together. Seconds are for comparing 1,000 training queries with the test queries:
by words alone, and with the frozen base's embeddings. Writes benchmarks/quality/leak.md.
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.harness import Benchmark
from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.stage import Stage
from dagr_ray.core.words import words
from dagr_ray.leakage import minhash
from dagr_ray.leakage.matching import EQUAL, FLOORS, MECHANISMS, HeldOut, Matches, SharedAnswers, WordInformation
from dagr_ray.quickstart.models import minilm
from dagr_ray.retrieval import encoder
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.leakage import PASSAGES, LeakGate
from dagr_ray.stages.sources import Beir, PyDocs

BOUNDS = {
    "exact": 0.99,
    "case and signs": 0.99,
    "reordered": 0.99,
    "one word replaced": 0.99,
    "inside a longer query": 0.9,
}
REPORTED = ("reordered, one word replaced", "its most telling word replaced", "translated")
FALSE_ALARMS = 0.005
LEAST = {name: LeakGate.model_fields[name].default for name in FLOORS}
TRANSLATED = Path(__file__).with_name("leak_translated.jsonl")


class Set:
    """A collection: its queries by split, the passages relevant to each, and its test queries as held-out texts."""

    def __init__(self, stage: Stage, runs: str, model: object) -> None:
        folder: Artifact = materialize(stage, runs)
        self.name = stage.label() if isinstance(stage, Beir) else f"pydocs-{stage.label()}"
        rows = folder.read("queries").to_pylist()
        text_of = {row["query_id"]: row["text"] for row in rows}
        self.relevant: dict[str, set[str]] = {}
        splits: dict[str, list[str]] = {"test": [], "train": [], "dev": []}
        for split, ids in splits.items():
            if f"qrels.{split}" in folder.table_names():
                judged = folder.read(f"qrels.{split}").to_pylist()
                ids += dict.fromkeys(row["query_id"] for row in judged)
                for row in judged:
                    if row["relevance"] > 0:
                        self.relevant.setdefault(row["query_id"], set()).add(row["doc_id"])
        self.test = splits["test"]
        self.train = [*splits["train"], *splits["dev"]]
        self.texts = [text_of[i] for i in self.test]
        self.asked = [text_of[i] for i in self.train]
        self.model = model
        passages = folder.slice("corpus", 0, PASSAGES).to_pylist()
        bodies = [tables.passage_text(row["title"], row["text"]) for row in passages]
        self.telling = WordInformation(minhash.split_words(_array(self.texts)), [minhash.split_words(_array(bodies))])
        self.held = HeldOut(_array(self.texts), telling=self.telling, vectors=self.encoded(self.texts))

    def encoded(self, texts: list[str]) -> minhash.Floats | None:
        return encoder.encode(self.model, texts) if self.model is not None and texts else None

    def find_similar(self, texts: list[str], by_meaning: bool, about: SharedAnswers | None = None) -> Matches:
        return self.held.find_similar(_array(texts), self.encoded(texts) if by_meaning else None, about)

    def found(self, texts: list[str], by_meaning: bool) -> Matches:
        return self.find_similar(texts, by_meaning).over(LEAST)

    def bits(self) -> Iterator[list[float]]:
        """What each word of each test query tells."""
        split = minhash.split_words(_array(self.texts))
        bits = self.telling.of(split)
        for start, stop in zip(split.starts[:-1], split.starts[1:], strict=True):
            yield bits[start:stop].tolist()


def _array(texts: list[str]) -> pa.Array:
    return pa.array(texts, tables.TEXT)


def planted(data: Set, form: str, rng: random.Random) -> list[str]:
    """What is planted for the test queries."""
    others = [word for text in data.asked or data.texts for word in words(text)]
    made: list[str] = []
    if form == "translated":
        rows = map(json.loads, TRANSLATED.read_text().splitlines())
        return [row["text"] for row in rows if row["query_id"] in data.test and data.name == "pydocs-stdlib"]
    for text, bits in zip(data.texts, data.bits(), strict=True):
        found = words(text)
        if len(bits) != len(found) or not found:
            continue  # a text whose words change by folding
        if form == "exact":
            made.append(text)
        elif form == "case and signs":
            made.append(", ".join(found).upper() + " ?!")
        elif form == "reordered":
            made.append(" ".join(rng.sample(found, len(found))))
        elif form == "inside a longer query":
            made.append(" ".join([*rng.choices(others, k=3), *found, *rng.choices(others, k=3)]))
        else:
            most = max(bits)
            telling = form.startswith("its most")
            places = [j for j, value in enumerate(bits) if (value >= most) == telling]
            if places:
                at = rng.choice(places)
                other = rng.choice(
                    [word for word in rng.choices(others, k=20) if word.casefold() != found[at].casefold()]
                )
                edited = [*found[:at], other, *found[at + 1 :]]
                made.append(" ".join(rng.sample(edited, len(edited)) if form.startswith("reordered") else edited))
    return made


def recall(data: Set, form: str) -> tuple[int, int, Counter[str]]:
    """Planted texts, those of them that are found, and how they are found."""
    made = planted(data, form, random.Random(7))
    found = data.found(made, by_meaning=form == "translated")  # the others are found without
    hit = {int(row): MECHANISMS[how] for row, how in zip(found.rows[::-1], found.how[::-1], strict=True)}
    return len(made), len(hit), Counter(hit.values())


def alarms(data: Set) -> tuple[int, int, int, Counter[str]]:
    """Real training queries, those that are refused, those of them for nothing, and the mechanisms of these."""
    passages = {passage: place for place, passage in enumerate(sorted(set().union(*data.relevant.values())))}
    made_of, answers = (
        np.array([(i, passages[p]) for i, q in enumerate(ids) for p in data.relevant.get(q, ())], np.int64)
        for ids in (data.train, data.test)
    )
    about = SharedAnswers(*made_of.reshape(-1, 2).T, *answers.reshape(-1, 2).T)
    found = data.find_similar(data.asked, by_meaning=True, about=about).over(LEAST)
    refused, false = set(), Counter[int]()
    by = Counter[str]()
    for row, other, how in zip(found.rows.tolist(), found.held_out.tolist(), found.how.tolist(), strict=True):
        refused.add(row)
        shared = data.relevant.get(data.train[row], set()) & data.relevant.get(data.test[other], set())
        if how >= EQUAL and not shared:
            false[row] += 1
            by[MECHANISMS[how]] += 1
    return len(data.asked), len(refused), len(false), by


def cost(data: Set) -> str:
    """Seconds for 1,000 of the training queries, by words and with embeddings."""
    spent = []
    for by_meaning in (False, True) if data.model is not None else (False,):
        began = time.perf_counter()
        data.found(data.asked, by_meaning)
        spent.append(f"{(time.perf_counter() - began) / len(data.asked) * 1000:.2f}")
    return " and ".join(spent)


def main() -> int:
    """Prints and writes the tables."""
    bench = Benchmark(__file__, __doc__)
    bench.add("folders", free=True, nargs="*", metavar="DIR")
    bench.add("--no-embedding", action="store_true")
    args = bench.parse()
    model = None if args.no_embedding else encoder.load(Encoder(model=str(minilm()), max_length=64))
    with tempfile.TemporaryDirectory() as runs:
        stages: list[Stage] = [PyDocs(part="stdlib"), PyDocs(part="numeric"), *(Beir(path=d) for d in args.folders)]
        sets = [Set(stage, runs, model) for stage in stages]
    bench.say(f"Thresholds: {', '.join(f'{k} {v}' for k, v in LEAST.items())}.\n")
    planted = []
    for form in (*BOUNDS, *REPORTED):
        counted = [recall(data, form) for data in sets]
        made, hit = sum(c[0] for c in counted), sum(c[1] for c in counted)
        by = sum((c[2] for c in counted), Counter[str]())
        bound = BOUNDS.get(form)
        if bound is not None:
            bench.bound(f"recall of {form}", hit / made, at_least=bound)
        cells = [f"{c[1] / c[0]:.3f}" if c[0] else "" for c in counted]
        how = ", ".join(f"{name} {count:,}" for name, count in by.most_common())
        planted.append([form, *cells, f"{hit / made:.4f}", bound or "none", how])
    bench.table(["planted", *(s.name for s in sets), "all", "bound", "found by"], planted, left=(0, -1))
    real = [(data, *alarms(data)) for data in sets if data.asked]
    if real:
        refusals = []
        for data, rows, refused, false, by in real:
            how = ", ".join(f"{name} {count:,}" for name, count in by.most_common())
            share = f"{false / rows:.2%}"
            refusals.append([data.name, f"{rows:,}", f"{refused:,}", f"{false:,}", share, cost(data), how])
        rows, refused, false = (sum(column) for column in list(zip(*real, strict=True))[1:4])
        bench.bound("false alarms", false / rows, at_most=FALSE_ALARMS)
        refusals.append(["all", f"{rows:,}", f"{refused:,}", f"{false:,}", f"{false / rows:.2%}", "", ""])
        head = [
            "training queries of",
            "queries",
            "refused",
            "for nothing",
            "share (bound 0.5 % of all)",
            "s per 1,000",
            "by",
        ]
        bench.say()
        bench.table(head, refusals, left=(0, -1))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
