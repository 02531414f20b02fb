"""People's data: what is found, what only looks like it, and what masking leaves of a query and of a passage."""

import pytest

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement
from dagr_ray.filters import ScoredQuery
from dagr_ray.filters.pii import Pii
from dagr_ray.stages.mask_pii import Mask
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from tests.stages.test_select_mine import FixedTables, corpus, parsed

FOUND = {
    "write to jane.doe+work@mail.company.co.uk today": ("email", "[email]"),
    "call +49 30 901820 now": ("phone", "[phone]"),
    "call (202) 456-1111 now": ("phone", "[phone]"),
    "card 5500 0055 5555 5559 refused": ("card", "[card]"),
    "pay to DE89 3704 0044 0532 0130 00 please": ("iban", "[iban]"),
    "my ssn is 536-90-4399 and": ("national-id", "[national-id]"),
    "blocked from 8.8.4.4 why": ("ip", "[ip]"),
    "ping 2001:4860:4860::8888 fails": ("ip", "[ip]"),
}
LEFT = [
    "what is user@example.com for",
    "decorator @app.route in flask",
    "listen on 127.0.0.1:8080 or 192.168.0.1",
    "3.141592653589793 digits",
    "isbn 978-3-16-148410-0",
    "1234 5678 9012 3456 is no card",
    "born 1987-04-12 died 2020-11-30",
    "error 0x80070057 in windows 10.0.19045",
    "population of 1,392,730,000",
    "time 12:30:45 parse",
    "std::vector::push_back",
    "call 9-1-1",
    "status of order 2024561111",
]


@pytest.fixture
def build(tmp_path):
    return lambda stage: materialize(stage, str(tmp_path), Placement())


def scored(text, **fields):
    return Pii(**fields).score([ScoredQuery("q", text, "d", "")], None)[0]


@pytest.mark.parametrize("text", FOUND)
def test_found_and_masked(text):
    kind, shown = FOUND[text]
    score = scored(text)
    assert Pii().keep(score) == kind
    assert Pii(allow=(kind,)).keep(score) is None
    masked, detail = Pii(mask=True).rewrite(text, score)
    assert masked.split()[0] == text.split()[0] and masked.split()[-1] == text.split()[-1]
    assert shown in masked and detail == f"1 {kind}"
    assert Pii().keep(scored(masked)) is None
    assert Pii(mask=True, allow=(kind,)).rewrite(text, score) is None


@pytest.mark.parametrize("text", LEFT)
def test_left(text):
    assert Pii().keep(scored(text)) is None
    assert Pii(mask=True).rewrite(text, 0.0) is None


def test_other_countries():
    assert Pii().keep(scored("cpf 390.533.447-05")) is None
    assert Pii().keep(scored("cpf 390.533.447-05", ids=("br.cpf",))) == "national-id"
    assert Pii().keep(scored("ruf 030 901820 an", region="DE")) == "phone"
    with pytest.raises(ValueError, match="'xx.yy' is not a module of python-stdnum"):
        Pii(ids=("xx.yy",))
    with pytest.raises(ValueError, match="region = 'Bavaria'; allowed: AC, AD"):
        Pii(region="Bavaria")


def test_a_masked_query_keeps_its_id_and_lineage(build):
    texts = ["mail jane@corp.net about dicts", "copy a dict", "call +49 30 901820 or jane@corp.net"]
    queries, docs = parsed(*((text, "d0") for text in texts)), corpus("Return a copy.")
    scores = Score(parsed=queries, corpus=docs, filter=Pii())
    masking = scores.model_copy(update={"filter": Pii(mask=True)})
    assert scores.fingerprint() == masking.fingerprint(), "masking is decided on stored scores"
    dropped, masked = build(Select(parsed=queries, scores=(scores,))), build(Select(parsed=queries, scores=(masking,)))
    assert dropped.read("queries")["text"].to_pylist() == [texts[1]]
    assert dropped.manifest["counts"]["rejected"] == {"pii/email": 2}
    assert masked.read("queries").to_pylist() == [
        {"query_id": "q0", "text": "mail [email] about dicts"},
        {"query_id": "q1", "text": "copy a dict"},
        {"query_id": "q2", "text": "call [phone] or [email]"},
    ]
    assert masked.read("lineage").equals(build(queries).read("lineage"))
    assert masked.read("masked").to_pylist() == [
        {"id": "q0", "by": "pii", "detail": "1 email"},
        {"id": "q2", "by": "pii", "detail": "1 email, 1 phone"},
    ]
    assert masked.manifest["counts"]["masked"] == 2 and masked.count("rejected") == 0


def test_passages(build):
    docs = FixedTables(
        rows={"corpus": (("d0", "Jane, jane@corp.net", "Ring +49 30 901820."), ("d1", "", "Return a copy."))}
    )
    folder = build(Mask(corpus=docs))
    assert folder.read("corpus").to_pylist() == [
        {"doc_id": "d0", "title": "Jane, [email]", "text": "Ring [phone]."},
        {"doc_id": "d1", "title": "", "text": "Return a copy."},
    ]
    changed = [(row["id"], row["detail"]) for row in folder.read("masked").to_pylist()]
    assert changed == [("d0", "title: 1 email"), ("d0", "text: 1 phone")]
    queries = parsed(("copy", "d0"), ("copy", "d1"))
    both = Select(parsed=queries, scores=(Score(parsed=queries, corpus=docs, filter=Pii(passages=True)),))
    assert [(r["id"], r["reason"]) for r in build(both).read("rejected").to_pylist()] == [("q0", "email-in-passage")]
    clean = Score(parsed=queries, corpus=Mask(corpus=docs), filter=Pii(passages=True))
    assert build(Select(parsed=queries, scores=(clean,))).count("queries") == 2
    assert tables.schema("masked").names == ["id", "by", "detail"]
