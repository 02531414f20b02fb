"""What a test set can see, before a study and after its first arms; the margin and the level as part of a study."""

import subprocess
import sys
from pathlib import Path

import pytest

from dagr_ray.core.config import ConfigError, digest
from dagr_ray.report.decision.power import SPREAD
from dagr_ray.study.job import load_job, parse_axes
from dagr_ray.study.plan import plan_study
from dagr_ray.study.visible import powers
from tests.conftest import tiny_beir
from tests.support.studies import card

ROOT = Path(__file__).parents[2]
DAGR = [sys.executable, "-m", "dagr_ray.cli.main"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tiny_beir(tmp_path_factory.mktemp("visible") / "set"))


def planned(data, *words, **rule):
    job = load_job(str(ROOT / "jobs" / "beir.py"))
    words = words or ("volume=8,16", "seed=0,1")
    return plan_study(job, parse_axes(job, [f"data={data}", "generator=crop", *words], sweep=True), **rule)


def test_worth_and_alpha_are_part_of_a_study_and_usual_ones_change_no_name(data, tmp_path) -> None:
    names = {
        planned(data, **rule).folder(str(tmp_path)).name
        for rule in ({}, {"worth": 0.01, "alpha": 0.05}, {"worth": 0.02}, {"alpha": 0.1}, {"worth": 0.02, "alpha": 0.1})
    }
    assert len(names) == 4
    study = planned(data)
    before = digest([study.job.name, sorted(trial.card.fingerprint() for trial in study.trials)])
    assert study.folder(str(tmp_path)).name == f"study-beir-{before}"
    for rule, words in (
        ({"worth": 0.0}, "worth = 0; give"),
        ({"alpha": 0.5}, "alpha = 0.5; give"),
        ({"worth": 2.0}, "below 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            planned(data, **rule)


def test_a_study_without_results_assumes_a_spread_and_counts_arms_without_seeds(data, tmp_path) -> None:
    (power,) = powers(planned(data), str(tmp_path))
    assert (power.name, power.queries, power.arms, power.spread, power.measured) == ("set", 48, 2, SPREAD, 0)
    assert "assumed: nothing is measured yet" in power.sentence()
    assert powers(planned(data, "volume=0"), str(tmp_path)) == []


def test_finished_arms_give_the_spread(data, tmp_path) -> None:
    study = planned(data, worth=0.02)
    frozen, *arms = (trial for trial in study.trials if trial.kind != "bm25")
    base = [0.1 * (i % 7) for i in range(40)]
    for trial, spread in ((frozen, 0.0), (arms[0], 0.05), (arms[1], 0.1)):
        values = {"set": [v + spread * (1 if i % 2 else -1) for i, v in enumerate(base)]}
        card(str(tmp_path), trial.card.folder(str(tmp_path)).name, values, "beir-none")
    (power,) = powers(study, str(tmp_path))
    assert (power.queries, power.measured) == (40, 2)
    assert power.spread == pytest.approx(0.1, rel=0.02)
    assert power.smallest == pytest.approx(0.0486, rel=0.02)
    assert "the largest of 2 finished arms" in power.sentence()
    assert power.to_json()["needed"] == power.needed > power.queries


def test_check_prints_what_each_test_set_can_see(data, tmp_path) -> None:
    words = [
        *DAGR,
        "check",
        "jobs/beir.py",
        f"data={data}",
        "generator=crop",
        "volume=8",
        "--runs",
        str(tmp_path),
        "--worth",
    ]
    done = subprocess.run([*words, "0.05"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = "set (test): 48 judged queries show a gain of 0.101 or more (80 % power, 1 arm, alpha 0.05); 0.05 needs about 197"
    assert seen in done.stdout
    wrong = subprocess.run([*words, "0"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (2, "dagr: error: worth = 0; give a number above 0 and below 1\n")
