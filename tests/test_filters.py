"""Filters: what every one must be; for each, planted defects that it must find and good queries that it must leave."""

import ast
import doctest
import importlib
import json
import pickle

import pytest

from dagr_ray import tables
from dagr_ray.config import Threshold, from_json, plugins
from dagr_ray.filters import Candidate, Filter
from dagr_ray.filters.copied import Copied
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.filters.format import Format
from dagr_ray.filters.length import Length
from dagr_ray.filters.round_trip import RoundTrip

# Whatever else is registered while the tests run (other test files) is not of this package.
FILTERS = {name: kind for name, kind in plugins(Filter).items() if kind.__module__.startswith("dagr_ray.")}


def rows(*texts, passage="Return a shallow copy of the dictionary."):
    return [Candidate(f"q{i}", text, f"d{i}", passage) for i, text in enumerate(texts)]


def reasons(kind, *texts, **more):
    return [kind.keep(score) for score in kind.score(rows(*texts, **more), None)]


@pytest.mark.parametrize("kind", FILTERS.values(), ids=FILTERS)
def test_contract(kind):
    made = kind()
    assert from_json(json.loads(json.dumps(made.to_json())), Filter) == made
    assert pickle.loads(pickle.dumps(made)) == made
    assert "arXiv" in kind.__doc__, "the docstring says where the filter comes from"
    runner = doctest.DocTestRunner()
    test = doctest.DocTestFinder().find(kind, globs=vars(importlib.import_module(kind.__module__)).copy())[0]
    assert test.examples, "the docstring has an example"
    assert not runner.run(test).failed


@pytest.mark.parametrize("kind", FILTERS.values(), ids=FILTERS)
def test_keep_reads_thresholds_and_score_does_not(kind):
    """A field that ``score`` reads and that is marked as a threshold would leave stale scores in the cache."""
    source = ast.parse(open(importlib.import_module(kind.__module__).__file__).read())
    methods = {node.name: node for node in ast.walk(source) if isinstance(node, ast.FunctionDef)}
    read = {
        name: {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "self"}
        for name, node in methods.items()
    }
    marked = {n for n, f in kind.model_fields.items() if any(isinstance(m, Threshold) for m in f.metadata)}
    assert marked, "something must be free to change without scoring anew"

    def reached(*names):
        """The fields that methods read, also through other methods of the object."""
        found, ahead = set(), set(names) & set(methods)
        while ahead:
            found |= ahead
            ahead = set().union(*(read[name] for name in ahead)) & set(methods) - found
        return set().union(*(read[name] for name in found)) & set(kind.model_fields)

    scoring, deciding = reached("score"), reached("keep", "settled", "room", "mend", "by_size")
    assert not scoring & marked
    assert deciding - scoring <= marked, "what scoring does not read must be free to change without scoring anew"


@pytest.mark.parametrize("kind", FILTERS.values(), ids=FILTERS)
def test_score_takes_nothing_and_odd_text(kind):
    search = tables.empty("candidates")
    assert kind().score([], search) == []
    odd = ["", " ", "?!", "\ufffd", "a" * 10_000, "量子コンピュータとは何ですか", "emoji 🎉 query"]
    scores = kind().score(rows(*odd), search)
    assert len(scores) == len(odd)
    assert all(kind().keep(score) is None or isinstance(kind().keep(score), str) for score in scores)


def test_length():
    assert reasons(Length(), "dict", "copy a dict", "word " * 41) == ["too-short", None, "too-long"]
    assert reasons(Length(min_words=1), "", "dict") == ["too-short", None]
    assert reasons(Length(), "量子コンピュータとは何ですか") == [None], "text without spaces is not one word"
    with pytest.raises(ValueError, match="min_words = 9 is over max_words = 3"):
        Length(min_words=9, max_words=3)


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("no-letters", ""),
        ("no-letters", "1234 ?"),
        ("markup", "<p>copy a dict</p>"),
        ("markup", "```python"),
        ("markup", "**how to copy a dict**"),
        ("markup", "<|im_end|> copy a dict"),
        ("markup", "## copying a dict"),
        ("markup", "| a | dict |"),
        ("list", "1. how to copy a dict"),
        ("list", "- copy a dict"),
        ("list", "copy a dict\nmerge a dict"),
        ("list", "a) copy a dict"),
        ("placeholder", "how to copy a [insert topic here]"),
        ("placeholder", "the ____ method copies a dict"),
        ("placeholder", "N/A"),
        ("placeholder", "Query"),
        ("prompt-label", "Query: copy a dict"),
        ("prompt-label", "copy a dict. Passage: Return a"),
        ("generic", "Which of the following sentences is nonsensical?"),
        ("generic", "Which one of the following is true about dicts?"),
        ("generic", "What is the main idea of the passage?"),
        ("generic", "According to the text, what is a dict?"),
        ("generic", "what does this passage describe"),
        ("generic", "What is the author trying to say about dicts?"),
        ("generic", "What is the best answer to the question?"),
        ("generic", "what does it do?"),
        ("generic", "how do I use this"),
        ("generic", "What is this about?"),
        ("repetitive", "dict copy dict copy dict copy dict copy"),
    ],
)
def test_format_finds(reason, text):
    assert reasons(Format(), text) == [reason]
    assert reasons(Format(allow=(reason,)), text)[0] != reason


@pytest.mark.parametrize(
    "text",
    [
        "how tall is the eiffel tower",
        "what does list<int> mean in java",
        "3.11 release notes of python",
        "difference between **kwargs and *args",
        "f(**a, b**2) meaning",
        "when did the French Revolution end?",
        "os.path.join with absolute second argument",
        "-m flag of python",
        "e-mail header encoding",
        "which article of the constitution covers free speech",
        "how to write a query in SQL",
        "what is a document object model",
        "the best option for storing sessions",
        "who wrote the text of the national anthem",
        "copy",
        "was ist ein Wörterbuch",
        "量子コンピュータとは何ですか",
        "to be or not to be that is the question shakespeare",
    ],
)
def test_format_leaves(text):
    assert reasons(Format(), text) == [None]


def test_copied():
    passage = "The Eiffel Tower is 330 metres tall, about the same height as an 81-storey building."
    texts = [
        "The Eiffel Tower is 330 metres tall",
        "THE EIFFEL tower, is 330",
        "how tall is the eiffel tower",
        "eiffel tower",
    ]
    assert reasons(Copied(), *texts, passage=passage) == ["copied", "copied", None, None]
    half = "the eiffel tower is 330 metres or maybe more than that"
    (share,) = Copied().score(rows(half, passage=passage), None)
    assert 0.3 < share < 0.5
    assert Copied(max_share=0.2).keep(share) == "copied"


def test_duplicate_does_not_depend_on_the_order_of_the_rows():
    given = rows("copy a dict", "Copy  a dict?", "copy a list", "COPY A DICT", "??", "!!")
    scores = dict(zip((r.query_id for r in given), Duplicate().score(given, None), strict=True))
    turned = dict(zip((r.query_id for r in given[::-1]), Duplicate().score(given[::-1], None), strict=True))
    assert scores == turned
    assert sorted([scores["q0"], scores["q1"], scores["q3"]]) == [0, 1, 2]
    assert scores["q2"] == scores["q4"] == scores["q5"] == 0
    assert [Duplicate(by="exact").keep(s) for s in Duplicate(by="exact").score(given, None)] == [None] * 6


def test_round_trip():
    hits = [("q0", "d9", 1), ("q0", "d0", 2), ("q0", "d0", 7), ("q1", "d0", 1), ("q2", "d2", 21)]
    found = [{"query_id": q, "doc_id": d, "rank": r, "score": 1.0 / r} for q, d, r in hits]
    scores = RoundTrip().score(rows("a", "b", "c"), tables.table("candidates", found))
    assert scores == [2, 1e6, 21], "the best rank of the own passage, and another query's hit is none"
    assert [RoundTrip(max_rank=20).keep(s) for s in scores] == [None, "not-found", "low-rank"]
    assert [RoundTrip(max_rank=1).keep(s) for s in scores] == ["low-rank", "not-found", "low-rank"]
