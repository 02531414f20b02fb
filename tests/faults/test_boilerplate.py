"""Texts that have most of their words in common: the pairs that are looked at grow with the texts, and what was copied is found."""

import random
import tracemalloc
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest

from dagr_ray.core import tables
from dagr_ray.core.joins import Positives
from dagr_ray.filters.diversity import facility, hashed
from dagr_ray.filters.duplicate import Duplicate, _highest_cosines
from dagr_ray.leakage import joins, minhash
from dagr_ray.leakage.matching import BEST, MECHANISMS, HeldOut, SharedAnswers
from dagr_ray.report.leaks import _bounds
from dagr_ray.stages.aggregate import rank
from dagr_ray.stages.leakage import LeakGate, LeakScan
from tests.stages.test_leak import SMALL, Held, materialize

pytestmark = pytest.mark.slow

FOOTER = " ".join(f"footer{i}" for i in range(60))
NOTICE = " ".join(f"notice{i % 90}and{i // 90}" for i in range(220))
COLUMNS = [[f"cell{c}v{i}" for i in range(5)] for c in range(14)]
PARTS = [" ".join(f"par{k}at{j}" for j in range(20)) for k in range(12)]


def passage(kind, part, row):
    rng = random.Random(f"{kind}{part}{row}")
    name = f"{part}{row}"
    if kind == "footer":
        return f"Ticket {name} was closed by agent {part}{row // 2} on day {row % 28}. {FOOTER}"
    if kind == "header":
        return f"{NOTICE} {' '.join(f'term{rng.randrange(400)}' for _ in range(20))} {name}"
    if kind == "table":
        return " ".join(f"column{c} {rng.choice(cells)}" for c, cells in enumerate(COLUMNS))
    if kind == "paragraphs":
        return " ".join(PARTS[i] for i in rng.sample(range(12), 7))
    if kind == "form":
        return f"the weight of the device {name} in the box number {row % 19} on the shelf is given on its label"
    return FOOTER if row % 2 else f"{FOOTER} {FOOTER}"


KINDS = ["footer", "header", "table", "paragraphs", "form"]


def array(texts):
    return pa.array(texts, tables.TEXT)


def planted(text, form):
    words = text.split()
    if form == "replaced":
        return " ".join([*words[:2], "elsewhere", *words[3:]])
    return text.upper() if form == "case" else " ".join(words[4:] + words[:4])


FORMS = ("replaced", "case", "turned")


def scanned(held, mine):
    return HeldOut(array(held), ngram=13).find_similar(array(mine))


def scored(table):
    return Duplicate(by="minhash").score_stream(lambda: [table], len(table))


def counted(monkeypatch, run, *given):
    """What ``run`` gives, how many pairs of texts it compared word by word, and the peak of its memory in bytes."""
    pairs = []
    shared = minhash.shared
    monkeypatch.setattr(minhash, "shared", lambda *lists: pairs.append(len(lists[1]) - 1) or shared(*lists))
    tracemalloc.start()
    found = run(*given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    monkeypatch.undo()
    return found, sum(pairs), peak


@pytest.mark.parametrize("kind", [*KINDS, "equal"])
def test_leak_scan_grows_with_the_texts_and_finds_every_copy(kind, monkeypatch):
    spent = []
    for rows in (300, 1200):
        held = [passage(kind, "held", i) for i in range(rows)]
        mine = [passage(kind, "mine", i) for i in range(rows)]
        copies = {i: FORMS[i // 50 % 3] for i in range(0, rows, 50)}
        for row, form in copies.items():
            mine[row] = planted(held[row], form)
        found, pairs, peak = counted(monkeypatch, scanned, held, mine)
        spent.append(peak)
        best = {}
        for row, other, score in zip(found.rows.tolist(), found.held_out.tolist(), found.scores.tolist(), strict=True):
            best[row, other] = max(best.get((row, other), 0), score)
        if kind == "equal":
            assert set(found.rows.tolist()) == set(range(rows)) == set(found.held_out.tolist())
        else:
            assert all(best.get((row, row), 0) >= 0.8 for row in copies)
        assert len(found) <= (BEST + 1) * 2 * rows * len(np.unique(found.how))
        assert pairs <= 3 * joins.SCORED * rows, "a square would be more: of 1,200 texts 1,440,000"
    assert spent[1] <= 8 * spent[0], "four times as many texts"


@pytest.mark.parametrize("kind", [*KINDS, "equal"])
def test_memory_for_duplicates_grows_with_the_texts(kind, monkeypatch):
    for rows in (300, 1200):
        texts = [passage(kind, "one", i) for i in range(rows)]
        texts += [planted(texts[i], "replaced") for i in range(0, rows, 50)]
        table = tables.columns("queries", len(texts), query_id=[f"q{i}" for i in range(len(texts))], text=texts)
        scores, pairs, _ = counted(monkeypatch, scored, table)
        assert pairs <= 240 * rows, "a square would be more: of 1,200 texts 720,000"
        for copy, row in enumerate(range(0, rows, 50)):
            one, other = (set(texts[i].casefold().replace(".", "").split()) for i in (row, rows + copy))
            alike = len(one & other) / len(one | other)
            assert max(scores[row], scores[rows + copy]) >= alike - 0.02, (kind, row)


@pytest.mark.parametrize(("kind", "recall"), [("footer", 1.0), ("header", 1.0), ("paragraphs", 0.9), ("table", 0.9)])
def test_similar_word_sets_are_found_among_boilerplate(kind, recall):
    rows = 1200
    held = [passage(kind, "held", i) for i in range(rows)]
    # no run of words is left, and two words are others: only the set is alike
    asked = []
    for text in held[::20]:
        found = text.split()
        asked.append(" ".join(random.Random(text).sample([*found[:-2], "new", "words"], len(found))))
    alike = joins.SimilarSets(minhash.split_words(array(held)), 20, 4)
    hits = {
        pair
        for rows, texts, _ in alike.to(minhash.split_words(array(asked)), 0.6)
        for pair in zip(rows.tolist(), texts.tolist(), strict=True)
    }
    assert sum((i, 20 * i) in hits for i in range(len(asked))) >= recall * len(asked)


def test_shared_text_is_found_but_not_shared_boilerplate():
    own = " ".join(f"secret{i}" for i in range(20))
    held = [passage("footer", "held", i) for i in range(200)] + [f"{own} {FOOTER}"]
    texts = HeldOut(array(held), ngram=13)
    row = texts.find_similar(array([f"{own} {NOTICE}", f"{' '.join(f'other{i}' for i in range(30))} {FOOTER}"]))
    assert 200 not in row.held_out[row.rows == 1].tolist()
    contained = [(MECHANISMS[h], o) for h, o in zip(row.how, row.held_out, strict=True)]
    assert contained and texts.common()["ngrams"] == 48 and texts.common()["texts"] == 0
    # a quotation of nothing but boilerplate is beside a few, and its pairs with all others are not made
    quoted = texts.quoted(array([" ".join(FOOTER.split()[5:25])]))
    assert 0 < len(quoted) <= BEST and quoted.scores.min() == 1
    alone = HeldOut(array([" ".join(FOOTER.split()[i % 3 :]) for i in range(3)] + held), ngram=13)
    assert alone.common()["texts"] == 3
    assert len(alone.find_similar(array([FOOTER])).rows), "equal words are found whatever they are"


def test_pairs_of_equal_keys_leave_everyone_a_partner():
    left, right = np.array([7] * 50 + [1, 2, 2], np.uint64), np.array([7] * 40 + [2, 2, 3], np.uint64)
    rows, others = joins.matching(left, right, 4)
    pairs = set(zip(rows.tolist(), others.tolist(), strict=True))
    assert len(pairs) == len(rows) == 50 * 4 + 40 * 4 - 4 * 4 + 4
    assert set(rows.tolist()) == {*range(50), 51, 52} and set(others.tolist()) == set(range(42))
    assert all(left[a] == right[b] for a, b in pairs)
    assert pairs <= set(zip(*(x.tolist() for x in joins.matching(left, right)), strict=True))
    assert joins.count_matching(left, right) == 50 * 40 + 4


def test_postings_are_complete_for_rare_keys_only():
    keys = np.array([1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 1], np.uint64)
    texts = np.array([0, 1, 2, 0, 1, 2, 3, 4, 5, 9, 0])
    postings = joins.Postings(keys, texts, common=3, few=2)
    rows, places = postings.known(np.array([1, 2, 1, 3, 8], np.uint64), np.array([0, 0, 0, 4, 4]))
    found = {
        (r, t): c for each in postings.pairs(rows, places) for r, t, c in zip(*(x.tolist() for x in each), strict=True)
    }
    assert found == {(0, 0): 1, (0, 1): 1, (0, 2): 1, (4, 9): 1}
    rows, places = postings.known(np.array([2], np.uint64), np.array([6]))
    assert [x.tolist() for x in next(postings.pairs(rows, places))] == [[6, 6], [0, 1], [0, 0]]


def test_a_row_of_any_number_of_keys_is_counted_as_others_are(monkeypatch):
    rng = np.random.default_rng(4)
    keys, texts = rng.integers(0, 400, 3000).astype(np.uint64), rng.integers(0, 60, 3000)
    asked, rows = rng.integers(0, 500, 900).astype(np.uint64), np.sort(rng.integers(0, 5, 900))
    grams = joins.Grams(keys, texts, 60)

    def shares():
        found = [np.stack(each) for each in grams.shared(asked, rows, 5)]
        return sorted(map(tuple, np.concatenate(found, axis=1).T.tolist()))

    whole = shares()
    own = [set(asked[rows == r].tolist()) for r in range(5)]
    theirs = [set(keys[texts == t].tolist()) for t in range(60)]
    assert whole == sorted((r, t, len(own[r] & theirs[t])) for r in range(5) for t in range(60) if own[r] & theirs[t])
    monkeypatch.setattr(joins, "ENTRIES", 50)
    monkeypatch.setattr(joins.chunks, "__defaults__", (50,))
    assert shares() == whole


def test_hashes_do_not_depend_on_blocks(monkeypatch):
    rng = random.Random(2)
    texts = ["".join(rng.choices("ab cd EF.,_9 é量 子ß\n", k=rng.choice([0, 1, 9, 300, 4000]))) for _ in range(60)]
    texts += ["x" * 9000, "word " * 2000, ""]

    def made():
        words = minhash.split_words(array(texts))
        return [
            words.hashes.tolist(),
            words.starts.tolist(),
            words.whole.tolist(),
            minhash.hash_texts(array(texts)).tolist(),
        ]

    whole = made()
    for block in (7, 64, 1000):
        monkeypatch.setattr(minhash, "BLOCK", block)
        assert made() == whole
    words = minhash.split_words(array(texts))
    assert sum(len(some) for _, some in words.blocks()) == len(texts)


def test_one_passage_that_repeats_itself_costs_its_words(monkeypatch):
    once = "Lot 7 of the sale is a clock. " + FOOTER + ". "
    held, mine = [once * 400, "a clock"], [once * 401, once]
    found, _, peak = counted(monkeypatch, scanned, held, mine)
    assert (0, 0) in set(zip(found.rows.tolist(), found.held_out.tolist(), strict=True))
    assert peak < 40 * len(once) * 801


def test_cosines_are_kept_for_the_best_and_for_everyone(monkeypatch):
    rng = np.random.default_rng(0)
    common = rng.normal(size=24).astype(np.float32)
    vectors = common + 0.3 * rng.normal(size=(700, 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    held, mine = vectors[:300], vectors[300:]
    texts = HeldOut(array([f"held {i}" for i in range(300)]), vectors=held)
    about = SharedAnswers(np.array([5, 6, 6]), np.array([0, 1, 1]), np.array([10, 11, 12]), np.array([0, 1, 9]))
    found = texts.find_similar(array([f"mine {i}" for i in range(400)]), mine, about)
    cosines = mine @ held.T
    near = found.select(found.how == MECHANISMS.index("embedding"))
    assert len(near) <= BEST * 400 + 300 < np.count_nonzero(cosines >= 0.8)
    for axis, places in ((1, near.rows), (0, near.held_out)):
        best = np.full(cosines.shape[1 - axis], -1, np.float32)
        np.maximum.at(best, places, near.scores)
        assert np.allclose(best, np.where(cosines.max(axis) >= 0.8, cosines.max(axis), -1), atol=1e-5)
    same = found.select(found.how == MECHANISMS.index("paraphrase"))
    expected = {(5, 10), (6, 11)} & {(r, h) for r, h in zip(*np.nonzero(cosines >= 0.8), strict=True)}
    assert set(zip(same.rows.tolist(), same.held_out.tolist(), strict=True)) == expected and expected
    assert found.left_out.sum() == np.count_nonzero(cosines >= 0.8) - len(near)


def test_vectors_of_a_crowded_cluster_are_compared_in_order(monkeypatch):
    from dagr_ray.filters import duplicate

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 8)).astype(np.float16)
    members = rng.permutation(500).astype(np.uint32)
    held = vectors[members].astype(np.float32)
    alike = np.tril(held @ held.T, -1)
    assert np.allclose(_highest_cosines(vectors, members, 20), np.maximum(alike.max(axis=1), 0), atol=1e-2)
    monkeypatch.setattr(duplicate, "NEAR", 40)
    some = _highest_cosines(vectors, members, 20)
    assert (some <= np.maximum(alike.max(axis=1), 0) + 1e-2).all() and some[60] > 0
    late = [max(alike[i, :40].max(), alike[i, i - 40 : i].max()) for i in range(100, 500)]
    assert (some[100:] >= np.array(late) - 1e-2).all() and (some[100:] < alike[100:].max(axis=1) - 1e-2).any()


class _Asked:
    """Tables of 3,000 queries that say the same, each with a passage of its own."""

    def scan(self, name, columns):
        rows = 3000
        if name == "queries":
            ids = [f"q{i}" for i in range(rows)]
            yield pa.table({"query_id": ids, "text": [" What is this?"] * rows}).select(columns)
        else:
            for i in range(2):
                ids = [f"q{j}" for j in range(i, rows, 2)]
                docs = [f"d{j}" for j in range(i, rows, 2)]
                yield pa.table({"query_id": ids, "doc_id": docs, "relevance": [1] * len(ids)}).select(columns)


def test_equal_queries_share_their_set_of_passages():
    positives = Positives(_Asked())
    qrels = pa.table({"query_id": ["q1", "q2", "new"], "doc_id": ["d1", "d2", "d9"]})
    found = positives.of(qrels)
    assert found["q1"] is found["q2"] and len(found["q1"]) == 3000 and found["new"] == {"d9"}


def test_items_are_ranked_in_blocks(monkeypatch):
    from dagr_ray.stages import aggregate

    rng = np.random.default_rng(1)
    ratings = np.where(rng.random((6, 40)) < 0.2, np.nan, (rng.random((6, 40)) < 0.5).astype(float))
    whole = rank(ratings)
    monkeypatch.setattr(aggregate, "PAIRS", 100)
    again = rank(ratings)
    assert again.first.tolist() == whole.first.tolist() and again.last.tolist() == whole.last.tolist()
    likes, told = np.nan_to_num(ratings), ~np.isnan(ratings)
    for i, j in combinations(range(5), 2):
        up = sum(likes[u, i] > likes[u, j] for u in range(6) if told[u, i] and told[u, j])
        down = sum(likes[u, i] < likes[u, j] for u in range(6) if told[u, i] and told[u, j])
        assert not (up > down and whole.first[j] == 1) or down


def test_a_facility_of_many_takes_fewer_at_once(monkeypatch):
    from dagr_ray.filters import diversity

    vectors = hashed([f"copy the list number {i % 17} into {i}" for i in range(120)])
    whole = facility(vectors, 20)
    monkeypatch.setattr(diversity, "PAIRS", 120 * 7)
    assert facility(vectors, 20) == whole


def test_counts_and_page_say_what_is_boilerplate(tmp_path):
    scan = LeakScan(selected=Template(), corpus=Template(), held_out=(Template(part="held"),))
    folder = materialize(LeakGate(selected=Template(), scan=scan), str(tmp_path), SMALL)
    counts = scan.folder(str(tmp_path)).manifest["counts"]
    (of,) = counts["common"].values()
    assert (
        of["passage"]["ngrams"] == 48
        and of["passage"]["of"] > 48
        and counts["left_out"]["positive-passage/minhash"] > 0
    )
    from dagr_ray.report.lineage import Folders

    told = _bounds(Folders(str(tmp_path)), folder.name)
    assert told["common"]["ngrams"] >= 48 and told["common"]["limit"] == joins.COMMON and told["left_out"] > 0


class Template(Held):
    """A collection of one template, a judged query for each passage."""

    type = "template-set"
    part: str = "mine"
    outputs = ("corpus", "queries", "qrels", "lineage")

    def open(self, inputs, folder, pool):
        def run(start, stop):
            from dagr_ray.core.stage import Output

            rows = range(150)
            ids, docs = [f"q{i}" for i in rows], [f"d{i}" for i in rows]
            made = {
                "corpus": tables.columns(
                    "corpus", 150, doc_id=docs, title="", text=[passage("footer", self.part, i) for i in rows]
                ),
                "queries": tables.columns(
                    "queries", 150, query_id=ids, text=[f"who closed {self.part}{i}" for i in rows]
                ),
                "lineage": tables.columns(
                    "lineage", 150, id=ids, gen_id=ids, source_id=docs, strategy="s", engine="e", model="m"
                ),
            }
            made |= {
                name: tables.columns("qrels", 150, query_id=ids, doc_id=docs, relevance=1)
                for name in ("qrels", "qrels.test")
            }
            return Output(made, counts={"in": 150, "out": 150})

        return run
