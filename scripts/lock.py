"""Resolves requirements/PROFILE.in into requirements/PROFILE.lock: ``python scripts/lock.py cpu``.

pip reports what it would install, and installs nothing. Run this with the Python of the environment.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
# On a CPU, scripts/setup.py installs torch separately, without the GPU packages that it depends on.
NOT_ON_CPU = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


def canonical(name: str) -> str:
    """A distribution's name, normalised as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def markers(text: str) -> dict[str, str]:
    """The environment markers of the direct requirements, by name. A locked line keeps its marker."""
    by_name = {}
    for line in text.splitlines():
        requirement, _, marker = line.partition("#")[0].partition(";")
        name = re.match(r"[\w.-]+", requirement.strip())
        if name and marker:
            by_name[canonical(name.group())] = f"; {marker.strip()}"
    return by_name


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
        print(f"lock: pip could not resolve {source.name}; correct the line that pip names above", file=sys.stderr)
        return 1
    marker_of = markers(source.read_text())
    lines = []
    for item in json.loads(report.stdout)["install"]:
        name = canonical(item["metadata"]["name"])
        if profile != "cpu" or not NOT_ON_CPU.match(name):
            lines.append(f"{name}=={item['metadata']['version']}{marker_of.get(name, '')}")
    head = f"# Resolved from {source.name} by `make lock PROFILE={profile}`; do not edit."
    (REQUIREMENTS / f"{profile}.lock").write_text("\n".join([head, *sorted(lines)]) + "\n")
    print(f"{profile}.lock: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
