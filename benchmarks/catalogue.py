"""Strategy by strategy: rows asked, parsed and accepted, their cost, what they are like, and what a retriever learns from 500.

    python benchmarks/catalogue.py [DATA ...] [--strategies a,b] [--volume 500] [--passages 800] [--runs DIR]

Runs ``dagr study jobs/catalogue.py`` on Python's documentation and on each DATA, a BEIR folder, and writes
docs/catalogue.md. Every number comes from a folder of the study. Exits 1 where a strategy has no line.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dagr_ray import report
from dagr_ray.catalogue import Arm, arm, strategy_named, teacher_scores
from dagr_ray.cluster import Placement
from dagr_ray.engines.vllm import VLLM
from dagr_ray.models import minilm, smollm2
from dagr_ray.report.verdict import dollars, signed
from dagr_ray.retriever import Encoder
from dagr_ray.stage import materialize
from dagr_ray.stages.corpus import Beir, PyDocs, Sample
from dagr_ray.stages.generate import Exemplars
from dagr_ray.stages.mix import Describe

ROOT = Path(__file__).parent.parent
Json = dict[str, Any]
HEAD = """# The catalogue, measured

Written by `benchmarks/catalogue.py`. Each strategy is asked about the same passages; a retriever (MiniLM) is trained on up to
{volume} accepted rows of it, one epoch, with the same settings for all. The generator is SmolLM2-135M: what it cannot do shows
as a low share of answers that parse, and says nothing about a larger model. Intervals are 95 %, paired by query.

* *asked*: completions; *parsed*: texts that came out of them; *accepted*: those that all filters keep (texts that are no
  queries pass no filter but the parser). *$/1,000* is for accepted ones, all that their stages cost included.
* *distinct-2*, *overlap*: of the queries that were accepted (the share of a query's words that its passage has).
* *teacher*: the mean score of the rows' passages by the hybrid teacher, 0.6 and 0.4 of BM25's and the base's z-scores among
  a query's 100 best.
* *gain*: nDCG@10 over the frozen base on the test split; *p* is Holm's over the table.
"""


def study(data: str | None, runs: str, args: argparse.Namespace) -> Json:
    """Runs the study and returns its summary."""
    words = [sys.executable, "-m", "dagr_ray.cli", "study", "jobs/catalogue.py", "--runs", runs]
    words += [f"strategy=none,{args.strategies}", f"volume={args.volume}", f"passages={args.passages}"]
    before = set(Path(runs).glob("study-*"))
    subprocess.run([*words, *([f"data={data}"] if data else [])], cwd=ROOT, check=True)
    made = max(set(Path(runs).glob("study-*")) - before or before, key=lambda path: path.stat().st_mtime)
    return report.summarise(runs, made.name)


def line(name: str, data: str | None, runs: str, args: argparse.Namespace, trial: Json | None) -> list[str]:
    """One row of the table."""
    corpus = Beir(path=data) if data else PyDocs(part="stdlib")
    exemplars = Exemplars(corpus=corpus, split="dev", k=4)
    asked = Sample(corpus=corpus, n=args.passages, exclude=exemplars)
    encoder = Encoder(model=str(minilm()), max_length=256 if data else 48)
    made = arm(strategy_named(name), VLLM(model=str(smollm2())), asked, corpus, encoder, exemplars=exemplars)
    folders = {key: stage.folder(runs) for key, stage in vars(made).items()}
    parsed = folders["parsed"].manifest["counts"]
    completions = folders["generations"].count("generations")
    accepted = folders["examples"].manifest["counts"]["out"]
    described = materialize(
        Describe(queries=made.queries, corpus=made.corpus, human=corpus), runs, Placement()
    ).read("metrics")  # fmt: skip
    found = {row["measure"]: row["value"] for row in described.to_pylist()}
    cells = [
        f"`{name}`",
        f"{completions:,}",
        f"{parsed['out']:,} ({parsed['out'] / max(completions, 1):.0%})",
        f"{accepted:,}",
    ]
    cost = trial["cost"] if trial and trial.get("cost") else {}
    price = cost.get("generation_usd", cost.get("usd"))
    cells.append("" if price is None or not accepted else dollars(1000 * price / accepted))
    cells += [f"{found['distinct@2']:.2f}", f"{found.get('overlap', 0):.2f}", f"{found['form:distance']:.2f}"]
    cells.append(f"{teacher_score(made, encoder, runs):.2f}")
    scores = next(iter(trial["scores"].values()))["nDCG@10"] if trial and trial["scores"] else None
    if scores is None or "delta" not in scores:
        return [*cells, str(min(accepted, args.volume)), "", "", ""]
    gain = f"{signed(scores['delta'])} ({signed(scores['delta_low'])} to {signed(scores['delta_high'])})"
    return [*cells, str(trial["used"]), f"{scores['mean']:.4f}", gain, f"{scores['p_holm']:.3f}"]


def teacher_score(made: Arm, encoder: Encoder, runs: str) -> float:
    """The mean score of the positives of an arm's examples."""
    labels = materialize(teacher_scores(made, encoder), runs, Placement()).read("scores")
    examples = materialize(made.examples, runs, Placement()).read("examples", ["query_id", "positive_id"])
    columns = (labels[n].to_pylist() for n in ("query_id", "doc_id", "score"))
    score_of = {(q, d): score for q, d, score in zip(*columns, strict=True)}
    pairs = zip(*(examples[n].to_pylist() for n in examples.column_names), strict=True)
    return float(np.mean([score_of[pair] for pair in pairs if pair in score_of] or [math.nan]))


def main() -> int:
    """Runs the studies, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument(
        "--strategies",
        default="crop,promptagator,inpars,typed,persona,paraphrase,noisy,hyde,hard-negative,counterfactual,simplify,"
        "translate,translate-passage,multi-hop,task-triple",
    )
    parser.add_argument("--volume", type=int, default=500)
    parser.add_argument("--passages", type=int, default=800)
    parser.add_argument("--runs", default=None)
    args = parser.parse_args()
    parts, missing = [HEAD.format(volume=args.volume)], 0
    with tempfile.TemporaryDirectory(prefix="dagr-catalogue-") as scratch:
        runs = args.runs or scratch
        for data in [None, *args.data]:
            summary = study(data, runs, args)
            by_name = {trial["params"].get("strategy"): trial for trial in summary["trials"]}
            frozen = next(trial for trial in summary["trials"] if trial["kind"] == "frozen")
            base = next(iter(frozen["scores"].values()))["nDCG@10"]["mean"]
            rows = [line(name, data, runs, args, by_name.get(name)) for name in args.strategies.split(",")]
            missing += sum(not row[-2] for row in rows)
            title = Path(data).name if data else "Python's standard library"
            parts += [f"## {title}\n", f"The frozen base: {base:.4f}.\n"]
            names = "strategy|asked|parsed|accepted|$/1,000|distinct-2|overlap|form distance|teacher|rows trained on|nDCG@10|gain|p"
            parts += ["| " + " | ".join(names.split("|")) + " |", "|---|" + "---:|" * names.count("|")]
            parts += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    text = "\n".join(parts)
    (ROOT / "docs" / "catalogue.md").write_text(text)
    print(text)
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
