"""Attention re-ranking of BM25's first 40: contrastive retrieval heads against all heads, and what leaving layers out saves.

    python -m benchmarks.quality.attention_rerank [FOLDER ...] [--find 24] [--queries 40] [--depth 40] [--json FILE]

On the quick start's corpus and on any BEIR folder given. Heads are found on dev queries (train ones where there is no dev split),
whose relevant passage BM25 has among its first 40, with the others as hard negatives, at the temperature that sets heads apart best
there; test queries are re-ranked. Time is that of re-ranking alone, in one process, both ways in turns, query by query.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Benchmark
from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.stage import Stage
from dagr_ray.miners.bm25 import BM25
from dagr_ray.quickstart.models import smollm2
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.sources import Beir, PyDocs
from dagr_ray.teachers import QueryPassage
from dagr_ray.teachers.attention_rerank import (
    AttentionRerank,
    AttentionSession,
    Head,
    LabelledQuery,
    best_heads,
    head_scores,
)

TEMPERATURES = (0.0001, 0.001, 0.01, 0.1)
KEEP = 8


def ndcg(ranked: list[str], grades: dict[str, int], k: int = 10) -> float:
    """nDCG@k as trec_eval has it."""
    discounts = 1 / np.log2(np.arange(2, k + 2))
    gains = np.array([max(grades.get(doc, 0), 0) for doc in ranked[:k]], float)
    ideal = np.array(sorted((g for g in grades.values() if g > 0), reverse=True)[:k], float)
    return float(gains @ discounts[: len(gains)] / (ideal @ discounts[: len(ideal)])) if len(ideal) else 0.0


def first_hits(
    data: Stage, split: str, depth: int, runs: str
) -> tuple[list[list[QueryPassage]], dict[str, dict[str, int]]]:
    """The pairs of each query of a split in BM25's order, and its grades."""
    found = materialize(Search(index=Index(corpus=data, miner=BM25()), queries=data, split=split, depth=depth), runs)
    folder = materialize(data, runs)
    text_of = {row["query_id"]: row["text"] for row in folder.read("queries").to_pylist()}
    passage_of = {r["doc_id"]: tables.passage_text(r["title"], r["text"]) for r in folder.read("corpus").to_pylist()}
    grades: dict[str, dict[str, int]] = {}
    for row in folder.read(f"qrels.{split}").to_pylist():
        grades.setdefault(row["query_id"], {})[row["doc_id"]] = row["relevance"]
    hits: dict[str, list[QueryPassage]] = {}
    for row in found.read("candidates").to_pylist():
        query_id, doc_id = row["query_id"], row["doc_id"]
        hits.setdefault(query_id, []).append(QueryPassage(query_id, text_of[query_id], doc_id, passage_of[doc_id]))
    order = sorted(hits, key=lambda q: tables.unit_of("benchmark", q))
    return [hits[query_id] for query_id in order], grades


def heads_of(session: AttentionSession, sample: list[LabelledQuery]) -> tuple[tuple[Head, ...], float, np.ndarray]:
    """The heads, the temperature that they were found at, and their scores."""
    measured = [(session.masses(each.pairs), each) for each in sample]
    best: tuple[float, float, np.ndarray] | None = None
    for temperature in TEMPERATURES:
        scores = head_scores(measured, temperature)
        top = np.argsort(-scores, axis=None, kind="stable")[:KEEP]
        masses = [(found.reshape(-1, found.shape[-1])[top].sum(axis=0), each) for found, each in measured]
        reached = float(np.mean([ndcg(_ranked(m, e.pairs), dict.fromkeys(e.relevant, 1)) for m, e in masses]))
        if best is None or reached > best[0]:
            best = (reached, temperature, scores)
    assert best is not None
    _, temperature, scores = best
    return best_heads(scores, KEEP), temperature, scores


def _ranked(scores: Any, pairs: Any) -> list[str]:
    return [pairs[i].doc_id for i in np.argsort(-np.asarray(scores), kind="stable")]


def compare(name: str, data: Stage, args: argparse.Namespace, runs: str) -> dict[str, Any]:
    """One data set: nDCG@10 of BM25, of all heads and of the kept ones, and seconds of a query."""
    folder = materialize(data, runs)
    split = "dev" if "qrels.dev" in folder.table_names() else "train"
    known, grades = first_hits(data, split, args.depth, runs)
    sample: list[LabelledQuery] = []
    for pairs in known:
        relevant = frozenset(p.doc_id for p in pairs if grades[p.query_id].get(p.doc_id, 0) > 0)
        if relevant and len(sample) < args.find:
            sample.append(LabelledQuery(pairs, relevant))
    teacher = AttentionRerank(model=str(smollm2()), window=args.depth, max_words=args.words)
    whole = AttentionSession(teacher)
    began = time.perf_counter()
    heads, temperature, scores = heads_of(whole, sample)
    finding = time.perf_counter() - began
    few = AttentionSession(teacher.model_copy(update={"heads": heads}))
    asked, grades = first_hits(data, "test", args.depth, runs)
    values: dict[str, list[float]] = {"BM25": [], "all heads": [], f"{KEEP} heads": []}
    seconds: dict[str, float] = {"all heads": 0.0, f"{KEEP} heads": 0.0}
    for number, pairs in enumerate(asked[: args.queries]):
        own = grades[pairs[0].query_id]
        values["BM25"].append(ndcg([p.doc_id for p in pairs], own))
        both = [("all heads", whole), (f"{KEEP} heads", few)]
        for what, session in both if number % 2 else both[::-1]:
            began = time.perf_counter()
            found = session.score(pairs)
            seconds[what] += time.perf_counter() - began
            values[what].append(ndcg(_ranked(found, pairs), own))
    n = len(values["BM25"])
    return {
        "name": name,
        "sample": len(sample),
        "found on": split,
        "finding_s": finding,
        "temperature": temperature,
        "heads": heads,
        "scores": [float(scores[head]) for head in heads],
        "layers": [whole.shape[0], few.shape[0]],
        "queries": n,
        "ndcg": {what: float(np.mean(v)) for what, v in values.items()},
        "error": {
            what: float(np.std(np.array(v) - np.array(values["all heads"])) / np.sqrt(n)) for what, v in values.items()
        },
        "seconds": {what: s / n for what, s in seconds.items()},
    }


def table(found: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    lines = [
        "| data | queries | ranking | nDCG@10 | over all heads (standard error) | layers | s a query |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for one in found:
        for what, value in one["ndcg"].items():
            layers = {"all heads": one["layers"][0], "BM25": ""}.get(what, one["layers"][1])
            spent = f"{one['seconds'][what]:.2f}" if what in one["seconds"] else ""
            over = f"{value - one['ndcg']['all heads']:+.3f} ({one['error'][what]:.3f})" if what != "all heads" else ""
            lines.append(f"| {one['name']} | {one['queries']} | {what} | {value:.3f} | {over} | {layers} | {spent} |")
    for one in found:
        saved = 1 - one["seconds"][f"{KEEP} heads"] / one["seconds"]["all heads"]
        heads = ", ".join(
            f"{layer}.{head} {score:.2f}" for (layer, head), score in zip(one["heads"], one["scores"], strict=True)
        )
        lines.append(
            f"\n{one['name']}: heads found on {one['sample']} {one['found on']} queries in {one['finding_s']:.0f} s at temperature "
            f"{one['temperature']:g} (layer.head and score): {heads}. Leaving out layers {one['layers'][1]} to "
            f"{one['layers'][0] - 1} saves {saved:.0%} of the time."
        )
    return "\n".join(lines)


def main() -> int:
    """Runs, prints and writes the table."""
    bench = Benchmark(__file__, __doc__)
    bench.add("folders", free=True, nargs="*", metavar="FOLDER", help="data sets in BEIR layout")
    bench.add("--find", type=int, default=24, help="queries that heads are found on")
    bench.add("--queries", type=int, default=40, help="test queries that are re-ranked")
    bench.add("--depth", type=int, default=40)
    bench.add("--words", type=int, default=60, help="words of a passage that are read")
    bench.add("--only", free=True, action="store_true", help="only the folders, not the quick start's corpus")
    args = bench.parse()
    sets: dict[str, Stage] = {} if args.only else {"pydocs-stdlib": PyDocs(part="stdlib")}
    sets |= {Path(folder).name: Beir(path=folder) for folder in args.folders}
    with tempfile.TemporaryDirectory() as runs:
        for name, data in sets.items():
            if not {"qrels.dev", "qrels.train"} & set(materialize(data, runs).table_names()):
                bench.error(f"{name} has judgements of neither dev nor train, on which heads are found; leave it out")
        found = []
        for name, data in sets.items():
            found.append(compare(name, data, args, runs))
            print(table(found[-1:]), flush=True)
    what = f"BM25's first {args.depth}, {args.words} words of each passage, on this CPU"
    bench.say(f"SmolLM2-135M-Instruct re-ranks {what}.\n\n{table(found)}")
    return bench.finish(found)


if __name__ == "__main__":
    sys.exit(main())
