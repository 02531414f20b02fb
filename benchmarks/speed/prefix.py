"""What it brings that several strategies ask one passage side by side: the same requests as Generate sends them, and shuffled.

    python -m benchmarks.speed.prefix [--passages 150] [--rounds 3] [--blocks 160] [--json FILE]

Three strategies read each passage (``Several``): exemplars, then the passage, then the task. In a corpus of millions the
prefix cache holds next to none of the passages; here it is as small (``--blocks``) against a few hundred of them. Both
orders run in turns in one engine, whose cache is emptied between; for the shuffled one the engine's own ordering, which
puts a passage's requests together again, is off. Bound: side by side is at least 1.3 times as fast.
"""

import random
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any
from unittest import mock

from benchmarks.harness import Benchmark
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Pool
from dagr_ray.core.tables import seed_of
from dagr_ray.engines import Sampling
from dagr_ray.engines._feeding import Request
from dagr_ray.engines.vllm import VLLM
from dagr_ray.prompts import Passage
from dagr_ray.quickstart.models import smollm2
from dagr_ray.stages.sources import PyDocs, Sample
from dagr_ray.strategies.several import FORMS, Several

BOUND = 1.3


def as_they_come(asked: Iterable[tuple[str, Request]]) -> list[Request]:
    """In place of ``longest_first``."""
    return [request for _, request in asked]


def main() -> int:
    """Runs the rounds, prints and writes the table."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--passages", type=int, default=150)
    bench.add("--rounds", type=int, default=3)
    bench.add("--blocks", type=int, default=160, help="blocks of the cache, of 32 tokens each on a CPU")
    args = bench.parse()
    with tempfile.TemporaryDirectory() as runs:
        corpus = Sample(corpus=PyDocs(part="stdlib"), n=args.passages, min_words=120)
        rows = materialize(corpus, runs).read("corpus").to_pylist()
    few = Several(strategies=tuple(form.model_copy(update={"max_exemplars": 1}) for form in FORMS))
    requests = [
        (one.prompt(Passage(row["doc_id"], row["title"], row["text"]), (), random.Random(0)), seed_of(row["doc_id"], i))
        for row in rows
        for i, one in enumerate(few.members())
    ]
    shuffled = random.Random(0).sample(requests, len(requests))
    engine = VLLM(model=str(smollm2()), max_model_len=512)
    session = engine.open(Pool(cpus=2, engine_args={"num_gpu_blocks_override": args.blocks, "max_num_seqs": 8}))
    seconds: dict[str, list[float]] = {"side by side": [], "shuffled": []}
    cached: dict[str, int] = {}
    prompt = 0
    for number in range(args.rounds):
        for name in list(seconds) if number % 2 == 0 else list(seconds)[::-1]:
            session.feeding.llm.reset_prefix_cache()
            asked = requests
            order: AbstractContextManager[Any] = nullcontext()
            if name == "shuffled":
                asked, order = shuffled, mock.patch(f"{VLLM.__module__}.longest_first", as_they_come)
            began = time.perf_counter()
            with order:
                answers = session.generate([p for p, _ in asked], [s for _, s in asked], Sampling(max_tokens=16), 1)
            seconds[name].append(time.perf_counter() - began)
            cached[name] = sum(answer[0].cached_tokens for answer in answers)
            prompt = sum(answer[0].prompt_tokens for answer in answers)
    session.close()
    ratios = [b / a for a, b in zip(seconds["side by side"], seconds["shuffled"], strict=True)]
    told = f"{median(ratios):.2f} (least {min(ratios):.2f}, most {max(ratios):.2f}; bound: at least {BOUND})"
    bench.say(
        f"{len(rows)} passages of 120 words and more, {len(few.members())} strategies, {prompt:,} prompt tokens, a cache of "
        f"{args.blocks * 32:,} tokens, SmolLM2-135M on this CPU.\n"
    )
    figures = [[n, f"{len(requests) / median(s):.2f}", f"{cached[n] / prompt:.0%}"] for n, s in seconds.items()]
    bench.table(["order", "requests/s, median", "prompt tokens from the cache"], figures)
    bench.say(f"\nSide by side over shuffled: {told}.")
    bench.bound("side by side over shuffled", median(ratios), at_least=BOUND)
    return bench.finish({"ratios": ratios, "seconds": seconds, "cached": cached, "prompt_tokens": prompt})


if __name__ == "__main__":
    sys.exit(main())
