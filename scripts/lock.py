"""Resolves requirements/PROFILE.in into requirements/PROFILE.lock: ``python scripts/lock.py cpu``.

Asks pip for a report of what it would install and installs nothing. Run it with the Python of the environment.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
# On a CPU torch goes in by itself (scripts/setup.py), and what it brings for GPUs is left out.
NOT_ON_CPU = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


def canonical(name: str) -> str:
    """A distribution's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def markers(text: str) -> dict[str, str]:
    """The environment markers of the direct requirements, by name; a locked line keeps its marker."""
    found = {}
    for line in text.splitlines():
        requirement, _, marker = line.partition("#")[0].partition(";")
        name = re.match(r"[\w.-]+", requirement.strip())
        if name and marker:
            found[canonical(name.group())] = f"; {marker.strip()}"
    return found


def main(profile: str) -> int:
    """Writes the lock; returns an exit code."""
    source = REQUIREMENTS / f"{profile}.in"
    if not source.is_file():
        allowed = ", ".join(sorted(path.stem for path in REQUIREMENTS.glob("*.in")))
        print(f"lock: no requirements/{source.name}; allowed: {allowed}", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", "-"]
    report = subprocess.run([*command, "-r", str(source)], stdout=subprocess.PIPE, text=True, check=False)
    if report.returncode:
        print(f"lock: pip could not resolve {source.name}; mend the line that it names above", file=sys.stderr)
        return 1
    kept = markers(source.read_text())
    lines = []
    for item in json.loads(report.stdout)["install"]:
        name = canonical(item["metadata"]["name"])
        if profile != "cpu" or not NOT_ON_CPU.match(name):
            lines.append(f"{name}=={item['metadata']['version']}{kept.get(name, '')}")
    head = f"# Resolved from {source.name} by `make lock PROFILE={profile}`; do not edit."
    (REQUIREMENTS / f"{profile}.lock").write_text("\n".join([head, *sorted(lines)]) + "\n")
    print(f"{profile}.lock: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
