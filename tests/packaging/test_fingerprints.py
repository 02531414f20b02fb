"""The folders of every job are named as they were: a move of code, or a new name in it, changes no fingerprint."""

import json
from pathlib import Path

import pytest

from dagr_ray.core.config import fingerprint_cache
from dagr_ray.study.job import load_job, parse_axes
from dagr_ray.study.plan import plan_study
from tests.conftest import tiny_beir

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "fingerprints.json"
# The quick start's passages are those of the Python that runs it, so its fingerprints differ between machines.
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem != "quickstart")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tiny_beir(tmp_path_factory.mktemp("fingerprints") / "set")
    (folder / "qrels" / "train.tsv").write_text((folder / "qrels" / "dev.tsv").read_text())
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_every_job_has_the_fingerprints_that_are_written_down(data, name):
    """A change on purpose: delete the job's entry, run this twice, and tell it in the changelog under *Fingerprints*."""
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    job = load_job(str(ROOT / "jobs" / f"{name}.py"))
    with fingerprint_cache():
        stages = plan_study(job, parse_axes(job, [f"data={data}"], sweep=True)).stages()
        folders = sorted(stage.folder_name() for stage in stages)
    if name not in known:
        GOLDEN.write_text(json.dumps(known | {name: folders}, indent=0, sort_keys=True) + "\n")
        pytest.fail(f"{name} was not in {GOLDEN.name}; its fingerprints are written down now")
    assert folders == known[name]
