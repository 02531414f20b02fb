"""Every strategy of the registry makes an arm: one that is added is in the catalogue the moment it exists."""

import re

import pytest

from dagr_ray.catalogue import TOKENS, arm, strategy_named
from dagr_ray.cluster import Placement, Pool
from dagr_ray.config import ConfigError, from_json, plugins
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.models import minilm
from dagr_ray.retriever import Encoder
from dagr_ray.stage import Stage, materialize, walk
from dagr_ray.stages.corpus import Beir, Sample
from dagr_ray.strategies import Strategy
from tests.conftest import tiny_beir
from tests.endpoint import served
from tests.test_canary import answers

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
def test_an_arm_of_each_kind_ends_in_examples_whose_texts_are_there(docs, tmp_path, name):
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
