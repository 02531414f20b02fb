"""Measurements in a process of their own, and the one right way to ask for a process's peak memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.checkout import ROOT, module_of


def peak_memory(pid: int | str = "self") -> int:
    """Bytes of the largest resident set that a program has had (the kernel's VmHWM).

    Not ``ru_maxrss``: a child's begins with what its parent held at the fork, so it can be the parent's figure.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def in_own_process(script: str, *words: str, **options: Any) -> dict[str, Any]:
    """Runs a benchmark's own file with ``words`` in a new process; returns the JSON of its last line.

    ``options`` go to ``subprocess.run``. Raises SystemExit with the end of its errors if it fails.
    """
    command = [sys.executable, "-m", module_of(script), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
