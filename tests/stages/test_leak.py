"""The leak gate: what it finds of planted leaks among PyDocs' own queries, what it leaves, and what comes of it."""

import random
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from dagr_ray import report
from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage, load_stage
from dagr_ray.core.words import words
from dagr_ray.leakage import minhash
from dagr_ray.leakage.joins import matching
from dagr_ray.leakage.matching import FLOORS, MECHANISMS, HeldOut, Matches, WordInformation
from dagr_ray.quickstart import pydocs
from dagr_ray.quickstart.models import minilm
from dagr_ray.report import page as pages
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages import leakage
from dagr_ray.stages.evaluate import Evaluate, Scorecard
from dagr_ray.stages.leakage import LeakGate, LeakScan
from tests.support.studies import EVIL, made_study

LEAST = {name: LeakGate.model_fields[name].default for name in FLOORS}


def texts(*given):
    return pa.array(given, tables.TEXT)


@pytest.fixture(scope="module")
def queries():
    """The test and the dev queries of PyDocs."""
    found = {"test": [], "dev": []}
    for part in ("stdlib", "numeric"):
        data = pydocs.read_judgements(part, _Every())
        for split, rows in data.qrels.items():
            found[split] += [data.queries[i] for i in dict.fromkeys(row["query_id"] for row in rows)]
    return found


class _Every(set):
    """Passage ids of which none is missing: only queries are wanted here."""

    def __contains__(self, item):
        return True


@pytest.fixture(scope="module")
def held(queries):
    given = texts(*queries["test"])
    return HeldOut(given, telling=WordInformation(minhash.split_words(given), []))


def by_form(queries, held):
    rng = random.Random(5)
    others = [word for text in queries["dev"] for word in words(text)]
    for row, text in enumerate(queries["test"]):
        found = words(text)
        folded = minhash.split_words(texts(text))
        bits = held.telling.of(folded)
        yield row, "exact", text
        yield row, "normalised", ", ".join(found).upper() + " ?!"
        yield row, "reordered", " ".join(rng.sample(found, len(found)))
        # any but the one that tells most: without that the question is another
        at = rng.choice([i for i in range(len(bits)) if bits[i] < bits.max()] or [0])
        if len(bits) == len(found) and bits[at] < bits.max():
            yield row, "edited", " ".join([*found[:at], rng.choice(others), *found[at + 1 :]])
        yield row, "contained", " ".join([*rng.choices(others, k=3), *found, *rng.choices(others, k=3)])


def test_planted_leaks_are_found(queries, held):
    planted = list(by_form(queries, held))
    found = held.find_similar(texts(*(text for _, _, text in planted))).over(LEAST)
    hits = set(zip(found.rows.tolist(), found.held_out.tolist(), strict=True))
    recall = {}
    for form in ("exact", "normalised", "reordered", "edited", "contained"):
        mine = [(i, row) for i, (row, kind, _) in enumerate(planted) if kind == form]
        recall[form] = sum(each in hits for each in mine) / len(mine)
    assert min(recall[form] for form in ("exact", "normalised", "reordered", "edited")) >= 0.99, recall
    assert recall["contained"] >= 0.9, recall


def test_other_queries_of_the_same_kind_are_kept(queries, held):
    assert len(held.find_similar(texts(*queries["dev"])).over(LEAST)) == 0


def one(held_out, text, **more):
    """Mechanisms by which a text resembles a held-out one, with scores."""
    held = HeldOut(texts(*held_out), **more)
    found = held.find_similar(texts(text)).over(LEAST)
    return {
        (MECHANISMS[how], int(o)): round(float(s), 3)
        for how, o, s in zip(found.how, found.held_out, found.scores, strict=True)
    }


def test_each_mechanism_alone():
    asked = ["how do I copy a nested dictionary", "sort a list of tuples by the second item"]
    assert one(asked, asked[0]) == {("exact", 0): 1}
    assert one(asked, "How do I copy: a NESTED dictionary?") == {("normalised", 0): 1}
    assert one(asked, "copy a nested dictionary how do I") == {("reordered", 0): 1}
    longer = one(asked, "please tell me sort a list of tuples by the second item with an example and some more words")
    assert longer == {("contained", 1): 1}
    assert one(asked, "how do I merge two data frames") == {}


def test_a_frame_that_questions_share_is_no_leak():
    asked = ["what is the size of the cooktop", "what is the size of the trunk", "who wrote the anthem of Malta"]
    passages = texts(*["who wrote this anthem"] * 5, "Malta", "the cooktop of the size", "what is the trunk")
    telling = WordInformation(minhash.split_words(texts(*asked)), [minhash.split_words(passages)])
    assert one(asked, "what is the size of the holder", telling=telling) == {}
    colours = ["what is the weight of the blue cooktop", "what is the weight of the red cooktop", "a red or blue one"]
    told = WordInformation(
        minhash.split_words(texts(*colours)),
        [minhash.split_words(texts(*["red or blue, whatever the weight"] * 9, "x"))],
    )
    assert one(colours[1:], "what is the weight of the green cooktop", telling=told) != {}, "the one with this frame"
    assert one(colours, "what is the weight of the green cooktop", telling=told) == {}
    assert ("edited", 2) in one(asked, "who wrote the hymn of Malta", telling=telling)
    assert ("edited", 2) not in one(asked, "who wrote the anthem of Peru", telling=telling), "that is another question"


def test_one_word_replaced_in_another_order_has_to_leave_more():
    asked = "who wrote the anthem of Malta"
    others = ["who wrote the song", *["of the anthem"] * 5, *["what is the use of it"] * 20]
    held = HeldOut(texts(asked), telling=WordInformation(minhash.split_words(texts(asked, *others)), []))

    def found(text, **least):
        matches = held.find_similar(texts(text)).over({**LEAST, "contained": 2, "minhash": 2, **least})
        return [(MECHANISMS[how], round(float(s), 2)) for how, s in zip(matches.how, matches.scores, strict=True)]

    assert found("who composed the anthem of Malta") == [("edited", 0.74)]
    assert found("who composed the of anthem Malta") == [], "and in another order too much has gone"
    assert found("who composed the of anthem Malta", rearranged=0.7) == [("rearranged", 0.74)]
    assert found("who wrote the hymn of Malta") == [("edited", 0.84)]
    assert found("of Malta who wrote the hymn") == [("rearranged", 0.84)]
    assert found("hymn who wrote the of Malta") == [("rearranged", 0.84)], "a word comes in elsewhere"
    assert found("who wrote the very anthem of Malta") == found("who wrote anthem of Malta") == [("edited", 1.0)]
    assert found("anthem of Malta who wrote the the") == [("rearranged", 1.0)], "one added"
    assert found("anthem of Malta who wrote") == [("rearranged", 1.0)], "one left out"
    assert found("of Malta who wrote the anthem") == [("reordered", 1.0)]


def test_matching_gives_all_pairs():
    left, right = np.array([3, 1, 3, 9], np.uint64), np.array([3, 3, 1, 7], np.uint64)
    assert set(zip(*(x.tolist() for x in matching(left, right)), strict=True)) == {
        (0, 0),
        (0, 1),
        (2, 0),
        (2, 1),
        (1, 2),
    }
    assert all(len(x) == 0 for x in matching(left[:0], right)) and len(Matches.concat([])) == 0


# -- stages -----------------------------------------------------------------------------------------------------------

ASKED = ["when was the amber near the cedar number 14 seen", "how many people visit the grove in spring"]
LEAK = "When was the AMBER near the cedar number 14 seen?"


class Held(Stage):
    """An evaluation set of two questions."""

    type: ClassVar[str] = "held-out-set"
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "queries")

    def open(self, inputs, folder, pool):
        docs = [
            ("d0", "The amber near the cedar was seen in 1714."),
            ("d1", "Nobody visits the grove."),
            ("d2", "Other."),
        ]
        made = {
            "corpus": tables.table("corpus", [{"doc_id": i, "title": "", "text": t} for i, t in docs]),
            "queries": tables.table("queries", [{"query_id": f"t{i}", "text": t} for i, t in enumerate(ASKED)]),
            "qrels.test": tables.table(
                "qrels", [{"query_id": f"t{i}", "doc_id": f"d{i}", "relevance": 1} for i in (0, 1)]
            ),
            "candidates": tables.table("candidates", [{"query_id": "t0", "doc_id": "d0", "rank": 1, "score": 1.0}]),
        }
        return lambda start, stop: Output(made)


class Trained(Stage):
    """Training queries in shards of two rows: the second is a test query in other case, the fifth a paraphrase of one."""

    type: ClassVar[str] = "training-queries"
    passage: str = "Nobody visits  the grove"
    shown: tuple[str, str] = (ASKED[1], "p")
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage", "corpus", "exemplars")
    texts: ClassVar[list[str]] = [
        "copy a dict", LEAK, "sort a list", "read a file", "the number of visitors of the grove in springtime", "zip"
    ]  # fmt: skip

    def size(self, inputs):
        return 6

    def open(self, inputs, folder, pool):
        def run(start, stop):
            ids = [f"g{i}" for i in range(start, stop)]
            rows = {
                "queries": [{"query_id": i, "text": self.texts[int(i[1])]} for i in ids],
                "qrels": [{"query_id": i, "doc_id": f"p{int(i[1]) // 2}", "relevance": 1} for i in ids],
                "lineage": [
                    {"id": i, "gen_id": i, "source_id": "p", "strategy": "s", "engine": "e", "model": "m"} for i in ids
                ],
                "corpus": [
                    {
                        "doc_id": f"p{start // 2}",
                        "title": "",
                        "text": self.passage if start else "A dict.",
                    }
                ],
                "exemplars": [{"query_id": "e", "doc_id": "x", "query": self.shown[0], "passage": self.shown[1]}]
                if start == 0
                else [],
            }
            return Output(
                {name: tables.table(name, found) for name, found in rows.items()}, counts={"in": stop - start}
            )

        return run


SMALL = Placement(light=Pool(shard_rows=2), retrieve=Pool(shard_rows=2))


def gate(encoder=None, trained=None, **fields):
    trained = trained or Trained()
    scan = LeakScan(selected=trained, corpus=trained, held_out=(Held(),), exemplars=trained, encoder=encoder)
    return LeakGate(selected=trained, scan=scan, **fields)


def test_the_gate_drops_what_leaks_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(leakage, "AT_ONCE", 2)  # three shards
    folder = materialize(gate(), str(tmp_path), SMALL)
    counts = folder.manifest["counts"]
    assert [r["query_id"] for r in folder.read("queries").to_pylist()] == ["g0", "g2", "g3", "g4", "g5"]
    assert set(folder.read("qrels")["query_id"].to_pylist()) == set(folder.read("lineage")["id"].to_pylist())
    assert counts["in"] == 6 == counts["out"] + 1 and counts["rejected"] == {"leak/normalised": 1}
    (refused,) = folder.read("rejected").to_pylist()
    assert refused["id"] == "g1" and "t0" in refused["detail"] and refused["by"] == "leak"
    assert counts["leaks"] == {
        "query-query/normalised": 1, "exemplar-query/exact": 1, "positive-passage/normalised": 4
    }  # fmt: skip
    assert load_stage(folder) == gate()
    assert len(gate().scan.folder(str(tmp_path)).manifest["tables"]["leaks"]["parts"]) == 3


def test_other_thresholds_compare_nothing_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(leakage, "AT_ONCE", 2)
    states = []
    first = materialize(gate(), str(tmp_path), SMALL).manifest["counts"]
    made = materialize(gate(drop=()), str(tmp_path), SMALL, lambda p: states.append((p.stage.type, p.state)))
    assert made.count("queries") == 6 and made.manifest["counts"]["leaks"]["query-query/normalised"] == 1
    assert [s for kind, s in states if kind == "leak-scan"] == ["cached"]
    whole = materialize(gate(embedding=0.9), str(tmp_path), Placement(light=Pool(shard_rows=100)))
    assert len(whole.manifest["tables"]["queries"]["parts"]) == 1 and whole.manifest["counts"] == first
    both = materialize(gate(drop=("query-query", "positive-passage")), str(tmp_path), SMALL)
    assert both.read("queries")["query_id"].to_pylist() == ["g0"], "all whose passage is a relevant one"
    with pytest.raises(ValueError, match="greater than or equal to"):
        gate(minhash=0.1)
    with pytest.raises(ValueError, match="scan the queries that go through the gate"):
        LeakGate(selected=Held(), scan=gate().scan)


def test_the_embedding_finds_paraphrases(tmp_path):
    def refused(**fields):
        folder = materialize(gate(base, **fields), str(tmp_path), SMALL)
        return {r["id"]: r["reason"] for r in folder.read("rejected").to_pylist()}

    base = Encoder(model=str(minilm()), max_length=32)
    assert refused(embedding=0.8) == {"g1": "normalised", "g4": "embedding"}
    assert refused(paraphrase=0.8) == {"g1": "normalised", "g4": "paraphrase"}
    assert refused() == {"g1": "normalised"}
    elsewhere = Trained(passage="A grove that somebody may well visit.")
    assert refused(paraphrase=0.8, trained=elsewhere) == {"g1": "normalised"}
    assert refused(paraphrase=0.8, embedding=0.8, trained=elsewhere) == {"g1": "normalised", "g4": "embedding"}
    for passage, found in (("Nobody visits the grove.", True), ("p", False)):
        shown = Trained(shown=(Trained.texts[4], passage))
        leaks = materialize(gate(base, paraphrase=0.8, drop=(), trained=shown), str(tmp_path), SMALL).read("leaks")
        assert (("exemplar-query", "paraphrase") in {(r["kind"], r["mechanism"]) for r in leaks.to_pylist()}) == found


def test_an_unknown_split_is_named(tmp_path):
    scan = gate().scan.model_copy(update={"split": "train"})
    with pytest.raises(ConfigError, match="split = 'train'.*allowed: test"):
        materialize(scan, str(tmp_path), SMALL)


def test_a_scorecard_has_it_both_ways(tmp_path):
    every = Evaluate(search=Held(), data=Held(), name="toy")
    assert (
        Evaluate.model_validate({"search": Held(), "data": Held(), "name": "toy", "leaks": None}).fingerprint()
        == every.fingerprint()
    )
    untouched = every.model_copy(update={"name": "toy-untouched", "leaks": gate(drop=())})
    with pytest.raises(ConfigError, match="no judged query to evaluate"):
        materialize(untouched, str(tmp_path), SMALL)  # t1 stood in the prompt
    scan = gate().scan.model_copy(update={"exemplars": None})
    untouched = untouched.model_copy(update={"leaks": LeakGate(selected=Trained(), scan=scan)})
    card = materialize(Scorecard(evaluations=(every, untouched)), str(tmp_path), SMALL)
    rows = [r for r in card.read("metrics").to_pylist() if r["measure"] == "nDCG@10" and r["query_id"]]
    assert {(r["data"], r["query_id"], r["value"]) for r in rows} == {
        ("toy", "t0", 1.0), ("toy", "t1", 0.0), ("toy-untouched", "t1", 0.0)
    }  # fmt: skip


def test_the_page_shows_what_was_found_and_the_scores_without_it(tmp_path):
    values = {"in": [0.5] * 60}
    runs, study = made_study(tmp_path, values, {8: {"in": [0.9] * 30 + [0.5] * 30}}, gated=True)
    summary = report.summarise(runs, study)
    (found,) = summary["leaks"]
    kinds = {(k["kind"], k["mechanism"]) for k in found["kinds"]}
    assert ("query-passage", "contained") in kinds or ("positive-passage", "exact") in kinds
    (line,) = found["arms"]
    assert line["queries"] == 60 and line["mean"] == pytest.approx(0.7)
    folder = found["folder"]
    rows = report.leaks.Folders(runs).artifact(folder).read("leaks").to_pylist()
    touched = {r["held_out_id"] for r in rows if r["kind"] == "query-query"}
    left = [v for q, v in enumerate([0.9] * 30 + [0.5] * 30) if f"q{q}" not in touched]
    assert line["untouched"] == pytest.approx(sum(left) / len(left)) and line["touched"] == 60 - len(left)
    page = pages.render(summary, runs)
    assert "Does the training data contain the test?" in page and EVIL not in page
    assert any(step["step"] == "leaks" for g in summary["generators"] for step in g["rejected"]) == (
        found["dropped"] > 0
    )
