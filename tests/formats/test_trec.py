"""TREC runs and qrels in and out: ties and order beside trec_eval's own code, bad lines, and runs compared."""

import doctest
import gzip
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import pytrec_eval

from dagr_ray.cli import main, results
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.formats import export, trec
from dagr_ray.report import compare as comparing
from dagr_ray.stages.evaluate import MEASURES, Evaluate, as_qrels, measure, qrels_of, rankings
from dagr_ray.stages.exemplars import Exemplars
from dagr_ray.stages.sources import PyDocs
from dagr_ray.stages.trec import TrecQrels, TrecRun
from tests.conftest import tiny_beir

TREC_NAMES = {
    "nDCG@10": "ndcg_cut_10", "R@100": "recall_100", "AP": "map", "Success@1": "success_1", "Success@5": "success_5",
    "Success@10": "success_10",
}  # fmt: skip
ASKED = {"ndcg_cut.10", "recall.100", "map", "recip_rank", "success.1,5,10"}


def random_run(path, candidates, seed):
    """A run file of some documents for each query, many with equal scores, its lines in no order, ranks that mean nothing."""
    rng = random.Random(seed)
    lines = [
        f"{q} Q0 {d} 1 {rng.choice([0.5, 1, 1.25, 7e-3, -2, 1 + 1e-9])} other\n"
        for q, docs in candidates.items()
        for d in docs
    ]
    rng.shuffle(lines)
    path.write_text("".join(lines))
    return path


def some(qrels, docs, skip, others=14, seed=0):
    """For each query but the first ``skip``: what is judged, and others."""
    rng = random.Random(seed)
    return {q: sorted({*qrels[q], *rng.sample(docs, others)}) for q in list(qrels)[skip:]}


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory):
    """The quick start's two collections, built once."""
    runs = str(tmp_path_factory.mktemp("runs"))
    return runs, {part: materialize(PyDocs(part=part), runs) for part in ("stdlib", "numeric")}


@pytest.mark.parametrize("part", ["stdlib", "numeric"])
def test_measures_of_a_run_file_equal_pytrec_eval(quick_start, tmp_path, part):
    runs, folders = quick_start
    qrels = qrels_of(folders[part], "test")
    docs = folders[part].read("corpus", ["doc_id"])["doc_id"].to_pylist()
    path = random_run(tmp_path / "run.trec", some(qrels, docs, skip=3), part)
    with open(path) as handle:
        theirs = pytrec_eval.RelevanceEvaluator(qrels, ASKED).evaluate(pytrec_eval.parse_run(handle))
    data = PyDocs(part=part)
    made = materialize(Evaluate(search=TrecRun(path=str(path)), data=data, name=part), runs)
    ours = {(r["measure"], r["query_id"]): r["value"] for r in made.read("metrics").to_pylist()}
    assert made.manifest["counts"]["no_hits"] == 3 and len(theirs) == len(qrels) - 3
    for query_id in qrels:
        values = theirs.get(query_id) or dict.fromkeys([*TREC_NAMES.values(), "recip_rank"], 0.0)
        for name, other in TREC_NAMES.items():
            assert ours[name, query_id] == pytest.approx(values[other], abs=1e-6), (name, query_id)
        expected = values["recip_rank"] if values["recip_rank"] >= 0.1 else 0
        assert ours["RR@10", query_id] == pytest.approx(expected, abs=1e-6)
    means = {m: np.mean([ours[m, q] for q in qrels]) for m in MEASURES}
    assert {m: ours[m, None] for m in MEASURES} == pytest.approx(means)
    assert 0 < means["Success@1"] < means["Success@5"] < means["Success@10"] < 1


def test_order_is_that_of_trec_eval_at_32_bits(tmp_path):
    # 1 + 1e-9 is 1 to trec_eval, whose scores have 32 bits; é comes after every ASCII letter
    (tmp_path / "run").write_text("q Q0 a 1 1.000000001 x\nq Q0 é 9 1 x\nq Q0 b 3 1 x\nq\tQ0\tc 1 1.5  x\r\n\n")
    rows = trec.read_run(str(tmp_path / "run")).table.to_pylist()
    assert [(r["doc_id"], r["rank"]) for r in rows] == [("c", 1), ("é", 2), ("b", 3), ("a", 4)]
    found = measure({"q": {"a": 1}}, rankings(trec.read_run(str(tmp_path / "run")).table, {"q": {"a": 1}})[0])
    theirs = pytrec_eval.RelevanceEvaluator({"q": {"a": 1}}, {"recip_rank"})
    run = {"q": {"a": 1.000000001, "é": 1.0, "b": 1.0, "c": 1.5}}
    assert found["RR@10"]["q"] == pytest.approx(theirs.evaluate(run)["q"]["recip_rank"])


def test_a_gzipped_run_is_the_same_run(tmp_path):
    path = random_run(tmp_path / "run.trec", {f"q{i}": [f"d{k}" for k in range(30)] for i in range(9)}, 1)
    packed = tmp_path / "run.trec.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    one, other = trec.read_run(str(path)), trec.read_run(f"file://{packed}")
    assert one.table.equals(other.table) and one.lines == other.lines == 270
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="not a complete gzip file"):
        trec.read_run(str(packed))


BAD = {
    "q1 Q0 d2 1 2.5": "broken-line",
    "q1 Q0 d2 1 nan x": "broken-line",
    "q1 Q0 d2 1 1e39 x": "broken-line",
    "q1 Q0 d2 1 high x": "broken-line",
    "q1 Q0 d0 1 2.5 x": "duplicate-id",
    "q1 Q0 d\udcff 1 2.5 x": "wrong-encoding",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_skipped_and_reported_with_its_number(tmp_path, line):
    good = [f"q{i // 20} Q0 d{i} 1 {i} x" for i in range(150)]
    path = tmp_path / "run.trec"
    path.write_bytes("\n".join([*good[:99], "q1 Q0 d0 1 7 x", line, *good[99:]]).encode("utf-8", "surrogateescape"))
    made = materialize(TrecRun(path=str(path)), str(tmp_path / "runs"))
    [refused] = made.read("rejected").to_pylist()
    assert (refused["id"], refused["reason"]) == ("run.trec:101", BAD[line])
    assert made.manifest["counts"] == {"in": 152, "out": 151, "rejected": {f"trec-run/{BAD[line]}": 1}}
    score = {(r["query_id"], r["doc_id"]): r["score"] for r in made.read("candidates").to_pylist()}
    assert score["q1", "d0"] == 7 and score["q0", "d0"] == 0


def test_too_many_bad_lines_stop_with_the_first(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("query,doc,score\n" + "".join(f"q Q0 d{i} 1 {i} x\n" for i in range(50)))
    with pytest.raises(ConfigError, match=r"run.csv: 1 of 51 lines are bad.*line 1: broken-line.*query Q0 doc rank"):
        trec.read_run(str(path))
    path.write_text("\n")
    with pytest.raises(ConfigError, match="has no line"):
        trec.read_run(str(path))
    with pytest.raises(ConfigError, match="no file at"):
        TrecRun(path=str(tmp_path / "none")).fingerprint()


def test_the_examples_hold():
    for module in (trec, export):
        assert doctest.testmod(module).failed == 0 and doctest.testmod(module).attempted


def test_a_run_is_named_by_its_content(tmp_path):
    one, two = tmp_path / "a.trec", tmp_path / "b.trec"
    for path in (one, two):
        path.write_text("q Q0 d 1 2 x\n")
    assert TrecRun(path=str(one)).fingerprint() == TrecRun(path=str(two)).fingerprint()
    two.write_text("q Q0 d 1 3 x\n")
    assert TrecRun(path=str(one)).fingerprint() != TrecRun(path=str(two)).fingerprint()


def test_exported_files_give_the_same_measures(quick_start, tmp_path):
    runs, folders = quick_start
    qrels = qrels_of(folders["numeric"], "test")
    docs = sorted({d for judged in qrels.values() for d in judged})
    path = random_run(tmp_path / "other.trec", some(qrels, docs, skip=1), 5)
    data = PyDocs(part="numeric")
    shown = Exemplars(corpus=data, split="test", k=3)  # queries that do not count, and are not exported
    made = materialize(Evaluate(search=TrecRun(path=str(path)), data=data, exclude=shown, name="n"), runs)
    target = str(tmp_path / "out" / "ours.trec")
    counts = export.to_trec(made, runs, target)
    assert list(counts) == [target, str(tmp_path / "out" / "ours.qrels")]
    with open(target) as run, open(list(counts)[1]) as judged:
        theirs = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(judged), ASKED).evaluate(
            pytrec_eval.parse_run(run)
        )
    means = {r["measure"]: r["value"] for r in made.read("metrics").to_pylist() if r["query_id"] is None}
    for name, other in TREC_NAMES.items():
        mean = sum(values[other] for values in theirs.values()) / (len(qrels) - 3)  # as trec_eval -c
        assert means[name] == pytest.approx(mean, abs=1e-6)
    # and back: both files are a collection of their own
    again = Evaluate(search=TrecRun(path=target), data=TrecQrels(path=list(counts)[1]), name="n")
    back = materialize(again, runs)
    assert back.read("metrics").equals(made.read("metrics"))


def test_qrels_keep_every_grade_and_refuse_bad_lines(tmp_path):
    path = tmp_path / "qrels"
    path.write_text("q1 0 d1 2\nq1 0 d2 0\nq2 Q0 d1 -1\n")
    made = materialize(TrecQrels(path=str(path), split="dl19"), str(tmp_path))
    assert as_qrels(made.read("qrels.dl19")) == {"q1": {"d1": 2, "d2": 0}, "q2": {"d1": -1}}
    path.write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    with pytest.raises(ConfigError, match="lines 'query 0 doc relevance'"):
        trec.read_qrels(str(path))


# -- dagr compare -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """A collection of 48 test queries and three runs: the baseline, one that is better on most queries, one level with it."""
    root = tmp_path_factory.mktemp("compare")
    tiny_beir(root / "set")
    rng = random.Random(2)
    ranks = {f"q{i}": rng.randint(1, 9) for i in range(12, 60)}

    def write(name, rank_of):
        lines = []
        for q, rank in ranks.items():
            hits = [f"x{j}" for j in range(10)]
            hits[rank_of(q, rank) - 1] = f"d{q[1:]}"
            lines += [f"{q} Q0 {d} {k} {10 - k} {name}\n" for k, d in enumerate(hits, 1)]
        (root / name).write_text("".join(lines))
        return str(root / name)

    def better(q, rank):
        return min(rank + 4, 10) if int(q[1:]) % 12 == 0 else max(rank - 3, 1)

    return str(root / "set"), [
        write("base.trec", lambda q, rank: rank),
        write("better.trec", better),
        write("level.trec", lambda q, rank: rank + (int(q[1:]) % 2) * (1 if int(q[1:]) % 4 == 1 else -1) if rank > 1 else rank),
    ]  # fmt: skip


def test_runs_are_compared_with_the_first(systems):
    data, files = systems
    found = comparing.compare(comparing.load_judgements(data, "test"), comparing.load_runs(files, lambda name: None))
    base, better, level = found["runs"]
    assert found["queries"] == 48 and "delta" not in base["scores"]["AP"]
    for name in ("nDCG@10", "RR@10", "AP"):
        score = better["scores"][name]
        assert score["delta"] == pytest.approx(score["mean"] - base["scores"][name]["mean"])
        assert score["delta_low"] > 0 and score["p_holm"] < 0.01 and score["p_holm"] == pytest.approx(2 * score["p"])
        other = level["scores"][name]
        assert other["delta_low"] < 0 < other["delta_high"] and other["p_holm"] == other["p"] > 0.05
    own = better["changes"]
    assert own["won"] + own["lost"] + own["same"] == 48 and own["lost"] == 4 and len(own["queries"]) == 10
    moves = [abs(q["after"] - q["before"]) for q in own["queries"]]
    assert moves == sorted(moves, reverse=True) and own["queries"][0]["text"].startswith("when was")
    shown = comparing.text(found)
    assert "48 judged queries" in shown and f"{better['scores']['nDCG@10']['mean']:.4f}" in shown
    assert "when was" in shown and "corrected (Holm) for 2 runs" in shown


def test_compare_from_the_command_line(systems, tmp_path, capsys):
    data, files = systems
    words = [sys.executable, "-m", "dagr_ray.cli.main", "compare", data, *files[:2], "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"][1]["changes"]["lost"] == 4

    def asked(*words):
        results.compare(main.parser().parse_args(["compare", *words, "--runs", str(tmp_path)]))
        return capsys.readouterr().out

    assert "over" not in asked(data, files[0])
    for words, said in [
        ((data, files[0], files[0]), "given twice"),
        ((data, files[0], "--measure", "ndcg"), "measure = 'ndcg'; allowed: nDCG@10"),
        ((data, files[0], "--split", "train"), "no split 'train'.*allowed: dev, test"),
        ((data, "none.trec"), "no folder 'none.trec'"),
    ]:
        with pytest.raises(ConfigError, match=said):
            asked(*words)


def test_a_folder_of_the_runs_folder_is_compared_too(systems, tmp_path):
    data, files = systems
    made = materialize(TrecRun(path=files[1]), str(tmp_path))
    found = comparing.compare(
        comparing.load_judgements(data, "test"), comparing.load_runs([files[1], made.name], lambda name: made)
    )
    score = found["runs"][1]["scores"]["nDCG@10"]
    assert found["runs"][1]["run"] == made.name and score["delta"] == 0 and score["p"] == 1
