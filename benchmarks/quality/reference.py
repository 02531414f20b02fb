"""BM25 and the frozen base on BEIR folders, beside figures that are known and beside pytrec_eval: is the evaluation right?

    python -m benchmarks.quality.reference DIR=0.6789 [DIR=0.4137,0.2943 ...]

Each argument is a folder with its known BM25 nDCG@10 (pyserini, one field, k1 0.9, b 0.4) and maybe that of the frozen
all-MiniLM-L6-v2. Exits 1 where ours is off by over 0.01, or where any measure of any query differs by over 1e-6 from what
pytrec_eval makes of the run file and the judgements, as they are and with scores rounded until most are ties.
Writes benchmarks/quality/reference.md.
"""

import sys
import tempfile

import pytrec_eval

from benchmarks.harness import Benchmark
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.quickstart.models import minilm
from dagr_ray.recipes.evaluation import judge
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.retrieval.vectors import Ranking
from dagr_ray.stages.evaluate import MEASURES, Qrels, measure, qrels_of, rankings
from dagr_ray.stages.sources import Beir

BOUND, SAME = 0.01, 1e-6
THEIRS = {
    "nDCG@10": "ndcg_cut_10", "R@100": "recall_100", "AP": "map", "Success@1": "success_1", "Success@5": "success_5",
    "Success@10": "success_10",
}  # fmt: skip
ASKED = {"ndcg_cut.10", "recall.100", "map", "recip_rank", "success.1,5,10"}


def worst(qrels: Qrels, run: dict[str, Ranking], ours: dict[str, dict[str, float]]) -> float:
    """The largest difference of any measure of any query to pytrec_eval's; a query without results has 0 there."""
    found = pytrec_eval.RelevanceEvaluator(qrels, ASKED).evaluate({q: dict(hits) for q, hits in run.items() if hits})
    largest = 0.0
    for query_id in qrels:
        values = found.get(query_id, {})
        first = values.get("recip_rank", 0.0)
        expected = {name: values.get(other, 0.0) for name, other in THEIRS.items()}
        expected["RR@10"] = first if first >= 0.1 else 0.0
        largest = max([largest, *(abs(ours[name][query_id] - expected[name]) for name in MEASURES)])
    return largest


def differences(folder: Artifact, data: Artifact) -> float:
    """The largest difference over an evaluation's run, and over that run with its scores rounded."""
    qrels = qrels_of(data, "test")
    rows = [row for row in folder.read("metrics").to_pylist() if row["query_id"] is not None]
    stored: dict[str, dict[str, float]] = {}
    for row in rows:
        stored.setdefault(row["measure"], {})[row["query_id"]] = row["value"]
    run, _ = rankings(folder.read("candidates"), qrels)
    coarse = {q: [(d, float(round(score, 1))) for d, score in hits] for q, hits in run.items()}
    return max(worst(qrels, run, stored), worst(qrels, coarse, measure(qrels, coarse)))


def main() -> int:
    """Prints a line for each folder."""
    bench = Benchmark(__file__, __doc__)
    bench.add("known", free=True, nargs="+", metavar="DIR=BM25[,MINILM]")
    bench.add("--runs", free=True)
    args = bench.parse()
    head = ["data", "BM25 nDCG@10", "known", "difference (bound 0.01)", "frozen MiniLM nDCG@10", "known"]
    head += ["difference (bound 0.01)", "largest difference to pytrec_eval (bound 1e-6)"]
    bench.table(head, [])
    with tempfile.TemporaryDirectory() as scratch:
        runs = args.runs or scratch
        for word in args.known:
            path, _, figures = word.rpartition("=")
            known = [float(figure) for figure in figures.split(",")]
            data = Beir(path=path)
            cells, apart = [data.label()], []
            for place, miner in enumerate((BM25(), Dense(encoder=Encoder(model=str(minilm()))))):
                card = judge({data.label(): data}, miner)
                rows = materialize(card, runs).read("metrics").to_pylist()
                mean = next(r["value"] for r in rows if r["query_id"] is None and r["measure"] == "nDCG@10")
                apart.append(differences(card.evaluations[0].folder(runs), data.folder(runs)))
                cells.append(f"{mean:.4f}")
                if place < len(known):
                    bench.bound(f"{cells[0]}: off by", abs(mean - known[place]), at_most=BOUND)
                    cells += [f"{known[place]:.4f}", f"{mean - known[place]:+.4f}"]
                else:
                    cells += ["", ""]
            bench.bound(f"{cells[0]}: difference to pytrec_eval", max(apart), at_most=SAME)
            bench.say(f"| {' | '.join(cells)} | {max(apart):.1e} |")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
