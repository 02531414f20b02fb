"""Writes the README's figures from finished runs and from the other benchmarks' tables; nothing in them is typed by hand.

    python benchmarks/readme.py [--quickstart RUNS] [--study RUNS ...]

``--quickstart`` is the runs folder of `make study`, each ``--study`` one of `dagr study jobs/beir.py`: without them those
blocks stay. The curve goes to docs/quickstart.svg, the tables of generation at scale into their block, and every
benchmarks/*.md into docs/benchmarks.md.
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from dagr_ray import report
from dagr_ray.report.charts import curves_svg

ROOT = Path(__file__).parent.parent
SCALE = ("quickstart", "generation", "orchestration", "chaos", "prefix")


def studies(runs: str) -> list[dict]:
    """Summaries of the studies in a runs folder, oldest first."""
    found = [report.summarise(runs, p.name) for p in Path(runs).glob("study-*") if (p / "study.json").is_file()]
    return sorted(found, key=lambda summary: summary["created"])


def machine(summary: dict) -> str:
    """Where a study ran, in words."""
    where = summary["machine"]
    device = f", {where['device']}" if "device" in where else ""  # older studies do not say
    return f"{where['cores']} cores, {where['platform'].split('-')[0]}, Python {where['python']}{device}"


def quickstart(runs: str) -> str:
    """The first screen's block."""
    summary = studies(runs)[-1]
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "quickstart.svg").write_text(curves_svg(summary))
    table = report.terminal_table(summary)
    return f"![{summary['verdict']['headline']}](docs/quickstart.svg)\n\n```\n$ make study\n{table}\n```\n\nOn {machine(summary)}."


def title(script: Path) -> str:
    """The first sentence of a script's docstring."""
    doc = ast.get_docstring(ast.parse(script.read_text())) or script.stem
    return doc.split("\n")[0]


def tables(names: Iterable[str], level: str) -> str:
    """The tables of some benchmarks that have been run, each under what its script says of itself."""
    folder = ROOT / "benchmarks"
    found = [(folder / f"{name}.py", folder / f"{name}.md") for name in names]
    return "\n\n".join(
        f"{level} {title(script)}\n\n`python benchmarks/{script.name}`\n\n{table.read_text().strip()}"
        for script, table in found
        if table.is_file()
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


def put(text: str, name: str, block: str) -> str:
    """The text with a new block between the markers called ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = text.partition(begin)
    assert end in rest, f"README.md has no {begin} ... {end}"
    return f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"


def main() -> int:
    """Rewrites README.md in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", metavar="RUNS")
    parser.add_argument("--study", action="append", default=[], metavar="RUNS")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = put(readme.read_text(), "scale", tables(SCALE, "###"))
    if args.quickstart:
        text = put(text, "quickstart", quickstart(args.quickstart))
    if args.study:
        text = put(text, "measured", measured(args.study))
    readme.write_text(text)
    every = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.md"))
    head = "# What the benchmarks measured\n\nWritten by `python benchmarks/readme.py` from the tables that the scripts write."
    (ROOT / "docs" / "benchmarks.md").write_text(f"{head}\n\n{tables(every, '##')}\n")
    print(json.dumps({"README.md": len(readme.read_text())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
