"""Names that a store, a list, a label or another program chose: none leads out of the folder that it was meant for."""

import json
import os
import time
from pathlib import Path

import boto3
import pyarrow.fs as pafs
import pytest

from dagr_ray.core import storage as places, tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.storage import below, fetch, filesystem, local_folder, plain_name
from dagr_ray.miners.bm25 import BM25
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.sources import Beir
from dagr_ray.study.mlflow_mirror import _artifact_folder
from dagr_ray.training.checkpoints import Checkpoints
from tests.conftest import tiny_beir
from tests.support.object_store import BUCKET, ObjectStore

pytestmark = pytest.mark.slow

REFUSED = {
    "empty": "",
    "the folder itself": ".",
    "its parent": "..",
    "a parent before": "../x",
    "five parents": "../../../../../x",
    "a parent inside": "a/../x",
    "a parent inside, outside": "a/../../x",
    "a parent last": "a/..",
    "the folder inside": "a/./x",
    "the folder first": "./x",
    "absolute": "/etc/passwd",
    "absolute twice": "//x",
    "an empty part": "a//x",
    "an empty end": "a/",
    "only a slash": "/",
    "a backslash": "a\\b",
    "a parent by backslash": "..\\x",
    "a parent by both": "a/..\\../x",
    "a drive": "C:/x",
    "a drive of its own": "c:x",
    "a share": "\\\\host\\x",
    "a long path of Windows": "\\\\?\\C:\\x",
    "NUL": "a\x00b",
    "NUL at the end": "a.txt\x00.png",
    "a line feed": "a\nb",
    "a carriage return": "a\rb",
    "an escape": "a\x1b[2J",
    "DEL": "a\x7f",
    "C1": "a\x9bb",
    "a line separator": "a\u2028b",
    "half of a surrogate": "a\ud800",
    "a byte that is not UTF-8": "a\udcff",
    "a name of 256 bytes": "x" * 256,
    "a name of 86 CJK characters": "中" * 86,
    "a path of 1,026 bytes": "/".join(["x" * 200] * 5) + "/" + "y" * 21,
    "parents without end": "../" * 300 + "x",
}  # fmt: skip
TAKEN = [
    "x", "a/b/c.bin", "...", "..x", "x..", "a/...", ".hidden", "..../x", "a b", " a ", "-rf", "~", "~root/x", "$HOME", "`x`", "a;b",
    "*", "%2e%2e/x", "a%2fb", "con", "nul.txt", "1:x",
     "x" * 255, "中" * 85, "ü", "u\u0308", "कि", "می\u200cخواهم", "😀", "'\"",
    "a\u202eb", "model_0.safetensors", "sub_$folder$", "/".join(["d"] * 200),
]  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_names_that_leave_the_folder_are_refused(tmp_path, kind):
    with pytest.raises(ConfigError) as told:
        below(tmp_path, REFUSED[kind], source="bucket/m")
    assert "refused" in str(told.value) and "bucket/m" in str(told.value) and len(str(told.value)) < 400
    with pytest.raises(ConfigError, match="refused"):
        plain_name(REFUSED[kind])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", TAKEN)
def test_names_inside_the_folder_are_accepted(tmp_path, name):
    found = below(tmp_path, name)
    assert found == f"{tmp_path}/{name}" and Path(found).resolve().is_relative_to(tmp_path.resolve())
    os.makedirs(os.path.dirname(found), exist_ok=True)
    Path(found).write_text("x")


def test_symlinks_out_of_the_folder_are_refused(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "in").mkdir(parents=True)
    outside.mkdir()
    for name, to in {
        "out": outside,
        "up": "..",
        "etc": "/etc",
        "here": "in",
        "loop": "loop",
        "dangling": "/none/x",
    }.items():
        (folder / name).symlink_to(to)
    for name in ("out/x", "out", "up/outside/x", "etc/passwd", "dangling"):
        with pytest.raises(ConfigError, match="symlink"):
            below(folder, name)
    assert below(folder, "here/x") and below(folder, "in/x")
    (tmp_path / "link").symlink_to(folder)
    assert below(tmp_path / "link", "in/x"), "the folder itself may be reached by a link"


# -- a store ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with ObjectStore() as running:
        yield running


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """Puts objects under keys of any kind below a prefix of this test's own, and gives its address."""
    monkeypatch.setenv("DAGR_SCRATCH", str(tmp_path / "scratch"))
    client = boto3.client("s3", endpoint_url=server.environment()["AWS_ENDPOINT_URL"], region_name="us-east-1")

    def put(objects):
        for key, value in objects.items():
            client.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/m{key}", Body=value)
        return f"s3://{BUCKET}/{tmp_path.name}/m"

    local_folder.cache_clear()
    places._remove_old_parts.cache_clear()
    yield put
    server.hook = None


def everything(tmp_path):
    return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())


KEYS = ["/../x", "/../../../../x", "/a/../../x", "/./x", "/a//b", "//x", "/a/..", "/a\\b", "/a\\..\\..\\x", "/C:/x",
    "/a\x1b[2J",
        "/" + "x" * 300]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_keys_outside_the_folder_are_refused(bucket, tmp_path, key):
    address = bucket({"/config.json": b"{}", key: b"written by the store"})
    with pytest.raises((ConfigError, OSError)) as told:
        local_folder(address)
    assert isinstance(told.value, ConfigError), told.value
    assert "refused" in str(told.value) or "not there" in str(told.value)
    assert not [name for name in everything(tmp_path) if "plan" not in name], "nothing is left, inside or outside"


def test_markers_of_empty_folders_are_ignored(bucket, tmp_path):
    marks = {"/": b"", "/sub/": b"", "/sub/deep/": b"", "/empty/": b""}
    address = bucket(
        {**marks, "/config.json": b"{}", "/sub/a.bin": b"a", "/sub/deep/b.bin": b"bb", "/old_$folder$": b""}
    )
    found = local_folder(address)
    assert found.name == "m"
    assert {p.relative_to(found).as_posix(): p.read_bytes() for p in found.rglob("*") if p.is_file()} == {
        "config.json": b"{}", "sub/a.bin": b"a", "sub/deep/b.bin": b"bb", "old_$folder$": b""
    }  # fmt: skip
    assert all(".part" not in name for name in everything(tmp_path))


def test_a_file_and_folder_of_one_name_are_refused(bucket, tmp_path):
    with pytest.raises(ConfigError, match="is a file and a folder"):
        local_folder(bucket({"/a": b"x", "/a/b": b"y"}))
    assert not everything(tmp_path)


def test_names_that_differ_only_in_case_stay_two(bucket):
    found = local_folder(bucket({"/README.md": b"one", "/readme.md": b"two"}))
    assert ((found / "README.md").read_bytes(), (found / "readme.md").read_bytes()) == (b"one", b"two")


def test_a_failed_fetch_leaves_nothing_behind(bucket, server, tmp_path):
    address = bucket({f"/{i}.bin": bytes([i]) * 100 for i in range(12)})
    server.hook = lambda request: 403 if request.method == "GET" and request.key.endswith("/7.bin") else None
    with pytest.raises(OSError):
        local_folder(address)
    assert not everything(tmp_path)
    server.hook = lambda request: 404 if request.method in ("GET", "HEAD") and request.key.endswith("/7.bin") else None
    with pytest.raises(ConfigError, match=r"7.bin' is in the store's listing, but missing"):
        local_folder(address)
    assert not everything(tmp_path)
    server.hook = None
    assert len(list(local_folder(address).iterdir())) == 12


def test_partial_files_of_killed_fetches_are_removed(tmp_path):
    source, scratch = tmp_path / "source", tmp_path / "scratch"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a").write_text("a")
    (scratch / "x").mkdir(parents=True, mode=0o700)
    os.environ["DAGR_SCRATCH"], before = str(scratch), os.environ.get("DAGR_SCRATCH")
    try:
        scratch.chmod(0o700)
        long_ago = time.time() - 2 * places.ABANDONED_S
        for name, old in (
            ("m.0123abcd.part", True),
            ("m.89abcdef.part", False),
            ("m.part", True),
            ("data.parquet", True),
        ):
            (scratch / "x" / name).mkdir()
            (scratch / "x" / name / "w.bin").write_text("half")
            if old:
                os.utime(scratch / "x" / name / "w.bin", (long_ago, long_ago))
                os.utime(scratch / "x" / name, (long_ago, long_ago))
        (scratch / "x" / "f.00000000.part").write_text("half a file")
        os.utime(scratch / "x" / "f.00000000.part", (long_ago, long_ago))
        places._remove_old_parts.cache_clear()
        fetch(pafs.LocalFileSystem(), str(source), str(scratch / "x" / "m"))
        assert sorted(os.listdir(scratch / "x")) == ["data.parquet", "m", "m.89abcdef.part", "m.part"]
        assert (scratch / "x" / "m" / "sub" / "a").read_text() == "a"
    finally:
        os.environ.pop("DAGR_SCRATCH")
        if before:
            os.environ["DAGR_SCRATCH"] = before


# -- lists, labels, places of artifacts ---------------------------------------------------------------------------------

LISTS = {
    "a parent": {"workers": 1, "files": {"../x": "0" * 64}},
    "absolute": {"workers": 1, "files": {"/tmp/x": "0" * 64}},
    "empty": {"workers": 1, "files": {"": "0" * 64}},
    "a file that is a folder": {"workers": 1, "files": {"a": "SHA", "a/b": "SHA"}},
    "a sum that is none": {"workers": 1, "files": {"a": 7}},
    "files a list": {"workers": 1, "files": ["a"]},
    "no files": {"workers": 1},
    "no workers": {"workers": 0, "files": {}},
    "workers of true": {"workers": True, "files": {}},
    "workers a text": {"workers": "1", "files": {}},
    "workers without end": {"workers": 10**12, "files": {}},
    "a list": [1],
    "null": None,
    "a text": "x",
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_foreign_checkpoint_list_writes_nothing_outside(tmp_path, kind):
    folder = Artifact(str(tmp_path / "runs"), "train-x")
    files = tmp_path / "files"
    files.mkdir()
    (files / "a").write_text("good")
    Checkpoints(folder, "one").put(1, files)
    wrong = tmp_path / "runs" / "train-x" / "checkpoints" / "00000002-two"
    wrong.mkdir()
    (wrong / "a").write_text("good")
    (tmp_path / "runs" / "train-x" / "checkpoints" / "x").write_text("written by somebody")
    (wrong / "rank-0.json").write_text(json.dumps(LISTS[kind]))
    (tmp_path / "runs" / "train-x" / "checkpoints" / ".DS_Store").mkdir()
    into = tmp_path / "into"
    into.mkdir()
    assert Checkpoints(folder, "three").last(into) == 1, "the one before is taken"
    assert everything(into) == ["a"] and sorted(os.listdir(into)) == ["a"]


def test_a_label_that_is_a_path_is_refused(tmp_path):
    data = Beir(path=str(tiny_beir(tmp_path / "set")))
    for split in ("../../x", "a/b", "a\x00", "x" * 300, "a\\b", "a\n"):
        search = Search(index=Index(corpus=data, miner=BM25()), queries=data, split=split)
        with pytest.raises(ConfigError, match="refused"):
            search.folder(str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("split", ["../../x", "/x", "a/b", "a\\b", "a\nb", "x" * 250])
def test_a_split_that_cannot_name_a_folder_is_refused(tmp_path, split):
    with pytest.raises(ConfigError, match="of a table is refused"):
        tables.check(f"qrels.{split}", tables.empty("qrels"))
    folder = tiny_beir(tmp_path / "set")
    if "/" not in split:
        (folder / "qrels" / f"{split}.tsv").write_text((folder / "qrels" / "test.tsv").read_text())
        with pytest.raises(ConfigError, match="of a table is refused"):
            materialize(Beir(path=str(folder)), str(tmp_path / "runs"))
        assert not [name for name in everything(tmp_path / "runs") if f"qrels.{split}" in name]


def test_data_set_names_stay_distinct_in_mlflow():
    names = [
        "scifact",
        "../set",
        "/set",
        "a/b",
        "a_b",
        "",
        ".",
        "..",
        "a\x00b",
        "a\\b",
        "x" * 300,
        "é 1.0",
        "%2e%2e",
        "a\nb",
        " a",
        "a ",
    ]
    placed = [_artifact_folder(name) for name in names]
    assert len(set(placed)) == len(names)
    for place in placed:
        assert place.strip(". ") and "/" not in place and "\\" not in place and place.isprintable() and len(place) < 90
    assert (placed[0], placed[11]) == ("scifact", "é 1.0")


def test_a_data_set_in_a_store_is_read_despite_markers(bucket, tmp_path):
    folder = tiny_beir(tmp_path / "set")
    files = {f"/{p.relative_to(folder).as_posix()}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    address = bucket({**files, "/": b"", "/qrels/": b"", "/../x": b"x", "/qrels/../../y.tsv": b"y"})
    assert Beir(path=address).fingerprint() == Beir(path=str(folder)).fingerprint()
    fs, root = filesystem(address)
    assert root.endswith("/m") and fs.get_file_info(root).type == pafs.FileType.Directory
