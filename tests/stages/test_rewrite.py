"""Pairs, rewritten queries and passages, and where training takes them from. Answers are recorded ones of the right form."""

import pytest

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import walk
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.keyboard import KeyboardEngine
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.miners.bm25 import BM25
from dagr_ray.recipes.augmentation import generator_named
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.pairs import AsQueries, LinkedPairs, Pairs, Topics
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.rewrite import ConcatCorpora, Expand, Rewrite, WithNegatives
from dagr_ray.stages.sources import Beir, Sample
from dagr_ray.strategies.counterfactual import Counterfactual
from dagr_ray.strategies.crop import Crop
from dagr_ray.strategies.hard_negative import HardNegative
from dagr_ray.strategies.hyde import Hyde
from dagr_ray.strategies.multi_hop import MultiHop
from dagr_ray.strategies.noisy import Noisy
from dagr_ray.strategies.paraphrase import Paraphrase
from dagr_ray.strategies.promptagator import Promptagator
from dagr_ray.strategies.task_triple import TaskTriple
from tests.conftest import tiny_beir
from tests.study.test_canary import answers
from tests.support.endpoint import served

HERE = Placement(generate=Pool(workers=0, shard_rows=7), light=Pool(workers=0, shard_rows=20))


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    return Beir(path=str(tiny_beir(tmp_path_factory.mktemp("set"))))


def rewritten(docs, runs, strategy, text, samples=1, pairs=None):
    """The folder of ``Rewrite``, where an endpoint says ``text`` (of the request)."""
    with served(answers(text)) as server:
        engine = OpenAIServer(model="m", base_url=server.url)
        asked = pairs or Pairs(queries=docs, corpus=docs, split="test")
        stage = Rewrite(generations=Generate(corpus=asked, strategy=strategy, engine=engine, samples=samples))
        return materialize(stage, runs, HERE), materialize(asked, runs, HERE), stage


def last_query(body):
    return body["prompt"].rpartition("Query: ")[2].partition("\n")[0]


def last_passage(body):
    return body["prompt"].rpartition("Passage: ")[2].partition("\n")[0]


def test_pairs_are_judgements_with_texts_and_nest(docs, tmp_path):
    whole = materialize(Pairs(queries=docs, corpus=docs, split="test"), str(tmp_path), HERE).read("pairs").to_pylist()
    assert len(whole) == 48 and len({row["doc_id"] for row in whole}) == 48
    for row in whole:
        assert row["query_id"][1:] == row["passage_id"][1:] and row["text"].startswith("The ") and row["query"]
    fewer = [materialize(Pairs(queries=docs, corpus=docs, split="test", n=n), str(tmp_path), HERE) for n in (5, 20)]
    drawn = [set(folder.read("pairs")["doc_id"].to_pylist()) for folder in fewer]
    assert len(drawn[0]) == 5 and drawn[0] < drawn[1] < {row["doc_id"] for row in whole}


def test_a_paraphrase_is_a_new_query_of_the_same_passage(docs, tmp_path):
    said = lambda body: f" year of number {last_query(body).split()[-2]}"  # noqa: E731
    made, pairs, stage = rewritten(docs, str(tmp_path), Paraphrase(), said)
    passage_of = {row["doc_id"]: row["passage_id"] for row in pairs.read("pairs").to_pylist()}
    queries = {row["query_id"]: row["text"] for row in made.read("queries").to_pylist()}
    lineage = {row["id"]: row for row in made.read("lineage").to_pylist()}
    qrels = made.read("qrels").to_pylist()
    assert len(queries) == len(qrels) == 48 and made.count("corpus") == 0
    for row in qrels:
        assert row["relevance"] == 1 and row["doc_id"] == passage_of[lineage[row["query_id"]]["source_id"]]
        assert queries[row["query_id"]] == f"year of number {row['doc_id'][1:]}"
    # shards of seven or of one: the same ids
    again = Placement(generate=Pool(workers=0, shard_rows=1))
    with served(answers(said)) as server:
        engine = OpenAIServer(model="m", base_url=server.url)
        other = Rewrite(generations=stage.generations.model_copy(update={"engine": engine}))
        assert other.generations.fingerprint() == stage.generations.fingerprint()
        assert materialize(other, str(tmp_path / "again"), again).read("queries") == made.read("queries")


def test_a_hypothetical_passage_is_a_positive_for_training(docs, tmp_path):
    runs = str(tmp_path)
    made, _, stage = rewritten(
        docs, runs, Hyde(), lambda body: f" The thing was seen: {last_query(body)}, so they say."
    )
    assert made.count("corpus") == made.count("qrels") == 48
    both = ConcatCorpora(corpora=(docs, stage))
    search = Search(index=Index(corpus=both, miner=BM25()), queries=stage, depth=10)
    with served(answers()):
        mined = materialize(Mine(selected=stage, corpus=both, searches=(search,), margin=None), runs, HERE)
    assert materialize(both, runs, HERE).count("corpus") == 60 + 48
    positives = {row["query_id"]: row["positive_id"] for row in mined.read("examples").to_pylist()}
    assert positives == {row["query_id"]: row["doc_id"] for row in made.read("qrels").to_pylist()}


def test_written_negatives_precede_mined_ones(docs, tmp_path):
    runs = str(tmp_path)
    number = iter(range(10_000))
    said = lambda body: f" Boats of {next(number)} go there in winter and come back in spring."  # noqa: E731
    made, _, stage = rewritten(docs, runs, HardNegative(), said, samples=3)
    judged = made.read("qrels").to_pylist()
    assert len(judged) == 144 and {row["relevance"] for row in judged} == {0}
    given = docs_with_qrels(docs)
    search = Search(index=Index(corpus=docs, miner=BM25()), queries=given, depth=20)
    mined = Mine(selected=given, corpus=docs, searches=(search,), negatives=5, margin=None)
    own = {
        query_id: {r["doc_id"] for r in judged if r["query_id"] == query_id}
        for query_id in {r["query_id"] for r in judged}
    }
    for share, most in ((1.0, 3), (0.4, 2), (0.0, 0)):
        mixed = materialize(WithNegatives(mined=mined, written=(stage,), total=5, written_share=share), runs, HERE)
        for row in mixed.read("examples").to_pylist():
            negatives = row["negative_ids"]
            assert set(negatives[:most]) <= own[row["query_id"]] and not set(negatives[most:]) & own[row["query_id"]]
            assert len(negatives) == len(row["negative_scores"]) == (3 if share == 1.0 else 5)


def docs_with_qrels(docs):
    """The test queries of a data set as a stage with ``qrels``, as selected queries have them."""
    from tests.stages.test_select_mine import FixedTables

    folder = docs.path
    rows = [line.split("\t") for line in open(f"{folder}/qrels/test.tsv").read().splitlines()[1:]]
    import json

    texts = {row["_id"]: row["text"] for row in map(json.loads, open(f"{folder}/queries.jsonl"))}
    return FixedTables(
        rows={
            "queries": tuple((q, texts[q]) for q, _, _ in rows),
            "qrels": tuple((q, d, 1) for q, d, _ in rows),
        }
    )


def test_a_counterfactual_says_what_it_changed(docs, tmp_path):
    def said(body):
        return " " + last_passage(body).replace("first", "never" if "number 13" not in body["prompt"] else "first")

    made, _, _ = rewritten(docs, str(tmp_path), Counterfactual(), said)
    changes = {row["doc_id"]: (row["before"], row["after"]) for row in made.read("changes").to_pylist()}
    new = {row["doc_id"]: row["text"] for row in made.read("corpus").to_pylist()}
    assert set(changes.values()) == {("first", "never")} and set(changes) == set(new) and len(new) == 47
    assert [row["reason"] for row in made.read("rejected").to_pylist()] == ["unchanged"]
    assert {row["relevance"] for row in made.read("qrels").to_pylist()} == {0}


def test_two_hop_queries_are_relevant_to_both_passages(docs, tmp_path):
    runs = str(tmp_path)
    asked = AsQueries(corpus=docs)
    search = Search(index=Index(corpus=docs, miner=BM25()), queries=asked, depth=10)
    linked = LinkedPairs(passages=docs, corpus=docs, search=search)

    def said(body):
        first, second = (line.partition(": ")[2] for line in body["prompt"].splitlines()[-3:-1])
        return f" who saw {first.split()[3]} {first.rstrip('.').split()[-1]} and {second.rstrip('.').split()[-1]}"

    made, pairs, _ = rewritten(docs, runs, MultiHop(), said, pairs=linked)
    rows = pairs.read("pairs").to_pylist()
    assert len(rows) == 60 and all(row["passage_id"] != row["other_id"] and row["other"] != row["text"] for row in rows)
    assert made.count("qrels") == 2 * made.count("queries") == 120


def test_triples_need_no_corpus(docs, tmp_path):
    number = iter(range(10_000))

    def said(body):
        i = next(number)
        if i == 3:
            return " find a fact\nQuery: only a query"
        return (
            f" find fact {i}\nQuery: what is {i} like\nRight passage: The number {i} is like {i} other numbers.\n"
            f"Wrong passage: Numbers such as {i} are written from left to right."
        )

    made, topics, stage = rewritten(docs, str(tmp_path), TaskTriple(), said, pairs=Topics(n=30))
    assert topics.count("corpus") == 30 and len(set(topics.read("corpus")["text"].to_pylist())) == 30
    assert (made.count("queries"), made.count("corpus"), made.count("qrels")) == (29, 58, 58)
    assert [row["reason"] for row in made.read("rejected").to_pylist()] == ["incomplete"]
    text_of = {row["doc_id"]: row["text"] for row in made.read("corpus").to_pylist()}
    for row in made.read("qrels").to_pylist():
        assert text_of[row["doc_id"]].startswith("The number" if row["relevance"] else "Numbers")
    mined = Mine(selected=stage, corpus=stage, negatives=0)
    with_own = materialize(WithNegatives(mined=mined, written=(stage,), total=1), str(tmp_path), HERE).read("examples")
    assert with_own.num_rows == 29 and all(len(ids) == 1 for ids in with_own["negative_ids"].to_pylist())


def test_slips_need_no_model_and_differ_by_sample(docs, tmp_path):
    asked = Pairs(queries=docs, corpus=docs, split="test")
    stage = Rewrite(generations=Generate(corpus=asked, strategy=Noisy(), engine=KeyboardEngine(), samples=2))
    made = materialize(stage, str(tmp_path), HERE)
    texts = made.read("queries")["text"].to_pylist()
    assert len(texts) >= 90 and len(set(texts)) >= 90 and made.manifest["counts"]["in"] == 96


def test_expansion_appends_the_queries_of_a_passage(docs, tmp_path):
    strategy, engine = generator_named("crop")
    asked = Sample(corpus=docs, n=20)
    parsed = Parse(generations=Generate(corpus=asked, strategy=strategy, engine=engine, samples=2), corpus=asked)
    made = materialize(Expand(corpus=docs, queries=parsed, per_passage=1), str(tmp_path), HERE)
    before = dict(
        zip(*(docs.folder(str(tmp_path)).read("corpus")[n].to_pylist() for n in ("doc_id", "text")), strict=True)
    )
    after = dict(zip(*(made.read("corpus")[n].to_pylist() for n in ("doc_id", "text")), strict=True))
    grown = {doc_id for doc_id in before if after[doc_id] != before[doc_id]}
    assert (
        grown == set(asked.folder(str(tmp_path)).read("corpus")["doc_id"].to_pylist()) and before.keys() == after.keys()
    )
    assert all(after[doc_id].startswith(before[doc_id] + "\n") and after[doc_id].count("\n") == 1 for doc_id in grown)


def test_contradicting_fields_are_refused_with_the_remedy(docs):
    with pytest.raises(ValueError, match="'paraphrase' reads pairs.*give Pairs or LinkedPairs"):
        Generate(corpus=docs, strategy=Paraphrase(), engine=CropEngine())
    with pytest.raises(ValueError, match="'promptagator' reads corpus.*give passages"):
        Generate(corpus=Pairs(queries=docs, corpus=docs), strategy=Promptagator(), engine=CropEngine())
    generations = Generate(corpus=Topics(n=3), strategy=TaskTriple(), engine=CropEngine())
    with pytest.raises(ValueError, match="Rewrite reads its answers"):
        Parse(generations=generations, corpus=Topics(n=3))
    assert [type(s).__name__ for s in walk(Rewrite(generations=generations))] == ["Topics", "Generate", "Rewrite"]
    assert Crop().reads == "corpus"


def test_two_passages_under_one_id_are_refused(tmp_path):
    from tests.stages.test_select_mine import corpus

    with pytest.raises(ConfigError, match="'d0' names two passages"):
        materialize(ConcatCorpora(corpora=(corpus("a b c"), corpus("d e f"))), str(tmp_path), HERE)
    same = materialize(ConcatCorpora(corpora=(corpus("a b c"), corpus("a b c", "d"))), str(tmp_path), HERE)
    assert (
        same.read("corpus")["doc_id"].to_pylist() == ["d0", "d1"]
        and tables.schema("corpus") == same.read("corpus").schema
    )
