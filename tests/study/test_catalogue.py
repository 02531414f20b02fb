"""Every strategy of the registry makes an arm: one that is added is in the catalogue the moment it exists."""

import re

import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError, from_json, plugins
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Stage, walk
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.quickstart.models import minilm
from dagr_ray.recipes.strategies import TOKENS, arm, mixed, strategy_named
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.sources import Beir, Sample
from dagr_ray.strategies import Strategy
from dagr_ray.study.job import load_job
from dagr_ray.study.preview import generation_of, preview_lines
from tests.conftest import tiny_beir
from tests.study.test_canary import answers
from tests.support.endpoint import served

HERE = Placement(generate=Pool(workers=0), retrieve=Pool(workers=0), light=Pool(workers=0))
IN_IT = sorted(name for name, cls in plugins(Strategy).items() if cls.writes in TOKENS)


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    return Beir(path=str(tiny_beir(tmp_path_factory.mktemp("set"))))


def test_what_is_listed_is_there():
    assert {"promptagator", "crop", "hyde", "hard-negative", "paraphrase", "noisy", "multi-hop", "task-triple"} <= set(
        IN_IT
    )
    with pytest.raises(ConfigError, match="strategy = 'none' is not in the catalogue; allowed: .*promptagator"):
        strategy_named("none")


@pytest.mark.parametrize("name", IN_IT)
def test_every_strategy_makes_an_arm(docs, name):
    strategy, encoder = strategy_named(name), Encoder(model=str(minilm()))
    engine = OpenAIServer(model="m", base_url="http://127.0.0.1:9/v1")
    made = arm(strategy, engine, Sample(corpus=docs, n=20), docs, encoder, exemplars=None)
    assert made.generations.strategy == strategy
    assert made.generations.fingerprint() in {stage.fingerprint() for stage in walk(made.examples)}
    for stage in (made.parsed, made.queries, made.corpus, made.examples):
        assert from_json(stage.to_json(), Stage).fingerprint() == stage.fingerprint()


def said(body):
    """A query for a passage, and a passage for anything else."""
    prompt = body["prompt"]
    if prompt.endswith("\nQuery:"):
        return f" what was seen in the year of number {re.findall(r'has number ([0-9]+)', prompt)[-1]}"
    asked = prompt.rpartition("Query: ")[2].partition("\n")[0]
    return f" People say that {asked} is what {asked} says, time {body['seed']}."


@pytest.mark.parametrize("name", ["hyde", "hard-negative", "noisy"])
def test_examples_of_each_kind_of_arm_have_their_texts(docs, tmp_path, name):
    runs = str(tmp_path)
    with served(answers(said)) as server:
        engine = OpenAIServer(model="m", base_url=server.url)
        made = arm(
            strategy_named(name), engine, Sample(corpus=docs, n=20), docs, Encoder(model=str(minilm())), exemplars=None,
            max_rank=60,
        )  # fmt: skip
        examples = materialize(made.examples, runs, HERE).read("examples").to_pylist()
        queries = materialize(made.queries, runs, HERE).read("queries")["query_id"].to_pylist()
        passages = materialize(made.corpus, runs, HERE).read("corpus")["doc_id"].to_pylist()
    assert examples and {row["query_id"] for row in examples} <= set(queries)
    assert {i for row in examples for i in (row["positive_id"], *row["negative_ids"])} <= set(passages)


@pytest.mark.parametrize("name", IN_IT)
def test_a_preview_shows_what_the_strategy_itself_asks(docs, tmp_path, name):
    with served(answers(said)) as server:
        engine, few = OpenAIServer(model="m", base_url=server.url), Encoder(model=str(minilm()), layers=1)
        made = arm(strategy_named(name), engine, Sample(corpus=docs, n=20), docs, few, exemplars=None)
        generate = generation_of(made.examples)
        lines = list(preview_lines(generate, 2, str(tmp_path), HERE))
    assert generate.strategy.type == name
    assert sum(line.startswith("--- sample") for line in lines) == 2 * generate.per_passage()
    assert sum(line.startswith("=== ") for line in lines) >= 2
    results = [line for line in lines if line.startswith("    -> ")]
    assert len(results) == 2 * generate.per_passage() and not any(line.endswith("?") for line in results)


def test_arms_of_all_kinds_make_one_mixture(docs, tmp_path):
    runs, encoder = str(tmp_path), Encoder(model=str(minilm()))
    with served(answers(said)) as server:
        engine = OpenAIServer(model="m", base_url=server.url)
        arms = [
            arm(strategy_named(name), engine, Sample(corpus=docs, n=20), docs, encoder, exemplars=None, max_rank=60)
            for name in ("crop", "hyde", "hard-negative")
        ]
        blend, corpus = mixed(arms, n=8, weights=(2.0, 1.0, 1.0))
        taken = materialize(blend, runs, HERE)
        passages = set(materialize(corpus, runs, HERE).read("corpus")["doc_id"].to_pylist())
    examples = taken.read("examples").to_pylist()
    assert sorted(taken.manifest["counts"]["taken"].values()) == [2, 2, 4]
    assert {row["query_id"] for row in examples} <= set(taken.read("queries")["query_id"].to_pylist())
    assert {i for row in examples for i in (row["positive_id"], *row["negative_ids"])} <= passages
    own = set(docs.folder(runs).read("corpus")["doc_id"].to_pylist())
    assert passages > own and any(row["positive_id"] not in own for row in examples)
    assert any(set(row["negative_ids"]) - own for row in examples)


def test_none_is_a_strategy_or_no_value_by_type():
    job = load_job("jobs/catalogue.py")
    assert job.value("strategy", "none") == "none" and job.value("data", "none") is None
