"""Filters: what every one must be; for each, planted defects that it must find and good queries that it must leave."""

import ast
import doctest
import importlib
import json
import pickle

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pytest

from dagr_ray.core import tables
from dagr_ray.core.config import Threshold, from_json, plugins
from dagr_ray.filters import Filter, ScoredQuery
from dagr_ray.filters.copied import Copied, lcs_length
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.filters.format import Format
from dagr_ray.filters.language import Language
from dagr_ray.filters.length import Length
from dagr_ray.filters.logprob import Logprob
from dagr_ray.filters.refusal import Refusal
from dagr_ray.filters.repetition import Repetition
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.filters.teacher import Teacher
from dagr_ray.filters.template import Template

# Whatever else is registered while the tests run (other test files) is not of this package.
FILTERS = {name: kind for name, kind in plugins(Filter).items() if kind.__module__.startswith("dagr_ray.")}


def rows(*texts, passage="Return a shallow copy of the dictionary."):
    return [ScoredQuery(f"q{i}", text, f"d{i}", passage) for i, text in enumerate(texts)]


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

    scoring, deciding = (
        reached("score"),
        reached("keep", "with_thresholds_for", "quota", "rewrite", "needs_corpus_size"),
    )
    assert not scoring & marked
    assert deciding - scoring <= marked, "what scoring does not read must be free to change without scoring anew"


@pytest.mark.parametrize("kind", FILTERS.values(), ids=FILTERS)
def test_score_takes_nothing_and_odd_text(kind):
    logprobs = pa.schema([("query_id", tables.TEXT), ("logprob", pa.float32())]).empty_table()
    search = logprobs if kind.reads == "generations" else tables.empty(kind.reads or "candidates")
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
        ("markup", "**how do I copy a dict?**"),
        ("markup", "## copying a dict"),
        ("markup", "| a | dict |"),
        ("list", "1. how to copy a dict"),
        ("list", "- copy a dict"),
        ("list", "copy a dict\nmerge a dict"),
        ("list", "a) copy a dict"),
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


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("chat-token", "<|im_end|> copy a dict"),
        ("chat-token", "[/INST] how to copy a dict"),
        ("chat-token", "### Response\ncopy a dict"),
        ("placeholder", "how to copy a [insert topic here]"),
        ("placeholder", "the ____ method copies a dict"),
        ("placeholder", "N/A"),
        ("placeholder", "Query"),
        ("prompt-label", "Query: copy a dict"),
        ("prompt-label", "copy a dict. Passage: Return a"),
        ("instruction", "Write a search query that this passage answers"),
        ("instruction", "a good question about the passage"),
        ("instruction", "You are a helpful assistant"),
        ("phrase", "so, how deep is LAKE Baikal then"),
        ("phrase", "kettle leak"),
    ],
)
def test_template_finds(reason, text):
    shown = {"phrases": ("how deep is lake baikal", "kettle leak")} if reason == "phrase" else {}
    assert reasons(Template(**shown), text) == [reason]
    assert reasons(Template(allow=(reason,), **shown), text) == [None]


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("identity", "As an AI language model, I have no opinion"),
        ("identity", "I'm just an AI and do not know"),
        ("refusal", "I cannot generate a query for that."),
        ("refusal", "Unfortunately, I am unable to provide this information"),
        ("refusal", "I’m unable to determine the answer"),
        ("refusal", "The passage does not contain enough information"),
        ("refusal", "no passage was provided"),
        ("apology", "I'm sorry, but the text is short"),
        ("apology", "I apologize for the confusion"),
        ("chat", "Sure! Here is a query"),
        ("chat", "Here are three possible queries"),
        ("chat", "copy a dict. Let me know if you need more"),
    ],
)
def test_refusal_finds(reason, text):
    assert reasons(Refusal(), text) == [reason]
    assert reasons(Refusal(allow=(reason,)), text) == [None]


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("dict copy list dict copy list", False),
        ("hahahahahaha", False),
        ("no no no no no no no", True),
        ("复制复制复制复制复制", True),
        ("a long question about how one copies a large dict in python of the of the of the of the", True),
    ],
)
def test_repetition_finds(text, whole):
    assert reasons(Repetition(), text) == ["repetition"]
    diluted = text + " to the other side where quite another thing is meant"
    assert reasons(Repetition(), diluted) == (["repetition"] if whole else [None])


GOOD = [
    "how tall is the eiffel tower",
    "what does list<int> mean in java",
    "i can't find my python installation",
    "i cannot create a table in mysql",
    "as an ai engineer what salary can i expect",
    "sorry album by justin bieber release date",
    "how to write a query in SQL",
    "write a question mark in latex",
    "ok google what is the weather",
    "can not vs cannot",
    "how do I say I am sorry in french",
    "python f-string {name} formatting",
    "what is the passage of time in physics",
    "q: drive mapping in windows",
    "when did Duran Duran release Rio",
    "1000000000 in words",
    "---- in a yaml file meaning",
    "what comes after 1 1 1 1 1 in octal",
    "aaaaargh meaning in english",
    "New York, New York lyrics",
    "复制一个字典的方法",
]


@pytest.mark.parametrize("text", GOOD)
@pytest.mark.parametrize("kind", [Template, Refusal, Repetition, Language])
def test_cheap_filters_leave(kind, text):
    made = kind(language="zh") if kind is Language and not text.isascii() else kind()
    assert reasons(made, text) == [None]


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
    gaps = "the Eiffel Tower is 330 tall about the height of an 81-storey building"
    assert reasons(Copied(), gaps, passage=passage) == [None]
    assert reasons(Copied(measure="lcs"), gaps, passage=passage) == ["copied"]


@hypothesis.given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcde"), max_size=12))
def test_longest_common_subsequence(one, other):
    """Against the table of Wagner and Fischer."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert lcs_length(one, other) == table[-1][-1]


def test_copied_by_form():
    of = {
        form: Copied().with_thresholds_for(form, 0)
        for form in ("typed/claim", "claim", "typed/title", "promptagator", "")
    }
    assert [each.keep(0.9) for each in of.values()] == [None, None, None, "copied", "copied"]
    assert [each.keep(1.0) for each in of.values()] == ["copied", "copied", None, "copied", "copied"]
    own = Copied(by_form={"typed/claim": 0.2, "claim": 0.5})
    assert [own.with_thresholds_for(form, 0).keep(0.4) for form in ("typed/claim", "claim")] == ["copied", None]
    assert own.scoring_identity() == Copied().scoring_identity()
    with pytest.raises(ValueError, match="by_form: claim = 2; give a share between 0 and 1"):
        Copied(by_form={"claim": 2})


def test_duplicate_does_not_depend_on_the_order_of_the_rows():
    given = rows("copy a dict", "Copy  a dict?", "copy a list", "COPY A DICT", "??", "!!")
    scores = dict(zip((r.query_id for r in given), Duplicate().score(given, None), strict=True))
    turned = dict(zip((r.query_id for r in given[::-1]), Duplicate().score(given[::-1], None), strict=True))
    assert scores == turned
    assert sorted([scores["q0"], scores["q1"], scores["q3"]]) == [0, 1, 2]
    assert scores["q2"] == scores["q4"] == scores["q5"] == 0
    assert [Duplicate(by="exact").keep(s) for s in Duplicate(by="exact").score(given, None)] == [None] * 6


def test_teacher():
    scored = [("q0", "d0", 4.0), ("q0", "d7", 5.5), ("q1", "d1", 2.0), ("q1", "d0", -1.0), ("q3", "d3", 9.0)]
    given = tables.table(
        "scores",
        [dict(zip(("query_id", "doc_id", "scorer", "score"), (q, d, "a", s), strict=True)) for q, d, s in scored],
    )
    asked = rows("a", "b", "c", "d")
    own = Teacher(min_score=3)
    assert [own.keep(s) for s in own.score(asked, given)] == [None, "low-score", "no-score", None]
    margin = Teacher(by="margin", min_score=0)
    assert [margin.keep(s) for s in margin.score(asked, given)] == ["low-score", None, "no-score", "no-score"]
    both = pa.concat_tables(
        [given, given.set_column(2, given.schema.field("scorer"), pa.array(["b"] * 5, tables.TEXT))]
    )
    assert Teacher(scorer="b").score(asked, both)[0] == 4
    with pytest.raises(ValueError, match="scorer = None; allowed: a, b"):
        Teacher().score(asked, both)
    with pytest.raises(ValueError, match="scorer = 'c'; allowed: a, b"):
        Teacher(scorer="c").score(asked, both)
    assert [Teacher(top=t, top_share=s).quota(40) for t, s in ((None, None), (7, None), (None, 0.5), (7, 0.1))] == [
        None,
        7,
        20,
        4,
    ]


def test_logprob():
    given = pa.table({"query_id": ["q0", "q1"], "logprob": pa.array([-0.5, None], pa.float32())})
    scores = Logprob().score(rows("a", "b", "c"), given)
    assert [Logprob(min_logprob=-1).keep(s) for s in scores] == [None, "no-logprob", "no-logprob"]
    assert Logprob(min_logprob=-0.1).keep(scores[0]) == "low-logprob"
    assert Logprob(top=3, top_share=0.5).quota(4) == 2


def test_round_trip_by_the_size_of_the_corpus():
    auto = RoundTrip(max_rank="auto")
    assert auto.needs_corpus_size and not RoundTrip().needs_corpus_size
    assert [auto.with_thresholds_for("", n).max_rank for n in (0, 499, 3_633, 5_183, 9_999, 10_000, 8_841_823)] == [
        20,
        20,
        3,
        2,
        2,
        1,
        1,
    ]
    assert [auto.with_thresholds_for("", 5_183).keep(rank) for rank in (1.0, 2.0, 3.0, 1e6)] == [
        None,
        None,
        "low-rank",
        "not-found",
    ]


def test_round_trip():
    hits = [("q0", "d9", 1), ("q0", "d0", 2), ("q0", "d0", 7), ("q1", "d0", 1), ("q2", "d2", 21)]
    found = [{"query_id": q, "doc_id": d, "rank": r, "score": 1.0 / r} for q, d, r in hits]
    scores = RoundTrip().score(rows("a", "b", "c"), tables.table("candidates", found))
    assert scores == [2, 1e6, 21], "the best rank of the own passage, and another query's hit is none"
    assert [RoundTrip(max_rank=20).keep(s) for s in scores] == [None, "not-found", "low-rank"]
    assert [RoundTrip(max_rank=1).keep(s) for s in scores] == ["low-rank", "not-found", "low-rank"]
