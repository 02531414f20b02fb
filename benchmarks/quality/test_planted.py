"""Every filter finds the defects that are planted for it, and asks for no new scores when its threshold changes."""

import pytest

from benchmarks.quality.filters import chosen, scored
from benchmarks.quality.planted import CASES, Planted
from dagr_ray.core.build import materialize
from dagr_ray.core.config import plugins
from dagr_ray.core.placement import Placement
from dagr_ray.filters import Filter

pytestmark = pytest.mark.slow

FILTERS = [name for name, kind in plugins(Filter).items() if kind.__module__.startswith("dagr_ray.")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return str(tmp_path_factory.mktemp("runs"))


def test_every_filter_has_planted_defects():
    assert sorted(FILTERS) == sorted(CASES), "write a case in benchmarks/quality/planted.py"


@pytest.mark.parametrize(("name", "which"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))])
def test_planted_defects(runs, name, which):
    """Precision and recall, and that another threshold reads what is stored."""
    planted = Planted(case=name, which=which, rows=120)
    case = planted.made()
    assert case.filter.type == name and case.filter.scoring_identity() == case.other.scoring_identity()
    first = chosen(planted, case.filter)
    kept = set(materialize(first, runs, Placement()).read("queries")["query_id"].to_pylist())
    precision, recall = case.judge([f"q{i}" not in kept for i in range(len(case.texts))])
    assert precision >= 0.95 and recall >= 0.95, f"{name}: precision {precision:.3f}, recall {recall:.3f}"

    seen = []
    other = chosen(planted, case.other)
    assert other.fingerprint() != first.fingerprint()
    assert other.scores[0].fingerprint() == scored(planted, case.filter).fingerprint()
    folder = materialize(other, runs, Placement(), lambda p: seen.append((p.stage.type, p.state)))
    assert {state for kind, state in seen if kind != "select"} == {"cached"}
    again = folder.read("queries")
    assert set(again["query_id"].to_pylist()) != kept or "masked" in folder.table_names()
