"""Paths that people give, in jobs that are sent with ``ray job submit``; and the codes with which such a job ends."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_beir
from tests.faults.test_path_verbs import JOB, TABLE, laid_out, shm  # noqa: F401  a fixture
from tests.support.ray_head import Head, local_head

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
SUBMITTED = """
import json, os
from tests.faults.test_path_verbs import verb
from dagr_ray.core.ray_start import connect
connect()
here = os.getcwd()
for member, (place, words) in json.load(open("table.json")).items():
    os.chdir(place)
    codes = [verb("study", here + "/job.py", "k1=0.9", *words, "--no-track", "--quiet")]
    codes += [verb("report", "--json", "--runs", words[words.index("--runs") + 1])]
    print("CODES", json.dumps([member, codes]), flush=True)
"""


@pytest.fixture(scope="module")
def head():
    with local_head(PYTHONPATH=str(ROOT)) as running:
        yield running


def test_the_table_is_read_by_a_submitted_job(head: Head, tmp_path, shm, monkeypatch) -> None:  # noqa: F811
    """One job for all members; each is a command of its own there, from the folder that its person stands in."""
    monkeypatch.chdir(tmp_path)
    places = {}
    for i, member in enumerate(TABLE):
        root = tmp_path / f"member{i}"
        root.mkdir()
        (shm / str(i)).mkdir()
        words, _ = laid_out(member, root, shm / str(i))
        places[member] = (str(root / "here"), words if "--runs" in words else [*words, "--runs", "the runs"])
    work = tmp_path / "work"
    work.mkdir()
    (work / "table.json").write_text(json.dumps(places))
    (work / "job.py").write_text(JOB)
    (work / "submitted.py").write_text(SUBMITTED)
    done = head.submit(work, [sys.executable, "submitted.py"], timeout=300)
    lines = [line.partition("CODES ")[2] for line in done.stdout.splitlines() if "CODES " in line]
    assert [json.loads(line) for line in lines] == [[member, [0, 0]] for member in TABLE], (done.stdout + done.stderr)[
        -3000:
    ]


@pytest.mark.parametrize(("data", "code"), [("set", 0), ("nowhere", 2)])
def test_a_submitted_command_ends_with_its_own_code(head: Head, tmp_path, data, code) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "job.py").write_text(JOB)
    tiny_beir(work / "set", docs=30)
    words = [
        sys.executable,
        "-m",
        "dagr_ray.cli.main",
        "study",
        "job.py",
        f"data={data}",
        "--runs",
        str(tmp_path / "runs"),
    ]
    done = head.submit(work, [*words, "--no-track", "--quiet"], timeout=200)
    if code:
        assert done.returncode and f"exit code {code}" in done.stdout + done.stderr
        assert "dagr: error: no folder" in done.stdout + done.stderr or "nowhere" in done.stdout + done.stderr
    else:
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
