"""What the whole chain brings, on the quick start's data and on BEIR folders: the ladder, both bases at each scale, people's pairs.

    python -m benchmarks.publish.results [DATA ...] [--runs DIR] [--volume 1000] [--seeds 1] [--parts ladder,scale,human]

Each DATA is judged on its own test split and, out of distribution, on those of the others, or of ``--outside``. Work is
`dagr study jobs/ladder.py`, so what is there already is not done again: a run that was stopped goes on where it was.
Writes docs/results.md, anew after each study, with every study of the runs folder; each row with the commit that made
it. What was tried besides is written by hand: results-tried.md beside the page is put at its end.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import ROOT, Benchmark, commit
from dagr_ray import report
from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.formats import beir
from dagr_ray.report import stats
from dagr_ray.report.lineage import Folders
from dagr_ray.report.verdict import dollars, duration, is_gain, is_loss, p_text, signed
from dagr_ray.stages.sources import Beir

ALONE = str(ROOT / "cluster" / "one_trial.toml")
MEASURE = "nDCG@10"
RUNGS = ("in-batch", "mined", "teacher", "filters")
STEPS = dict(
    zip(RUNGS, ("+ generated queries, in-batch", "+ mined negatives", "+ teacher's scores", "+ filters"), strict=True)
)
BASES = ("minilm", "scratch")
QUICK_PASSAGES = 640  # as the quick start itself asks about
TRIED = "results-tried.md"
Json = dict[str, Any]


def planned(args: argparse.Namespace) -> Iterable[tuple[str, str, list[str]]]:
    """(collection, part, words after `dagr study`) of every study that was asked for."""
    seeds = ",".join(map(str, range(args.seeds)))
    for data in [*([None] if args.quick_start else []), *args.data]:
        others = [each for each in (args.outside or args.data) if each != data] if data else []
        own = [f"data={data}"] if data else []
        own += [f"ood={'+'.join(others)}"] if others else []
        passages = args.passages if data else min(args.passages, QUICK_PASSAGES)
        own += [f"passages={passages}", f"samples={args.samples}", f"seed={seeds}"]
        volume = args.volume if data else min(args.volume, args.quick_volume)
        label = Beir(path=data).label() if data else "pydocs-stdlib"
        if "ladder" in args.parts:
            words = [f"rung={','.join(RUNGS)}", f"base={','.join(BASES)}", f"volume={volume}"]
            yield label, "ladder", [*own, *words, *args.more]
        if "scale" in args.parts:
            volumes = ",".join(str(volume // 4**k) for k in (2, 1, 0))
            yield label, "scale", [*own, "rung=filters", f"base={','.join(BASES)}", f"volume={volumes}", *args.more]
        if "human" in args.parts and data and (people := human_pairs(data)):
            # the gate takes some of people's pairs out, and both sides are to have as many
            pairs = min(volume, args.human_volume or volume, 3 * people // 4)
            words = ["rung=teacher", "base=minilm", "human=0,0.5,1", f"volume={pairs}"]
            yield label, "human", [*own, *words, *args.more]


def human_pairs(data: str) -> int:
    """How many relevant pairs the train split of a BEIR folder has; 0 where there is none."""
    try:
        return tables.relevant(beir.read_qrels(data, "train")[0]).num_rows
    except ConfigError:
        return 0


def run(job: str, words: Sequence[str], runs: str, placement: str = "local") -> str:
    """The study's folder, once all of it is there; a trial that failed has no row. Raises where there is no study.

    ``placement``: ``ALONE`` where trials generate, whose seconds and costs would else be those of two on one machine.
    """
    command = [sys.executable, "-m", "dagr_ray.cli.main", "study", job, *words, "--runs", runs, "--no-track"]
    command += ["--placement", placement]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    pages = [line for line in done.stdout.splitlines() if line.startswith("page: ")]
    if not pages:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}; run this script again to go on")
    return Path(pages[-1].removeprefix("page: ")).parent.name


def main() -> int:
    """Runs what is missing and writes the page."""
    bench = Benchmark(__file__, __doc__)
    bench.add("data", nargs="*", help="BEIR folders")
    bench.add("--runs", default="runs/results")
    bench.add("--parts", type=lambda text: text.split(","), default=["ladder", "scale", "human"])
    bench.add("--outside", nargs="*", metavar="DATA", help="judge on these, not on the other DATA")
    bench.add("--volume", type=int, default=1000, help="pairs to train on (default: %(default)s)")
    bench.add("--quick-volume", type=int, default=448, help="at most so many on the quick start's data")
    bench.add("--human-volume", type=int, help="pairs of people, and as many generated ones (default: --volume)")
    bench.add("--passages", type=int, default=1500, help="passages to ask about (default: %(default)s)")
    bench.add("--samples", type=int, default=4, help="queries a passage (default: %(default)s)")
    bench.add("--seeds", type=int, default=1, help="training seeds of each arm (default: %(default)s)")
    bench.add("--no-quick-start", dest="quick_start", action="store_false")
    bench.add("--more", nargs="*", default=[], metavar="NAME=VALUE", help="other parameters of jobs/ladder.py")
    bench.add("--page", default=str(ROOT / "docs" / "results.md"))
    bench.add("--page-only", action="store_true", help="run no study; write the page of those in the runs folder")
    args = bench.parse()
    runs = os.path.abspath(args.runs)
    known = Artifact(runs, "results")
    studies: Json = known.read_json("studies.json") or {}
    if args.page_only:
        write(args.page, runs, studies)
        return bench.finish()
    todo = list(planned(args))
    for number, (label, part, words) in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {label}: {part}", flush=True)
        started = time.time()
        folder = run("jobs/ladder.py", words, runs)
        key = f"{label}/{part}"
        again = studies.get(key, {})
        if again.get("folder") != folder:
            studies[key] = {"folder": folder, "commit": commit()}
            known.write_json("studies.json", studies)
        write(args.page, runs, studies)
        print(f"[{number}/{len(todo)}] {label}: {part}: {duration(time.time() - started)}", flush=True)
    return bench.finish()


def write(target: str, runs: str, studies: Json) -> None:
    """Writes the page, with what was tried besides at its end."""
    tried = Path(target).with_name(TRIED)
    Path(target).write_text(page(runs, studies, tried.read_text() if tried.exists() else ""))


# -- the page -----------------------------------------------------------------------------------------------------------


class Study:
    """A finished study: its summary, and the values by query of any of its arms."""

    def __init__(self, runs: str, folder: str, made: str) -> None:
        self.runs, self.made = runs, made
        self.summary = report.summarise(runs, folder)
        self.folders = Folders(runs)
        self.folder_of = {t["trial"]: t["folder"] for t in Artifact(runs, folder).read_json("study.json")["trials"]}
        self.home = self.summary["sets"][0]
        self.outside = [s for s in self.summary["sets"] if s["role"] == "out"]

    def arms(self, **params: Any) -> list[Json]:
        """The arms with these parameters, and a result."""
        found = [t for t in self.summary["trials"] if t["kind"] == "augmented" and t["scores"]]
        return [t for t in found if all(t["params"].get(k) == v for k, v in params.items())]

    def bases(self) -> list[str]:
        """Those that were trained."""
        return [base for base in BASES if self.arms(base=base)]

    def frozen(self, base: str) -> Json:
        return next(t for t in self.summary["trials"] if t["kind"] == "frozen" and t["base"] == base)

    def values(self, arm: Json, data: Json) -> np.ndarray:
        """By query, in one order for all arms: the mean over the arm's seeds."""
        runs = []
        for each in arm["seeds"]:
            if not each["means"]:  # it failed
                continue
            rows = Artifact(self.runs, self.folder_of[each["trial"]]).read("metrics").to_pylist()
            mine = [r for r in rows if r["measure"] == MEASURE and r["query_id"] is not None]
            found = {r["query_id"]: r["value"] for r in mine if r["data"] == data["key"].split("/")[0]}
            runs.append([found[query_id] for query_id in sorted(found)])
        return np.mean(runs, axis=0)

    def cells(self, arm: Json) -> str:
        """Seconds, dollars and the commit. What was not trained costs what judging it does."""
        cost = arm["cost"] or self.folders.sums(self.folders.ancestors(arm["folder"]))
        return f"{duration(cost['seconds'])} | {dollars(cost['price'])} | `{self.made}`"


def gaps(columns: Sequence[np.ndarray]) -> list[Json]:
    """Means of differences by query, each with its 95 % bootstrap interval over queries, p, and p by Holm over all of them."""
    found = []
    for values in columns:
        low, high = stats.interval(stats.resampled_means(values[:, None])[:, 0])
        p = float(stats.randomisation_p(values[:, None])[0])
        found.append({"delta": float(values.mean()), "delta_low": low, "delta_high": high, "p": p})
    for each, p in zip(found, stats.holm([each["p"] for each in found]), strict=True):
        each["p_holm"] = p
    return found


def told(score: Json) -> str:
    """A difference with its interval; bold where it stands after correction."""
    mark = "**" if "p_holm" in score and (is_gain(score) or is_loss(score)) else ""
    return f"{mark}{signed(score['delta'])}{mark} [{signed(score['delta_low'])}, {signed(score['delta_high'])}]"


def p_of(score: Json) -> str:
    return p_text(score["p_holm"]).removeprefix("p = ").removeprefix("p ")


def outside(study: Study, arm: Json) -> str:
    """The mean over the other data sets, and the gain there over the frozen base."""
    if not study.outside:
        return " | "
    averages = [a for a in study.summary["averages"] if "out of" in a["name"]]
    name = averages[0]["name"] if averages else study.outside[0]["name"]
    score = arm["scores"][name][MEASURE]
    return f"{score['mean']:.3f} | {told(score) if 'delta' in score else ''}"


def ladder(study: Study) -> list[str]:
    """A table for each base, from the frozen base up."""
    home = study.home
    where = ", ".join(s["name"] for s in study.outside) or "none"
    lines = [f"### {home['name']}", "", f"{home['queries']:,} test queries; out of distribution: {where}.", ""]
    head = ["base", "step", "pairs", MEASURE, "over frozen [95 % CI]", "p (Holm)", "over the step before [95 % CI]"]
    head += ["p (Holm)", "R@100", f"{MEASURE} out", "over frozen, out [95 % CI]", "seconds", "cost", "commit"]
    lines += [f"| {' | '.join(head)} |", "|---|---|---:|---:|---|---:|---|---:|---:|---:|---|---:|---:|---|"]
    bm25 = next((t for t in study.summary["trials"] if t["kind"] == "bm25"), None)
    lines += [untrained(study, bm25, "", "BM25")] if bm25 else []
    for base in study.bases():
        frozen = study.frozen(base)
        arms = [arm for rung in RUNGS for arm in study.arms(rung=rung, base=base)]
        lines.append(untrained(study, frozen, base, "frozen"))
        chain = [study.values(each, home) for each in (frozen, *arms)]
        steps = gaps([after - before for before, after in itertools.pairwise(chain)])
        for arm, step in zip(arms, steps, strict=True):
            score = arm["scores"][home["name"]]
            cells = [base, STEPS[arm["params"]["rung"]], f"{arm['used']:,}", f"{score[MEASURE]['mean']:.3f}"]
            cells += [told(score[MEASURE]), p_of(score[MEASURE]), told(step), p_of(step)]
            cells += [recall(score), outside(study, arm), study.cells(arm)]
            lines.append(f"| {' | '.join(cells)} |")
    used = {arm["params"]["rung"]: arm["used"] for arm in study.arms()}
    if len(set(used.values())) > 1:
        numbers = ", ".join(f"{used[rung]:,} ({STEPS[rung]})" for rung in RUNGS if rung in used)
        lines += ["", f"Not all steps have as many pairs, so the number changes with the step: {numbers}."]
    return [*lines, ""]


def recall(scores: Json) -> str:
    return f"{scores['R@100']['mean']:.3f}" if "R@100" in scores else ""


def untrained(study: Study, arm: Json, base: str, what: str) -> str:
    """The row of BM25 or a frozen base."""
    own = arm["scores"][study.home["name"]]
    cells = [base, what, "0", f"{own[MEASURE]['mean']:.3f}", "", "", "", "", recall(own)]
    return f"| {' | '.join(cells)} | {outside(study, arm)} | {study.cells(arm)} |"


def aim(studies: Sequence[Study]) -> list[str]:
    """Where the last step of the pre-trained base wins on what it was tuned to, and where it loses on anything else."""
    tuned: dict[bool, list[str]] = {True: [], False: []}
    elsewhere, lost, won = 0, [], []
    for study in studies:
        for arm in study.arms(rung=RUNGS[-1], base=BASES[0])[:1]:
            score = arm["scores"][study.home["name"]][MEASURE]
            tuned[is_gain(score)].append(f"{study.home['name']} ({signed(score['delta'])}, {p_text(score['p_holm'])})")
            for data in study.outside:
                score = arm["scores"][data["name"]][MEASURE]
                text = (
                    f"{data['name']} after {study.home['name']} ({signed(score['delta'])}, {p_text(score['p_holm'])})"
                )
                lost += [text] if is_loss(score) else []
                won += [text] if is_gain(score) else []
                elsewhere += 1
    if not any(tuned.values()):
        return []
    every = sum(map(len, tuned.values()))
    said = [
        f"With all steps, {BASES[0]} beats its frozen self significantly on {len(tuned[True])} of the {every} collections "
        f"it was tuned to: {'; '.join(tuned[True]) or 'none'}. Not on: {'; '.join(tuned[False]) or 'none'}.",
        f"Of {elsewhere} collections out of distribution it loses significantly on {len(lost)}"
        f"{': ' * bool(lost)}{'; '.join(lost)}, and gains significantly on {len(won)}{': ' * bool(won)}{'; '.join(won)}.",
    ]
    return [*said[: 1 + bool(elsewhere)], ""]


def scale(study: Study) -> list[str]:
    """A line for each volume: both bases' gains, and how much more the base gains that is not pre-trained."""
    home, lines = study.home, []
    frozen = {base: study.values(study.frozen(base), home) for base in study.bases()}
    pairs = []
    for volume in sorted({t["params"]["volume"] for t in study.arms()}):
        arms = {base: arm for base in BASES for arm in study.arms(volume=volume, base=base)[:1]}
        pairs += [arms] if len(arms) == len(BASES) else []
    gains = [{base: study.values(arm, home) - frozen[base] for base, arm in arms.items()} for arms in pairs]
    for arms, more in zip(pairs, gaps([each["scratch"] - each["minilm"] for each in gains]), strict=True):
        scores = {base: arm["scores"][home["name"]][MEASURE] for base, arm in arms.items()}
        cells = [home["name"], f"{arms['minilm']['used']:,}"]
        for base in BASES:
            cells += [f"{frozen[base].mean():.3f} to {scores[base]['mean']:.3f}", told(scores[base])]
        lines.append(f"| {' | '.join(cells)} | {told(more)} | {p_of(more)} | {study.cells(arms['scratch'])} |")
    return lines


def human(study: Study) -> list[str]:
    """A line for each mixture of people's and generated pairs, at equal numbers."""
    home, lines = study.home, []
    arms = sorted(study.arms(), key=lambda t: t["params"]["human"])
    ours = next(iter(study.arms(human=0.0)), None)
    others = [arm for arm in arms if ours and arm is not ours]
    over = gaps([study.values(arm, home) - study.values(ours, home) for arm in others if ours])
    beside = dict(zip((arm["trial"] for arm in others), over, strict=True))
    for arm in arms:
        share, score = arm["params"]["human"], arm["scores"][home["name"]][MEASURE]
        what = {0.0: "generated", 1.0: "people's"}.get(share, f"{share:.0%} people's")
        cells = [home["name"], what, f"{arm['used']:,}", f"{score['mean']:.3f}", told(score), p_of(score)]
        more = beside.get(arm["trial"])
        cells += [told(more), p_of(more)] if more else ["", ""]
        lines.append(f"| {' | '.join(cells)} | {study.cells(arm)} |")
    return lines


def page(runs: str, studies: Json, tried: str = "") -> str:
    """docs/results.md out of all studies that are there, with ``tried`` at its end."""
    found = {key: Study(runs, value["folder"], value["commit"]) for key, value in studies.items()}

    def of(part: str) -> list[Study]:
        return [study for key, study in found.items() if key.endswith(f"/{part}")]

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [
        "# Results", "",
        f"Written by `benchmarks/publish/results.py`, which runs `jobs/ladder.py`; {platform.machine()}, {cores} cores. Intervals "
        "are paired bootstraps over the test queries; those over a frozen base are over the seeds too, where an arm has several. "
        "p values are those of paired randomisation tests by query after Holm's correction: over all arms of a study where "
        "they compare with a frozen base, else over a base's steps, a collection's volumes, or its mixtures. Bold: the "
        "interval excludes 0 and the corrected p < 0.05. Seconds and cost are an arm's share of making its data, and its "
        "training with one seed; of BM25 and a frozen base, of indexing and searching all sets. `scratch` is MiniLM with two "
        "re-initialised layers; what it learns from was mined and scored with the help of the pre-trained MiniLM, as for "
        "`minilm` itself. Test questions that training queries resemble were held out of training.", "",
    ]  # fmt: skip
    if of("ladder"):
        lines += ["## The ladder", "", *aim(of("ladder"))]
        lines += [line for study in of("ladder") for line in ladder(study)]
        said = [answer["sentence"] for study in of("ladder") for answer in study.summary["verdict"]["answers"]]
        lines += ["In words:", "", *(f"- {sentence}" for sentence in said), ""]
    if of("scale"):
        lines += ["## What a base gains that is not pre-trained", ""]
        head = "| data set | pairs | minilm | gain [95 % CI] | scratch | gain [95 % CI] | scratch gains more by [95 % CI] | "
        lines += [head + "p (Holm) | seconds | cost | commit |", "|---|---:|---|---|---|---|---|---:|---:|---:|---|"]
        lines += [line for study in of("scale") for line in scale(study)] + [""]
    if of("human"):
        lines += ["## People's pairs and generated ones, at equal numbers", ""]
        head = f"| data set | pairs of | number | {MEASURE} | over frozen [95 % CI] | p (Holm) | over generated [95 % CI] | "
        lines += [head + "p (Holm) | seconds | cost | commit |", "|---|---|---:|---:|---|---:|---|---:|---:|---:|---|"]
        lines += [line for study in of("human") for line in human(study)] + [""]
    return "\n".join([*lines, tried.strip(), ""] if tried else lines)


if __name__ == "__main__":
    sys.exit(main())
