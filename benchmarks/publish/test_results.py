"""Parts of the pages: corrected tests, equal numbers of pairs, and sections that replace only themselves."""

import argparse

import numpy as np
import pytest

from benchmarks.harness.collections import numbered
from benchmarks.publish import results
from benchmarks.publish.catalogue import with_section
from benchmarks.publish.readme import gains, six_lines

NOISE = np.random.default_rng(5).normal(0, 0.05, 40)
NOISE -= NOISE.mean()


def test_tests_are_corrected_for_their_number():
    one, two, three = results.gaps([NOISE + shift for shift in (0.0, 0.0148, 0.1)])
    assert one["p_holm"] == 1 and three["p_holm"] == pytest.approx(3 * three["p"])
    assert two["p"] < 0.05 < two["p_holm"] == pytest.approx(2 * two["p"]) and two["delta_low"] > 0
    assert "**" not in results.told(two)


def test_people_and_generated_pairs_are_as_many(tmp_path):
    root = numbered(tmp_path / "set", 60)
    lines = [f"q{i}\td{i}\t{i % 2}" for i in range(20)]
    given = {
        "seeds": 2,
        "quick_start": True,
        "outside": None,
        "parts": ["human", "ladder"],
        "passages": 900,
        "samples": 3,
    }
    given |= {"more": ["generator=crop"], "volume": 12, "quick_volume": 8, "human_volume": None}
    args = argparse.Namespace(**given, data=[str(root), "/other"])
    assert [(label, part) for label, part, _ in results.planned(args) if label == "set"] == [("set", "ladder")]
    (root / "qrels" / "train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    words = {(label, part): words for label, part, words in results.planned(args)}
    assert {"volume=7", "human=0,0.5,1", "seed=0,1", "ood=/other"} < set(words["set", "human"]), "3/4 of 10"
    assert {"volume=8", "passages=640"} < set(words["pydocs-stdlib", "ladder"])
    args.outside = ["/third"]
    assert all("ood=/third" in words for label, _, words in results.planned(args) if label == "set")


def test_a_collections_section_is_replaced_and_those_of_others_stay():
    head = "# Title\n\nWhat it is.\n"
    page = with_section("", head, "one", "## one\n\nfirst\n")
    page = with_section(page, head, "two", "## two\n\nsecond\n")
    page = with_section(page, head, "one", "## one\n\nthird\n")
    assert page == head + "\n## one\n\nthird\n\n## two\n\nsecond\n"
    assert with_section(page, "# Other\n", "one", "## one\n") == "# Other\n\n## one\n"


def test_gains_of_the_last_step_are_read_off_the_page():
    page = """## The ladder

### home

9 test queries; out of distribution: away.

| minilm | + mined negatives | 9 | 0.5 | **+0.300** [+0.2, +0.4] | 0.1 |
| minilm | + filters | 9 | −0.013 [−0.030, +0.004] | 0.1 | **+0.02** [+0.01, +0.03] | **+0.019** [+0.014, +0.024] | 8 s |

## Another

### not this
"""
    assert gains(page) == [
        ("home", (-0.013, -0.03, 0.004), True), ("away\ntuned to home", (0.019, 0.014, 0.024), False),
    ]  # fmt: skip


def test_six_lines_of_a_study_are_its_verdict_and_its_cost():
    text = "a table\n\nDid augmentation help? Yes.\n* one\n* two\n* three\n* four\n* five\n* Cost: 1 s.\n* six\n"
    assert six_lines(text) == ["Did augmentation help? Yes.", "* one", "* two", "* three", "* four", "* Cost: 1 s."]
