"""The decision's statistics on studies whose answer is known: seeded simulations and properties that always hold."""

import doctest
import importlib

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st

from dagr_ray.report import numbers
from dagr_ray.report.decision import crossfit, curves, estimates, outcomes, power, purchase, sequential
from dagr_ray.report.decision.estimates import Estimate, paired, seed_variance

RUNGS = [62.0, 250.0, 1000.0, 4000.0]
MODULES = (crossfit, curves, estimates, numbers, outcomes, power, purchase, sequential)


def scores(gains, queries, rng, seeds=3, seed_sd=0.004, spread=0.15):
    """Gains of arms ``[queries, arms, seeds]`` whose queries differ by a share of all arms, of the arm, and of the seed."""
    arms = len(gains)
    shared, own = rng.normal(0, 0.6, (queries, 1, 1)), rng.normal(0, 0.6, (queries, arms, 1))
    rest = rng.normal(0, 0.52, (queries, arms, seeds))
    return np.asarray(gains)[:, None] + rng.normal(0, seed_sd, (arms, seeds)) + spread * (shared + own + rest)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_doctests(module) -> None:
    found = doctest.testmod(importlib.import_module(module.__name__))
    assert found.failed == 0
    assert found.attempted > 0


def test_intervals_cover_over_queries_and_seeds() -> None:
    rng = np.random.default_rng(1)
    covered, queries_only = 0, 0
    for _ in range(600):
        arms = scores([0.02] * 4, 400, rng, seed_sd=0.01)
        pooled = seed_variance([arms[:, i] for i in range(4)])
        low, high = paired(arms[:, 0], pooled=pooled).interval(0.05)
        covered += low <= 0.02 <= high
        low, high = paired(arms[:, 0].mean(axis=1)).interval(0.05)
        queries_only += low <= 0.02 <= high
    assert 0.93 <= covered / 600 <= 0.98
    assert queries_only / 600 < 0.9, "seeds vary as much as queries here, and must be in the interval"


def test_paired_is_the_t_test_of_scipy() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.1, 1, (2, 80))
    theirs = scipy.stats.ttest_rel(a, b)
    assert paired(a, b).p() == pytest.approx(theirs.pvalue)
    assert paired(a, b).interval(0.1) == pytest.approx(tuple(theirs.confidence_interval(0.9)))


@given(st.integers(2, 50_000), st.floats(0.01, 1), st.integers(1, 64), st.floats(0.001, 0.3))
def test_needed_queries_and_smallest_gain_agree(queries, spread, arms, alpha) -> None:
    smallest = power.smallest_gain(queries, spread, arms, alpha)
    assert power.queries_needed(smallest, spread, arms, alpha) in (queries, queries + 1)
    assert (
        power.smallest_gain(queries, spread, arms + 1, alpha)
        > smallest
        > power.smallest_gain(queries + 1, spread, arms, alpha)
    )


def test_the_smallest_gain_is_seen_four_times_of_five() -> None:
    rng = np.random.default_rng(3)
    gain = power.smallest_gain(300, 0.15, arms=4)
    seen = [paired(rng.normal(gain, 0.15, 300)).interval(0.05 / 4)[0] > 0 for _ in range(1_000)]
    assert 0.76 <= np.mean(seen) <= 0.84


@settings(max_examples=300)
@given(st.floats(-0.2, 0.2), st.floats(0, 0.1), st.floats(0.001, 0.1), st.floats(0.001, 0.3))
def test_an_outcome_claims_only_what_its_interval_shows(mean, se, worth, alpha) -> None:
    found = outcomes.compare(Estimate(mean, se, 200), 201, worth=worth, alpha=alpha)
    shown = {
        "better": found.low > 0,
        "worse": found.high < 0,
        "equivalent": -worth < found.low and found.high < worth,
        "more judged queries": found.low <= 0 <= found.high,
    }
    assert shown[found.outcome]
    # an interval that still holds what is worth having never says that nothing is there
    assert found.high < worth or found.outcome != "equivalent"


@pytest.mark.parametrize("queries", [60, 400, 3_000])
def test_enough_is_seldom_false_where_today_s_rule_often_is(queries) -> None:
    rng = np.random.default_rng(queries)
    true = np.array([0.0, 0.012, 0.022, 0.032, 0.042])  # each rung adds exactly what is worth having
    false = not_worse = 0
    for _ in range(200):
        arms = scores(true, queries, rng)
        volumes = [arms[:, i] for i in range(5)]
        false += outcomes.smallest_enough(volumes, pooled=seed_variance(volumes[1:])).at is not None
        best = int(arms.mean(axis=(0, 2)).argmax())
        level = [i for i in range(5) if paired(volumes[best], volumes[i]).interval(0.05)[0] <= 0]
        not_worse += true[min([*level, best])] <= true[-1] - 0.01
    assert false <= 12
    assert queries > 1_000 or not_worse > 50


def test_a_level_curve_is_shown_to_be_enough_with_queries_to_see_it() -> None:
    rng = np.random.default_rng(4)
    true = [0.0, 0.03, 0.05, 0.051, 0.051]
    named = [
        outcomes.smallest_enough(list(scores(true, 5_000, rng, seed_sd=0.001).swapaxes(0, 1))).at for _ in range(30)
    ]
    assert named.count(2) >= 25
    assert not {0, 1} & set(named)


def test_queries_that_all_tie_show_nothing_until_they_are_many() -> None:
    scored = np.random.default_rng(12).uniform(0, 1, (600, 1))
    assert outcomes.smallest_enough([scored[:60]] * 3).at is None
    assert outcomes.smallest_enough([scored] * 3).at == 0


@given(st.floats(0.001, 0.3), st.integers(1, 40))
def test_looks_spend_no_more_than_alpha(alpha, looks) -> None:
    assert sum(sequential.spent(alpha, k, looks) for k in range(1, looks + 1)) == pytest.approx(alpha)
    assert sum(sequential.spent(alpha, k) for k in range(1, looks + 1)) < alpha
    with pytest.raises(ValueError, match="look = 0"):
        sequential.spent(alpha, 0)


def test_a_betting_sequence_holds_at_all_times() -> None:
    rng = np.random.default_rng(5)
    missed = peeked = 0
    for _ in range(120):
        x = np.where(rng.random(300) < 0.4, rng.choice([-0.35, 0.07, 0.07, 0.07, 0.07, 0.07], 300), 0.0)
        lows, highs = sequential.betting_sequence(x, 0.1, cells=400)
        assert (np.diff(lows) >= 0).all()
        assert (np.diff(highs) <= 0).all()
        missed += bool((lows > 0).any() or (highs < 0).any())
        count = np.arange(20, 300, 20)
        peeked += any(not low <= 0 <= high for low, high in (paired(x[:n]).interval(0.1) for n in count))
    assert missed <= 12
    assert peeked > 24, "an interval for one look does not hold for many"
    assert highs[-1] - lows[-1] < 0.25
    with pytest.raises(ValueError, match="outside"):
        sequential.betting_sequence(np.array([1.5]))


def test_the_best_arm_has_no_winner_s_curse() -> None:
    rng = np.random.default_rng(6)
    naive, fitted, covered = [], [], 0
    for _ in range(120):
        arms = scores([0.02] * 8, 200, rng)
        best = crossfit.best_arm([arms[:, i] for i in range(8)], repeats=20)
        naive.append(best.naive - 0.02)
        fitted.append(best.estimate.mean - 0.02)
        low, high = best.estimate.interval(0.05)
        covered += low <= 0.02 <= high
    assert np.mean(naive) > 0.006
    assert abs(np.mean(fitted)) < 0.003
    assert covered / 120 >= 0.9
    with pytest.raises(ValueError, match="give each arm as many"):
        crossfit.best_arm([np.zeros((4, 2)), np.zeros((4, 3))])


def test_a_clear_best_arm_is_named_with_its_own_gain() -> None:
    rng = np.random.default_rng(7)
    arms = scores([0.01, 0.1, 0.02], 500, rng)
    best = crossfit.best_arm([arms[:, i] for i in range(3)])
    assert best.arm == 1
    assert best.chosen[1] == 1
    assert best.estimate.mean == pytest.approx(arms[:, 1].mean())


@pytest.mark.parametrize("family", ["hill", "pow4", "peak"])
def test_a_curve_of_its_own_family_is_found_again(family) -> None:
    shape = curves.shapes(family, RUNGS, [*RUNGS, 16_000])[100 % 24]
    curve = np.array([0.04, -0.002])[: len(shape)] @ shape
    again = curves.fit(family, RUNGS, curve[None, :4], np.ones(4), [16_000])
    assert again[0, 0] == pytest.approx(curve[4], rel=1e-3)
    assert curves.shapes(family, RUNGS, [0])[:, :, 0] == pytest.approx(0)


def test_last1_joins_the_rungs_and_goes_on_level() -> None:
    gains = np.array([[0.01, 0.02, 0.03, 0.05]])
    at = [31, 62, 250, 500, 4_000, 64_000]
    found = curves.fit("last1", RUNGS, gains, np.ones(4), at)[0]
    assert found == pytest.approx([0.005, 0.01, 0.02, 0.025, 0.05, 0.05])


def test_bands_cover_the_rung_that_was_held_out() -> None:
    rng = np.random.default_rng(8)
    true = 0.08 * np.array([*RUNGS, 16_000]) ** 0.6 / (3_000**0.6 + np.array([*RUNGS, 16_000]) ** 0.6)
    inside, widths = 0, []
    for _ in range(80):
        arms = scores(true, 600, rng)
        samples = curves.resampled_gains(np.zeros(600), [arms[:, i] for i in range(4)], 200)
        curve = curves.fit_curve(RUNGS, samples, [16_000])
        low, high = curves.forecast(curve)
        inside += low <= arms[:, 4].mean() <= high
        widths.append(high - low)
        assert set(curve.error) == set(curves.FAMILIES)
        assert sum(curve.weight.values()) == pytest.approx(1)
    assert 64 <= inside <= 79
    assert np.median(widths) < 0.1
    with pytest.raises(ValueError, match="three or more"):
        curves.fit_curve(RUNGS[:2], samples[:, :2], [4_000])


def test_resamples_keep_what_rungs_share() -> None:
    rng = np.random.default_rng(9)
    arms = scores([0.01, 0.02], 400, rng, seed_sd=0)
    base = rng.uniform(0, 0.5, 400)
    samples = curves.resampled_gains(base, [arms[:, i] + base[:, None] for i in range(2)], 2_000)
    assert samples.mean(axis=0) == pytest.approx(arms.mean(axis=(0, 2)), abs=0.002)
    assert np.corrcoef(samples.T)[0, 1] > 0.3


def test_dips_are_told_only_if_shown() -> None:
    rng = np.random.default_rng(10)
    flat = [paired(rng.normal(0, 0.15, 400)) for _ in range(4 * 200)]
    told = [bool(curves.dips(flat[i : i + 4])) for i in range(0, len(flat), 4)]
    assert np.mean(told) <= 0.09
    found = curves.dips([Estimate(0.02, 0.003, 400), Estimate(-0.03, 0.003, 400)])
    assert [(dip.at, dip.change) for dip in found] == [(2, -0.03)]


def made_curve(height=0.05, noise=0.001, queries=2_000, half=200.0):
    rng = np.random.default_rng(11)
    true = height * np.array(RUNGS) / (half + np.array(RUNGS))
    gains = true + rng.normal(0, noise, (300, 1)) + rng.normal(0, noise / 2, (300, 4))
    return curves.fit_curve(RUNGS, gains, purchase.grid(RUNGS))


def test_a_purchase_is_the_safe_volume_and_costs_more_than_the_likely_one() -> None:
    curve = made_curve()
    found = purchase.buy(curve, lambda n: 0.5 + n / 1_000, generator="crop", base="minilm", target=0.04)
    assert found.n is not None
    assert 700 <= found.likely <= found.n <= 1_600
    assert found.likely < found.n
    assert found.price == pytest.approx(0.5 + found.n / 1_000, rel=0.01)
    assert found.low < found.gain < found.high
    assert found.per_dollar > found.next_per_dollar > 0
    safer = purchase.buy(curve, lambda n: n, generator="crop", base="minilm", target=0.04, risk=0.02)
    assert safer.n is not None and safer.n >= found.n
    assert "Buy " in found.sentence() and " queries of crop for minilm: +0.04" in found.sentence()


def test_nothing_is_bought_out_of_reach_or_on_a_test_that_cannot_see_it() -> None:
    beyond = purchase.buy(made_curve(), lambda n: n, generator="crop", base="minilm", target=0.09)
    assert beyond.n is None
    assert "out of reach below 64,000 queries with a probability of 100%" in beyond.sentence()
    coarse = purchase.buy(made_curve(noise=0.01), lambda n: n, generator="crop", base="minilm", target=0.02)
    assert coarse.n is None
    assert "times as many judged queries" in coarse.sentence()


def test_generators_are_compared_at_equal_dollars() -> None:
    both = {"dear": (made_curve(), lambda n: n / 10), "cheap": (made_curve(height=0.04), lambda n: n / 100)}
    found = purchase.at_dollars(both, 50.0)
    assert found["dear"][0] == pytest.approx(500)
    assert found["cheap"][0] == pytest.approx(5_000)
    assert (found["cheap"][1] - found["dear"][1]).mean() > 0
    assert set(purchase.at_dollars(both, 1_000.0)) == {"dear"}
    assert set(purchase.at_dollars(both, 1.0)) == {"cheap"}


def test_value_decides_how_much_pays() -> None:
    curve = made_curve()
    little, much = (purchase.best_value(curve, lambda n: n / 100, value) for value in (1.0, 50.0))
    assert -1 <= little < much
    assert purchase.best_value(curve, lambda n: 1e6 + n, 1.0) == -1
