"""The page of results, from synthetic studies with a failed seed, steps of unequal size, and no teacher."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from tests.support.studies import QUERIES, card, put

ROOT = Path(__file__).parents[2]
BASES, RUNGS = ("minilm", "scratch"), ("in-batch", "mined", "teacher", "filters")
RANDOM = np.random.default_rng(5)
FROZEN = RANDOM.uniform(0.2, 0.8, QUERIES)
NOISE = RANDOM.normal(0, 0.05, QUERIES)
NOISE -= NOISE.mean()


# pairs -> gain, for one rung each; and the share of human pairs, for three of them
GAINS = {8: 0.0, 16: 0.02, 17: 0.1, 24: 0.12}
SHARES = {16: 0.0, 17: 0.5, 24: 1.0}


def above(gain):
    return (FROZEN + gain + NOISE).tolist()


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """(runs, studies): a ladder of two bases with two seeds and a failed seed, a study of sizes, a study of human shares."""
    runs = str(tmp_path_factory.mktemp("results"))
    sets = {"home": "beir-home", "away": "beir-away"}
    for name in sets.values():
        put(runs, name, {}, {"queries": tables.empty("queries"), "qrels.test": tables.empty("qrels")}, {})
    put(runs, "generate-none", {}, {"generations": tables.empty("generations")}, {})
    put(runs, "mine-none", {"generations": "generate-none"}, {"examples": examples(40)}, {})
    low, trials = (FROZEN - 0.15).tolist(), []

    def add(kind, params, folder, **more):
        trial = {"trial": f"t{len(trials):03d}", "params": params, "kind": kind, "state": "done", "error": None}
        trials.append(trial | {"folder": folder, "stages": {folder: folder[-12:]}, "seconds": 2.0, **more})

    def judged(name, home, away, trained=None):
        return card(runs, f"scorecard-{name}", {"home": home, "away": away}, sets, trained)

    add("bm25", {}, judged("bm25", [0.3] * QUERIES, [0.3] * QUERIES))
    add("frozen", {"base": "minilm"}, judged("minilm", FROZEN.tolist(), FROZEN.tolist()))
    add("frozen", {"base": "scratch"}, judged("scratch", low, low))
    for (pairs, gain), rung in zip(GAINS.items(), RUNGS, strict=True):
        put(runs, f"take-{pairs}", {"mined": "mine-none"}, {"examples": examples(pairs)}, {})
        put(runs, f"train-{pairs}", {"examples": f"take-{pairs}"}, {}, {}, {"train_s": 1.0}, price=0.01)
        for seed in (0, 1):
            away = above(-0.1 if rung == "filters" else 0.0)
            made = judged(f"{pairs}-{seed}", above(gain + 0.001 * seed), away, f"train-{pairs}")
            for base in BASES:
                params = {"base": base, "generator": "crop", "volume": pairs, "rung": rung, "human": 0.0, "seed": seed}
                add("augmented", params, made)
    add("augmented", {**trials[-1]["params"], "seed": 2}, "scorecard-none", state="failed", error="no memory")

    def study(name, change):
        changed = [change(trial, dict(trial["params"])) for trial in trials]
        described = {"name": "made", "job": "jobs/made.py", "axes": {}, "created": 1.8e9, "machine": {}, "wall_s": 60.0}
        kept = [trial for trial in changed if trial is not None]
        Artifact(runs, f"study-{name}").write_json("study.json", described | {"trials": kept})
        return {"folder": f"study-{name}", "commit": "abc1234"}

    def sized(trial, params):
        more = {"rung": "filters"} if trial["kind"] == "augmented" else {}
        return {**trial, "params": params | more} if params.get("seed", 0) == 0 else None

    def mixed(trial, params):
        if params.get("seed", 0) or params.get("base") == "scratch" or params.get("volume") == 8:
            return None
        more = {"human": SHARES[params["volume"]], "volume": 16} if trial["kind"] == "augmented" else {}
        return {**trial, "params": params | more}

    ladder = study("ladder", lambda trial, _: trial)
    return runs, {"home/ladder": ladder, "home/scale": study("scale", sized), "home/human": study("human", mixed)}


def examples(n):
    return tables.table(
        "examples", [{"query_id": f"q{i}", "positive_id": "d", "negative_ids": ["e"]} for i in range(n)]
    )


@pytest.fixture(scope="module")
def page(studies, tmp_path_factory):
    """The page, written by its program."""
    (runs, made), target = studies, tmp_path_factory.mktemp("page") / "results.md"
    Artifact(runs, "results").write_json("studies.json", made)
    target.with_name("results-tried.md").write_text("## What was tried besides\n\nNothing.\n")
    words = ["-m", "benchmarks.publish.results", "--page-only", f"--runs={runs}", f"--page={target}"]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    return target.read_text()


def rows(page, title):
    """The cells of the first table after a title."""
    table = page.split(title, 1)[1].split("| commit |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_ladder_has_bm25_frozen_bases_and_all_steps(page):
    found = rows(page, "### home")
    steps = ["+ generated queries, in-batch", "+ mined negatives", "+ teacher's scores", "+ filters"]
    assert [(cells[0], cells[1]) for cells in found] == [
        ("", "BM25"), *((base, step) for base in BASES for step in ("frozen", *steps)),
    ]  # fmt: skip
    assert {len(cells) for cells in found} == {14}
    assert all(re.fullmatch(r"[\d.]+ s|\d+ min.*", cells[11]) and cells[13] == "`abc1234`" for cells in found)
    last = found[5]
    assert last[2:4] == ["24", f"{np.mean(FROZEN) + 0.1205:.3f}"], "the failed seed is ignored"
    assert last[4].startswith("**+0.120**") or last[4].startswith("**+0.121**")
    assert "8 (+ generated queries, in-batch), 16 (+ mined negatives), 17 (+ teacher's scores), 24 (+ filters)." in page


def test_gains_and_losses_of_the_last_step_are_described(page):
    assert re.search(
        r"beats its frozen self significantly on 1 of the 1 collections.*home \(\+0\.12\d, p < 0\.001\)", page
    )
    assert re.search(
        r"Of 1 collections out of distribution it loses significantly on 1: away after home \(−0\.\d", page
    )
    assert page.rstrip().endswith("Nothing.")


def test_a_step_is_tested_against_the_step_before(page):
    before = {cells[1]: (cells[6], cells[7]) for cells in rows(page, "### home") if cells[0] == "minilm"}
    assert before["frozen"] == ("", "")
    assert before["+ teacher's scores"][0].startswith("**+0.080**") and before["+ teacher's scores"][1] == "< 0.001"


def test_volumes_and_human_pairs_have_corrected_tests(page):
    sizes = rows(page, "## What a base gains")
    assert [cells[1] for cells in sizes] == ["8", "16", "17", "24"] and {len(cells) for cells in sizes} == {11}
    assert all(cells[6].startswith("**+0.150**") and cells[7] == "< 0.001" for cells in sizes)
    people = rows(page, "## People's pairs")
    assert [cells[1] for cells in people] == ["generated", "50% people's", "people's"] and {len(c) for c in people} == {
        11
    }
    assert people[0][6:8] == ["", ""] and people[1][6].startswith("**+0.080**") and people[1][7] == "< 0.001"
