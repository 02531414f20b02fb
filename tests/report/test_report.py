"""Statistics compared with SciPy, verdicts on studies with a known answer, the safety of the page, and the trace."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats

from dagr_ray import report
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.report import stats
from dagr_ray.report.charts import curves_svg
from dagr_ray.report.lineage import Folders
from tests.support.studies import EVIL, QUERIES, card, made_study, put

RANDOM = np.random.default_rng(3)
FROZEN = RANDOM.uniform(0.2, 0.8, QUERIES)
NOISE = RANDOM.normal(0, 1, QUERIES)
NOISE -= NOISE.mean()


def arm(gain: float, spread: float) -> list[float]:
    """Scores that are ``gain`` above the frozen base on average, with standard deviation ``spread`` over queries."""
    return (FROZEN + gain + spread * NOISE).tolist()


@pytest.fixture(scope="module")
def helped(tmp_path_factory):
    """A study in which 8 rows have no effect, 16 help, 24 help a little more, and all hurt out of distribution."""
    both = {8: (0.0, 0.1), 16: (0.1, 0.1), 24: (0.104, 0.15)}
    arms = {n: {"in": arm(*x), "out": arm(-0.1, 0.05)} for n, x in both.items()}
    return made_study(tmp_path_factory.mktemp("helped"), {"in": FROZEN.tolist(), "out": FROZEN.tolist()}, arms)


@pytest.fixture(scope="module")
def page(helped) -> str:
    runs, study = helped
    with open(report.write_page(report.summarise(runs, study), runs, study)) as handle:
        return handle.read()


def test_bootstrap_interval_equals_scipy() -> None:
    values = RANDOM.gamma(2, 0.2, (200, 1))
    ours = stats.interval(stats.resampled_means(values)[:, 0])
    theirs = scipy.stats.bootstrap(
        (values[:, 0],), np.mean, n_resamples=10_000, method="percentile"
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert ours == stats.interval(stats.resampled_means(values)[:, 0]), "another seed each time"


def test_randomisation_p_equals_scipy() -> None:
    # without a difference of exactly 0: SciPy doubles the smaller side, which differs if many samples tie
    gains = np.stack([NOISE * 0.1 + shift for shift in (0.01, 0.02, 0.03)], axis=1)
    ours = stats.randomisation_p(gains)
    options = {"permutation_type": "samples", "n_resamples": 10_000, "rng": 5}
    theirs = [scipy.stats.permutation_test((column,), np.mean, **options).pvalue for column in gains.T]
    np.testing.assert_allclose(ours, theirs, atol=0.02)
    assert stats.randomisation_p(NOISE[:, None])[0] == 1
    assert stats.randomisation_p(np.full((60, 1), 0.1))[0] == pytest.approx(1 / 10_001)


def test_holm_is_ordered_and_never_below_p() -> None:
    p = RANDOM.uniform(0, 0.2, 9).tolist()
    corrected = stats.holm(p)
    assert all(c >= x for c, x in zip(corrected, p, strict=True))
    assert sorted(range(9), key=p.__getitem__) == sorted(range(9), key=lambda i: (corrected[i], p[i]))


@pytest.mark.parametrize(
    ("gain", "spread", "answer"),
    [(0.1, 0.1, "yes"), (0.0, 0.02, "no"), (0.01, 0.3, "cannot tell"), (-0.1, 0.1, "worse")],
)
def test_answers(tmp_path, gain, spread, answer) -> None:
    runs, study = made_study(tmp_path, {"in": FROZEN.tolist()}, {8: {"in": arm(gain, spread)}})
    found = report.summarise(runs, study)["verdict"]["answers"]
    assert [a["answer"] for a in found] == [answer]
    assert found[0]["delta"] == pytest.approx(gain, abs=1e-9)


# scores of the frozen base and of the arm on a data set -> the answer and its reason, and the comparison with BM25 (0.3)
CASES = {
    "one": ([0.5], [0.5], "cannot tell", "1 judged query is too few to tell", "cannot be distinguished from"),
    "six-better": (
        [0.2] * 6,
        [0.2, 0.9, 0.1, 0.2, 0.3, 0.8],
        "cannot tell",
        "6 judged queries are too few",
        "cannot be distinguished from",
    ),
    "six-worse": (
        [0.5] * 6,
        [0.5, 0.5, 0.4, 0.5, 0.5, 0.5],
        "cannot tell",
        "6 judged queries are too few",
        "cannot be distinguished from",
    ),
    "none-relevant": ([0.0] * 600, [0.0] * 600, "cannot tell", "no retrieved passage is judged relevant", "is below"),
    "ties": ([0.3] * 60, [0.3] * 60, "cannot tell", "too few queries changed", "cannot be distinguished from"),
    "one-lost": (
        [0.3] * 60,
        [0.2] + [0.3] * 59,
        "cannot tell",
        "too few queries changed",
        "cannot be distinguished from",
    ),
    "many-ties": ([0.3] * 600, [0.3] * 600, "no", "a gain of 0.01 or more is ruled out", "is level with"),
    "steady": (FROZEN.tolist(), arm(0.0, 0.02), "no", "a gain of 0.01 or more is ruled out", "is above"),
    "unsteady": (FROZEN.tolist(), arm(0.01, 0.3), "cannot tell", "the interval includes 0", "is above"),
}


def test_too_little_data_gives_no_claim(tmp_path) -> None:
    frozen, after = ({name: case[i] for name, case in CASES.items()} for i in (0, 1))
    runs, study = made_study(tmp_path, frozen, {8: after})
    found = report.summarise(runs, study)["verdict"]
    answers = {answer["set"]: answer for answer in found["answers"]}
    beside = {re.search(r"BM25 on ([\w-]+)", s)[1]: s for s in found["sentences"] if s.startswith("Against BM25")}
    for name, (_, _, answer, why, against) in CASES.items():
        assert (answers[name]["answer"], why in answers[name]["sentence"]) == (answer, True), answers[name]["sentence"]
        assert f") {against} it (" in beside[name], beside[name]


def test_too_few_queries_give_no_answer_to_enough(tmp_path) -> None:
    arms = {n: {"in": [0.2 + gain] * 8} for n, gain in ((8, 0.2), (16, 0.3), (24, 0.31))}
    runs, study = made_study(tmp_path, {"in": [0.2] * 8}, arms)
    found = " ".join(report.summarise(runs, study)["verdict"]["sentences"])
    assert (
        "How much is enough, crop: cannot tell; 8 judged queries are too few." in found
        and "best of the volumes" not in found
    )


def test_enough_is_said_only_if_it_is_shown(helped) -> None:
    """24 rows are not shown to beat 16, nor are they shown to add less than what is worth having."""
    summary = report.summarise(*helped)
    curve = next(c for c in summary["curves"] if c["set"] == "in")
    assert [p["used"] for p in curve["points"]] == [0, 8, 16, 24]
    assert (curve["best"], curve["enough"], curve["rest"]["outcome"]) == (24, None, "more judged queries")
    assert curve["rest"]["low"] < 0 < 0.01 < curve["rest"]["high"]
    said = next(s for s in summary["verdict"]["sentences"] if s.startswith("How much is enough"))
    assert "cannot tell; 24 may add 0.01 or more to 16 (+0.004, −" in said
    assert f"and 0.01 needs about {curve['rest']['needed']:,}." in said
    assert curve["rest"]["needed"] == pytest.approx((2.80 * 0.05 * NOISE.std(ddof=1) / 0.01) ** 2, rel=0.01)
    assert [s["per_100_rows"] for s in curve["steps"]] == pytest.approx([0, 1.25, 0.05], abs=1e-9)
    assert [s["per_dollar"] for s in curve["steps"][1:2]] == pytest.approx([0.1 / 0.08], rel=0.01)
    assert [a["answer"] for a in summary["verdict"]["answers"]] == ["yes", "worse"]
    assert "In distribution: yes. Out of distribution: it got worse." in summary["verdict"]["headline"]


# gains and spreads of 8, 16 and 24 rows, and the margin -> the volume that is shown to be enough, and what is said
ENOUGH = {
    "level from 16 on": (
        [(0.0, 0.1), (0.1, 0.1), (0.102, 0.11)],
        0.01,
        16,
        "16 queries; it is shown that no larger volume",
    ),
    "a wide margin": ([(0.05, 0.1), (0.1, 0.1), (0.104, 0.15)], 0.03, 16, "adds 0.03 or more (the most is +0.004, −"),
    "still rising": (
        [(0.0, 0.1), (0.1, 0.1), (0.2, 0.12)],
        0.01,
        None,
        "more than was tried may help; 24 are better than 16",
    ),
    "a gain of no worth": ([(0.005, 0.01), (0.005, 0.012), (0.005, 0.014)], 0.01, 0, "no queries are needed"),
}


@pytest.mark.parametrize(("points", "worth", "enough", "words"), ENOUGH.values(), ids=list(ENOUGH))
def test_enough_by_curve(tmp_path, points, worth, enough, words) -> None:
    arms = {n: {"in": arm(*point)} for n, point in zip((8, 16, 24), points, strict=True)}
    runs, study = made_study(tmp_path, {"in": FROZEN.tolist()}, arms)
    folder = Artifact(runs, study)
    folder.write_json("study.json", folder.read_json("study.json") | {"worth": worth, "alpha": 0.05})
    summary = report.summarise(runs, study)
    assert summary["curves"][0]["enough"] == enough
    assert words in " ".join(summary["verdict"]["sentences"])


def test_the_level_of_a_study_is_in_its_intervals_and_answers(tmp_path) -> None:
    runs, study = made_study(tmp_path, {"in": FROZEN.tolist()}, {8: {"in": arm(0.03, 0.1)}})
    folder, seen = Artifact(runs, study), {}
    for alpha in (0.05, 0.005):
        folder.write_json("study.json", folder.read_json("study.json") | {"worth": 0.01, "alpha": alpha})
        summary = report.summarise(runs, study)
        score = next(t for t in summary["trials"] if t["kind"] == "augmented")["scores"]["in"]["nDCG@10"]
        seen[alpha] = (score["delta_high"] - score["delta_low"], summary["verdict"]["answers"][0])
        assert f"{100 * (1 - alpha):g} % CI" in report.terminal_table(summary)
        assert f"{100 * (1 - alpha):g} % CI" in report.markdown_table(summary)
    assert seen[0.005][0] > 1.3 * seen[0.05][0]
    assert [seen[alpha][1]["answer"] for alpha in (0.05, 0.005)] == ["yes", "cannot tell"]
    assert seen[0.005][1]["smallest"] > seen[0.05][1]["smallest"]


def test_cannot_tell_says_what_could_be_seen(tmp_path) -> None:
    runs, study = made_study(tmp_path, {"in": FROZEN.tolist()}, {8: {"in": arm(0.01, 0.3)}})
    answer = report.summarise(runs, study)["verdict"]["answers"][0]
    spread = 0.3 * np.std(NOISE, ddof=1)
    assert answer["smallest"] == pytest.approx(2.80 * spread / 60**0.5, rel=0.01)
    assert answer["needed"] == pytest.approx((2.80 * spread / 0.01) ** 2, rel=0.01)
    words = f"the smallest gain that 60 judged queries show is {answer['smallest']:.3f} (80 % power, 1 arm), and 0.01 needs about"
    assert f"{words} {answer['needed']:,}" in answer["sentence"]


def test_tables_hold_the_summary(helped) -> None:
    summary = report.summarise(*helped)
    text, markdown = report.terminal_table(summary), report.markdown_table(summary)
    for trial in summary["trials"]:
        mean = f"{trial['scores']['in']['nDCG@10']['mean']:.3f}"
        assert mean in text
        assert mean in markdown
    assert summary["verdict"]["headline"] in text
    assert {line.count(" | ") for line in markdown.splitlines() if line.startswith("| ")} == {6}


def test_costs_are_shared_by_rows(helped) -> None:
    runs, study = helped
    summary = report.summarise(runs, study)
    generator = summary["generators"][0]
    folders = Folders(runs)
    data = folders.sums(folders.ancestors(generator["mined"]))
    arms = [t for t in summary["trials"] if t["kind"] == "augmented"]
    for trial in arms:
        share = trial["used"] / generator["accepted"]
        assert trial["cost"]["price"] == pytest.approx(data["price"] * share + 0.01 * trial["used"])
    rejected = sum(row["rows"] for row in generator["rejected"])
    assert generator["accepted"] + rejected == generator["completions"]


class Reader(HTMLParser):
    """Collects tags, and the targets of links."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data") and v]
        assert not any(k.startswith("on") for k, _ in attrs), (tag, attrs)


def test_page_is_one_file_and_text_stays_text(page) -> None:
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert "svg" in reader.tags
    assert all(link.startswith("#") for link in reader.links), reader.links
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
    assert EVIL not in page
    assert not re.search(r"url\((?!#)", page)


def test_page_answers_the_questions(page, helped) -> None:
    summary = report.summarise(*helped)
    for words in ("Did augmentation help?", "How much is enough", "Completions, accepted and rejected", "Rows to read"):
        assert words in page
    assert page.count('class="tag gain"') >= 1
    assert all(f"{x['folder']}</td>" in page for x in summary["stages"])
    assert page.count('<tr class="base">') == 6  # two data sets and their average


def test_the_chart_is_deterministic_and_names_all_generators(helped) -> None:
    summary = report.summarise(*helped)
    assert curves_svg(summary) == curves_svg(summary)
    assert ">crop<" in curves_svg(summary)
    assert curves_svg(summary | {"curves": []}) == ""


def test_trace_of_an_accepted_and_a_rejected_row(helped) -> None:
    runs, _ = helped
    folders = Folders(runs)
    mined = report.summarise(*helped)["generators"][0]["mined"]
    row = folders.artifact(mined).read("examples").to_pylist()[0]
    found = report.trace(runs, row["query_id"])
    assert found["passage"]["doc_id"] == row["positive_id"]
    assert found["query"].split()[0] in found["passage"]["text"] + found["passage"]["title"]
    assert found["raw"] in found["passage"]["text"] + found["passage"]["title"]
    assert found["passage"]["text"] in found["prompt"]
    assert found["scores"]["round-trip"] <= 50
    assert found["negatives"] == row["negative_ids"]
    assert mined in found["used_by"]
    assert found["price"]["completion"] > 0
    assert report.trace(runs, found["generation"]["gen_id"])["id"] == found["id"]
    selected = next(n for n in folders.ancestors(mined) if n.startswith("select-"))
    refused = folders.artifact(selected).read("rejected").to_pylist()[0]
    assert [r["reason"] for r in report.trace(runs, refused["id"])["rejected"]] == [refused["reason"]]
    with pytest.raises(ConfigError, match="no generated row 'nothing'"):
        report.trace(runs, "nothing")


def test_a_study_that_has_not_ended_has_a_page(helped, tmp_path) -> None:
    runs, study = helped
    value = Artifact(runs, study).read_json("study.json")
    value["trials"][-1] |= {"state": "failed", "error": "no <memory>", "folder": "scorecard-none"}
    Artifact(runs, "study-made-2").write_json("study.json", value)
    summary = report.summarise(runs, "study-made-2")
    with open(report.write_page(summary, runs, "study-made-2")) as handle:
        assert "failed: no &lt;memory&gt;" in handle.read()
    assert "1 of 5 trials have no result" in report.terminal_table(summary)


def test_the_page_shows_the_recall_of_approximate_search(helped) -> None:
    runs, study = helped
    value = Artifact(runs, study).read_json("study.json")
    for name, counts in (("search-quick", {"recall": 0.987, "exact": 0}), ("search-low", {"recall": 0.4, "exact": 1})):
        put(runs, name, {}, {}, {}, counts=counts)
    value["trials"][-1]["folder"] = card(runs, "scorecard-quick", {"in": FROZEN.tolist()}, "search-quick", "search-low")
    Artifact(runs, "study-made-3").write_json("study.json", value)
    summary = report.summarise(runs, "study-made-3")
    found = {x["folder"]: (x["recall"], x["exact"]) for x in summary["stages"] if x["recall"] is not None}
    assert found == {"search-quick": (0.987, False), "search-low": (0.4, True)}
    with open(report.write_page(summary, runs, "study-made-3")) as handle:
        page = handle.read()
    assert '<td>search-quick</td><td class="n">0.987</td><td>approximately</td>' in page
    assert '<td>search-low</td><td class="n">0.400</td><td>exactly</td>' in page
    with open(report.write_page(report.summarise(runs, study), runs, study)) as handle:
        assert "Approximate search" not in handle.read()


def test_a_folder_without_a_study_is_a_user_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no study.json"):
        report.summarise(str(tmp_path), "study-none")
