"""One table of paths that people give, through check, run, study and report; and places that nobody may use."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from dagr_ray.cli import main, results, run
from dagr_ray.study import mlflow_mirror
from tests.conftest import tiny_beir

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
NOBODY = 65534
# A study of two retrievers that start at once: paths are what is tried here.
JOB = """
from typing import Literal
from dagr_ray.core.paths import FileOrFolder
from dagr_ray.miners.bm25 import BM25
from dagr_ray.recipes.evaluation import judge, named_sets
from dagr_ray.stages.evaluate import Scorecard
from dagr_ray.stages.sources import Beir


def job(data: FileOrFolder, ood: FileOrFolder | None = None, k1: Literal["0.9", "1.2"] = "0.9") -> Scorecard:
    return judge(named_sets(Beir(path=data), ood), BM25(k1=float(k1)))
"""


def verb(name: str, *words: str) -> int:
    """A verb in this process; the exit code. One line comes of an error."""
    args, late = main.parser().parse_known_args([name, *words])
    if hasattr(args, "values"):
        args.values += late
    try:
        main.make_absolute(args)
        return (getattr(run, name, None) or getattr(results, name))(args) or 0
    except Exception as error:
        return main._explain(error)


# Where a person stands is `here`, below a scratch folder with the set `plain`. Name -> (data, ood, runs).
TABLE = {
    "relative, the default runs folder": ("set", None, None),
    "with ..": ("../here/./set/", None, "../here/../out"),
    "symlinked": ("link", None, "runs link"),
    "spaces and quotes": ('it\'s my "set"', None, "my 'runs' \"here\""),
    "commas, plus, equals": ("a,b+c=d", None, "r,u=n+s"),
    "signs of shells and addresses": ("$HOME #1 50%41?x;&", None, "*[r] 50%20#?"),
    "several scripts": ("सेट-ไทย-中文-عربي-é🎉", None, "रन-運行"),
    "names as long as a name may be": ("n" * 255, None, "r" * 255),
    "a path of 3,000 bytes": ("/".join(["deep" * 50] * 14) + "/set", None, None),
    "another disk": ("{shm}/set", None, "{shm}/runs"),
    "two folders with one last name": ("one/set", "two/set", None),
    "one folder by two names": ("set", "link", None),
}


def laid_out(member: str, root: Path, shm: Path) -> tuple[list[str], int]:
    """The words for a member of the table, in folders made for it, and how many data sets it names."""
    here = root / "here"
    here.mkdir()
    data, ood, runs = (each.format(shm=shm) if each else each for each in TABLE[member])
    tiny_beir(here / "set", docs=30)
    (here / "link").symlink_to("set")
    (here / "real").mkdir()
    (here / "runs link").symlink_to("real")
    for i, each in enumerate(filter(None, (data, ood))):
        if not (here / each).exists():
            made = tiny_beir(root / f"made{i}", docs=30 + i)
            os.chdir(here)
            os.makedirs(os.path.dirname(each) or ".", exist_ok=True)
            shutil.move(made, each)
    (here / "job.py").write_text(JOB)
    return [f"data={data}", *([f"ood={ood}"] if ood else []), *(["--runs", runs] if runs else [])], 1 + (
        member == "two folders with one last name"
    )


@pytest.fixture
def shm():
    """A folder on another disk."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev:
        raise AssertionError("this test needs another file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="dagr-test-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("member", TABLE)
def test_a_path_is_read_by_check_run_study_and_report(member, tmp_path, shm, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words, sets = laid_out(member, tmp_path, shm)
    monkeypatch.chdir(tmp_path / "here")
    where = [word for i, word in enumerate(words) if word == "--runs" or (i and words[i - 1] == "--runs")]
    assert verb("check", "job.py", "k1=0.9", *words) == 0, capsys.readouterr().err
    assert verb("run", "job.py", *words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert os.path.isdir(printed.splitlines()[-1])
    assert verb("study", "job.py", "k1=0.9", *words, "--no-track", "--quiet") == 0, capsys.readouterr().err
    capsys.readouterr()
    assert verb("report", "--json", *where) == 0, capsys.readouterr().err
    assert len(json.loads(capsys.readouterr().out)["sets"]) == sets
    assert verb("report", *where) == 0
    assert os.path.isfile(capsys.readouterr().out.rsplit("page: ", 1)[1].strip())


# -- what cannot be: one line and exit code 2 ---------------------------------------------------------------------------


def as_nobody(work) -> tuple[int, str]:
    """(what it returns, what it prints as errors) of work as an ordinary user, in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        code = 99
        try:
            if not os.geteuid():
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            code = work()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study that everybody may read, in folders that nobody but its owner may write."""
    root = tmp_path_factory.mktemp("finished")
    for folder in (root, *root.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/") and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o055)
    tiny_beir(root / "set", docs=30)
    (root / "job.py").write_text(JOB)
    assert verb("study", f"{root}/job.py", f"data={root}/set", "--runs", f"{root}/runs", "--no-track", "--quiet") == 0
    assert verb("report", "--runs", f"{root}/runs") == 0
    assert (
        verb("check", f"{root}/job.py", f"data={root}/set", "--runs", f"{root}/runs") == 0
    )  # another user imports nothing
    for top, _, names in os.walk(root):
        os.chmod(top, 0o555)
        for name in names:
            os.chmod(f"{top}/{name}", 0o444)
    yield root
    for top, _, _ in os.walk(root):
        os.chmod(top, 0o755)


@pytest.mark.parametrize(
    ("name", "more", "code"),
    [
        ("check", (), 0),
        ("run", (), 2),
        ("study", ("--no-track", "--quiet"), 2),
        ("report", ("--json",), 0),
        ("report", (), 2),
    ],
)
def test_a_runs_folder_that_may_only_be_read(finished, name, more, code) -> None:
    job = (
        ()
        if name == "report"
        else (f"{finished}/job.py", f"data={finished}/set", *(["--one"] if name == "check" else []))
    )
    ended, told = as_nobody(lambda: verb(name, *job, *more, "--runs", f"{finished}/runs"))
    assert ended == code, told
    if code:
        [line] = told.strip().splitlines()
        assert (
            line.startswith("dagr: error: ") and f"{finished}/runs" in line and ("permission" in line or "writ" in line)
        )


@pytest.mark.parametrize("closed", ["data", "ood", "job", "runs", "placement"])
def test_a_place_without_permission_as_an_ordinary_user(closed, finished, tmp_path) -> None:
    tmp_path.chmod(0o755)
    place = tmp_path / "closed"
    tiny_beir(place / "set", docs=20)
    (place / "job.py").write_text(JOB)
    (place / "local.toml").write_text("")
    place.chmod(0o000)
    data = f"{place}/set" if closed == "data" else f"{finished}/set"
    words = [f"{place}/job.py" if closed == "job" else f"{finished}/job.py", f"data={data}"]
    words += [f"ood={place}/set"] if closed == "ood" else []
    words += ["--runs", f"{place}/runs" if closed == "runs" else f"{tmp_path}/runs"]
    words += ["--placement", f"{place}/local.toml"] if closed == "placement" else []
    try:
        ended, told = as_nobody(lambda: verb("check", *words, "--one"))
    finally:
        place.chmod(0o755)
    assert ended == 2, told
    [line] = told.strip().splitlines()
    assert line.startswith("dagr: error: ") and str(place) in line


@pytest.mark.parametrize("length", [3900, 4090, 4096, 5000])
@pytest.mark.parametrize("name", ["check", "run", "study", "report"])
def test_a_runs_folder_about_as_long_as_a_path_may_be(name, length, finished, tmp_path, capsys) -> None:
    runs = (f"{tmp_path}/" + "/".join(["r" * 200] * 40))[:length].rstrip("/")
    job = [] if name == "report" else [f"{finished}/job.py", f"data={finished}/set", "--quiet"]
    job += ["--one"] if name == "check" else ["--no-track"] if name == "study" else []
    code = verb(name, *job, "--runs", runs)
    told = capsys.readouterr().err.strip().splitlines()
    assert code == (0 if length == 3900 and name != "report" else 2), told
    if code:
        assert len(told) == 1 and told[0].startswith("dagr: error: "), told


def test_a_moved_data_set_has_its_new_name_in_the_mirror(tmp_path, monkeypatch, capsys) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(JOB)
    tiny_beir(tmp_path / "before", docs=30)
    assert verb("study", "job.py", "data=before", "--no-track", "--quiet") == 0
    os.rename("before", "after")
    assert verb("study", "job.py", "data=after", "--no-track", "--quiet") == 0
    capsys.readouterr()
    study = max((tmp_path / "runs").glob("study-*"), key=lambda each: each.stat().st_mtime).name
    assert mlflow_mirror.mirror(str(tmp_path / "runs"), study).problem is None
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    measured = {name.partition("/")[0] for each in found for name in each.data.metrics if "/" in name}
    assert verb("report", "--json") == 0
    assert measured == {each["name"] for each in json.loads(capsys.readouterr().out)["sets"]} == {"after"}
