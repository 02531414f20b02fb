"""Strategy by strategy: rows asked, parsed and accepted, their cost, what they are like, and what a retriever learns from 500.

    python -m benchmarks.publish.catalogue [DATA ...] [--strategies a,b] [--volume 500] [--passages N] [--runs DIR] [--page FILE]

Runs ``dagr study jobs/catalogue.py`` on Python's documentation and on each DATA, a BEIR folder, and writes their
sections of docs/catalogue.md, each after its study; those of other collections stay. Every number comes from a folder of
the study: with ``--runs``, a run that was stopped goes on where it was. A strategy that the model cannot do has a row that
says so. Exits 1 where the study of a collection has no row with a score at all.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import ROOT, Benchmark, commit
from benchmarks.publish.results import ALONE, run
from dagr_ray import report
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Stage, walk
from dagr_ray.recipes.negatives import hybrid_scores
from dagr_ray.recipes.strategies import Arm
from dagr_ray.report.lineage import Folders
from dagr_ray.report.verdict import dollars, duration, p_text, signed
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.describe import Describe
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir, PyDocs
from dagr_ray.stages.take import Take
from dagr_ray.stages.train import Train
from dagr_ray.study.job import Job, load_job

HERE = Placement(generate=Pool(workers=0))
Json = dict[str, Any]
STRATEGIES = (
    "crop,crop/span,crop/inverse-cloze,promptagator,inpars,inpars/gbq,typed,persona,prefix,multi-hop,task-triple,hyde,"
    "hard-negative,counterfactual,paraphrase,simplify,translate,translate-passage,noisy"
)
HEAD = """# The catalogue, measured

Written by `benchmarks/publish/catalogue.py`. Each strategy is asked about the same passages; a retriever (MiniLM) is
trained on up to {volume} accepted rows of it, one epoch, with the same settings for all. The generator is
SmolLM2-135M: what it cannot do shows as a low share of answers that parse, and says nothing about a larger model.
Intervals are 95 %, paired by query. Training queries that resemble test queries are left out by the leak gate.

* *asked*: completions; *parsed*: those out of which something came; *accepted*: training rows that all filters keep, two for
  a query of two hops (texts that are no queries pass no filter but the parser, and rows with a query of Promptagator's only
  where that was accepted).
* *$/1,000* is for accepted rows, all that their stages cost included: for strategies that rewrite, also Promptagator's.
* *distinct-2*, *overlap*, *spread*: of the rows' queries (the share of a query's words that its passage has; one minus the
  mean cosine of two of them). *form distance*: from people's mix of questions, keywords and statements on the dev split.
* *teacher*: the mean score of the rows' passages by the hybrid teacher, 0.6 and 0.4 of BM25's and the base's z-scores among
  a query's 100 best.
* *rows*: those trained on, with ▽ where fewer than {volume} were there, so that the row is not to be compared with the others.
* *gain*: nDCG@10 over the frozen base on the test split; *p* is Holm's over the table.
"""
COLUMNS = (
    "strategy", "asked", "parsed", "accepted", "$/1,000", "distinct-2", "overlap", "spread", "form distance", "teacher",
    "rows", "nDCG@10", "gain", "p",
)  # fmt: skip


def study(data: str | None, runs: str, args: argparse.Namespace) -> str:
    """Runs the study and returns its folder."""
    words = [f"strategy={args.strategies}", f"volume={args.volume}", *([f"data={data}"] if data else [])]
    words += [f"passages={args.passages}"] if args.passages else []
    return run("jobs/catalogue.py", words, runs, ALONE)


def line(trial: Json, job: Job, runs: str) -> list[str]:
    """One row of the table: what of its folders is there."""
    cells: dict[str, str] = {"strategy": f"`{trial['params']['strategy']}`"}
    made, train = arm_of(job.stage(**trial["params"]))
    folders = {key: stage.folder(runs) for key, stage in vars(made).items()}
    there = {key for key, folder in folders.items() if folder.manifest is not None}
    completions = 0
    accepted = folders["examples"].count("examples") if "examples" in there else None
    if "generations" in there:
        completions = folders["generations"].count("generations")
        cells["asked"] = f"{completions:,}"
    if "parsed" in there:
        parsed = len(folders["parsed"].read("lineage", ["gen_id"])["gen_id"].unique())
        cells["parsed"] = f"{parsed:,} ({parsed / max(completions, 1):.0%})"
    if accepted is not None:
        cells["accepted"] = f"{accepted:,}"
        if accepted:
            known = Folders(runs)
            price = known.sums(known.ancestors(folders["examples"].name))["price"]
            cells["$/1,000"] = dollars(1000 * price / accepted)
            try:
                cells |= described(made, train.base, trial["params"].get("data"), runs)
            except Exception as error:  # an hour of other rows is not given up for this
                print(f"{cells['strategy']} is not described: {error!r}", file=sys.stderr, flush=True)
    score = next(iter(trial["scores"].values()))["nDCG@10"] if trial["scores"] else None
    if score is None:
        why = "no row to train on" if accepted == 0 else f"failed: {trial['error'] or 'not run'}"
        cells["gain"] = why.replace("|", "/")[:160]
    else:
        cells["rows"] = f"{trial['used']:,}" + ("" if trial["used"] >= trial["params"]["volume"] else " ▽")
        cells["nDCG@10"] = f"{score['mean']:.4f}"
        if "delta" in score:
            cells["gain"] = f"{signed(score['delta'])} [{signed(score['delta_low'])}, {signed(score['delta_high'])}]"
        if "p_holm" in score:
            cells["p"] = p_text(score["p_holm"]).removeprefix("p = ").removeprefix("p ")
    return [cells.get(column, "") for column in COLUMNS]


def arm_of(card: Stage) -> tuple[Arm, Train]:
    """The stages of a recipe's arm, and its training."""
    [train] = [stage for stage in walk(card) if isinstance(stage, Train)]
    examples = train.examples.mined if isinstance(train.examples, Take) else train.examples
    behind = walk(examples)
    generations = [stage for stage in behind if isinstance(stage, Generate)][-1]
    parsed = next(s for s in behind if getattr(s, "generations", None) == generations)
    return Arm(generations, parsed, train.queries, train.corpus, examples), train


def described(made: Arm, encoder: Encoder, data: str | None, runs: str) -> dict[str, str]:
    """What an arm's queries are like, and what the teacher says about its passages."""
    corpus = Beir(path=data) if data else PyDocs(part="stdlib")
    judged = materialize(corpus, runs, HERE).table_names()
    human = corpus if "qrels.dev" in judged else None
    taken = Describe(queries=made.queries, corpus=made.corpus, human=human, encoder=encoder)
    found = {row["measure"]: row["value"] for row in materialize(taken, runs, HERE).read("metrics").to_pylist()}
    names = {"distinct-2": "distinct@2", "overlap": "overlap", "spread": "spread", "form distance": "form:distance"}
    cells = {column: f"{found[name]:.2f}" for column, name in names.items() if name in found}
    return cells | {"teacher": f"{teacher_score(made, encoder, runs):.2f}"}


def teacher_score(made: Arm, encoder: Encoder, runs: str) -> float:
    """The mean score of the positives of an arm's examples."""
    told = hybrid_scores(made.queries, made.corpus, encoder, examples=made.examples)
    labels = materialize(told, runs, HERE).read("scores")
    examples = materialize(made.examples, runs, HERE).read("examples", ["query_id", "positive_id"])
    columns = (labels[n].to_pylist() for n in ("query_id", "doc_id", "score"))
    score_of = {(q, d): score for q, d, score in zip(*columns, strict=True)}
    pairs = zip(*(examples[n].to_pylist() for n in examples.column_names), strict=True)
    return float(np.mean([score_of[pair] for pair in pairs if pair in score_of] or [math.nan]))


def section(title: str, summary: Json, rows: list[list[str]], made: str) -> list[str]:
    """The table of one collection."""
    home = summary["sets"][0]
    scores = {
        t["kind"]: t["scores"][home["name"]]["nDCG@10"]["mean"]
        for t in summary["trials"]
        if t["kind"] != "augmented" and t["scores"]
    }
    text = ", ".join(f"{kind} {scores[key]:.4f}" for key, kind in (("frozen", "frozen base"), ("bm25", "BM25")))
    parts = [f"## {title}", "", f"{home['queries']:,} test queries; nDCG@10: {text}. Commit `{made}`.", ""]
    parts += ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    return [*parts, *("| " + " | ".join(row) + " |" for row in rows), ""]


def with_section(page: str, head: str, title: str, made: str) -> str:
    """The page with the section ``made`` in place of the one with its title; another head makes another page."""
    before = page.removeprefix(head).split("\n## ")[1:] if page.startswith(head) else []
    found = {each.partition("\n")[0]: f"## {each.strip()}\n" for each in before} | {title: made}
    return "\n".join([head, *found.values()])


def main() -> int:
    """Runs the studies, writes the page."""
    bench = Benchmark(__file__, __doc__)
    bench.add("data", nargs="*", help="BEIR folders")
    bench.add("--strategies", default=STRATEGIES)
    bench.add("--volume", type=int, default=500)
    bench.add("--passages", type=int, help="passages to ask about (default: the recipe's own)")
    bench.add("--no-quick-start", dest="quick_start", action="store_false")
    bench.add("--runs", default="runs/catalogue")
    bench.add("--page", default=str(ROOT / "docs" / "catalogue.md"))
    args = bench.parse()
    runs, job = os.path.abspath(args.runs), load_job(str(ROOT / "jobs" / "catalogue.py"))
    known = Artifact(runs, "catalogue")
    studies: Json = known.read_json("studies.json") or {}
    head, empty = HEAD.format(volume=args.volume), []
    for data in [*([None] if args.quick_start else []), *map(os.path.abspath, args.data)]:
        title, began = Path(data).name if data else "Python's standard library", time.time()
        try:
            folder = study(data, runs, args)
        except SystemExit as stop:  # the other collections are no worse for it
            print(stop, file=sys.stderr, flush=True)
            empty.append(title)
            continue
        if studies.get(title, {}).get("folder") != folder:
            studies[title] = {"folder": folder, "commit": commit()}
            known.write_json("studies.json", studies)
        summary = report.summarise(runs, folder)
        by_name = {t["params"]["strategy"]: t for t in summary["trials"] if t["kind"] == "augmented"}
        rows = []
        for name in filter(by_name.__contains__, args.strategies.split(",")):
            try:
                rows.append(line(by_name[name], job, runs))
            except Exception as error:  # nor for this
                rows.append([f"`{name}`", *[""] * (len(COLUMNS) - 3), f"not read: {error!r}"[:160], ""])
        made = "\n".join(section(title, summary, rows, studies[title]["commit"]))
        if not any(row[COLUMNS.index("nDCG@10")] for row in rows):
            empty.append(title)
        page = Path(args.page)
        page.write_text(with_section(page.read_text() if page.exists() else "", head, title, made))
        print(f"{made}\n{title}: {duration(time.time() - began)}", flush=True)
    for title in empty:
        bench.fail(f"{title} has no row with a score")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
