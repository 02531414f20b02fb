"""Fine-tunes a bi-encoder with Ray Train on mined examples."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from pydantic import Field

from dagr_ray import retriever, tables
from dagr_ray.artifact import Artifact
from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError
from dagr_ray.model_card import model_card
from dagr_ray.retriever import Encoder
from dagr_ray.stage import Inputs, Output, Run, Stage

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LOG_EVERY = 4
# Rows sorted by length together, in batches: enough to save padding, few enough that batches stay mixed.
SORTED_TOGETHER = 8
CHUNK = 16  # passages of one forward


class Train(Stage):
    """``base`` fine-tuned on ``examples`` with MultipleNegativesRankingLoss.

    That is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) with in-batch negatives (Henderson et al. 2017, arXiv
    1705.00652): a query's passage against its own negatives and all passages of the batch, by cosine / ``temperature``.

    ``batch_size`` is that of a whole step: workers share each batch and gather its passages, so that their number
    changes the order of additions and nothing else. For that, and because a CPU is faster without it, there is no
    dropout unless ``dropout`` is set. While another order can avoid it, no passage is in a batch twice where it would
    be one query's positive and another's negative; ``repeats`` in the counts says how often that could not be avoided.

    ``warmup`` is the share of the steps in which the rate rises; then it falls to zero in a line. Passages are cut to
    ``max_length`` tokens in training. The metrics hold the mean loss of every few steps as ``loss@<step>``.
    """

    abstract: ClassVar[bool] = False
    pool: ClassVar[str] = "train"
    starts_workers: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ("metrics",)
    examples: Stage
    queries: Stage
    corpus: Stage
    base: Encoder
    epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 32
    lr: Annotated[float, Field(gt=0)] = 2e-5
    max_length: Annotated[int, Field(ge=8)] = 128
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    temperature: Annotated[float, Field(gt=0)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 0

    def label(self) -> str:
        return self.base.label()

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            rows = inputs["examples"].count("examples")
            if not rows:
                raise ConfigError(
                    f"train: examples = {inputs['examples'].name!r} has no rows; generate more, or relax the filters "
                    "(dagr show says which refused what)"
                )
            negatives = pc.list_value_length(inputs["examples"].read("examples", ["negative_ids"])["negative_ids"])
            fewest, most = pc.min_max(negatives).as_py().values()
            if most and not fewest:
                raise ConfigError(
                    f"train: examples = {inputs['examples'].name!r} has rows with negatives and rows without; "
                    "the loss wants some in every row or in none: mine again, or with negatives=0"
                )
            if self.batch_size % max(pool.workers, 1):
                raise ConfigError(
                    f"train: batch_size = {self.batch_size} cannot be shared by {pool.workers} workers; set a multiple"
                )
            started = time.time()
            settings = self.to_json() | {"sources": {k: v.folder_name() for k, v in self.inputs().items()}}
            settings |= {"fingerprint": self.fingerprint(), "base_identity": self.base.identity()}
            result = _fit(settings, inputs, folder, pool)
            made = tables.table(
                "metrics", ({"measure": f"loss@{step}", "value": loss} for step, loss in result["losses"])
            )
            counts = {"in": rows, "out": rows, **result["counts"]}
            cost = {"train_s": result["train_s"], "setup_s": time.time() - started - result["train_s"]}
            files = [f"model/{name}" for name in result["files"]]
            return Output({"metrics": made}, files, counts, cost | {"samples": result["samples"]})

        return run


def _fit(settings: dict[str, Any], inputs: Inputs, folder: Artifact, pool: Pool) -> dict[str, Any]:
    """Runs the training on the pool's workers (0: here, by Ray Train's local mode); returns rank 0's summary."""
    import ray.train.torch

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    storage = f"{folder.path}/ray"
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"settings": settings, "inputs": inputs, "folder": folder, "workers": pool.workers},
        scaling_config=ray.train.ScalingConfig(
            num_workers=pool.workers,
            use_gpu=pool.gpus > 0,
            resources_per_worker={"CPU": pool.cpus, **({"GPU": pool.gpus} if pool.gpus else {})},
        ),
        # every worker must reach the storage, as it does the folder; nothing is kept there
        run_config=ray.train.RunConfig(name="train", storage_path=storage, storage_filesystem=folder.fs),
    )
    try:
        with _sigint_kept():
            return trainer.fit().return_value
    finally:
        with contextlib.suppress(FileNotFoundError):
            folder.fs.delete_dir(storage)


@contextlib.contextmanager
def _sigint_kept() -> Iterator[None]:
    """Ray Train puts its own handler of Ctrl-C in place and leaves it there."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


# -- on the workers --------------------------------------------------------------------------------------------------


class _Example(NamedTuple):
    """Row numbers of texts in ``_Texts``; equal passages have one number."""

    query: int
    positive: int
    negatives: tuple[int, ...]


class _Texts(NamedTuple):
    queries: list[str]
    passages: list[str]
    examples: list[_Example]


def _work(config: dict[str, Any]) -> dict[str, Any] | None:
    """One worker of a training: the whole of it, on its share of each batch."""
    import ray.train.torch

    rank, workers, device = 0, 1, None
    if config["workers"]:  # the local mode has no context inside a Tune trial
        context = ray.train.get_context()
        rank, workers = context.get_world_rank(), context.get_world_size()
        device = str(ray.train.torch.get_device())
    settings, folder = config["settings"], config["folder"]
    base = Encoder.model_validate(settings["base"])
    texts = _join(config["inputs"], base)
    size = min(settings["batch_size"], len(texts.examples) // workers * workers) or workers
    order = _plan(texts, size, settings["epochs"], settings["seed"])
    model = retriever.load(base, device=device)
    started = time.time()
    losses = _train(model, base, texts, order, size // workers, workers, settings)
    train_s = time.time() - started
    if rank:
        return None
    negatives = sum(len(set(e.negatives)) for e in texts.examples) / len(texts.examples)
    counts = {
        "examples": len(texts.examples),
        "steps": len(order) // size,
        "negatives": negatives,
        "repeats": _repeats(texts, order, size),
    }
    summary = {"losses": losses, "counts": counts, "samples": len(order), "train_s": train_s}
    summary["files"] = _save(model, model_card(settings, summary), folder)
    return summary


def _join(inputs: Inputs, base: Encoder) -> _Texts:
    """The texts of the examples, from the tables that hold them; only the rows needed are kept."""
    examples = inputs["examples"].read("examples", ["query_id", "positive_id", "negative_ids"])
    negatives = pc.list_flatten(examples["negative_ids"])
    wanted = pa.chunked_array([*examples["positive_id"].chunks, *negatives.chunks], tables.TEXT).unique()
    queries = _rows(inputs["queries"], "queries", examples["query_id"].unique())
    passages = _rows(inputs["corpus"], "corpus", wanted)
    query_of = {q["query_id"]: i for i, q in enumerate(queries)}
    bodies = [tables.passage_text(p["title"], p["text"]) for p in passages]
    first: dict[str, int] = {}
    passage_of = {
        p["doc_id"]: first.setdefault(body, i) for i, (p, body) in enumerate(zip(passages, bodies, strict=True))
    }
    widest = pc.max(pc.list_value_length(examples["negative_ids"])).as_py()
    joined = []
    for row in examples.to_pylist():
        own = [passage_of[i] for i in row["negative_ids"]]
        # the loss wants full columns: an example with fewer negatives repeats its own
        padded = [own[i % len(own)] for i in range(widest)]
        joined.append(_Example(query_of[row["query_id"]], passage_of[row["positive_id"]], tuple(padded)))
    said = [base.query_prefix + q["text"] for q in queries]
    return _Texts(said, [base.doc_prefix + body for body in bodies], joined)


def _rows(source: Artifact, name: str, ids: pa.Array) -> list[dict[str, Any]]:
    """The rows of a table with these ids, in the order of the ids: the same for any sharding of the table."""
    key = tables.schema(name).field(0).name
    parts = [part.filter(pc.is_in(part[key], value_set=ids)) for part in source.scan(name)]
    found = pa.concat_tables([tables.empty(name), *parts])
    row_of = {row[key]: row for row in found.to_pylist()}
    missing = [i for i in ids.to_pylist() if i not in row_of]
    assert not missing, (
        f"{len(missing)} rows of the examples are not in {name} of {source.path}, such as {missing[0]!r}"
    )
    return [row_of[i] for i in ids.to_pylist()]


def _plan(texts: _Texts, size: int, epochs: int, seed: int) -> list[int]:
    """Example numbers, epoch after epoch, ``size`` to a batch; the last batch is filled up from its epoch's start.

    Depends on nothing but the examples and the seed, so it is the same for any number of workers. Rows that stand in
    line together are alike in length, and no batch has a passage twice as long as a row without it is in reach.
    """
    examples, rng = texts.examples, np.random.default_rng(seed)
    length = [max(len(texts.passages[p]) for p in (e.positive, *e.negatives)) for e in examples]
    order: list[int] = []
    for _ in range(epochs):
        shuffled = rng.permutation(len(examples)).tolist()
        whole = -(-len(shuffled) // size) * size
        shuffled = (shuffled * size)[:whole]
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), size * SORTED_TOGETHER):
            group = sorted(shuffled[start : start + size * SORTED_TOGETHER], key=length.__getitem__)
            batches += _cut(examples, group, size)
        order += [row for b in rng.permutation(len(batches)) for row in batches[b]]
    return order


def _cut(examples: Sequence[_Example], rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows as full batches: each goes to the first with room and none of its texts, the last ones by an exchange."""
    batches: list[list[int]] = [[] for _ in range(len(rows) // size)]
    seen = [_Seen() for _ in batches]
    first, left = 0, []
    for row in rows:
        while first < len(batches) and len(batches[first]) == size:
            first += 1
        fits = (b for b in range(first, len(batches)) if len(batches[b]) < size and not seen[b].clash(examples[row]))
        b = next(fits, None)
        if b is None:
            left.append(row)
        else:
            seen[b].add(examples[row])
            batches[b].append(row)
    for row in left:
        b = next(b for b, batch in enumerate(batches) if len(batch) < size)
        row = _exchange(examples, batches, row, seen[b]) if seen[b].clash(examples[row]) else row
        seen[b].add(examples[row])
        batches[b].append(row)
    return batches


def _exchange(examples: Sequence[_Example], batches: list[list[int]], row: int, room: _Seen) -> int:
    """Puts ``row`` in the place of one that fits the batch with room, and returns that; ``row`` if there is none."""
    for batch in batches:
        for place, other in enumerate(batch):
            if not room.clash(examples[other]):
                rest = _Seen()
                for kept in batch[:place] + batch[place + 1 :]:
                    rest.add(examples[kept])
                if not rest.clash(examples[row]):
                    batch[place] = row
                    return other
    return row


class _Seen:
    """The texts of a batch."""

    def __init__(self) -> None:
        self.queries: set[int] = set()
        self.positives: set[int] = set()
        self.negatives: set[int] = set()

    def clash(self, e: _Example) -> bool:
        """Whether a passage that is relevant to a query would stand in the batch as another's as well."""
        known = e.query in self.queries or e.positive in self.positives or e.positive in self.negatives
        return known or not self.positives.isdisjoint(e.negatives)

    def add(self, e: _Example) -> None:
        self.queries.add(e.query)
        self.positives.add(e.positive)
        self.negatives.update(e.negatives)


def _repeats(texts: _Texts, order: list[int], size: int) -> int:
    """Rows whose batch holds one of their texts already."""
    found = 0
    for start in range(0, len(order), size):
        seen = _Seen()
        for row in order[start : start + size]:
            found += seen.clash(texts.examples[row])
            seen.add(texts.examples[row])
    return found


def _train(
    model: SentenceTransformer,
    base: Encoder,
    texts: _Texts,
    order: list[int],
    share: int,
    workers: int,
    settings: dict[str, Any],
) -> list[tuple[int, float]]:
    """Trains the model in place on ``share`` rows a step; returns (step, mean loss since the last one)."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.data import BatchSampler, SequentialSampler
    from transformers import PrinterCallback

    class Loss(MultipleNegativesRankingLoss):
        def forward(self, sentence_features: Any, labels: Any) -> Any:
            """The library pads all passages of a batch to the longest; in chunks of like length the sum is the same."""
            queries, *columns = list(sentence_features)
            passages = _embed(self.model, columns)
            return self.compute_loss_from_embeddings([self.model(queries)["sentence_embedding"], *passages], labels)

    class Trainer(SentenceTransformerTrainer):
        def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
            """The library's card counts the data's tokens and asks the hub about the base; ours is `model_card`."""

    disable_progress_bars()
    model.max_seq_length = settings["max_length"]
    _set_dropout(model, settings["dropout"])
    _freeze_unused(model, texts.queries[0])
    rows = [texts.examples[i] for i in order]
    columns = {"query": [texts.queries[e.query] for e in rows], "positive": [texts.passages[e.positive] for e in rows]}
    for k in range(len(rows[0].negatives)):
        columns[f"negative_{k + 1}"] = [texts.passages[e.negatives[k]] for e in rows]
    steps = len(order) // (share * workers)
    device = model.device.type
    with tempfile.TemporaryDirectory(prefix="dagr-train-") as scratch:
        trainer = Trainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=scratch,
                num_train_epochs=1,  # the plan holds all epochs
                per_device_train_batch_size=share,
                # worker r takes the r-th share of each batch of the plan: accelerate deals batches out in turn
                batch_sampler=lambda dataset, batch_size, **_: BatchSampler(
                    SequentialSampler(dataset), batch_size, True
                ),
                dataloader_num_workers=0,
                dataloader_pin_memory=False,
                learning_rate=settings["lr"],
                weight_decay=settings["weight_decay"],
                warmup_steps=round(settings["warmup"] * steps),
                lr_scheduler_type="linear",
                max_grad_norm=1.0,
                seed=settings["seed"],
                bf16=retriever.compute_dtype(base.dtype, device) == torch.bfloat16,
                use_cpu=device == "cpu",
                ddp_backend=None if workers == 1 else "gloo" if device == "cpu" else "nccl",
                ddp_find_unused_parameters=False,
                save_strategy="no",
                eval_strategy="no",
                logging_steps=min(LOG_EVERY, steps),
                report_to="none",
                disable_tqdm=True,
                log_level="error",
            ),
            train_dataset=Dataset.from_dict(columns),
            loss=Loss(model, scale=1 / settings["temperature"], gather_across_devices=workers > 1),
        )
        trainer.remove_callback(PrinterCallback)
        # On a CPU the fused attention's backward pass takes longer than the plain one: 15.0 against 11.7 s for 192 rows.
        with sdpa_kernel([SDPBackend.MATH]) if device == "cpu" else contextlib.nullcontext():
            trainer.train()
    model.max_seq_length = base.max_length
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def _embed(model: Any, columns: list[dict[str, Any]]) -> list[Any]:
    """One tensor of embeddings for each column of passages, encoded together in chunks of like length on a CPU."""
    import torch
    from torch.nn.functional import pad

    masks = [column["attention_mask"] for column in columns]
    if masks[0].device.type != "cpu" or not all(bool(mask[:, 0].all()) for mask in masks):
        # a GPU wants few large passes; what is padded at the start cannot be cut at the end
        return [model(column)["sentence_embedding"] for column in columns]
    width = max(mask.shape[1] for mask in masks)
    names = [name for name, value in columns[0].items() if torch.is_tensor(value) and value.ndim == 2]
    whole = {name: torch.cat([pad(c[name], (0, width - c[name].shape[1])) for c in columns]) for name in names}
    lengths = whole["attention_mask"].sum(1)
    order = lengths.argsort(stable=True)
    vectors = []
    for rows in order.split(CHUNK):
        longest = int(lengths[rows].max())
        vectors.append(model({name: value[rows, :longest] for name, value in whole.items()})["sentence_embedding"])
    back = torch.cat(vectors)[order.argsort()]
    return list(back.split([len(mask) for mask in masks]))


def _set_dropout(model: SentenceTransformer, share: float) -> None:
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
        for name in ("attention_dropout", "attn_dropout", "dropout_prob"):  # numbers given to fused attention
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)


def _freeze_unused(model: SentenceTransformer, text: str) -> None:
    """Weights that no embedding depends on (BERT's pooler) get no gradient, on which workers would wait for ever."""
    model.train()
    model(dict(model.tokenizer([text], return_tensors="pt").to(model.device)))["sentence_embedding"].sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad(set_to_none=True)


def _save(model: SentenceTransformer, card: str, folder: Artifact) -> list[str]:
    """Writes the model and its card below ``model/`` of the folder; returns the files' names there."""
    with tempfile.TemporaryDirectory(prefix="dagr-model-") as scratch:
        target = Path(folder.path if folder.local else scratch) / "model"
        shutil.rmtree(target, ignore_errors=True)  # what an earlier try left
        target.mkdir(parents=True)
        retriever.save(model, target)
        (target / "README.md").write_text(card, encoding="utf-8")
        if not folder.local:
            pafs.copy_files(str(target), f"{folder.path}/model", destination_filesystem=folder.fs)
        return sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
