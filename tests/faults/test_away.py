"""Things that are away for a moment: no row is given up for them, the stage ends with one line, and goes on with all rows."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dagr_ray.core import blame, ray_pool
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import StageFailed
from dagr_ray.core.worker import Opener
from dagr_ray.engines import Completion, Engine
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir, Sample
from dagr_ray.strategies.crop import Crop
from dagr_ray.study.job import load_job
from tests.conftest import tiny_beir
from tests.support.billed import Killed

ROOT = Path(__file__).parents[2]


def system(number, path="/some/where"):
    return OSError(number, os.strerror(number), path)


def wrapped(error):
    try:
        raise RuntimeError("the engine could not") from error
    except RuntimeError as outer:
        return outer


# What an engine meets -> whether the machine is at fault.
MET = {
    "refused": (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), True),
    "reset": (ConnectionResetError("the peer is gone"), True),
    "pipe": (BrokenPipeError("the server's process is gone"), True),
    "late": (TimeoutError("no answer"), True),
    "name": (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), True),
    "missing": (system(errno.ENOENT), True),
    "permission": (system(errno.EACCES), True),
    "not permitted": (system(errno.EPERM), True),
    "full": (system(errno.ENOSPC), True),
    "quota": (system(errno.EDQUOT), True),
    "too large a file": (system(errno.EFBIG), True),
    "read-only": (system(errno.EROFS), True),
    "input/output": (system(errno.EIO), True),
    "stale": (system(errno.ESTALE), True),
    "no device": (system(errno.ENXIO), True),
    "not connected": (system(errno.ENOTCONN), True),
    "no files left": (system(errno.EMFILE), True),
    "no route": (system(errno.EHOSTUNREACH), True),
    "an object store's": (OSError("When reading information for key 'a': AWS Error NETWORK_CONNECTION"), True),
    "wrapped": (wrapped(system(errno.ENOSPC)), True),
    "wrapped twice": (wrapped(wrapped(ConnectionAbortedError("aborted"))), True),
    "a name too long": (system(errno.ENAMETOOLONG), False),
    "an argument": (system(errno.EINVAL), False),
    "a value": (ValueError("no good"), False),
    "a key": (KeyError("choices"), False),
    "letters": (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"), False),
    "depth": (RecursionError("maximum recursion depth exceeded"), False),
}


class Meets(Engine):
    """Answers with the passage's number; at number 13 it meets what ``what`` names, as long as the file ``until`` is not there."""

    abstract = True
    what: str
    until: str

    def identity(self):
        return {"type": "meets"}

    def open(self, pool):
        return self

    def close(self):
        pass

    def generate(self, prompts, seeds, sampling, n):
        numbers = [prompt.passage.split("number ")[1].split(".")[0] for prompt in prompts]
        if "13" in numbers and not os.path.exists(self.until):
            if self.what == "memory":
                raise MemoryError("Unable to allocate 40.0 GiB for an array")
            if self.what == "memory of many" and len(numbers) > 3:
                raise MemoryError("Unable to allocate 4.0 GiB for an array")
            if self.what in MET:
                raise MET[self.what][0]
        return [[Completion(f"answer {number}", "stop", 10, 0, 2)] * n for number in numbers]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Beir(path=str(tiny_beir(tmp_path_factory.mktemp("away") / "set", docs=40)))


HERE = Placement(generate=Pool(workers=0, shard_rows=10))


@pytest.mark.parametrize("what", MET)
def test_only_what_a_row_causes_is_blamed_on_it(tmp_path, data, what):
    machine = MET[what][1]
    stage = Generate(corpus=data, strategy=Crop(), engine=Meets(what=what, until=str(tmp_path / "well")))
    runs = str(tmp_path / "runs")
    if machine:
        with pytest.raises(StageFailed) as ended:
            materialize(stage, runs, HERE)
        line = str(ended.value)
        assert line.startswith(stage.folder(runs).path) and "no row was skipped" in line and "run again" in line
        assert "\n" not in line and len(line) < 600
        assert len(stage.folder(runs).receipts()) == 1, "what was done before stays"
        (tmp_path / "well").touch()
    folder = materialize(stage, runs, HERE)
    given_up = [] if machine else ["d13"]
    assert folder.read("rejected")["id"].to_pylist() == given_up
    assert sorted({f"d{i}" for i in range(40)} - set(folder.read("generations")["source_id"].to_pylist())) == given_up


@pytest.mark.parametrize("at", ["whole folder", "manifest", "table"])
def test_an_input_that_is_away_for_a_moment_loses_no_row(tmp_path, data, at):
    runs, until = str(tmp_path / "runs"), str(tmp_path / "away")
    corpus = Sample(corpus=data, n=40)
    there = Path(materialize(corpus, runs).path)
    there = there / {"whole folder": "", "manifest": "manifest.json", "table": "corpus"}[at]

    class Mover(Meets):
        abstract = True

        def generate(self, prompts, seeds, sampling, n):
            if any("number 13." in prompt.passage for prompt in prompts) and there.exists():
                shutil.move(there, until)
            return super().generate(prompts, seeds, sampling, n)

    stage = Generate(corpus=corpus, strategy=Crop(), engine=Mover(what="", until=until))
    if at == "table":  # a damaged input is built again; so is one whose parts have gone
        folder = materialize(stage, runs, HERE)
    else:
        with pytest.raises(StageFailed, match="no row was skipped"):
            materialize(stage, runs, HERE)
        assert not there.exists(), "nothing is put where it was"
        shutil.move(until, there)
        folder = materialize(stage, runs, HERE)
    assert folder.read("rejected").num_rows == 0
    assert sorted(folder.read("generations")["source_id"].to_pylist()) == sorted(f"d{i}" for i in range(40))


def test_memory_that_is_enough_for_fewer_rows_loses_none(tmp_path, data):
    engine = Meets(what="memory of many", until=str(tmp_path / "well"))
    folder = materialize(Generate(corpus=data, strategy=Crop(), engine=engine), str(tmp_path / "runs"), HERE)
    assert folder.count("generations") == 40 and folder.count("rejected") == 0


def test_memory_that_runs_out_says_what_to_change(tmp_path, data):
    stage = Generate(corpus=data, strategy=Crop(), engine=Meets(what="memory", until=str(tmp_path / "well")))
    with pytest.raises(StageFailed) as ended:
        materialize(stage, str(tmp_path / "runs"), HERE)
    for word in (
        "memory ran out",
        "40.0 GiB",
        "[generate]",
        "workers",
        "shard_rows (now 10)",
        "in_flight",
        "run again",
    ):
        assert word in str(ended.value)
    (tmp_path / "well").touch()
    folder = materialize(stage, str(tmp_path / "runs"), HERE)
    assert folder.count("generations") == 40 and folder.count("rejected") == 0


@pytest.mark.parametrize("size", [0, 2])
def test_a_full_disk_names_its_path_and_the_run_goes_on_later(tmp_path, data, size):
    """``ulimit -f``: files of at most so many blocks of 1,024 bytes can be written, as root too."""
    code = (
        "import sys; from tests.faults.test_away import *\n"
        f"stage = Generate(corpus=Beir(path={data.path!r}), strategy=Crop(), engine=Meets(what='', until='/'))\n"
        f"try: materialize(stage, {str(tmp_path / 'runs')!r}, HERE)\n"
        "except StageFailed as error: print(error); sys.exit(1)"
    )
    limited = ["bash", "-c", f'ulimit -f {size}; exec {sys.executable} -B -c "$0"', code]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert str(tmp_path / "runs") in done.stdout and "File too large" in done.stdout and "run again" in done.stdout
    assert not list(tmp_path.rglob("*.tmp"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "runs").glob("generate-*")
    made = Artifact(str(tmp_path / "runs"), folder.name)
    assert made.count("generations") == 40 and made.count("rejected") == 0


def test_a_second_driver_says_for_whom_it_waits(tmp_path, data, caplog):
    folder = Artifact(str(tmp_path / "runs"), "beir-1")
    code = f"""
import sys
from dagr_ray.core.artifact import Artifact
with Artifact({folder.runs!r}, "beir-1").lock():
    print("held", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        import threading

        threading.Timer(0.5, other.stdin.close).start()
        with folder.lock():
            pass
    [line] = caplog.messages
    assert folder.path in line and f"process {other.pid} of " in line
    caplog.clear()
    with folder.lock():
        pass
    assert caplog.messages == []


PAGE = """\x1b[36mray::train()\x1b[39m (pid=7, ip=10.0.0.1)
  File "loop.py", line 3, in fit
ValueError: {reason}

The above exception was the direct cause of the following exception:

  File "worker.py", line 9, in run
ray.exceptions.RayTaskError(UserCodeException): \x1b[36mray::map()\x1b[39m
ray.train.WorkerGroupError: Training failed due to worker errors: {{'job': {dump}}}"""


DURING = "During handling of the above exception, another exception occurred:"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PAGE.format(reason="no number", dump="x" * 5000), "ValueError: no number"),
        ("ray.OutOfMemoryError: killed for memory pressure\nTop 10", "OutOfMemoryError: killed for memory pressure"),
        (f"KeyError: 'a'\n\n{DURING}\n\nOSError: no room", "OSError: no room"),
        ("no line that looks like one", "no line that looks like one"),
        ("", ""),
    ],
)  # fmt: skip
def test_a_page_of_a_library_is_one_line(text, reason):
    assert blame.reason(text) == reason


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (system(errno.ENOMEM), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("java.lang.OutOfMemoryError: Java heap space"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("A task was killed by the memory monitor: node is low on memory"), True),
        (wrapped(MemoryError("realloc of size 4096 failed")), True),
        (RuntimeError("the memory of this passage is short"), False),
        (ValueError("no good"), False),
    ],
)
def test_memory_is_told_from_other_errors(error, memory):
    assert blame.is_of_memory(error) == memory


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 2**64, 10**40])
def test_an_invalid_seed_is_refused_with_the_job(data, seed):
    with pytest.raises(ConfigError, match=rf"seed = {seed}: Input should be (less than|greater than or equal to)"):
        load_job(str(ROOT / "jobs/beir.py")).stage(data=data.path, generator="crop", seed=seed)


class Ended(Meets):
    """Its worker is ended in the middle of its work, as by whoever frees memory."""

    abstract = True

    def generate(self, prompts, seeds, sampling, n):
        time.sleep(1)
        raise Killed


def test_workers_killed_for_memory_cost_no_row(tmp_path, data, monkeypatch):
    stage = Generate(corpus=data, strategy=Crop(), engine=Ended(what="", until=str(tmp_path / "well")))
    runs, shard = str(tmp_path / "runs"), {"shard": 0, "start": 0, "stop": 1}
    inputs = {name: materialize(each, runs) for name, each in stage.inputs().items()}
    monkeypatch.setenv("RAY_memory_usage_threshold", "0")
    assert ray_pool.is_memory_short(), "and Ray is imported, as it is in a worker"
    for _ in range(3):
        with pytest.raises(Killed):
            Opener(stage, inputs, stage.folder(runs), Pool(workers=1, shard_rows=1), "1-x")()(shard)
    with pytest.raises(
        StageFailed, match=r"memory ran out.*3 workers were killed.*\[generate\] lower workers \(now 1\)"
    ):
        Opener(stage, inputs, stage.folder(runs), Pool(workers=1, shard_rows=1), "1-x")()(shard)
    assert stage.folder(runs).receipts() == {}, "no row was skipped, though it was alone"


@pytest.mark.parametrize(
    ("page", "death", "reason"),
    [
        ("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR", True, None),
        (
            "The actor died because of an error raised in its creation task, ray::MapWorker.__init__()\n"
            "  File 'worker.py', line 3\nAttributeError: no such field",
            False,
            "AttributeError: no such field",
        ),
    ],
)
def test_a_failed_start_differs_from_a_killed_worker(page, death, reason):
    error = RuntimeError(page)
    assert blame.is_of_a_death(error) == death
    assert reason is None or blame.reason(error) == reason
