"""A goal in place of a size: steps until enough is accepted, and limits that say that they were reached."""

from collections import Counter

import pytest

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import from_json
from dagr_ray.core.placement import Placement, Pool, Prices
from dagr_ray.core.stage import Stage
from dagr_ray.engines.crop import CropEngine
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.filters.length import Length
from dagr_ray.recipes.augmentation import augment, generator_named
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.generate_until import GenerateUntil
from dagr_ray.stages.mix import MixQueries
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from tests.conftest import tiny_beir

HERE = Placement(generate=Pool(workers=0, shard_rows=16), prices=Prices(cpu_hour=3600))  # a dollar a second


@pytest.fixture
def selected(tmp_path):
    corpus = Beir(path=str(tiny_beir(tmp_path / "set", docs=300)))
    made = Generate(corpus=corpus, strategy=Crop(), engine=CropEngine(), samples=2)
    parsed = Parse(generations=made, corpus=corpus)
    filters = (Length(min_words=7), Duplicate())
    return Select(parsed=parsed, scores=tuple(Score(parsed=parsed, corpus=corpus, filter=each) for each in filters))


def steps(folder: Artifact) -> list[str]:
    return [name for key, name in folder.read_json("plan.json")["inputs"].items() if key.startswith("steps.")]


def test_a_goal_is_met_exactly_in_steps_that_share_nothing(selected, tmp_path):
    goal = GenerateUntil(selected=selected, accepted=100, first_step=20)
    folder = materialize(goal, str(tmp_path / "runs"), HERE)
    counts = folder.manifest["counts"]
    assert folder.count("queries") == 100 == counts["out"] and counts["stopped"] == {"accepted": 1}
    assert counts["candidates"] < 600, "not the whole corpus"
    assert len(steps(folder)) > 1
    queries, qrels, lineage = (folder.read(name).to_pylist() for name in ("queries", "qrels", "lineage"))
    ids = [row["query_id"] for row in queries]
    assert len(set(ids)) == 100 and ids == [row["query_id"] for row in qrels] == [row["id"] for row in lineage]
    assert len({row["text"].casefold() for row in queries}) == 100
    assert counts["in"] == 100 + sum(counts["rejected"].values())
    asked = [set(Artifact(folder.runs, name).read("qrels")["doc_id"].to_pylist()) for name in steps(folder)]
    assert all(not a & b for i, a in enumerate(asked) for b in asked[:i])
    # the same goal again is there; a larger one begins with the same steps
    larger = materialize(GenerateUntil(selected=selected, accepted=120, first_step=20), str(tmp_path / "runs"), HERE)
    assert steps(larger)[0] == steps(folder)[0]
    assert from_json(goal.to_json(), Stage) == goal


@pytest.mark.parametrize(
    ("limit", "why"),
    [({"max_completions": 90}, "max_completions"), ({}, "corpus"), ({"max_cost": 1e-6}, "max_cost")],
)
def test_a_limit_that_is_reached_first_is_named(selected, tmp_path, caplog, limit, why):
    folder = materialize(
        GenerateUntil(selected=selected, accepted=5000, first_step=20, **limit), str(tmp_path / "runs"), HERE
    )
    counts = folder.manifest["counts"]
    assert counts["stopped"] == {why: 1}
    assert counts["candidates"] == {"max_completions": 90, "corpus": 600, "max_cost": 40}[why]
    assert f"stopped by {why}" in caplog.text and 0 < folder.count("queries") < 5000


def test_a_mixture_by_budget_holds_what_each_arm_could_buy(selected, tmp_path):
    corpus, runs = selected.parsed.corpus, str(tmp_path / "runs")
    cut = Parse(
        generations=selected.parsed.generations.model_copy(update={"strategy": Crop(mode="span")}), corpus=corpus
    )
    scores = (Score(parsed=cut, corpus=corpus, filter=Length(min_words=4)),)
    arms = tuple(
        GenerateUntil(selected=each, accepted=5000, first_step=20, max_cost=dollars)
        for each, dollars in ((selected, 1e-6), (Select(parsed=cut, scores=scores), 1e6))
    )
    made = materialize(MixQueries(arms=arms), runs, HERE)
    stopped = [arm.folder(runs).manifest["counts"]["stopped"] for arm in arms]
    assert stopped == [{"max_cost": 1}, {"corpus": 1}]
    told = Counter(made.read("lineage")["strategy"].to_pylist())
    assert told == {"crop": arms[0].folder(runs).count("queries"), "crop/span": arms[1].folder(runs).count("queries")}
    assert 0 < told["crop"] <= 40 < told["crop/span"]


def test_a_goal_that_was_interrupted_goes_on(selected, tmp_path):
    goal = GenerateUntil(selected=selected, accepted=100, first_step=20)
    seen = []

    def observe(progress):
        seen.append((progress.state, progress.stage.type))
        if seen.count(("done", "generate")) == 2:
            raise KeyboardInterrupt

    runs = str(tmp_path / "runs")
    with pytest.raises(KeyboardInterrupt):
        materialize(goal, runs, HERE, observe)
    before = {p.name for p in (tmp_path / "runs").glob("generate-*")}
    calm = materialize(goal, str(tmp_path / "calm"), HERE)
    folder = materialize(goal, runs, HERE)
    assert folder.read("queries").equals(calm.read("queries"))
    assert before <= {p.name for p in (tmp_path / "runs").glob("generate-*")}


def test_a_recipe_with_a_goal_gives_examples_of_accepted_queries(tmp_path):
    corpus = Beir(path=str(tiny_beir(tmp_path / "set", docs=120)))
    selected, mined = augment(
        corpus, corpus, *generator_named("crop"), exemplars=None, samples=2, max_rank=50, accepted=30
    )
    folder = materialize(mined, str(tmp_path / "runs"), HERE)
    assert selected.folder(folder.runs).count("queries") == 30
    assert folder.manifest["counts"]["in"] == 30
    wanted = set(selected.folder(folder.runs).read("queries")["query_id"].to_pylist())
    assert set(folder.read("examples")["query_id"].to_pylist()) <= wanted
