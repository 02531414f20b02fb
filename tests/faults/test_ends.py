"""How the command line ends, and what it prints: signals, streams that are closed or full, encodings that lack our letters."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from tests.conftest import tiny_beir

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DAGR = [sys.executable, "-m", "dagr_ray.cli.main"]
SLOW = """
import time
from dagr_ray.engines import Completion, Engine
from dagr_ray.core.stage import Stage
from dagr_ray.stages.sources import Beir
from dagr_ray.stages.generate import Generate
from dagr_ray.strategies.crop import Crop


class Slow(Engine):
    abstract = False
    type = "slow"

    def open(self, pool):
        return self

    def close(self):
        pass

    def generate(self, prompts, seeds, sampling, n):
        time.sleep(0.2)
        return [[Completion(prompt.passage[:20], "stop", 1, 0, 1)] * n for prompt in prompts]


def slow(data: str) -> Stage:
    return Generate(corpus=Beir(path=data), strategy=Crop(), engine=Slow(), samples=1)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_beir(tmp_path_factory.mktemp("ends") / "set", docs=40)


@pytest.fixture(scope="module")
def judged(data):
    """A complete folder with candidates, for what can be exported."""
    from dagr_ray.miners.bm25 import BM25
    from dagr_ray.stages.retrieve import Index, Search
    from dagr_ray.stages.sources import Beir

    corpus, runs = Beir(path=str(data)), str(data.parent / "runs")
    return materialize(Search(index=Index(corpus=corpus, miner=BM25()), queries=corpus, split="test"), runs)


def _as_from_a_terminal():
    """A background job of a shell, as a test may be, has some signals ignored."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def begun(*words, **options):
    """The command line in a process of its own, whose output is read."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": _as_from_a_terminal} | options
    return subprocess.Popen([*DAGR, *map(str, words)], cwd=ROOT, env=environment, **pipes)


def said(path):
    """Waits for a file that a job writes."""
    until = time.time() + 30
    while not path.exists():
        assert time.time() < until
        time.sleep(0.02)


WAITS = "import pathlib, time\npathlib.Path({mark!r}).touch()\ntime.sleep(100)\n"
SWALLOWS = WAITS.replace("time.sleep", "while True:\n    try: time.sleep") + "    except BaseException: pass\n"


@pytest.mark.parametrize(
    ("verb", "number", "code", "job"),
    [
        ("run", signal.SIGTERM, 143, WAITS),
        ("run", signal.SIGINT, 130, WAITS),
        ("run", signal.SIGHUP, 129, WAITS),
        ("study", signal.SIGTERM, 143, WAITS),
        ("check", signal.SIGTERM, 143, WAITS),
        ("preview", signal.SIGTERM, 143, WAITS),
        ("run", signal.SIGTERM, 143, SWALLOWS),
    ],
)
def test_a_signal_ends_a_verb_with_its_own_code_and_one_line(tmp_path, verb, number, code, job):
    (tmp_path / "job.py").write_text(job.format(mark=str(tmp_path / "mark")))
    process = begun(verb, tmp_path / "job.py", "a=b c")
    said(tmp_path / "mark")
    process.send_signal(number)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == code, errors
    [line] = errors.decode().strip().splitlines()
    assert line.endswith(f"finished work is kept. Resume with: dagr {verb} {tmp_path / 'job.py'} 'a=b c'")


def test_signals_end_the_verbs_that_look_at_results():
    """Each waits for ever for a store that takes a connection and is silent."""
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}
    waiting = []
    for number, code, said_first in ((signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")):
        for words in (("report",), ("annotate", "export", "beir-set", "to-rate")):
            store = socket.create_server(("127.0.0.1", 0))
            store.settimeout(60)
            at = f"127.0.0.1:{store.getsockname()[1]}"
            runs = f"s3://bucket/runs?endpoint_override={at}&scheme=http&region=us-east-1"
            waiting.append((begun(*words, "--runs", runs, env=keys), store, words, number, code, said_first))
    connected = [store.accept() for _, store, *_ in waiting]
    for process, _, _, number, *_ in waiting:
        process.send_signal(number)
    for process, _, words, _, code, said_first in waiting:
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code, errors
        [line] = errors.decode().strip().splitlines()
        assert line.startswith(f"{said_first}; finished work is kept. Resume with: dagr {' '.join(words)} ")
    for connection, _ in connected:
        connection.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_canary_and_leaves_no_process(tmp_path, data, number, code):
    (tmp_path / "slow.py").write_text(SLOW)
    words = ("check", tmp_path / "slow.py", f"data={data}", "--one", "--canary", "--runs", tmp_path / "runs")
    process = begun(*words)
    while not list((tmp_path / "runs").glob("generate-*/attempts/*")):
        assert process.poll() is None
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in each.name() for each in family)
    process.send_signal(number)
    out, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert b"Resume with: dagr check" in errors and b"Traceback" not in errors and not out
    assert not psutil.wait_procs(family, timeout=5)[1]


def test_what_blocks_outside_of_python_is_ended_too(tmp_path, judged):
    os.mkfifo(
        tmp_path / "out.trec"
    )  # the export waits for a reader, in a library that goes on waiting when a signal comes
    process = begun("export", judged.name, tmp_path / "out.trec", "--format", "trec", "--runs", judged.runs)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 143 and b"stopped by SIGTERM" in errors and b"Traceback" not in errors


def test_a_program_that_nohup_started_outlives_its_terminal(tmp_path):
    (tmp_path / "job.py").write_text(WAITS.format(mark=str(tmp_path / "mark")))
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = begun("run", tmp_path / "job.py", **ignored)
    said(tmp_path / "mark")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.terminate()
    assert process.wait(timeout=10) == 143


def test_a_signal_while_ray_starts_leaves_no_process(tmp_path, data):
    (tmp_path / "slow.py").write_text(SLOW)
    process = begun("run", tmp_path / "slow.py", f"data={data}", "--runs", tmp_path / "runs")
    family: list[psutil.Process] = []
    while not any("gcs_server" in each.name() for each in family):
        assert process.poll() is None
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143, errors
    assert b"stopped by SIGTERM; finished work is kept. Resume with: dagr run" in errors and b"Traceback" not in errors
    assert not psutil.wait_procs(family, timeout=5)[1]


def test_a_run_stopped_twice_resumes_with_all_rows(tmp_path, data):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "small.toml").write_text("[generate]\nworkers = 1\ncpus = 0.5\nshard_rows = 4\nin_flight = 1\n")
    words = (
        "run",
        tmp_path / "slow.py",
        f"data={data}",
        "--placement",
        tmp_path / "small.toml",
        "--runs",
        tmp_path / "runs",
    )
    process = begun(*words)
    kept: set[str] = set()
    while len(kept) < 3:
        assert process.poll() is None
        kept = {path.name for path in (tmp_path / "runs").glob("generate-*/receipts/*.json")}
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143, errors
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("generate-*/receipts/*.json")}
    assert 3 <= len(stamps) < 10
    again = begun(*words, "--quiet")
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    [folder] = (tmp_path / "runs").glob("generate-*")
    made = Artifact(str(tmp_path / "runs"), folder.name)
    assert sorted(made.read("generations")["source_id"].to_pylist()) == sorted(f"d{i}" for i in range(40))
    assert made.manifest["counts"]["rejected"] == {}


# -- streams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "code", "out"),
    [
        ("set -o pipefail; $D plugins | (exec <&-; sleep 1)", 141, ""),
        ("set -o pipefail; $D --help | (exec <&-; sleep 1)", 141, ""),
        ("$D ls --runs /no >&-", 0, ""),
        ("$D ls --runs /no 2>&- <&-", 0, "nothing in /no"),
        ("$D trace x --runs /no 2>&-", 2, ""),
        ("$D ls --runs /no > /dev/full", 1, "No space left on device"),
        ("$D ls --runs /no < /dev/null", 0, "nothing in /no"),
        ("setsid $D ls --runs /no", 0, "nothing in /no"),
        ("umask 777; $D ls --runs /no", 0, "nothing in /no"),
    ],
)
def test_streams_that_are_closed_or_full_are_no_traceback(shell, code, out):
    environment = os.environ | {"D": " ".join(DAGR), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert out in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"LC_ALL": "C"}, "nöné 日 😀"),
        ({"LC_ALL": "POSIX"}, "nöné 日 😀"),
        ({"LANG": "C", "LC_ALL": ""}, "nöné 日 😀"),
        ({"LC_ALL": "C.UTF-8"}, "nöné 日 😀"),
        ({"LC_ALL": "xx_YY.nowhere"}, "nöné 日 😀"),
        ({"PYTHONIOENCODING": "ascii"}, r"n\u00f6n\u00e9 \u65e5 \ud83d\ude00"),
        ({"PYTHONIOENCODING": "latin-1"}, r"nöné \u65e5 \ud83d\ude00"),
        ({"PYTHONIOENCODING": "cp1252"}, r"nöné \u65e5 \ud83d\ude00"),
        ({"PYTHONIOENCODING": "utf-16"}, "nöné 日 😀"),
        ({"LC_ALL": "POSIX"} | PLAIN, r"n\u00f6n\u00e9 \u65e5 \ud83d\ude00"),
        ({"LC_ALL": "POSIX"} | PLAIN | {"PYTHONIOENCODING": "latin-1"}, r"nöné \u65e5 \ud83d\ude00"),
    ],
)
def test_any_encoding_of_the_terminal_shows_what_it_can(tmp_path, environment, shown):
    runs = tmp_path / "nöné 日 😀"
    runs.mkdir()
    process = begun("ls", "--runs", runs, env={"PYTHONIOENCODING": ""} | environment)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    encoding = environment.get("PYTHONIOENCODING") or "utf-8"
    assert out.decode(encoding) == f"nothing in {tmp_path}/{shown}\n"


def test_json_stays_json_in_any_encoding(data):
    process = begun("trace", "−é😀", "--json", "--runs", data.parent / "no", env={"PYTHONIOENCODING": "ascii"})
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and b"Traceback" not in errors
    code = "from dagr_ray.cli import main; from dagr_ray.core import terminal; main._open_streams(); "
    code += "terminal.print_json(['−é😀', '\\ud800'])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout) == ["−é😀", "\ud800"]
