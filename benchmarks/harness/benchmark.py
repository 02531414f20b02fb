"""A benchmark's arguments, its table and its bounds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.harness.tables import markdown


class Benchmark:
    """One script: ``add`` its arguments, ``parse`` them, ``say`` lines of its table, state each ``bound``, ``finish``.

    The table goes to the file of the script's name with the suffix ``.md``, written only by a run that measured what the
    default arguments measure. Arguments that are ``free`` do not change that: where data lies, where results go.
    """

    def __init__(self, script: str, doc: str | None) -> None:
        self.script = Path(script)
        self.parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{self.script.parent.name}.{self.script.stem}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.free: set[str] = {"json"}
        self.args = argparse.Namespace()
        self.lines: list[str] = []
        self.bounds: list[dict[str, Any]] = []
        self.missed: list[str] = []

    def add(self, *names: str, free: bool = False, **options: Any) -> None:
        """An argument, as argparse's ``add_argument``."""
        action = self.parser.add_argument(*names, **options)
        if free:
            self.free.add(action.dest)

    def parse(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """The arguments of the command line; every benchmark also has ``--json FILE``."""
        self.parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
        self.args = self.parser.parse_args(words)
        return self.args

    def error(self, text: str) -> NoReturn:
        """Ends with a line about the arguments and exit code 2."""
        self.parser.error(text)

    def say(self, text: str = "") -> None:
        """Prints lines of the table at once, and keeps them."""
        self.lines.append(text)
        print(text, flush=True)

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]], left: Iterable[int] = (0,)) -> None:
        """Says a whole table (see ``markdown``)."""
        self.say("\n".join(markdown(head, rows, left)))

    def bound(self, what: str, value: float, *, at_least: float = float("-inf"), at_most: float = float("inf")) -> bool:
        """Whether a figure holds its bound. A benchmark that misses one exits with 1."""
        holds = at_least <= value <= at_most
        limit = f"at most {at_most:,g}" if at_most != float("inf") else f"at least {at_least:,g}"
        self.bounds.append({"what": what, "value": value, "bound": limit, "holds": holds})
        if not holds:
            self.fail(f"{what}: {value:,.4g} ({limit})")
        return holds

    def fail(self, what: str) -> None:
        """A bound that no number states is missed."""
        self.missed.append(what)

    def write(self) -> bool:
        """Writes the table beside the script if the run measured what the default arguments measure; else says why not."""
        target = self.script.with_suffix(".md")
        changed = {k: v for k, v in vars(self.args).items() if k not in self.free and v != self.parser.get_default(k)}
        if changed:
            print(f"{target.name} is not written: other arguments than the default ones: {changed}")
            return False
        target.write_text("\n".join(self.lines).rstrip("\n") + "\n")
        return True

    def finish(self, report: Any = None) -> int:
        """Writes the table if there is one, and with ``--json`` the report; returns the exit code: 1 if a bound is missed."""
        if self.lines:
            self.write()
        if self.args.json:
            figures = {"bounds": self.bounds, "table": self.lines} if report is None else report
            Path(self.args.json).write_text(json.dumps(figures, indent=1) + "\n")
        for what in self.missed:
            print(f"missed: {what}", file=sys.stderr)
        return int(bool(self.missed))
