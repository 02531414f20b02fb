"""One thing changed at a time, at equal numbers of training rows: a filter, the source of hard negatives, a strategy of a mixture.

    python -m benchmarks.publish.comparisons [DATA ...] [--parts filters,negatives,mixture] [--runs DIR] [--more NAME=VALUE ...]

Runs jobs/filters.py and jobs/mixture.py on Python's documentation and each DATA (a BEIR folder), and jobs/negatives.py on
each DATA that has a train split. What is there already is not done again. Writes docs/comparisons.md, anew after each
study, with every study of the runs folder; each row with the commit that made it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import ROOT, Benchmark, commit
from benchmarks.publish.catalogue import arm_of, described
from benchmarks.publish.results import ALONE, MEASURE, Study, gaps, p_of, run, told
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.stage import walk
from dagr_ray.report.lineage import Folders
from dagr_ray.report.verdict import dollars, duration, is_gain, is_loss
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir
from dagr_ray.study.job import load_job

Json = dict[str, Any]


class Part(NamedTuple):
    """A question, the recipe that answers it, its axis, and the setting that the others are compared with."""

    title: str
    about: str
    job: str
    axis: str
    reference: str


PARTS = {
    "filters": Part(
        "With and without each filter",
        "The generator is SmolLM2-135M. `all`: format, length, repetition, refusal, template, duplicate, copied, round trip "
        "through BM25, leak gate (`none`: not even that). `with-logprob`, `with-teacher-score` and `with-diversity` add one "
        "that keeps the better half, `with-language` and `with-pii` one more check.",
        "jobs/filters.py", "filters", "all",
    ),
    "negatives": Part(
        "Where hard negatives come from",
        "After arXiv 2504.21015: people's training queries, 5 negatives each, in-batch loss. Negatives by a 135M model say "
        "little about those of a large one. `searched`: what BM25 and the base return, however near to the positive; "
        "`searched-dropped` and `searched-relabelled` without those that the hybrid teacher scores at 95 % of the positive or "
        "above, or with them as positives.",
        "jobs/negatives.py", "source", "bm25",
    ),
    "mixture": Part(
        "What a strategy adds to a mixture",
        "Queries of several strategies in equal parts, always the same number in all.",
        "jobs/mixture.py", "mix", "all",
    ),
    "refine": Part(
        "What rounds of generator and evaluator add",
        "After MetaSynth, arXiv 2510.01523. In a round, passages without an accepted query are asked again, shown the best so "
        "far; an evaluator says what is wrong with the answers, and these are written again.",
        "jobs/refine.py", "rounds", "1",
    ),
}  # fmt: skip


def planned(args: argparse.Namespace) -> Iterable[tuple[str, str, list[str]]]:
    """(collection, part, words after the recipe) of every study that was asked for."""
    for data in [*([None] if args.quick_start else []), *args.data]:
        label = Beir(path=data).label() if data else "pydocs-stdlib"
        trained = data and any((Path(data) / "qrels").glob("train.tsv*"))
        for part in args.parts:
            if part != "negatives" or trained:
                seeds = f"seed={','.join(map(str, range(args.seeds)))}"
                yield label, part, [*([f"data={os.path.abspath(data)}"] if data else []), seeds, *args.more]


def compared(study: Study, part: Part) -> list[tuple[Json, Json | None]]:
    """The arms that have a score, the reference first, with what each has over it; empty where the reference has none."""
    arms = sorted(study.arms(), key=lambda arm: str(arm["params"][part.axis]) != part.reference)
    if not arms or str(arms[0]["params"][part.axis]) != part.reference:
        return []
    first = study.values(arms[0], study.home)
    return list(zip(arms, [None, *gaps([study.values(arm, study.home) - first for arm in arms[1:]])], strict=True))


def lines_of(study: Study, part: Part) -> list[str]:
    """A row for each setting, the reference first."""
    home, found = study.home, []
    arms = compared(study, part)
    if not arms:
        found.append(f"| {home['name']} | `{part.reference}` | | | not there: nothing to compare with | | | | | |")
    most = max((arm["used"] for arm, _ in arms), default=0)
    for arm, own in arms:
        score = arm["scores"][home["name"]][MEASURE]
        cells = [home["name"], f"`{arm['params'][part.axis]}`", f"{arm['used']:,}{'' if arm['used'] == most else ' ▽'}"]
        cells += [f"{score['mean']:.4f}", told(score)]
        cells += [told(own), p_of(own)] if own else ["", ""]
        found.append(f"| {' | '.join(cells)} | {study.cells(arm)} |")
    failed = [t for t in study.summary["trials"] if t["kind"] == "augmented" and not t["scores"]]
    return found + [_failed(study, part, trial) for trial in failed]


CLAIM = {
    "llm": "negatives that the LLM wrote",
    "mixed": "written and searched ones mixed",
    "llm-filtered": "written ones that a teacher filtered",
}


def claim(study: Study, part: Part) -> str:
    """Whether what arXiv 2504.21015 finds from its third version on holds: written negatives are worse than BM25's."""
    said, verdicts = [], []
    for arm, own in compared(study, part):
        what = CLAIM.get(arm["params"][part.axis])
        if own is None or what is None:
            continue
        worse, better = is_loss(own), is_gain(own)
        verdicts.append("worse" if worse else "better" if better else "open")
        word = {"worse": "worse than", "better": "better than", "open": "not told apart from"}[verdicts[-1]]
        said.append(f"{what} are {word} BM25's ({told(own)}, p {p_of(own)})")
    if not said:
        return ""
    holds = {"worse": "holds here", "better": "does not hold here: it is the other way round"}
    result = holds.get("+".join(sorted(set(verdicts) - {"open"})), "holds for some of them only")
    result = "is neither shown nor refuted here" if set(verdicts) == {"open"} else result
    return f"- {study.home['name']}: {'; '.join(said)}. That LLM-written negatives are worse than BM25's {result}."


LIKE = ("asked", "accepted", "$/1,000", "distinct-2", "overlap", "spread", "form distance", "teacher")


def like(study: Study, part: Part, runs: str) -> list[str]:
    """What the queries of each mixture are like and what they cost: a row for each setting."""
    job, found = load_job(str(ROOT / part.job)), []
    for arm, _ in compared(study, part):
        made, train = arm_of(job.stage(**arm["params"]))
        sources = made.examples.inputs()
        accepted = sum(s.folder(runs).count("examples") for name, s in sources.items() if name.startswith("examples."))
        asked = [s.folder(runs).count("generations") for s in walk(made.examples) if isinstance(s, Generate)]
        known = Folders(runs)
        price = known.sums(known.ancestors(made.examples.folder_name()))["price"]
        cells = {"asked": f"{sum(asked):,}", "accepted": f"{accepted:,} ({accepted / max(sum(asked), 1):.0%})"}
        cells["$/1,000"] = dollars(1000 * price / max(accepted, 1))
        try:
            cells |= described(made, train.base, arm["params"].get("data"), runs)
        except Exception as error:  # the other tables are no worse for it
            print(f"{arm['params']} is not described: {error!r}", file=sys.stderr, flush=True)
        row = [study.home["name"], f"`{arm['params'][part.axis]}`", *(cells.get(name, "") for name in LIKE)]
        found.append(f"| {' | '.join(row)} |")
    return found


def steps(study: Study) -> list[str]:
    """What each step of the longest refinement asked and gave."""
    found: Json = max(study.summary["generators"], key=lambda each: len(each["parts"]), default={"parts": []})
    rounds = max((arm["params"]["rounds"] for arm in study.arms()), default=0)
    return [
        f"| {study.home['name']} | {rounds} | {i} | {p['strategy']} | {p['completions']:,} | {p['accepted']:,} |"
        for i, p in enumerate(found["parts"], 1)
    ]


def _failed(study: Study, part: Part, trial: Json) -> str:
    error = (trial["error"] or "not run").replace("|", "/")[:160]
    setting = trial["params"][part.axis]
    return f"| {study.home['name']} | `{setting}` | | | failed: {error} | | | | | `{study.made}` |"


def page(runs: str, studies: Json) -> str:
    """docs/comparisons.md out of all studies that are there."""
    lines = [
        "# Comparisons", "",
        "Written by `benchmarks/publish/comparisons.py`. The base is MiniLM. Intervals are paired bootstraps over the test "
        "queries, p values those of paired randomisation tests after Holm's correction over a table's arms; bold: the "
        "interval excludes 0 and p < 0.05. ▽: fewer rows than others, so the row is not to be compared with them.", "",
    ]  # fmt: skip
    for name, part in PARTS.items():
        found = [
            Study(runs, each["folder"], each["commit"]) for key, each in studies.items() if key.endswith(f"/{name}")
        ]
        if not found:
            continue
        head = ["data set", part.axis, "rows", MEASURE, "over frozen [95 % CI]", f"over `{part.reference}` [95 % CI]"]
        head += ["p (Holm)", "seconds", "cost", "commit"]
        lines += [
            f"## {part.title}",
            "",
            part.about,
            "",
            f"| {' | '.join(head)} |",
            "|---|---|---:|---:|---|---|---:|---:|---:|---|",
        ]
        lines += [line for study in found for line in lines_of(study, part)] + [""]
        if name == "mixture":
            lines += [
                "What they are made of, as in docs/catalogue.md; *accepted* of all that was asked for their strategies:",
                "",
            ]
            lines += [f"| data set | mix | {' | '.join(LIKE)} |", "|---|---|" + "---:|" * len(LIKE)]
            lines += [line for key, each in studies.items() if key.endswith(f"/{name}") for line in each["like"]] + [""]
        if name == "refine":
            lines += ["The steps of the longest: answers of the generator, then those that were written again.", ""]
            lines += [
                "| data set | rounds | step | strategy | completions | accepted |",
                "|---|---:|---:|---|---:|---:|",
            ]
            lines += [line for study in found for line in steps(study)] + [""]
        if name == "negatives":
            lines += [text for study in found if (text := claim(study, part))] + [""]
    return "\n".join(lines)


def main() -> int:
    """Runs what is missing and writes the page."""
    bench = Benchmark(__file__, __doc__)
    bench.add("data", nargs="*", help="BEIR folders")
    bench.add("--runs", default="runs/comparisons")
    bench.add("--parts", type=lambda text: text.split(","), default=list(PARTS))
    bench.add("--seeds", type=int, default=1, help="training seeds of each arm (default: %(default)s)")
    bench.add("--no-quick-start", dest="quick_start", action="store_false")
    bench.add("--more", nargs="*", default=[], metavar="NAME=VALUE", help="other parameters of the recipes")
    bench.add("--page", default=str(ROOT / "docs" / "comparisons.md"))
    args = bench.parse()
    runs = os.path.abspath(args.runs)
    known = Artifact(runs, "comparisons")
    studies: Json = known.read_json("studies.json") or {}
    todo, missing = list(planned(args)), 0
    for number, (label, part, words) in enumerate(todo, 1):
        began = time.time()
        print(f"[{number}/{len(todo)}] {label}: {part}", flush=True)
        try:
            folder, key = run(PARTS[part].job, words, runs, ALONE), f"{label}/{part}"
        except SystemExit as stop:  # the other studies are no worse for it
            print(stop, file=sys.stderr, flush=True)
            missing += 1
            continue
        if studies.get(key, {}).get("folder") != folder:
            studies[key] = {"folder": folder, "commit": commit()}
            if part == "mixture":  # kept, because a later version of a stage looks in other folders
                studies[key]["like"] = like(Study(runs, folder, studies[key]["commit"]), PARTS[part], runs)
            known.write_json("studies.json", studies)
        Path(args.page).write_text(page(runs, studies))
        print(f"[{number}/{len(todo)}] {label}: {part}: {duration(time.time() - began)}", flush=True)
    if missing:
        bench.fail(f"{missing} studies did not end")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
