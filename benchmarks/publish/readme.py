"""Writes the pages' figures from finished runs and from the benchmarks' tables; nothing in them is typed by hand.

    python -m benchmarks.publish.readme [--quickstart RUNS] [--study RUNS ...]

``--quickstart`` is the runs folder of `make study`: six lines of what it printed go into README.md, all of it into
docs/quickstart.md, its curves into docs/quickstart.svg. Each ``--study`` is a runs folder of `dagr study jobs/beir.py`,
for docs/studies.md. Without them those blocks stay. Always: every benchmark's table into docs/benchmarks.md, and the chart
of the ladder, docs/ladder.svg, from the tables of docs/results.md.
"""

import re
import sys
from pathlib import Path

from benchmarks.harness import ROOT, Benchmark, title
from dagr_ray import report
from dagr_ray.report.charts import curves_svg

DOCS = ROOT / "docs"
# the base and the step whose gains the chart shows, as docs/results.md names them
BASE, STEP = "minilm", "+ filters"
GAIN = re.compile(r"\**([+−][0-9.]+)\** \[([+−][0-9.]+), ([+−][0-9.]+)\]")


def studies(runs: str) -> list[dict]:
    """Summaries of the studies in a runs folder, oldest first."""
    found = [report.summarise(runs, p.name) for p in Path(runs).glob("study-*") if (p / "study.json").is_file()]
    return sorted(found, key=lambda summary: summary["created"])


def machine(summary: dict) -> str:
    """Where a study ran, in words."""
    where = summary["machine"]
    device = f", {where['device']}" if "device" in where else ""  # older studies do not say
    return f"{where['cores']} cores, {where['platform'].split('-')[0]}, Python {where['python']}{device}"


def six_lines(text: str) -> list[str]:
    """Of what a study prints: its verdict, the first four answers, and what it cost."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("Did augmentation help?"))
    cost = next(line for line in lines if line.startswith("* Cost:"))
    return [*lines[first : first + 5], cost]


def quickstart(summary: dict) -> tuple[str, str]:
    """The README's block, and that of docs/quickstart.md."""
    text = report.terminal_table(summary)
    few = "\n".join(["```", "$ make study", *six_lines(text), "```"])
    picture = f"![{summary['verdict']['headline']}](quickstart.svg)"
    return few, f"{picture}\n\n```\n$ make study\n{text}\n```\n\nOn {machine(summary)}."


def tables() -> str:
    """Every benchmark's table, under what its script says of itself."""
    scripts = sorted(script for script in (ROOT / "benchmarks").glob("*/*.py") if script.with_suffix(".md").is_file())
    return "\n\n".join(
        f"## {title(script)}\n\n`python -m benchmarks.{script.parent.name}.{script.stem}`\n\n"
        f"{script.with_suffix('.md').read_text().strip()}"
        for script in scripts
    )


def measured(runs: list[str]) -> str:
    """The block of the studies."""
    blocks = []
    for summary in (s for each in runs for s in studies(each)):
        home, *others = [s["name"] for s in summary["sets"]]
        where = f"data={home}" + (f" ood={'+'.join(others)}" if others else "")
        axes = {k: v for k, v in summary["axes"].items() if k not in ("data", "ood")}
        words = " ".join(f"{k}={','.join(map(str, v))}" for k, v in axes.items())
        blocks.append(f"`dagr study {summary['job']} {where} {words}`\n\n{report.markdown_table(summary)}")
    return "\n\n".join(blocks)


def put(page: Path, name: str, block: str) -> None:
    """Writes a page with a new block between the markers called ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = page.read_text().partition(begin)
    if end not in rest:
        raise SystemExit(f"{page.name} has no {begin} ... {end}")
    page.write_text(f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}")


def gains(page: str) -> list[tuple[str, tuple[float, float, float], bool]]:
    """Of a page of results: (data set, gain with its interval, in distribution) of the last step, in the page's order."""
    found: list[tuple[str, tuple[float, float, float], bool]] = []
    ladder = page.partition("## The ladder")[2].partition("\n## ")[0]
    for part in ladder.split("\n### ")[1:]:
        name = part.split("\n")[0]
        outside = re.findall(r"out of distribution: (.+)\.", part)[0]
        cells = next(row.split(" | ") for row in part.splitlines() if row.startswith(f"| {BASE} | {STEP} |"))
        both = [match for cell in cells for match in GAIN.findall(cell)]
        numbers = [tuple(float(text.replace("−", "-")) for text in each) for each in both]
        found += [(name, numbers[0], True), (f"{outside}\ntuned to {name}", numbers[-1], False)]  # type: ignore[list-item]
    return found


def draw(rows: list[tuple[str, tuple[float, float, float], bool]], target: Path) -> None:
    """A line for each data set: the gain in nDCG@10 and its 95 % interval."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = sorted(rows, key=lambda row: (not row[2], -row[1][0]))[::-1]
    with plt.rc_context({"svg.hashsalt": "dagr", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(7.2, 3.6))
        for place, (_, (gain, low, high), inside) in enumerate(rows):
            shown = "#1b7837" if low > 0 else "#b2182b" if high < 0 else "#777777"
            axes.plot([low, high], [place, place], color=shown, linewidth=2)
            axes.plot([gain], [place], "o" if inside else "s", color=shown)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set_xlabel(
            "nDCG@10 over the frozen model, 95 % interval\nsquares: out of distribution; grey: the interval holds 0"
        )
        figure.tight_layout()
        figure.savefig(target, metadata={"Date": None})
        plt.close(figure)


def main() -> int:
    """Rewrites the pages in place."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--quickstart", metavar="RUNS")
    bench.add("--study", action="append", default=[], metavar="RUNS")
    args = bench.parse()
    if args.quickstart:
        summary = studies(args.quickstart)[-1]
        few, everything = quickstart(summary)
        (DOCS / "quickstart.svg").write_text(curves_svg(summary))
        put(ROOT / "README.md", "quickstart", few)
        put(DOCS / "quickstart.md", "quickstart", everything)
    if args.study:
        put(DOCS / "studies.md", "measured", measured(args.study))
    head = (
        "# What the benchmarks measured\n\nWritten by `python -m benchmarks.publish.readme` from the scripts' tables."
    )
    (DOCS / "benchmarks.md").write_text(f"{head}\n\n{tables()}\n")
    draw(gains((DOCS / "results.md").read_text()), DOCS / "ladder.svg")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
