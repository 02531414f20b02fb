"""Candidates to judge for the PyDocs queries: BM25 top 10 and dense top 10 of each, without repeats, shuffled.

    python -m benchmarks.quality.pydocs_pool stdlib queries.jsonl pool.jsonl

``queries.jsonl`` holds lines {"_id", "text"}; ``pool.jsonl`` gets {"_id", "text", "pool": [{"doc_id", "text"}]}. The
order says nothing of the rank or the system that found a passage.
"""

import json
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Benchmark
from dagr_ray.core import tables
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.quickstart import pydocs
from dagr_ray.quickstart.models import minilm
from dagr_ray.retrieval.encoder import Encoder

DEPTH = 10
WORDS = 60


def main() -> int:
    """Writes the pools."""
    bench = Benchmark(__file__, __doc__)
    bench.add("part", choices=("stdlib", "numeric"))
    bench.add("queries", type=Path)
    bench.add("target", type=Path)
    args = bench.parse()
    passages = pydocs.stdlib_passages() if args.part == "stdlib" else pydocs.package_passages()
    corpus = tables.table("corpus", (p._asdict() for p in passages))
    queries = [json.loads(line) for line in args.queries.read_text().splitlines()]
    text_of = {p.doc_id: p.text for p in passages}
    pools: list[set[str]] = [set() for _ in queries]
    for miner in (BM25(), Dense(encoder=Encoder(model=str(minilm())))):
        with TemporaryDirectory() as folder:
            miner.build([corpus], Path(folder))
            found = miner.open(Path(folder)).search([q["text"] for q in queries], DEPTH)
        for pool, hits in zip(pools, found, strict=True):
            pool.update(doc_id for doc_id, _ in hits)
    with open(args.target, "w") as out:
        for query, pool in zip(queries, pools, strict=True):
            order = sorted(pool)
            random.Random(query["_id"]).shuffle(order)
            shown = [{"doc_id": d, "text": " ".join(text_of[d].split()[:WORDS])} for d in order]
            out.write(json.dumps({**query, "pool": shown}, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
