"""What holds for all tests, those of the package and those of the benchmarks."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.guard import sitecustomize as guard

HEAVY = ("engine", "cluster", "browser")
# Files of more than half a minute begin first, so that none of them is alone at the end.
SLOW = (
    "study train_resume chaos object_store vllm_start openai_vllm train_steps train index_parts bill odd_rows resume canary "
    "poison nodes llm_judge vllm vllm_arguments vllm_feeding tracking"
).split()


def pytest_configure() -> None:
    # files run side by side on machines of any speed: how long an example takes says nothing
    settings.register_profile("tests", deadline=None)
    settings.load_profile("tests")
    # Ray workers and the JVM in one process: both handle SIGSEGV.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    # Test files run side by side: threads that wait for a core which another file keeps busy make a step ten times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell's background job, and xdist, ignore Ctrl-C, by which a row that hangs in this process is ended.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = str(Path(guard.__file__).parent)
    if folder not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which pytest's workers take up files (with --no-loadscope-reorder)."""
    place = {f"test_{name}.py": i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """In `make check` (a run that chooses by marks), a test without one starts neither vLLM nor a node of Ray nor a browser."""
    before = os.environ.get(guard.VARIABLE, "")
    allowed = not item.config.option.markexpr or any(item.get_closest_marker(mark) for mark in (*HEAVY, "slow"))
    os.environ[guard.VARIABLE] = "" if allowed else ",".join(HEAVY)
    try:
        return (yield)
    finally:
        os.environ[guard.VARIABLE] = before
