"""The simulation behind docs/scaling.md: its seconds add up, and it is right where the answer is known."""

from dataclasses import replace

import pytest

from benchmarks.scale.scaling_simulation import Setting, simulate

SMALL = Setting(shards=2000, workers=50)
CALM = replace(SMALL, mtbf_h=1e9, straggle=0.0, start_s=0.0, spread=0.0)


@pytest.mark.parametrize("fields", [{}, {"in_flight": 1}, {"mtbf_h": 1.0}, {"grown": True}, {"straggle": 0.2}])
def test_every_second_of_every_worker_has_a_cause(fields) -> None:
    result = simulate(replace(SMALL, **fields))
    assert result.done == SMALL.shards
    assert sum(result.spent.values()) == pytest.approx(result.total)
    assert all(seconds >= -1e-6 for seconds in result.spent.values()), result.spent
    assert result.spent["useful"] == pytest.approx(SMALL.shards * SMALL.shard_s, rel=0.02)


def test_equal_shards_without_faults_cost_what_arithmetic_says() -> None:
    assert simulate(CALM).makespan_s == pytest.approx(2000 / 50 * 600)
    assert simulate(replace(CALM, in_flight=1)).makespan_s == pytest.approx(2000 / 50 * 606)
    assert simulate(replace(CALM, start_s=120.0)).makespan_s == pytest.approx(2000 / 50 * 600 + 120)
    # 2,010 shards: ten workers do one more while forty wait
    late = simulate(replace(CALM, shards=2010, in_flight=1))
    assert late.spent["tail"] == pytest.approx(40 * 606)


def test_failures_come_as_often_as_they_should_and_lose_half_a_shard_each() -> None:
    result = simulate(replace(CALM, mtbf_h=2.0, in_flight=1))
    worked = result.total - result.spent["replacing"] - result.spent["engine start"]
    assert result.failures == pytest.approx(worked / 7200, rel=0.2)
    assert result.spent["begun and lost"] / result.failures == pytest.approx(300, rel=0.25)


def test_a_deadline_ends_what_hangs() -> None:
    hanging = replace(SMALL, straggle=0.01, tail=3.0)
    without, ended = simulate(replace(hanging, patience=1e9)), simulate(hanging)
    assert without.hung == 0 < ended.hung
    assert ended.makespan_s < without.makespan_s / 3
