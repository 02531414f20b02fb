"""Refuses what is slow to start to a test without a mark: here, and in every Python process that has this folder on its path.

What is refused stands in the environment, so that a test's children know it too. A node of Ray, vLLM and a browser take
seconds to start; a test that starts one says so, and `make check` leaves it out.
"""

import os
import sys
from pathlib import PurePath

VARIABLE = "TESTS_REFUSE"
MODULES = {"vllm": "engine"}
PROGRAMS = dict.fromkeys(("gcs_server", "raylet"), "cluster") | dict.fromkeys(
    ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"), "browser"
)


class NotMarked(RuntimeError):
    """A test starts what it has no mark for. A process may hold this file as two modules, and two classes of this name."""


def refused() -> set[str]:
    """The marks that a test would need for what it may not start."""
    return set(filter(None, os.environ.get(VARIABLE, "").split(",")))


def _watch(event: str, args: tuple) -> None:
    if event == "import":
        mark, what = MODULES.get(args[0]), args[0]
    elif event == "subprocess.Popen":
        words = args[1] if isinstance(args[1], (list, tuple)) else str(args[1]).split()
        names = [PurePath(os.fsdecode(word)).name for word in words]
        what = next((name for name in names if name in PROGRAMS), "")
        mark = PROGRAMS.get(what)
    else:
        return
    if mark in refused():
        raise NotMarked(f"a test that starts {what} is marked {mark}: pytestmark = pytest.mark.{mark}")


# workers of Ray outlive the test that started its nodes, and belong to tests that are marked
if not any("default_worker.py" in word for word in sys.orig_argv):
    sys.addaudithook(_watch)
