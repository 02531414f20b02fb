"""Co-annotation: what is asked first, the page in a real browser, and ratings that come back."""

import csv
import doctest
import json
import os
import re
import time
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from dagr_ray.annotation import agreement, export, import_, sampling
from dagr_ray.cli import main, results
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.stage import load_stage
from dagr_ray.quickstart import models
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages import human_labels
from tests.stages.test_select_mine import FixedTables
from tests.support.browser import MISSING, Browser, find

EVIL = (
    "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">\u2028{{ 7 * 7 }}"
)
QUERIES = ["how to copy a folder", "sort a list", "read a csv file", EVIL, "=SUM(A1)", "what is a lock"]
PAIRS = [(f"q{i}", f"d{j}") for i in range(6) for j in range(i, i + 3)]


def judged(scorer, scores):
    """A folder as a teacher leaves it, with the queries and passages."""
    return FixedTables(
        rows={
            "queries": tuple((f"q{i}", text) for i, text in enumerate(QUERIES)),
            "corpus": tuple((f"d{i}", "" if i % 2 else f"Title {i}", f"passage {i} {EVIL}") for i in range(8)),
            "scores": tuple((q, d, scorer, score) for (q, d), score in scores.items()),
        }
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def folders(runs):
    """Two teachers of the same pairs: q1/d3 is what they disagree about most, q2/d4 is nearest to 1.5."""
    judge = {pair: 0.1 * i + 0.04 for i, pair in enumerate(PAIRS)} | {("q1", "d3"): 0.0, ("q2", "d4"): 1.51}
    other = {pair: float(i) for i, pair in enumerate(PAIRS)} | {("q1", "d3"): 99.0}
    claims = judged("", {}).rows | {"qrels": (("q0", "d0", 1), ("q1", "d1", 1))}
    claims.pop("scores")
    stages = judged("llm-judge", judge), judged("cross-encoder", other), FixedTables(rows=claims)
    return [materialize(stage, runs) for stage in stages]


# -- agreement --------------------------------------------------------------------------------------------------------


def test_kappa_is_that_of_scikit_learn():
    rng = np.random.default_rng(7)
    ours, theirs = rng.integers(0, 4, 300), rng.integers(0, 4, 300)
    theirs = np.where(rng.uniform(size=300) < 0.5, ours, theirs)
    found = agreement.agreement(ours, theirs)
    assert found.kappa == pytest.approx(cohen_kappa_score(ours, theirs))
    assert found.quadratic == pytest.approx(cohen_kappa_score(ours, theirs, weights="quadratic"))
    assert found.confusion.sum(1).tolist() == np.bincount(ours, minlength=4).tolist()
    assert found.confusion[2, 1] == ((ours == 2) & (theirs == 1)).sum()
    assert np.isnan(agreement.agreement([1, 1], [1, 1]).kappa), "no chance of disagreeing"


def test_the_cut_points_are_the_best_of_all():
    rng = np.random.default_rng(8)
    grades = rng.integers(0, 4, 25)
    scores = grades + rng.normal(0, 0.8, 25)
    edges = np.append(np.sort(scores), 99)
    every = [
        agreement.agreement(grades, agreement.graded(scores, cuts)).quadratic
        for cuts in combinations_with_replacement(edges, 3)
    ]
    best = agreement.best_cuts(scores, grades)
    assert list(best) == sorted(best)
    found = agreement.agreement(grades, agreement.graded(scores, best))
    assert found.quadratic == pytest.approx(max(every))
    assert agreement.agreement(grades, agreement.graded(scores, (0.5, 1.5, 2.5))).quadratic < found.quadratic
    assert agreement.best_cuts(scores * 100 - 7, grades) == pytest.approx(np.array(best) * 100 - 7)


def test_cut_points_of_many_and_of_single_scores():
    grades = np.repeat([0, 1, 2, 3], 250)
    cuts = agreement.best_cuts(grades + np.random.default_rng(9).uniform(0, 0.9, 1000), grades)
    assert cuts == pytest.approx((1, 2, 3), abs=0.15)
    for grade in range(4):
        assert agreement.graded([5.0, 6.0], agreement.best_cuts([5.0, 6.0], [grade] * 2)).tolist() == [grade] * 2


def test_labels_held_out_tell_what_cut_points_are_worth():
    ids = [str(i) for i in range(200)]
    rng = np.random.default_rng(10)
    noise, grades = rng.uniform(size=200).tolist(), rng.integers(0, 4, 200).tolist()
    inside = agreement.agreement(grades, agreement.graded(noise, agreement.best_cuts(noise, grades)))
    outside = agreement.held_out(noise, grades, ids)
    assert inside.quadratic > max(outside.quadratic, 0.05)
    assert agreement.held_out(noise[:19], grades[:19], ids[:19]) is None


@pytest.mark.parametrize("module", [agreement, sampling, human_labels])
def test_doctests(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


# -- what is asked first ----------------------------------------------------------------------------------------------


def asked(target):
    return [json.loads(line) for line in (target / "items.jsonl").read_text().split("\n")[:-1]]


def test_items_come_by_reason_in_turn_and_the_same_every_time(folders, tmp_path):
    counts = export.export(folders, str(tmp_path / "a"), items=9)
    rows = asked(tmp_path / "a")
    assert [row["reason"] for row in rows] == ["disagree", "threshold", "random"] * 3
    assert counts == {"disagree": 3, "threshold": 3, "region": 0, "random": 3}
    assert (rows[0]["query_id"], rows[0]["doc_id"]) == ("q1", "d3") and "llm-judge above" in rows[0]["why"]
    assert (rows[1]["query_id"], rows[1]["doc_id"]) == ("q2", "d4") and "threshold is 1.5" in rows[1]["why"]
    assert rows[0]["scores"] == {"llm-judge": 0.0, "cross-encoder": 99.0}
    assert [row["rank"] for row in rows] == list(range(1, 10))
    assert len({(row["query_id"], row["doc_id"]) for row in rows}) == 9
    export.export(folders[::-1], str(tmp_path / "b"), items=9)
    for name in export.FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    export.export(folders, str(tmp_path / "c"), items=1000)
    assert len(asked(tmp_path / "c")) == len(PAIRS), "every pair once"


def test_thresholds_are_given_by_teacher(folders, tmp_path):
    export.export(folders, str(tmp_path), items=3, threshold=["cross-encoder=4.2", "llm-judge=-50"])
    assert asked(tmp_path)[1]["why"] == "cross-encoder gives 4, and its threshold is 4.2"
    assert list(import_.thresholds_named([], ["llm-judge-pairwise", "llm-judge", "llm-judge (0f)"])) == [
        "llm-judge",
        "llm-judge (0f)",
    ]
    for bad in ("other=1", "llm-judge", "llm-judge=x", "llm-judge=1,2", "llm-judge=3,2,1", "llm-judge=nan"):
        with pytest.raises(ConfigError, match="SCORER=VALUE.*cross-encoder, llm-judge"):
            import_.thresholds_named([bad], ["cross-encoder", "llm-judge"])


def test_two_folders_of_one_teacher_are_two_teachers(runs, tmp_path):
    twins = [materialize(judged("t", {pair: sign * i for i, pair in enumerate(PAIRS)}), runs) for sign in (1, -1)]
    scores = [sampling.pairs_of(folders).scores for folders in (twins, twins[::-1])]
    assert list(scores[0]) == list(scores[1]) == ["t", f"t ({max(f.name for f in twins)[-12:]})"]
    assert all((scores[0][name] == scores[1][name]).all() for name in scores[0])


def test_one_teacher_or_none(runs, folders, tmp_path):
    export.export(folders[1:2], str(tmp_path / "one"), items=4)
    assert {row["reason"] for row in asked(tmp_path / "one")} == {"random"}
    plain = FixedTables(
        rows={"queries": (("q0", "a"),), "corpus": (("d0", "", "b"),), "qrels.test": (("q0", "d0", 1),)}
    )
    export.export([materialize(plain, runs)], str(tmp_path / "none"))
    assert len(asked(tmp_path / "none")) == 1


def test_new_regions_are_far_from_what_was_chosen():
    angles = np.array([0.0, 0.02, 1.5, 1.52, 3.0, 0.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    order = list(sampling.farthest_first(vectors))
    assert [row for row, _ in order[:3]] == [0, 4, 2]
    assert order[0][1] == -1 and order[1][1] == pytest.approx(np.cos(3.0))
    assert 5 not in [row for row, _ in order], "a copy is no new region"
    assert [row for row, _ in sampling.farthest_first(vectors, seen=1)][:2] == [4, 2]
    assert list(sampling.farthest_first(vectors[:0])) == []


def test_new_regions_by_a_real_encoder(folders, tmp_path):
    encoder = Encoder(model=str(models.minilm()), max_length=32)
    export.export(folders, str(tmp_path), items=40, encoder=encoder)
    new = [row for row in asked(tmp_path) if row["reason"] == "region"]
    assert len(new) == len({row["query_id"] for row in new}) >= 3
    cosines = [float(found) for row in new for found in re.findall(r"cosine (-?[\d.]+)", row["why"])]
    assert cosines == sorted(cosines) and len(cosines) >= 2


def test_an_export_never_writes_over_grades(folders, tmp_path):
    export.export(folders, str(tmp_path), items=3)
    export.export(folders, str(tmp_path), items=3)
    filled = (tmp_path / "items.csv").read_text().replace("\r\n", "\n") + "4,q,d,,,,,2,me\n"
    (tmp_path / "items.csv").write_text(filled)
    with pytest.raises(ConfigError, match=r"items.csv exists with other content"):
        export.export(folders, str(tmp_path), items=3)
    with pytest.raises(ConfigError, match=r"items.jsonl exists with other content"):
        export.export(folders, str(tmp_path), items=4)
    assert (tmp_path / "items.csv").read_text() == filled and len(asked(tmp_path)) == 3


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert find(), MISSING
    opened = Browser(tmp_path_factory.mktemp("downloads"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    target = tmp_path_factory.mktemp("export")
    export.export(folders, str(target), items=18)
    return target


def opened(browser, page):
    """The page with what was kept; nothing is under way any more, as a person who comes back would find it."""
    kept(browser)
    browser.open(page / "annotate.html")
    browser.wait("!document.getElementById('page').hidden")


def kept(browser):
    browser.wait("document.getElementById('page')?.getAttribute('aria-busy') !== 'true'")


def shown(browser):
    names = ("place", "query", "title", "passage", "reason", "note", "count")
    return browser.value(f"Object.fromEntries({list(names)}.map(i => [i, document.getElementById(i).textContent]))")


def saved(browser, folder, name):
    before = time.monotonic()
    while not (folder / name).is_file() or not (folder / name).stat().st_size:
        assert time.monotonic() < before + 30, list(folder.iterdir())
        browser.value("1")
        time.sleep(0.05)
    return folder / name


@pytest.mark.browser
def test_a_person_rates_in_a_real_browser(page, folders, runs, tmp_path):
    rows = asked(page)
    browser = Browser(tmp_path)
    try:
        opened(browser, page)
        for row in rows:
            seen = shown(browser)
            assert (seen["query"], seen["title"], seen["passage"]) == (row["query"], row["title"], row["passage"])
            assert seen["place"] == f"Item {row['rank']} of 18" and seen["reason"] == sampling.REASONS[row["reason"]]
            browser.press("ArrowRight")
        assert browser.value("document.getElementById('bar').value") == 0
        for _ in range(20):
            browser.press("ArrowLeft")
        for key in "3120":
            browser.press(key)
        assert shown(browser)["place"] == "Item 5 of 18" and shown(browser)["count"] == "4 of 18 rated"
        browser.press("u")
        assert shown(browser)["place"] == "Item 4 of 18" and shown(browser)["count"] == "3 of 18 rated"
        browser.press("4")
        browser.press("1", modifiers=2)
        assert shown(browser)["count"] == "3 of 18 rated", "only 0 to 3 rate"
        browser.press("s")
        browser.click("[data-grade='2']")
        browser.press("ArrowLeft")
        assert browser.value("document.querySelector('[aria-pressed=true]').dataset.grade") == "2"
        browser.press("1")
        browser.press("z", modifiers=2)
        assert browser.value("document.querySelector('[aria-pressed=true]').dataset.grade") == "2", "undo of a change"
        browser.press("n")
        assert shown(browser)["place"] == "Item 6 of 18"
        browser.click("#save")
        assert "name" in shown(browser)["note"] and not list(tmp_path.iterdir()), "a file says who rated"
        for letter in "Zoë 3":
            browser.press(letter)
        assert shown(browser)["count"] == "4 of 18 rated", "a name is no grade"
        opened(browser, page)
        assert shown(browser)["count"] == "4 of 18 rated" and browser.value("who.value") == "Zoë 3", (
            "kept by the browser"
        )
        browser.click("#save")
        name = shown(browser)["note"].split()[-1].removesuffix(".")
        assert re.fullmatch(r"ratings-[0-9a-f]{8}-Zoë_3\.jsonl", name), shown(browser)["note"]
        ratings = human_labels.read_ratings(str(saved(browser, tmp_path, name)))
        by = [
            (rows[place]["query_id"], rows[place]["doc_id"], grade) for place, grade in ((0, 3), (1, 1), (2, 2), (4, 2))
        ]
        assert [(r.query_id, r.doc_id, r.grade) for r in ratings] == by
        assert {r.who for r in ratings} == {"Zoë 3"} and all(re.match(r"20\d\d-.*Z$", r.at) for r in ratings)
        assert not browser.console and not browser.dialogs
        outside = [url for url in browser.requests if not url.startswith(("file://", "blob:"))]
        assert not outside
        folder, report = import_.import_ratings(folders, [str(tmp_path / name)], runs)
        assert report["labels"] == 4 == folder.count("qrels")
    finally:
        browser.close()


@pytest.mark.browser
def test_text_of_the_corpus_stays_text(page, browser):
    html = (page / "annotate.html").read_text()
    assert html.count("<script") == 2 == html.count("</script>") and "<img" not in html
    opened(browser, page)
    evil = next(i for i, row in enumerate(asked(page)) if row["query"] == EVIL)
    for _ in range(evil):
        browser.press("ArrowRight")
    assert shown(browser)["query"] == EVIL
    assert browser.value("document.title") == "Rate 18 passages"
    assert browser.value("document.querySelectorAll('img, iframe, script:not([type])').length") == 1
    # what the template missed, the page's policy would stop: markup that is put in later does not run either
    browser.value("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    browser.value(
        "(s => { s.textContent = 'document.title = 2'; document.body.append(s) })(document.createElement('script'))"
    )
    browser.value("fetch('file:///etc/hostname').catch(() => 0).then(() => 0)")
    assert browser.value("document.title") == "Rate 18 passages"
    assert any("Content Security Policy" in line for line in browser.console)


@pytest.mark.browser
def test_the_page_works_without_browser_storage(page, browser):
    script = "Object.defineProperty(window, 'indexedDB', {get() { throw new DOMException('no') }})"
    added = browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    opened(browser, page)
    assert "save before you close" in shown(browser)["note"]
    browser.press("2")
    assert shown(browser)["count"] == "1 of 18 rated"
    browser.click("#who")
    browser.press("x")
    browser.click("#save")
    assert "Saved 1 rating as" in shown(browser)["note"]
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added)


def test_teachers_scores_are_not_on_the_page_or_in_the_csv(page):
    for name in ("annotate.html", "items.csv"):
        text = (page / name).read_text()
        assert "cross-encoder" not in text and "99.0" not in text


# -- ratings come back ------------------------------------------------------------------------------------------------


def line(query_id="q0", doc_id="d0", grade=2, who="a", **more):
    return json.dumps({"query_id": query_id, "doc_id": doc_id, "grade": grade, "who": who, **more}) + "\n"


@pytest.fixture
def rated(tmp_path):
    def write(*lines, name="r.jsonl"):
        (tmp_path / name).write_text("".join(lines))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([line(), line(grade=4)], ["r.jsonl:2", "grade = 4", "(q0, d0)", "0, 1, 2 and 3"]),
        ([line(grade="good")], ["r.jsonl:1", "'good'", "0, 1, 2 and 3"]),
        ([line(grade=True), line(grade=-1)], ["grade = True", "1 more bad line"]),
        ([line(grade=1.5)], ["grade = 1.5"]),
        ([line(), "\n", line(grade=1)], ["r.jsonl:3", "(q0, d0)", "by 'a' in r.jsonl:1", "keep one"]),
        (
            [line(doc_id="nowhere"), line()],
            ["r.jsonl:1", "(q0, nowhere)", "is not a pair of", "give the exported folders"],
        ),
        ([line(), "{cut off"], ["r.jsonl:2", "not JSON"]),
        ([line(query_id=7)], ["r.jsonl:1", "no query_id"]),
        (["[1]\n"], ["no query_id"]),
        ([], ["no rating"]),
    ],
)
def test_a_bad_file_is_one_line_and_loses_nothing(folders, runs, rated, lines, words):
    path = rated(*lines)
    content, before = Path(path).read_text(), sorted(os.listdir(runs))
    with pytest.raises(ConfigError) as caught:
        import_.import_ratings(folders, [path], runs)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Path(path).read_text() == content and sorted(os.listdir(runs)) == before


def test_a_filled_in_csv_comes_back_as_it_was_read(folders, runs, tmp_path):
    export.export(folders, str(tmp_path), items=18)
    with open(tmp_path / "items.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert {row["query"] for row in rows if row["query_id"] == "q4"} == {"'=SUM(A1)"}, "no formula"
    for i, row in enumerate(rows):
        row["grade"], row["who"] = ("", "") if i % 3 else (["0", "3", " 2 ", "1.0"][i // 3 % 4], "Ann")
    # as a spreadsheet of another country saves it
    with open(tmp_path / "back.csv", "w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    folder, _ = import_.import_ratings(folders, [str(tmp_path / "back.csv")], runs)
    found = {(r["query_id"], r["doc_id"]): r["relevance"] for r in folder.read("qrels").to_pylist()}
    assert found == {(r["query_id"], r["doc_id"]): int(float(r["grade"])) for r in rows if r["grade"]}
    assert len(found) == 6 and set(folder.read("ratings")["who"].to_pylist()) == {"Ann"}
    (tmp_path / "bad.csv").write_text("query,grade\na,1\n")
    with pytest.raises(ConfigError, match="bad.csv: no column 'query_id'"):
        human_labels.read_ratings(str(tmp_path / "bad.csv"))


def test_ids_that_look_like_formulas_survive_a_csv():
    for text in ("=1", "'=1", "''x", "@a", "-1", "+1", "plain", "'tis", ""):
        cell = human_labels.plain_cell(text)
        assert human_labels.cell_text(cell) == text and not cell.startswith(("=", "+", "-", "@"))


def test_what_an_import_says(folders, runs, rated):
    grades = {pair: min(3, i // 4) for i, pair in enumerate(PAIRS)}
    mine = rated(*(line(q, d, grade, "ann", at="now") for (q, d), grade in grades.items()))
    other = rated(line("q0", "d0", 3, "bob"), line("q0", "d1", 0, "bob"), name="s.jsonl")
    folder, report = import_.import_ratings(folders, [mine, other], runs)
    judge = report["teachers"]["llm-judge"]
    scores = {(r["query_id"], r["doc_id"]): r["score"] for r in folders[0].read("scores").to_pylist()}
    labels = grades | {("q0", "d0"): 0}  # the lower median of 0 and 3
    given = [int(sum(scores[p] >= cut for cut in (0.5, 1.5, 2.5))) for p in grades]
    assert judge["given"]["kappa"] == pytest.approx(cohen_kappa_score(list(labels.values()), given), abs=1e-4)
    assert judge["recalibrated"]["quadratic"] > judge["given"]["quadratic"]
    assert judge["labels"] == report["labels"] == 18 and judge["held_out"] is None
    assert report["teachers"]["cross-encoder"]["given"] is None
    assert report["people"]["ratings"] == {"ann": 18, "bob": 2}
    assert report["people"]["agreement"][0]["confusion"][0] == [1, 0, 0, 1]
    assert report["claimed"] == [2, 0, 0, 0]
    assert folder.read_json("agreement.json") == report
    assert {r["at"] for r in folder.read("ratings").to_pylist()} == {"now", None}
    shown = import_.text(report)
    assert "18 pairs rated (ann 18, bob 2)" in shown and "of 2 pairs that the data label as relevant" in shown
    assert "fewer than 20 labels" in shown and "people \\ teacher" in shown
    again, _ = import_.import_ratings(folders, [other, mine], runs)
    assert again.name == folder.name, "the order of the files means nothing"
    assert load_stage(folder).fingerprint() == folder.name[-12:]
    with pytest.raises(ConfigError, match="s.jsonl:1.*was rated by 'bob' in s.jsonl:1"):
        import_.import_ratings(folders, [other, other], runs)


def test_the_next_export_skips_rated_pairs(folders, runs, rated, tmp_path):
    grades = {pair: min(3, i // 4) for i, pair in enumerate(PAIRS[:12])}
    folder, report = import_.import_ratings(folders, [rated(*(line(q, d, g) for (q, d), g in grades.items()))], runs)
    export.export(folders, str(tmp_path / "next"), people=folder)
    rows = asked(tmp_path / "next")
    assert {(r["query_id"], r["doc_id"]) for r in rows} == set(PAIRS[12:])
    cuts = report["teachers"]["cross-encoder"]["recalibrated"]["cuts"]
    assert import_.thresholds_named([], ["cross-encoder"], folder) == {"cross-encoder": tuple(cuts)}
    whole = rated(*(line(q, d, 1, "b") for q, d in PAIRS), name="all.jsonl")
    everything, _ = import_.import_ratings(folders, [whole], runs)
    with pytest.raises(ConfigError, match="nothing to rate: 18 pairs, 18 of them rated"):
        export.export(folders, str(tmp_path / "no"), people=everything)


def test_the_verb(folders, runs, tmp_path, capsys):
    def dagr(*words):
        results.annotate(main.parser().parse_args(["annotate", *words, "--runs", runs]))
        return capsys.readouterr()

    names = [folder.name for folder in folders]
    told = dagr("export", *names, str(tmp_path / "out"), "--items", "6")
    assert "2 teachers disagree" in told.out and "out/annotate.html" in told.out
    (tmp_path / "r.jsonl").write_text(line(who="x") + line(doc_id="d1", grade=0, who="x"))
    told = dagr("import", *names, str(tmp_path / "r.jsonl"), "--json")
    assert json.loads(told.out)["labels"] == 2 and "people-" in told.err
    assert "llm-judge, 2 labels" in dagr("import", *names, str(tmp_path / "r.jsonl")).out
    for words, said in (
        (("export", names[0]), "a folder to write to"),
        (("import", names[0]), "files of ratings"),
        (("import", str(tmp_path / "r.jsonl")), "files of ratings"),
        (("import", names[0], str(tmp_path / "none.csv")), "no file"),
        (("export", names[0], str(tmp_path / "o"), "--items", "0"), "--items 0"),
        (("export", "no-such", str(tmp_path / "o")), "no folder 'no-such'"),
    ):
        with pytest.raises(ConfigError, match=said):
            dagr(*words)
