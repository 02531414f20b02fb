"""The quick start from nothing and once more: wall seconds of the set-up, the study, each kind of stage, and their bounds.

    python -m benchmarks.speed.quickstart [--runs DIR]

The set-up is `make setup` into an environment of its own, with what pip has downloaded before. Exits 1 where it takes over
5 minutes, the study over 12 or the second run over 40 s. Writes benchmarks/speed/quickstart.md.
"""

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.harness import ROOT, Benchmark
from dagr_ray.core.artifact import Artifact

BOUND_S, AGAIN_BOUND_S, SETUP_BOUND_S = 720, 40, 300


def setup(folder: str) -> float:
    """Wall seconds of a set-up into an empty folder."""
    started = time.perf_counter()
    subprocess.run(["make", "setup", f"VENV={folder}/venv"], cwd=ROOT, check=True)
    return time.perf_counter() - started


def study(runs: str) -> float:
    """Wall seconds of the study."""
    started = time.perf_counter()
    words = [sys.executable, "-m", "dagr_ray.cli.main", "study", "jobs/quickstart.py", "--runs", runs]
    subprocess.run(words, cwd=ROOT, check=True)
    return time.perf_counter() - started


def main() -> int:
    """Prints the table and writes it."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--runs", free=True)
    args = bench.parse()
    with tempfile.TemporaryDirectory() as scratch:
        runs = args.runs or scratch
        made, first, again = setup(scratch), study(runs), study(runs)
        spent: dict[str, list[float]] = defaultdict(list)
        for path in Path(runs).iterdir():
            manifest = Artifact(runs, path.name).manifest
            if manifest:
                spent[manifest["stage"]["type"]].append(manifest["cost"]["wall_s"])
    rows = [
        ("set-up", 1, made, f"at most {SETUP_BOUND_S}"),
        ("whole study", 1, first, f"at most {BOUND_S}"),
        ("the same command again", 1, again, f"at most {AGAIN_BOUND_S}"),
    ]
    rows += [(f"`{kind}` folders", len(found), sum(found), "") for kind, found in sorted(spent.items())]
    cells = [[name, times, f"{seconds:.1f}", bound] for name, times, seconds, bound in rows]
    bench.table(["what", "times", "seconds in all", "bound"], cells, left=(0, 3))
    bench.bound("seconds of the set-up", made, at_most=SETUP_BOUND_S)
    bench.bound("seconds of the study", first, at_most=BOUND_S)
    bench.bound("seconds of the same command again", again, at_most=AGAIN_BOUND_S)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
