"""The page of results: out of studies that are made up, with a seed that failed, steps of unequal size, and no teacher."""

import argparse
import re
import subprocess

import numpy as np
import pytest

from benchmarks import results
from dagr_ray.artifact import Artifact
from tests.conftest import tiny_beir
from tests.studies import QUERIES, card, made_study

RANDOM = np.random.default_rng(5)
FROZEN = RANDOM.uniform(0.2, 0.8, QUERIES)
NOISE = RANDOM.normal(0, 0.05, QUERIES)
NOISE -= NOISE.mean()


def above(gain):
    return (FROZEN + gain + NOISE).tolist()


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """(runs, studies) with a ladder of both bases, two seeds each of which one failed once, a study of sizes and one of people."""
    rungs = dict(zip((8, 16, 17, 24), results.RUNGS, strict=True))
    gains = {8: 0.0, 16: 0.02, 17: 0.1, 24: 0.12}
    arms = {
        (n, seed): {"home": above(gain + 0.001 * seed), "away": above(-0.1 if n == 24 else 0.0)}
        for n, gain in gains.items()
        for seed in (0, 1)
    }
    runs, study = made_study(
        tmp_path_factory.mktemp("results"), {"home": FROZEN.tolist(), "away": FROZEN.tolist()}, arms
    )
    made = Artifact(runs, study).read_json("study.json")
    for trial in made["trials"]:
        if trial["kind"] == "augmented":
            trial["params"] |= {"rung": rungs[trial["params"]["volume"]], "human": 0.0}
    one, both = made["trials"], []
    low = (FROZEN - 0.15).tolist()
    frozen = card(runs, "scorecard-frozen-scratch", {"home": low, "away": low}, "beir-none")
    for trial in one:
        twin = {**trial, "trial": f"{trial['trial']}s", "params": {**trial["params"], "base": "scratch"}}
        both += [twin | ({"folder": frozen} if trial["kind"] == "frozen" else {})] if trial["kind"] != "bm25" else []
    failed = {**one[-1], "trial": "t900", "params": {**one[-1]["params"], "seed": 2}, "folder": "scorecard-none"}
    failed |= {"state": "failed", "error": "no memory"}

    def put(name, trials):
        Artifact(runs, name).write_json("study.json", {**made, "trials": trials})
        return {"folder": name, "commit": "abc1234"}

    ladder = put("study-made-ladder", [*one, failed, *both])
    sized = [
        {**t, "params": {**t["params"], "rung": "filters"}}
        for t in (*one, *both)
        if t["params"].get("seed") in (None, 0)
    ]
    scale = put("study-made-scale", sized)
    people = [t for t in one if t["params"].get("seed") in (None, 0) and t["params"].get("volume") != 8]
    shares = iter((0.0, 0.5, 1.0))
    mixed = [
        {**t, "params": {**t["params"], "human": next(shares), "volume": 16}} if t["kind"] == "augmented" else t
        for t in people
    ]
    human = put("study-made-human", mixed)
    return runs, {"home/ladder": ladder, "home/scale": scale, "home/human": human}


@pytest.fixture(scope="module")
def page(studies):
    return results.page(*studies, tried="## What was tried besides\n\nNothing.\n")


def rows(page, title):
    """The cells of the first table after a title."""
    table = page.split(title, 1)[1].split("| commit |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_ladder_has_bm25_the_frozen_bases_and_each_step_with_seconds_and_cost(page):
    found = rows(page, "### home")
    steps = list(results.STEPS.values())
    assert [(cells[0], cells[1]) for cells in found] == [
        ("", "BM25"), *((base, step) for base in results.BASES for step in ("frozen", *steps)),
    ]  # fmt: skip
    assert {len(cells) for cells in found} == {14}
    assert all(re.fullmatch(r"[\d.]+ s|\d+ min.*", cells[11]) and cells[13] == "`abc1234`" for cells in found)
    last = found[5]
    assert last[2:4] == ["24", f"{np.mean(FROZEN) + 0.1205:.3f}"], "the seed that failed counts for nothing"
    assert last[4].startswith("**+0.120**") or last[4].startswith("**+0.121**")
    assert "8 (+ generated queries, in-batch), 16 (+ mined negatives), 17 (+ teacher's scores), 24 (+ filters)." in page


def test_where_the_last_step_wins_and_loses_is_said_in_words(page):
    assert re.search(
        r"beats its frozen self significantly on 1 of the 1 collections.*home \(\+0\.12\d, p < 0\.001\)", page
    )
    assert re.search(
        r"Of 1 collections out of distribution it loses significantly on 1: away after home \(−0\.\d", page
    )
    assert page.rstrip().endswith("Nothing.")


def test_a_step_is_tested_against_the_one_before_after_correction(page):
    before = {cells[1]: (cells[6], cells[7]) for cells in rows(page, "### home") if cells[0] == "minilm"}
    assert before["frozen"] == ("", "")
    assert before["+ teacher's scores"][0].startswith("**+0.080**") and before["+ teacher's scores"][1] == "< 0.001"
    one, two, three = results.gaps([NOISE + shift for shift in (0.0, 0.0142, 0.1)])
    assert one["p_holm"] == 1 and three["p_holm"] == pytest.approx(3 * three["p"])
    assert two["p"] < 0.05 < two["p_holm"] == pytest.approx(2 * two["p"]) and two["delta_low"] > 0
    assert "**" not in results.told(two)


def test_volumes_and_peoples_pairs_have_corrected_tests(page):
    sizes = rows(page, "## What a base gains")
    assert [cells[1] for cells in sizes] == ["8", "16", "17", "24"] and {len(cells) for cells in sizes} == {11}
    assert all(cells[6].startswith("**+0.150**") and cells[7] == "< 0.001" for cells in sizes)
    people = rows(page, "## People's pairs")
    assert [cells[1] for cells in people] == ["generated", "50% people's", "people's"] and {len(c) for c in people} == {
        11
    }
    assert people[0][6:8] == ["", ""] and people[1][6].startswith("**+0.080**") and people[1][7] == "< 0.001"


def test_people_and_generated_pairs_are_as_many(tmp_path):
    root = tiny_beir(tmp_path / "set")
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


def test_pages_do_not_make_a_commit_another(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    for name in ("docs/results.md", "benchmarks/x.md", "code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    for name in ("docs/results.md", "benchmarks/x.md"):
        (tmp_path / name).write_text("b")
    clean = results.commit(tmp_path)
    (tmp_path / "code.py").write_text("b")
    assert re.fullmatch(r"[0-9a-f]+", clean) and results.commit(tmp_path) == f"{clean}+"
