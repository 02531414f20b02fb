"""Training measured beside sentence-transformers' own trainer, and two workers beside one: alternating, in one run.

    python -m benchmarks.speed.training [--rounds 3] [--steps 10]

MiniLM on passages of Python's documentation, a cropped sentence of each as its query and another passage as its hard
negative, batches of 32, 128 tokens, in-batch InfoNCE. Exits 1 where it trains under 0.97 of the samples a second of
``SentenceTransformerTrainer`` with ``MultipleNegativesRankingLoss`` on the same batches in the same precision, where two
workers of one thread are slower than one worker of two, or where 10 % of the computed tokens are padding. Writes
benchmarks/speed/training.md.
"""

import random
import statistics
import sys
import tempfile
import time
from typing import Any, ClassVar

from benchmarks.harness import Benchmark
from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.ray_start import connect
from dagr_ray.core.stage import Output, Stage
from dagr_ray.quickstart import models, pydocs
from dagr_ray.retrieval.encoder import Encoder, compute_dtype, load
from dagr_ray.stages.train import Train
from dagr_ray.training import texts
from dagr_ray.training.settings import Settings

BATCH, LENGTH = 32, 128
PEER, WORKERS, PADDING = 0.97, 1.0, 0.10


class Cropped(Stage):
    """``n`` passages of the documentation with a sentence of each as a query, and the next passage as its negative."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "queries", "examples")
    n: int

    def open(self, inputs, folder, pool):
        def run(start: int, stop: int) -> Output:
            found = random.Random(0).sample(sorted(pydocs.stdlib_passages()), self.n)
            rng = random.Random(1)
            rows: dict[str, list[dict[str, Any]]] = {name: [] for name in self.outputs}
            for i, passage in enumerate(found):
                words = passage.text.split()
                at = rng.randrange(max(len(words) - 12, 1))
                rows["corpus"].append(passage._asdict())
                rows["queries"].append({"query_id": f"q{i}", "text": " ".join(words[at : at + 12])})
                other = found[(i + 1) % self.n].doc_id
                rows["examples"].append({"query_id": f"q{i}", "positive_id": passage.doc_id, "negative_ids": [other]})
            return Output({name: tables.table(name, values) for name, values in rows.items()})

        return run


def ours(folder: Artifact, encoder: Encoder, steps: int) -> tuple[float, dict]:
    """Samples a second, and the counts."""
    from dagr_ray.training import loop

    data = texts.fetch(folder, folder, folder)
    model = load(encoder, device="cpu")
    made = loop.fit(model, encoder, data, Settings(steps=steps, batch_size=BATCH, max_length=LENGTH))
    return made.samples / made.seconds, made.counts


def theirs(folder: Artifact, encoder: Encoder, steps: int) -> float:
    """Samples a second of the library's trainer on the same rows in the same batches."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch.utils.data import BatchSampler, SequentialSampler
    from transformers import PrinterCallback

    from dagr_ray.training.batches import plan, rows_of

    disable_progress_bars()
    data = texts.fetch(folder, folder, folder)
    order = [i for b in plan(data.examples, data.passages.bytes, BATCH, 1, 0)[:steps] for i in b]
    rows = rows_of(data.examples, order)
    columns = {
        "query": data.queries.read([r.query for r in rows]),
        "positive": data.passages.read([r.positive for r in rows]),
        "negative": data.passages.read([r.negatives[0] for r in rows]),
    }
    model = load(encoder, device="cpu")
    model.max_seq_length = LENGTH
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # as ours does: random numbers take a tenth of the time
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=scratch, per_device_train_batch_size=BATCH, num_train_epochs=1, use_cpu=True,
                bf16=compute_dtype(encoder.dtype, "cpu") == torch.bfloat16, dataloader_pin_memory=False,
                batch_sampler=lambda dataset, batch_size, **_: BatchSampler(SequentialSampler(dataset), batch_size, True),
                save_strategy="no", eval_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
                log_level="error",
            ),
            train_dataset=Dataset.from_dict(columns),
            loss=MultipleNegativesRankingLoss(model),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        started = time.time()
        trainer.train()
        return len(rows) / (time.time() - started)


def staged(toy: Stage, encoder: Encoder, steps: int, pool: Pool, seed: int, runs: str) -> float:
    """Samples a second of a training by Ray Train."""
    stage = Train(
        examples=toy, queries=toy, corpus=toy, base=encoder, steps=steps, batch_size=BATCH, max_length=LENGTH, seed=seed
    )
    cost = (materialize(stage, runs, Placement(train=pool)).manifest or {})["cost"]
    return cost["samples"] / cost["train_s"]


def main() -> int:
    """Prints the table and writes it."""
    bench = Benchmark(__file__, __doc__)
    bench.add("--rounds", type=int, default=3)
    bench.add("--steps", type=int, default=10)
    args = bench.parse()
    encoder = Encoder(model=str(models.minilm()), max_length=LENGTH)
    rates: dict[str, list[float]] = {"ours": [], "theirs": [], "two": [], "one": []}
    padding = 0.0
    with tempfile.TemporaryDirectory() as runs:
        toy = Cropped(n=BATCH * (args.steps + 2))
        folder = materialize(toy, runs)
        for train in (ours, theirs):
            train(folder, encoder, 2)  # what is done once in a process
        for _ in range(args.rounds):
            rate, counts = ours(folder, encoder, args.steps)
            rates["ours"].append(rate)
            padding = counts["padding"]
            rates["theirs"].append(theirs(folder, encoder, args.steps))
        connect()
        for round_ in range(args.rounds):
            for name, pool in (("two", Pool(workers=2, cpus=1)), ("one", Pool(workers=1, cpus=2))):
                # a runs folder each: in one, the second would find what the first has made
                rates[name].append(staged(toy, encoder, args.steps, pool, round_, f"{runs}/{name}"))
    beside = statistics.median(a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True))
    spread = statistics.median(a / b for a, b in zip(rates["two"], rates["one"], strict=True))
    middle = {name: statistics.median(each) for name, each in rates.items()}
    rows = [
        ("samples/s, one process", f"{middle['ours']:.1f}", ""),
        ("samples/s, `SentenceTransformerTrainer`", f"{middle['theirs']:.1f}", ""),
        ("ratio", f"{beside:.2f}", f"at least {PEER}"),
        ("samples/s, two workers of one thread", f"{middle['two']:.1f}", ""),
        ("samples/s, one worker of two threads", f"{middle['one']:.1f}", ""),
        ("ratio", f"{spread:.2f}", f"at least {WORKERS}"),
        ("padding among computed tokens", f"{padding:.1%}", f"under {PADDING:.0%}"),
    ]
    bench.table(["what", "measured", "bound"], rows, left=(0, 2))
    bench.bound("samples/s over the peer's", beside, at_least=PEER)
    bench.bound("samples/s of two workers over one", spread, at_least=WORKERS)
    if padding >= PADDING:
        bench.fail(f"padding: {padding:.1%} (under {PADDING:.0%})")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
