"""The table of a benchmark: benchmarks/NAME.md is written by a run with the default arguments, and by no other."""

import argparse
from pathlib import Path


def write_table(
    script: str,
    text: str,
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    free: tuple[str, ...] = ("json",),
) -> bool:
    """Writes ``text`` beside ``script`` and returns whether it did; says on stdout why where it does not.

    ``free`` are the arguments that do not change what is measured.
    """
    changed = {k: v for k, v in vars(args).items() if k not in free and v != parser.get_default(k)}
    target = Path(script).with_suffix(".md")
    if changed:
        print(f"{target.name} is not written: other arguments than the default ones: {changed}")
        return False
    target.write_text(text.rstrip("\n") + "\n")
    return True
