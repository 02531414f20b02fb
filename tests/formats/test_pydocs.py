"""The documentation corpus and the judgements that came with it."""

import inspect
import re

import pytest

from dagr_ray.quickstart import pydocs

PARTS = {"stdlib": pydocs.stdlib_passages, "numeric": pydocs.package_passages}


@pytest.fixture(params=sorted(PARTS))
def part(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _all(part: str) -> pydocs.JudgedQueries:
    """The judgements as they were committed: against every passage that they name."""
    named = set()
    for path in (pydocs.DATA / part / "qrels").glob("*.tsv"):
        named |= {line.split("\t")[1] for line in path.read_text().splitlines()[1:]}
    return pydocs.read_judgements(part, named)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


@pytest.mark.parametrize(("name", "low", "high"), [("stdlib", 2000, 4000), ("numeric", 1000, 2500)])
def test_passages_are_many_distinct_and_long_enough(name: str, low: int, high: int) -> None:
    passages = PARTS[name]()
    assert low < len(passages) < high
    assert len({p.doc_id for p in passages}) == len(passages)
    assert [p.doc_id for p in passages] == sorted(p.doc_id for p in passages)
    assert min(len(p.text.split()) for p in passages) >= pydocs.MIN_WORDS
    assert not any(re.search(r"(^|\.)_", p.title) for p in passages)


def test_passages_stand_under_the_name_that_people_use() -> None:
    ids = {p.doc_id for p in pydocs.stdlib_passages()}
    numeric = {p.doc_id for p in pydocs.package_passages()}
    assert {"os.path.join", "json.dumps", "str.split", "contextlib.contextmanager"} <= ids
    assert not {i for i in ids if i.startswith(("posixpath.", "ntpath.", "posix.", "ast.contextmanager"))}
    assert {"topic:assert#1", "topic:with#1"} <= ids
    # inherited from classes that pandas does not show, and loaded by numpy only when asked for
    assert {"pandas.DataFrame.fillna", "pandas.Series.str.contains", "numpy.fft.fft", "numpy.arccosh"} <= numeric


def test_a_text_is_kept_once(part: str) -> None:
    texts = [pydocs._norm(p.text) for p in PARTS[part]() if not p.doc_id.startswith("topic:")]
    # pieces of different texts may still agree; whole texts may not
    assert len(set(texts)) > 0.98 * len(texts)


def test_passages_do_not_depend_on_what_this_process_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch and others replace functions of the standard library, and numpy loads its parts when asked."""
    before = pydocs.stdlib_passages()
    assert "inspect.getfile" in {p.doc_id for p in before}
    monkeypatch.setattr(inspect, "getfile", len)
    assert pydocs._passages.__wrapped__(()) == before


def test_a_package_that_is_not_there_is_nothing() -> None:
    assert pydocs.package_passages(("no_such_package",)) == []


@pytest.mark.parametrize(("name", "least"), [("stdlib", 150), ("numeric", 80)])
def test_judgements_are_enough_and_almost_all_apply_here(name: str, least: int) -> None:
    committed, here = _all(name), pydocs.read_judgements(name, {p.doc_id for p in PARTS[name]()})
    assert len(committed.queries) >= least and not committed.rejected
    assert set(committed.qrels) == {"dev", "test"}
    rows = sum(map(len, committed.qrels.values()))
    assert sum(map(len, here.qrels.values())) + len(here.rejected) == rows
    # another minor version or another numpy lacks a few
    assert len(here.rejected) < 0.1 * rows
    assert len(set(map(str.lower, committed.queries.values()))) == len(committed.queries)
    assert {row["relevance"] for rows in committed.qrels.values() for row in rows} == {1, 2}


def test_no_passage_and_no_query_is_judged_in_two_splits(part: str) -> None:
    splits = _all(part).qrels
    for key in ("doc_id", "query_id"):
        dev, test = ({row[key] for row in splits[name]} for name in ("dev", "test"))
        assert dev and test and not dev & test
    pairs = [(row["query_id"], row["doc_id"]) for rows in splits.values() for row in rows]
    assert len(set(pairs)) == len(pairs)


def test_queries_do_not_copy_their_passages(part: str) -> None:
    texts = {p.doc_id: f" {' '.join(_words(p.title + ' ' + p.text))} " for p in PARTS[part]()}
    judged = pydocs.read_judgements(part, texts)
    for row in (row for rows in judged.qrels.values() for row in rows):
        words = _words(judged.queries[row["query_id"]])
        runs = [" ".join(words[i : i + 5]) for i in range(len(words) - 4)]
        assert not [run for run in runs if f" {run} " in texts[row["doc_id"]]], row


def test_a_judgement_of_an_absent_passage_is_dropped_and_counted(part: str) -> None:
    committed = _all(part)
    lost = committed.qrels["test"][0]
    have = {row["doc_id"] for rows in committed.qrels.values() for row in rows} - {lost["doc_id"]}
    judged = pydocs.read_judgements(part, have)
    assert {row["detail"] for row in judged.rejected} == {lost["doc_id"]}
    assert not any(row["doc_id"] == lost["doc_id"] for rows in judged.qrels.values() for row in rows)
    nothing = pydocs.read_judgements(part, set())
    assert not nothing.queries and len(nothing.rejected) == sum(map(len, committed.qrels.values()))
    assert nothing.lost == sorted(committed.queries) and not committed.lost
