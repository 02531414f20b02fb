"""Folders that this program makes for itself: they are the user's own, wherever HOME and TMPDIR point, whoever was there first."""

import os
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from dagr_ray.core import ray_start, storage
from dagr_ray.core.config import ConfigError

NOBODY = 65534
ROOT = Path(__file__).parents[2]


@contextmanager
def as_somebody_else():
    """As another user where this one may become it (root); else as this user."""
    if os.geteuid():
        yield os.geteuid()
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield NOBODY
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A machine's folders: /home/me, /tmp and no variable that says otherwise."""
    for name in ("DAGR_SCRATCH", "XDG_CACHE_HOME", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/") and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o055)  # so that another user can come here
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path


def is_private(folder):
    found = os.lstat(folder)
    return stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700


# What stands in the environment -> where the scratch folder is, below the place.
WHERE = {
    "HOME alone": ({}, "home/.cache/dagr"),
    "an absolute XDG_CACHE_HOME": ({"XDG_CACHE_HOME": "{}/caches"}, "caches/dagr"),
    "a relative XDG_CACHE_HOME is ignored": ({"XDG_CACHE_HOME": "caches"}, "home/.cache/dagr"),
    "an empty XDG_CACHE_HOME": ({"XDG_CACHE_HOME": ""}, "home/.cache/dagr"),
    "an XDG_CACHE_HOME that cannot be made": ({"XDG_CACHE_HOME": "/proc/caches"}, "home/.cache/dagr"),
    "an XDG_CACHE_HOME that is a file": ({"XDG_CACHE_HOME": "{}/file"}, "home/.cache/dagr"),
    "a HOME that cannot be written": ({"HOME": "/proc/home"}, "tmp/dagr-{uid}"),
    "a HOME that is a file": ({"HOME": "{}/file"}, "tmp/dagr-{uid}"),
    "a relative HOME": ({"HOME": "home"}, "tmp/dagr-{uid}"),
    "a HOME that is not there": ({"HOME": "{}/new/home"}, "tmp/dagr-{uid}"),
    "DAGR_SCRATCH": ({"DAGR_SCRATCH": "{}/mine"}, "mine"),
    "a DAGR_SCRATCH with spaces and letters": ({"DAGR_SCRATCH": "{}/a b/日"}, "a b/日"),
    "an empty DAGR_SCRATCH": ({"DAGR_SCRATCH": ""}, "home/.cache/dagr"),
    "a DAGR_SCRATCH below HOME": ({"DAGR_SCRATCH": "~/mine"}, "home/mine"),
    "a DAGR_SCRATCH that everybody may write": ({"DAGR_SCRATCH": "{}/tmp"}, "tmp/dagr-{uid}"),
    "a DAGR_SCRATCH that the user has linked": ({"DAGR_SCRATCH": "{}/link"}, "real"),
}


@pytest.mark.parametrize("case", WHERE)
def test_the_scratch_folder_is_the_users_own_cache(place, monkeypatch, case):
    environment, expected = WHERE[case]
    (place / "file").touch()
    (place / "real").mkdir(mode=0o755)
    (place / "link").symlink_to(place / "real")
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(place))
    made = storage.scratch()
    assert made == str(place / expected.format(uid=os.geteuid()))
    assert is_private(made) or expected == "real"
    assert storage.scratch() == made


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_no_umask_opens_it(place, mask):
    before = os.umask(mask)
    try:
        made = storage.scratch()
        (place / "source").mkdir()
        (place / "source" / "weights").write_text("ours")
        storage.fetch(pafs.LocalFileSystem(), str(place / "source"), f"{made}/folders/1/m")
    finally:
        os.umask(before)
    assert is_private(made) and is_private(f"{made}/folders")
    assert Path(made, "folders/1/m/weights").read_text() == "ours"


def test_a_home_of_another_user_is_theirs_to_fill(place):
    """As after ``sudo -E``. Only root can have one that it could write."""
    if not os.geteuid():
        os.chown(place / "home", NOBODY, NOBODY)
    expected = "tmp" if not os.geteuid() else "home"
    assert Path(storage.scratch()).is_relative_to(place / expected)


def test_no_home_at_all(place, monkeypatch):
    monkeypatch.delenv("HOME")
    assert is_private(storage.scratch())


def test_two_users_of_a_machine_have_a_folder_each(place):
    first = storage.own_temporary()
    with as_somebody_else() as other:
        second = storage.own_temporary()
        assert os.path.basename(second) == f"dagr-{other}"
        assert is_private(second) and os.lstat(second).st_uid == other
    assert is_private(first) and (first != second or other == os.geteuid())


@pytest.mark.parametrize("before", ["folder of another user", "link", "file", "link to nothing"])
def test_what_was_there_first_is_not_used(place, before):
    """Another user has made the folder that this one would make."""
    taken, trap = place / "tmp" / f"dagr-{os.geteuid()}", place / "trap"
    trap.mkdir(mode=0o777)
    if before == "folder of another user" and not os.geteuid():
        with as_somebody_else():
            taken.mkdir(mode=0o777)
            taken.chmod(0o777)
    elif before == "file":
        taken.touch()
    else:
        taken.symlink_to(trap if before == "link" else place / "nothing")
    if before == "folder of another user" and os.geteuid():
        assert taken.is_symlink()
    made = storage.own_temporary()
    assert made != str(taken) and is_private(made)
    with pytest.raises(ConfigError, match=rf"{taken}.*(is a link or a file|belongs to user).*DAGR_SCRATCH"):
        storage.own_folder(str(taken))
    assert not any(trap.iterdir())


def test_child_processes_use_the_new_folder(place, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/home")
    (place / "tmp" / f"dagr-{os.geteuid()}").touch()
    made = storage.scratch()
    assert os.environ["DAGR_SCRATCH"] == made and storage.scratch() == made


def test_a_mode_that_was_opened_is_closed_again(place):
    made = Path(storage.scratch())
    made.chmod(0o777)
    assert is_private(storage.scratch())


@pytest.mark.parametrize("level", ["folders", "folders/1", "folders/1/m"])
@pytest.mark.parametrize("kind", ["link", "other user"])
def test_what_somebody_put_into_the_cache_is_refused(place, level, kind):
    source, trap = place / "source", place / "trap"
    for folder, text in ((source, "ours"), (trap / "1/m", "theirs"), (trap / "m", "theirs")):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(text)
    at = Path(storage.scratch(), level)
    at.parent.mkdir(parents=True, exist_ok=True)
    if kind == "other user" and not os.geteuid():
        at.mkdir()
        os.chown(at, NOBODY, NOBODY)
    else:
        at.symlink_to(trap / "m" if level.endswith("m") else trap)
    cache = f"{storage.scratch()}/folders/1/m"
    with pytest.raises(ConfigError, match=rf"{at}.*(link|belongs to user)"):
        storage.fetch(pafs.LocalFileSystem(), str(source), cache)


def test_a_scratch_folder_that_cannot_be_written_is_named(place, monkeypatch):
    for given in ("/proc/mine", str(place / "file" / "below")):
        (place / "file").touch()
        monkeypatch.setenv("DAGR_SCRATCH", given)
        with pytest.raises(ConfigError, match=f"DAGR_SCRATCH = '{given}' cannot be written .*folder of your own"):
            storage.scratch()


# -- Ray ----------------------------------------------------------------------------------------------------------------


def test_rays_sessions_lie_in_a_short_private_place(place, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    monkeypatch.setattr("tempfile.tempdir", str(place / ("long" * 30)))
    made = ray_start._session_folder()
    assert is_private(os.path.dirname(made)) and len(made) + 64 <= 107
    assert os.path.dirname(made).startswith(f"/tmp/dagr-{os.geteuid()}")


@pytest.mark.cluster
def test_a_private_ray_is_closed_and_writes_nothing_to_home(tmp_path):
    """What lies open in its folder, and who is let in, with a HOME that cannot be written."""
    code = """
import os, subprocess, sys
from dagr_ray.core import ray_start
ray_start.connect()
import ray
session = ray._private.worker._global_node.get_session_dir_path()
at, closed = session, []
while at != "/":
    closed.append(not os.stat(at).st_mode & 0o077)
    at = os.path.dirname(at)
print("private", any(closed))
address = ray.get_runtime_context().gcs_address
knock = "import sys; from ray._raylet import GcsClient; client = GcsClient(address=sys.argv[1])"
knock += "; print(client.internal_kv_get(b'session_name', b'session'))"
for token in (None, "0" * 64, os.environ["RAY_AUTH_TOKEN"]):
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {"HOME": "/proc"}
    env |= {"RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": "token"} if token else {}
    done = subprocess.run([sys.executable, "-c", knock, address], env=env, capture_output=True, text=True)
    print("in" if "session_" in done.stdout else "out")
print(ray.get(ray.remote(lambda: 7).remote()))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": "/proc", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=90
    )
    assert done.stdout.split("\n")[:-1] == ["private True", "out", "out", "in", "7"], done.stderr[-2000:]


@pytest.mark.cluster
def test_a_process_may_start_ray_twice_with_one_token():
    """Ray reads a token once in a process; what is started meanwhile inherits it."""
    code = """
import os
from dagr_ray.core import ray_start
seen = []
for _ in range(2):
    ray_start.connect()
    import ray
    seen.append((ray.get(ray.remote(lambda: 7).remote()), os.environ["RAY_AUTH_TOKEN"]))
    ray.shutdown()
print(seen[0] == seen[1], len(seen[0][1]))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=90
    )
    assert done.stdout.split() == ["True", "64"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:{closed}", "refused"),
        ("localhost:{closed}", "refused"),
        ("[::1]:{closed}", "answers there"),
        ("no-such-host.invalid:6379", "answers there"),
        ("127.0.0.1:{silent}", "does not speak Ray"),
        ("127.0.0.1", "is not host:port"),
        ("127.0.0.1:", "is not host:port"),
        (":6379", "is not host:port"),
        ("127.0.0.1:99999", "is not host:port"),
        ("127.0.0.1:port", "is not host:port"),
        ("nothing at all", "is not host:port"),
        ("ray://127.0.0.1:10001", "ray job submit"),
        ("http://127.0.0.1:8265", "ray job submit"),
    ],
)
@pytest.mark.parametrize("source", ["RAY_ADDRESS", "--address"])
def test_an_address_without_a_cluster_is_named(monkeypatch, address, why, source):
    import socket

    monkeypatch.setattr(ray_start, "ANSWER_S", 1.0)
    with socket.socket() as silent, socket.socket() as closed:
        for each in (silent, closed):
            each.bind(("", 0))
        silent.listen()
        given = address.format(silent=silent.getsockname()[1], closed=closed.getsockname()[1])
        with pytest.raises(ConfigError) as refused:
            ray_start._head_address(given, source)
    assert str(refused.value).startswith(f"{source} = {given!r}") and why in str(refused.value)


def test_charts_leave_no_files_if_home_is_read_only(tmp_path):
    code = "from dagr_ray.report import charts; charts.curves_svg({'curves': []}); "
    code += "import matplotlib, os; print(matplotlib.get_cachedir(), flush=True); os._exit(0)"
    (tmp_path / "tmp").mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("MPLCONFIGDIR", "XDG_CACHE_HOME")}
    env |= {"HOME": "/proc", "TMPDIR": f"{tmp_path}/tmp", "DAGR_SCRATCH": f"{tmp_path}/mine", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"{tmp_path}/mine/matplotlib", done.stderr
    assert not list((tmp_path / "tmp").iterdir())
