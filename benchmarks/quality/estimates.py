"""Estimates from a canary of 64 passages beside what then happens: tokens, time, storage and money, each within 25 %.

    python -m benchmarks.quality.estimates DATA [DATA ...] [--generator crop,smollm2] [--passages 300] [--json FILE]

DATA are BEIR folders. For each of them and each generator, `dagr check --canary` and then `dagr run` work in a runs
folder of their own. Times are those of the stages: what a program needs to start is in neither. Writes
benchmarks/quality/estimates.md. Exits with 1 where a number is off by more than the bound.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Benchmark
from dagr_ray.core.artifact import Artifact

BOUND = 0.25
JOB = """
from dagr_ray.filters.copied import Copied
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.filters.format import Format
from dagr_ray.filters.length import Length
from dagr_ray.recipes.augmentation import generator_named
from dagr_ray.core.stage import Stage
from dagr_ray.stages.sources import Beir, Sample
from dagr_ray.stages.exemplars import Exemplars
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.select import Score, Select


def filtered(data: str, generator: str, passages: int) -> Stage:
    corpus = Beir(path=data)
    strategy, engine = generator_named(generator)
    shown = Exemplars(corpus=corpus, split="dev", k=6) if generator != "crop" else None
    asked = Sample(corpus=corpus, n=passages, exclude=shown)
    raw = Generate(corpus=asked, strategy=strategy, engine=engine, samples=2, exemplars=shown)
    parsed = Parse(generations=raw, corpus=asked)
    filters = [Format(), Length(), Duplicate()] + ([Copied()] if generator != "crop" else [])
    return Select(parsed=parsed, scores=tuple(Score(parsed=parsed, corpus=asked, filter=each) for each in filters))
"""


def dagr(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dagr_ray.cli.main", *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def compare(data: str, generator: str, passages: int) -> list[dict]:
    """One line for each number: what was guessed and what it came to."""
    with tempfile.TemporaryDirectory(prefix="dagr-estimates-") as folder:
        job, runs = Path(folder) / "filtered.py", str(Path(folder) / "runs")
        job.write_text(JOB)
        words = [str(job), f"data={data}", f"generator={generator}", f"passages={passages}", "--runs", runs, "--quiet"]
        checked = json.loads(dagr("check", *words, "--one", "--canary", "--json"))["stages"]
        dagr("run", *words)
        guesses = {line["folder"]: line["estimate"] for line in checked if line["state"] != "cached"}
        made = {name: Artifact(runs, name).manifest for name in guesses}
        said = {
            "prompt tokens": ("prompt_tokens", lambda m: m["cost"].get("prompt_tokens", 0)),
            "completion tokens": ("completion_tokens", lambda m: m["cost"].get("completion_tokens", 0)),
            "seconds": ("seconds", lambda m: m["cost"]["wall_s"]),
            "bytes": ("bytes", lambda m: sum(entry["bytes"] for entry in m["tables"].values())),
            "dollars": ("price", lambda m: m["price"]),
        }
        lines = []
        for name, (key, real) in said.items():
            guess = sum(estimate[key] for estimate in guesses.values())
            truth = sum(real(manifest) for manifest in made.values())
            if truth:
                where = {"data": Path(data).name, "generator": generator, "passages": passages}
                lines.append({**where, "number": name, "estimate": guess, "actual": truth, "off": guess / truth - 1})
        return lines


def table(lines: list[dict]) -> str:
    """A line for each data set, generator and number."""
    head = ["| data | generator | number | estimate | actual | off by |", "|---|---|---|---:|---:|---:|"]
    cells = (
        f"| {each['data']} | {each['generator']} | {each['number']} | {each['estimate']:,.6g} | {each['actual']:,.6g} "
        f"| {each['off']:+.1%} |"
        for each in lines
    )
    return "\n".join([*head, *cells])


def main() -> int:
    bench = Benchmark(__file__, __doc__)
    bench.add("data", free=True, nargs="+", help="BEIR folders")
    bench.add("--generator", default="crop,smollm2")
    bench.add("--passages", type=int, default=300)
    args = bench.parse()
    lines = []
    print(f"{'data':<20} {'generator':<10} {'number':<18} {'estimate':>14} {'actual':>14} {'off':>7}")
    for data in args.data:
        for generator in args.generator.split(","):
            for line in compare(data, generator, args.passages):
                lines.append(line)
                shown = [f"{line[key]:>14,.6g}" for key in ("estimate", "actual")]
                print(
                    f"{line['data']:<20} {generator:<10} {line['number']:<18} {' '.join(shown)} {line['off']:>+7.1%}",
                    flush=True,
                )
    worst = max(lines, key=lambda line: abs(line["off"]))
    which = ", ".join([worst["number"], worst["data"], worst["generator"]])
    bench.say(f"{args.passages:,} passages, estimated from a canary of 64; bound: at most {BOUND:.0%} off.\n")
    bench.say(table(lines))
    passed = bench.bound(f"off by, {which}", abs(worst["off"]), at_most=BOUND)
    print(f"worst {worst['off']:+.1%} ({which}); bound {BOUND:.0%}: {'ok' if passed else 'OVER'}")
    return bench.finish({"bound": BOUND, "lines": lines})


if __name__ == "__main__":
    sys.exit(main())
