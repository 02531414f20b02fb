"""The quick-start study from nothing and once more: wall seconds of each, of every kind of stage, and their bounds.

    python benchmarks/quickstart.py [--runs DIR]

Exits 1 where the study takes over 12 minutes or the second run over 40 s. Writes benchmarks/quickstart.md.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from dagr_ray.artifact import Artifact

ROOT = Path(__file__).parent.parent
BOUND_S, AGAIN_BOUND_S = 720, 40


def study(runs: str) -> float:
    """Wall seconds of the study."""
    started = time.perf_counter()
    words = [sys.executable, "-m", "dagr_ray.cli", "study", "jobs/quickstart.py", "--runs", runs]
    subprocess.run(words, cwd=ROOT, check=True)
    return time.perf_counter() - started


def main() -> int:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = args.runs or scratch
        first, again = study(runs), study(runs)
        spent: dict[str, list[float]] = defaultdict(list)
        for path in Path(runs).iterdir():
            manifest = Artifact(runs, path.name).manifest
            if manifest:
                spent[manifest["stage"]["type"]].append(manifest["cost"]["wall_s"])
    rows = [
        ("whole study", 1, first, f"at most {BOUND_S}"),
        ("the same command again", 1, again, f"at most {AGAIN_BOUND_S}"),
    ]
    rows += [(f"`{kind}` folders", len(found), sum(found), "") for kind, found in sorted(spent.items())]
    lines = ["| what | times | seconds in all | bound |", "|---|---:|---:|---|"]
    lines += [f"| {name} | {times} | {seconds:.1f} | {bound} |" for name, times, seconds, bound in rows]
    (ROOT / "benchmarks" / "quickstart.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(first > BOUND_S or again > AGAIN_BOUND_S)


if __name__ == "__main__":
    sys.exit(main())
