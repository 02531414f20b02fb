"""Arms of several seeds and of several data sets: what is one arm, what varies, and what the report says of it."""

import json

import numpy as np
import pytest

from dagr_ray import report
from dagr_ray.core.artifact import Artifact
from dagr_ray.report import stats
from dagr_ray.report.text import seed_lines
from tests.support.studies import QUERIES, made_study

RANDOM = np.random.default_rng(11)
FROZEN = RANDOM.uniform(0.2, 0.7, QUERIES)
QUERY = RANDOM.normal(0, 1, QUERIES)
QUERY -= QUERY.mean()


def seeded(gain: float, shifts: tuple[float, ...], spread: float) -> list[list[float]]:
    """Scores by seed: ``gain`` over the frozen base on average, shifted for each seed, spread over queries."""
    return [(FROZEN + gain + shift + spread * QUERY).tolist() for shift in shifts]


def study_of(root, arms: dict[int, dict[str, list[list[float]]]]):
    """A study with the frozen base on two data sets, and arms of several seeds."""
    by_seed = {
        (rows, seed): {name: values[seed] for name, values in sets.items()}
        for rows, sets in arms.items()
        for seed in range(len(next(iter(sets.values()))))
    }
    return made_study(root, {"in": FROZEN.tolist(), "out": FROZEN.tolist(), "far": FROZEN[:20].tolist()}, by_seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """8 rows: seeds far apart; 16 rows: seeds that agree. On ``far`` only 20 queries."""

    def sets(values):
        return {"in": values, "out": seeded(-0.1, (0, 0, 0), 0.01), "far": [each[:20] for each in values]}

    arms = {8: sets(seeded(0.05, (-0.1, 0.0, 0.1), 0.02)), 16: sets(seeded(0.05, (-0.001, 0, 0.001), 0.02))}
    runs, study = study_of(tmp_path_factory.mktemp("seeds"), arms)
    return runs, study, report.summarise(runs, study)


def test_the_variance_of_seeds_and_of_queries_add_up() -> None:
    queries, seeds = 400, 4
    values = RANDOM.normal(0, 1, (queries, 1)) + RANDOM.normal(0, 0.08, seeds) + RANDOM.normal(0, 0.3, (queries, seeds))
    means = stats.resampled_means(np.concatenate([values, np.zeros((queries, 1))], axis=1))
    arm, zero = stats.over_seeds(means, [range(seeds), [seeds]]).T
    expected = values.mean(axis=1).var(ddof=1) / queries + values.mean(axis=0).var(ddof=1) / seeds
    # the interaction is in both terms (Owen 2007, section 3), so a little more than expected
    assert expected * 0.97 < arm.var() < expected * 1.1
    assert arm.mean() == pytest.approx(values.mean(), abs=0.004)
    assert not zero.any()
    same = stats.over_seeds(means, [[0], [0, 0]])
    np.testing.assert_allclose(same[:, 0], same[:, 1])
    assert (stats.over_seeds(means, [range(seeds)])[:, 0] == arm).all(), "another draw for the same arm"


def test_seeds_are_one_arm_and_tested_once(made) -> None:
    _, _, summary = made
    assert [t["kind"] for t in summary["trials"]] == ["bm25", "frozen", "augmented", "augmented"]
    wild, calm = (t["scores"]["in"]["nDCG@10"] for t in summary["trials"][2:])
    assert [wild["delta"], calm["delta"]] == pytest.approx([0.05, 0.05])
    assert wild["p"] == pytest.approx(calm["p"])
    assert wild["p_holm"] == pytest.approx(2 * wild["p"]), "corrected for six arms, not two"
    assert wild["seed_sd"] == pytest.approx(0.1) and calm["seed_sd"] == pytest.approx(0.001)
    assert wild["query_se"] == pytest.approx(0.02 * QUERY.std(ddof=1) / QUERIES**0.5)
    assert wild["delta_low"] < 0 < calm["delta_low"], "an interval that does not know the seeds"
    assert [s["seed"] for s in summary["trials"][2]["seeds"]] == [0, 1, 2]


def test_a_gain_that_hangs_on_the_seed_is_no_answer(tmp_path) -> None:
    runs, study = study_of(tmp_path, {8: {n: seeded(0.05, (-0.1, 0.0, 0.1), 0.02) for n in ("in", "out", "far")}})
    answer = report.summarise(runs, study)["verdict"]["answers"][0]
    assert answer["answer"] == "cannot tell" and "(3 seeds)" in answer["sentence"]


def test_an_average_counts_each_data_set_alike(made) -> None:
    _, _, summary = made
    every, outside = summary["averages"]
    assert (every["name"], outside["name"]) == ("average of 3 sets", "average of 2 sets out of distribution")
    assert outside["sets"] == ["out", "far"]
    for trial in summary["trials"]:
        for average in summary["averages"]:
            for measure in average["measures"]:
                means = [trial["scores"][name][measure]["mean"] for name in average["sets"]]
                assert trial["scores"][average["name"]][measure]["mean"] == pytest.approx(np.mean(means))
    arm = summary["trials"][-1]["scores"]
    own = arm["average of 3 sets"]["nDCG@10"]
    assert own["delta"] == pytest.approx(np.mean([arm[n]["nDCG@10"]["delta"] for n in ("in", "out", "far")]))
    assert own["delta_low"] < own["delta"] < own["delta_high"]
    widths = [arm[n]["nDCG@10"]["high"] - arm[n]["nDCG@10"]["low"] for n in ("in", "out", "far")]
    # samples of independent sets: the variances add up, and are divided by the square of their number
    expected = np.sqrt(np.sum(np.square(widths))) / 3
    assert own["high"] - own["low"] == pytest.approx(expected, rel=0.06)


def test_what_got_worse_is_said_in_words(made) -> None:
    _, _, summary = made
    [said] = [
        s for s in summary["verdict"]["sentences"] if s.startswith("Worse than the frozen base by more than 0.01")
    ]
    assert "crop queries (3 seeds), minilm, on out (−0.100)" in said and " on in " not in said
    assert any(s.startswith("Average of 3 sets, minilm: at best") for s in summary["verdict"]["sentences"])


def test_page_and_tables_show_seeds_averages_and_queries_won(made) -> None:
    runs, study, summary = made
    text, markdown = report.terminal_table(summary), report.markdown_table(summary)
    assert "average of 3 sets nDCG@10" in text and "Average of 3 sets (in, out, far):" in markdown
    lines = seed_lines(summary)
    assert len(lines) == 6 and lines[0]["means"] == pytest.approx([FROZEN.mean() + x for x in (-0.05, 0.05, 0.15)])
    assert "| SD of seeds |" in markdown and "0.1000 | 0.0577" in markdown
    with open(report.write_page(summary, runs, study)) as handle:
        page = handle.read()
    assert "Variation between seeds" in page and "0.0577" in page
    change = next(c for c in summary["changes"] if c["set"] == "in")
    assert change["won"] + change["lost"] + change["same"] == QUERIES and len(change["queries"]) == 10
    assert f"Won {change['won']}, lost {change['lost']}, tied {change['same']}" in page
    answer = summary["verdict"]["answers"][0]
    assert answer["trial"] == change["trial"]
    assert f"{change['won']} queries won, {change['lost']} lost" in answer["sentence"]
    assert change["queries"][0]["text"].startswith("when was the") and change["queries"][0]["text"] in page


def test_a_seed_without_a_result_is_told(made) -> None:
    runs, study, _ = made
    value = Artifact(runs, study).read_json("study.json")
    value["trials"][2] |= {"state": "failed", "error": "no memory", "folder": "scorecard-none"}
    Artifact(runs, "study-made-3").write_json("study.json", value)
    summary = report.summarise(runs, "study-made-3")
    assert any("2 of 3 seeds have a result" in warning for warning in summary["warnings"])
    assert "1 of 8 trials have no result" in report.terminal_table(summary)
    assert len(summary["trials"][2]["seeds"]) == 3
    json.dumps(summary)
