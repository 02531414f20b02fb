"""What is exported says what it was made from, whatever stands in names and texts: out and in again, over Unicode."""

import csv
import io
import json
import re

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from dagr_ray.annotation.export import _csv, _jsonl
from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.markdown import code, markdown
from dagr_ray.formats import beir, export, trec
from dagr_ray.report import compare as comparing
from dagr_ray.report.text import markdown_table
from dagr_ray.stages.evaluate import as_qrels
from dagr_ray.stages.human_labels import cell_text, plain_cell, read_ratings
from dagr_ray.training import model_card
from tests.support.studies import put

# what any reader of columns, lines, quotes, escapes or formulas may stumble over
ODD = st.text(alphabet=" \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u3000\ufeff\\u0020c5ab_\"',;|=+-@%", min_size=1, max_size=12)
ANY = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
IDS = st.lists(ODD | ANY, min_size=4, max_size=8, unique=True)
TEXTS = (ODD | ANY).filter(lambda text: bool(text.strip()))
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MEET = [
    "a b",
    "a_b",
    "a\tb",
    "a\\u0020b",
    "a\\u005cu0020b",
    "a\u00a0b",
    "\\",
    " ",
    '"',
    '""',
    "a\nb",
    "a\r",
    "a\n\n\tb",
    "\ufeffq",
]


@FEW
@given(ids=IDS, data=st.data())
@example(ids=MEET, data=None)
def test_a_collection_comes_back_from_beirs_layout(tmp_path_factory, ids, data):
    root = tmp_path_factory.mktemp("x")
    texts = (
        ["some text"] * len(ids) if data is None else data.draw(st.lists(TEXTS, min_size=len(ids), max_size=len(ids)))
    )
    titles = (
        [""] * len(ids)
        if data is None
        else data.draw(st.lists(st.just("") | ODD, min_size=len(ids), max_size=len(ids)))
    )
    corpus = [{"doc_id": i, "title": t, "text": x} for i, t, x in zip(ids, titles, texts, strict=True)]
    queries = [{"query_id": i, "text": x} for i, x in zip(ids, reversed(texts), strict=True)]
    judged = [
        {"query_id": q, "doc_id": d, "relevance": n} for n, (q, d) in enumerate(zip(ids, reversed(ids), strict=True))
    ]
    made = {
        name: tables.table(name, rows) for name, rows in (("corpus", corpus), ("queries", queries), ("qrels", judged))
    }
    folder = Artifact(str(root), put(str(root), "select-x", {}, made, {}))
    export.to_beir(folder, str(root), str(root / "set"))
    back = beir.read(str(root / "set"))
    assert not back.unusable and not back.problems
    assert back.tables["corpus"].to_pylist() == corpus and back.tables["queries"].to_pylist() == queries
    assert back.tables["qrels.train"].to_pylist() == judged
    assert comparing.load_judgements(str(root / "set"), "train").qrels == as_qrels(made["qrels"])


@FEW
@given(ids=IDS)
@example(ids=MEET)
def test_a_run_and_its_judgements_come_back_from_trecs_formats(tmp_path_factory, ids):
    root = tmp_path_factory.mktemp("x")
    ranked = [
        {"query_id": q, "doc_id": d, "rank": rank, "score": float(-rank)} for q in ids for rank, d in enumerate(ids, 1)
    ]
    judged = [{"query_id": q, "doc_id": d, "relevance": n % 3} for n, q in enumerate(ids) for d in ids[: n + 1]]
    runs = str(root)
    data = put(runs, "data", {}, {"qrels.test": tables.table("qrels", judged)}, {})
    search = {"candidates": tables.table("candidates", ranked)}
    folder = Artifact(runs, put(runs, "search a", {"data": data}, search, {"split": "test"}))
    run, qrels = export.to_trec(folder, runs, str(root / "out" / "x.trec"))
    assert trec.read_run(run).table.to_pylist() == ranked
    assert trec.read_qrels(qrels).table.to_pylist() == judged
    for path in (run, qrels):
        with open(path, "rb") as file:  # as C's isspace and Python's split read them
            lines = [line for line in file.read().split(b"\n") if line]
        assert (
            {len(line.split()) for line in lines}
            == {len(line.decode().split()) for line in lines}
            == {6 if path == run else 4}
        )
        words = {line.split()[2] for line in lines}
        assert len(words) == len(ids), "two ids became one"
    one = comparing.load_judgements(qrels, "test")
    assert one.qrels == as_qrels(tables.table("qrels", judged))
    again = comparing.compare(one, {"file": trec.read_run(run).table, "folder": search["candidates"]})
    assert again["runs"][0]["scores"]["nDCG@10"]["mean"] == again["runs"][1]["scores"]["nDCG@10"]["mean"]
    assert again["runs"][0]["no_hits"] == 0


@FEW
@given(word=ODD | ANY)
def test_a_word_of_others_is_read_as_it_stands(word):
    assert tables.unescape_spaces(tables.escape_spaces(word)) == word
    for other in ("http://x/a%20b", "C:\\users\\new", "caf\\u00e9", "a_b", "d\\udead"):
        assert tables.unescape_spaces(other) == other


@FEW
@given(rows=st.lists(st.tuples(ODD | ANY, ODD | ANY, ODD | ANY), min_size=1, max_size=5, unique_by=lambda row: row[:2]))
@example(rows=[("=1+1", "@SUM(A1)", "-2+3"), ("+a", "\t=b", "\r=c"), ("'=d", "\n=e", "＝f"), ("'", "''", "a")])
def test_cells_are_no_formulas_and_come_back(tmp_path_factory, rows):
    items = [
        {"rank": 1, "query_id": q, "doc_id": d, "reason": "random", "query": t, "title": "", "passage": t, "grade": "2"}
        for q, d, t in rows
    ]
    written = _csv(items)
    cells = list(csv.reader(io.StringIO(written, newline="")))[1:]
    assert not [cell for row in cells for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝"))]
    assert [cell_text(row[4]) for row in cells] == [text for _, _, text in rows]
    path = tmp_path_factory.mktemp("x") / "items.csv"
    path.write_text(written, newline="")
    assert [(r.query_id, r.doc_id, r.grade) for r in read_ratings(str(path))] == [(q, d, 2) for q, d, _ in rows]
    assert all(cell_text(plain_cell(each)) == each for row in rows for each in row)


HOSTILE = "[x](javascript:a) ![i](http://e/p.png) <script>b</script> `c` *d* _e_ | f\n# g\n---\nlicense: evil\x1b[2J\u202e &lt;"


def links_and_tags(markdown):
    """What of a Markdown text means something: unescaped signs outside of code."""
    bare = re.sub(r"(`+) .*? \1|`[^`\n]*`", "", markdown)
    return re.findall(r"(?<!\\)[\[\]*`|]|<[a-z/!]", bare)


def test_texts_are_text_in_markdown():
    said = markdown(HOSTILE)
    assert "\n" not in said and not links_and_tags(said) and "\x1b" not in said and "\u202e" not in said
    for line in ("# a", "- a", "+ a", "1. a", "1) a", "=== a", "--- a", "> a"):
        assert markdown(line)[0] in "\\&1" and not re.match(r"\d+[.)]", markdown(line))
    plain = "squadshifts_wiki (in distribution): 95 % CI +0.1 to −0.2; a-b.c"
    assert markdown(plain) == plain
    for held in ("a", "`a", "a``b`", "```"):
        fence = re.match("`+", code(held))[0]
        assert code(held).endswith(fence) and fence not in held.replace(held, "") + held[: held.find(fence) + 1 or 0]


def test_a_cards_names_and_texts_are_text():
    settings_ = {
        "type": "train", "fingerprint": "0", "losses": [{"type": "info-nce"}], "sources": {HOSTILE: HOSTILE}, "max_length": 8,
        "base": {"model": f"models/{HOSTILE}", "revision": HOSTILE, "layers": None, "reinitialise": None},
        "base_identity": {"model": "x"}, "note": HOSTILE,
        "examples": {"corpus": {"type": "beir", "path": HOSTILE}, "engine": {"type": "vllm", "model": HOSTILE}},
    }  # fmt: skip
    counts = {"examples": 1, "negatives": 1, "steps": 1, "effective_negatives": {}, "padding": 0, "best_step": 0}
    summary = {
        "counts": counts,
        "losses": [],
        "samples": 1,
        "train_s": 1,
        "dev": [],
        "prompts": [HOSTILE, ""],
        "reads": [8],
    }
    card = model_card.model_card(settings_, summary)
    front, body = card.split("---\n")[1:]
    assert "evil" not in front and "\nlicense" not in body and "\x1b" not in card and "\n# g" not in body
    assert not [line for line in body.split("\n") if links_and_tags(re.sub(r"^\* (\*\*.*\*\*)?", "", line))]


def test_a_reports_names_are_text():
    score = {"mean": 0.5, "low": 0.4, "high": 0.6}
    trial = {"base": HOSTILE, "label": HOSTILE, "used": 1, "scores": {"in": {"nDCG@10": score}}, "cost": None}
    trial |= {"seeds": [], "state": "done"}
    summary = {
        "measure": "nDCG@10", "interval": "95 % CI", "verdict": {"headline": HOSTILE, "sentences": [HOSTILE]},
        "trials": [trial], "averages": [],
        "sets": [{"name": "in", "role": "in", "queries": 1, "measures": ["nDCG@10"]}], "warnings": [HOSTILE], "lexical": [],
    }  # fmt: skip
    lines = markdown_table(summary).split("\n")
    for line in lines:
        inside = re.sub(r"^\*\*(.*)\*\*$|^- ", r"\1", line).replace("[95 % CI]", "").replace("[0.400, 0.600]", "")
        assert not [sign for sign in links_and_tags(inside) if sign != "|" or not line.startswith("|")], line
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert len(cells) == 1, "a name made a cell of its own"


def test_training_rows_come_back_as_json_lines():
    rows = [{"anchor": HOSTILE, "positive": '\u2028\u2029\x85 \\ "'}]
    assert [json.loads(line) for line in _jsonl(rows).split("\n") if line] == rows


@pytest.mark.parametrize("bad", ["a b Q0 d 1 2.5 x", "q Q0 d 1 2.5"])
def test_a_run_of_others_with_spaces_in_ids_is_refused(tmp_path, bad):
    (tmp_path / "run").write_text(f"{bad}\n")
    with pytest.raises(ValueError, match="columns, not 6"):
        trec.read_run(str(tmp_path / "run"))
