"""BM25 and the frozen base on BEIR folders, beside figures that are known: is the evaluation right?

    python benchmarks/reference.py DIR=0.6789 [DIR=0.4137 ...]

Each argument is a folder and its known BM25 nDCG@10 (pyserini, one field, k1 0.9, b 0.4). Exits 1 where ours is off by over 0.01.
Writes benchmarks/reference.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.models import minilm
from dagr_ray.recipes import judge
from dagr_ray.retriever import Encoder
from dagr_ray.stage import materialize
from dagr_ray.stages.corpus import Beir

BOUND = 0.01


def main() -> int:
    """Prints a line for each folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("known", nargs="+", metavar="DIR=NDCG")
    parser.add_argument("--runs", default=None)
    args = parser.parse_args()
    off, lines = 0, []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    say("| data | BM25 nDCG@10 | known | difference (bound 0.01) | frozen MiniLM nDCG@10 |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        for word in args.known:
            path, _, known = word.rpartition("=")
            data = Beir(path=path)
            found = []
            for miner in (BM25(), Dense(encoder=Encoder(model=str(minilm())))):
                card = materialize(judge({data.label(): data}, miner), args.runs or scratch)
                rows = card.read("metrics").to_pylist()
                found.append(next(r["value"] for r in rows if r["query_id"] is None and r["measure"] == "nDCG@10"))
            bm25, frozen = found
            off += abs(bm25 - float(known)) > BOUND
            say(f"| {data.label()} | {bm25:.4f} | {known} | {bm25 - float(known):+.4f} | {frozen:.4f} |")
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
