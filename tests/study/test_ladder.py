"""The ladder as a job: each rung is what it says, all share their generation, and one runs from pairs to a scorecard."""

from pathlib import Path

import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import walk
from dagr_ray.recipes.ladder import RUNGS
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.label import Label
from dagr_ray.stages.leakage import LeakGate
from dagr_ray.stages.mix import HumanPairs, MixExamples
from dagr_ray.stages.relabel import Relabel
from dagr_ray.stages.select import Select
from dagr_ray.stages.train import Train
from dagr_ray.study.job import load_job, parse_axes
from dagr_ray.study.plan import plan_study
from tests.conftest import tiny_beir

JOB = Path(__file__).parents[2] / "jobs" / "ladder.py"
HERE = Placement(generate=Pool(workers=0), retrieve=Pool(workers=0), light=Pool(workers=0), train=Pool(workers=0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A collection with questions of people to train on."""
    root = tiny_beir(tmp_path_factory.mktemp("ladder") / "set")
    for split, chosen in (("train", range(12, 36)), ("test", range(36, 60))):
        rows = "".join(f"q{i}\td{i}\t1\n" for i in chosen)
        (root / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return str(root)


def planned(data, *words):
    job = load_job(str(JOB))
    return plan_study(job, parse_axes(job, [f"data={data}", "generator=crop", *words], sweep=True)).trials


def of(card, kind):
    return [stage for stage in walk(card) if isinstance(stage, kind)]


def test_rungs_build_on_each_other_and_share_a_generation(data):
    trials = planned(data)
    assert [t.kind for t in trials] == ["bm25", "frozen", "frozen", *["augmented"] * 8]
    arms = {(t.params["rung"], t.params["base"]): t.card for t in trials[3:]}
    losses = {rung: [loss.type for loss in of(arms[rung, "minilm"], Train)[0].losses] for rung in RUNGS}
    assert losses == {r: ["info-nce"] for r in RUNGS[:2]} | {r: ["kl", "info-nce"] for r in RUNGS[2:]}
    assert [bool(of(arms[rung, "minilm"], Relabel)) for rung in RUNGS] == [False, False, True, True]
    assert [bool(of(arms[rung, "minilm"], Select)) for rung in RUNGS] == [False, False, False, True]
    assert len({stage.fingerprint() for card in arms.values() for stage in of(card, Generate)}) == 1
    assert all(of(card, LeakGate) for card in arms.values()), "test questions are not held out"
    same = [of(arms["teacher", base], Train)[0].examples.fingerprint() for base in ("minilm", "scratch")]
    assert same[0] == same[1], "the bases learn from different examples"
    assert len(JOB.read_text().splitlines()) <= 60


def test_a_cross_encoder_may_be_the_teacher(data, tmp_path):
    (tmp_path / "reranker").mkdir()
    (tmp_path / "reranker" / "model.safetensors").write_bytes(b"weights")
    trials = planned(data, "rung=mined,filters", "base=minilm", f"teacher={tmp_path / 'reranker'}")
    mined, filters = (t.card for t in trials if t.kind == "augmented")
    assert not of(mined, Label)
    assert [each.teacher.type for each in of(filters, Label)] == ["cross-encoder"]
    assert of(filters, Train)[0].losses[0].teacher_temperature == 1.0
    with pytest.raises(ConfigError, match=r"bm25_share = 0.3 is the hybrid teacher's; remove it with cross-encoder"):
        planned(data, "base=minilm", f"teacher={tmp_path / 'reranker'}", "bm25_share=0.3")


def test_the_hybrid_teacher_weighs_bm25_by_its_share(data):
    trials = planned(data, "rung=teacher", "base=minilm", "bm25_share=0,0.3,0.6")
    arms = {t.params["bm25_share"]: t.card for t in trials if t.kind == "augmented"}
    assert {share: of(card, Label)[0].teacher.weights for share, card in arms.items()} == {
        0.0: (0.0, 1.0),
        0.3: (0.3, 0.7),
        0.6: (0.6, 0.4),
    }
    usual = [t.card for t in planned(data, "rung=teacher", "base=minilm") if t.kind == "augmented"]
    assert usual[0].fingerprint() == arms[0.6].fingerprint()
    with pytest.raises(ConfigError, match=r"bm25_share = 1.2; give .* from 0 to 1"):
        planned(data, "rung=teacher", "base=minilm", "bm25_share=1.2")


def test_people_join_by_their_share(data):
    trials = planned(data, "rung=teacher", "base=minilm", "human=0,0.5,1", "volume=16")
    found = {t.params["human"]: of(t.card, Train)[0] for t in trials if t.kind == "augmented"}
    assert [bool(of(found[share], HumanPairs)) for share in (0, 0.5, 1)] == [False, True, True]
    assert [bool(of(found[share], Generate)) for share in (0, 0.5, 1)] == [True, True, False]
    assert isinstance(found[0.5].examples, MixExamples) and found[0.5].examples.weights == (0.5, 0.5)


def test_a_mix_of_human_pairs_and_crops_is_trained(data, tmp_path):
    card = load_job(str(JOB)).stage(
        data=data, rung="filters", base="scratch", human=0.5, volume=16, generator="crop", passages=24, epochs=1,
        negatives=3,
    )  # fmt: skip
    made = materialize(card, str(tmp_path), HERE)
    [trained] = of(card, Train)
    counts = trained.folder(str(tmp_path)).manifest["counts"]
    assert counts["in"] == 16
    examples = trained.examples.folder(str(tmp_path)).read("examples").to_pylist()
    assert sum(row["query_id"].startswith("q") for row in examples) == 8
    assert all(row["positive_score"] is not None and len(row["negative_scores"]) == 3 for row in examples)
    means = {r["measure"]: r["value"] for r in made.read("metrics").to_pylist() if r["query_id"] is None}
    assert 0 < means["nDCG@10"] <= 1 and 0 < means["AP"] <= 1
