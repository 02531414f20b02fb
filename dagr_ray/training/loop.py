"""The training loop: sentence-transformers' trainer over planned batches, with checkpoints and best weights."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.util import truncate_embeddings
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from dagr_ray.core.config import ConfigError
from dagr_ray.retrieval.encoder import TASKS, Encoder, compute_dtype, transformers
from dagr_ray.training import lora as adapters, sharded
from dagr_ray.training.batches import plan, repeats
from dagr_ray.training.checkpoints import Checkpoints
from dagr_ray.training.dev import Dev
from dagr_ray.training.settings import Settings
from dagr_ray.training.step import TEXTS, Collator, Objective, cached, gather
from dagr_ray.training.texts import Data

log = logging.getLogger("dagr")
LOG_EVERY = 4
EVALUATIONS = 10  # in a training, unless `eval_every` is set
WEIGHTS, BEST, PROGRESS = "weights.safetensors", "best.safetensors", "progress.json"
Weights = dict[str, torch.Tensor]


@dataclass
class TrainingResult:
    """The result of a training. ``weights`` has the trained weights only on rank 0 of a sharded model."""

    weights: Weights
    losses: list[tuple[int, float]]  # (step, mean since the last one)
    dev: list[tuple[int, float]]  # (step, nDCG@10)
    best_step: int
    counts: dict[str, Any]
    samples: int
    seconds: float


@dataclass
class _Progress:
    """The state in a checkpoint besides weights, optimizer and random states."""

    losses: list[Any] = field(default_factory=list)  # one per step
    dev: list[tuple[int, float]] = field(default_factory=list)
    best: Weights = field(default_factory=dict)
    waited: int = 0  # evaluations since the best one
    stopped: bool = False


def fit(
    model: SentenceTransformer,
    encoder: Encoder,
    data: Data,
    settings: Settings,
    *,
    rank: int = 0,
    workers: int = 1,
    dev: Dev | None = None,
    checkpoints: Checkpoints | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Trains the model in place, as one of ``workers``; several workers need a process group.

    Resumes from the last checkpoint if there is one. With ``dev``, the model ends with its best weights of all
    evaluations.
    """
    examples, device = data.examples, model.device.type
    per_epoch = -(-len(examples) // settings.batch_size)
    epochs = settings.epochs if settings.steps is None else -(-settings.steps // per_epoch)
    batches = plan(examples, data.passages.bytes, settings.batch_size, epochs, settings.seed, settings.curriculum)[
        : settings.steps
    ]
    if settings.lora is not None:
        adapters.adapt(model, settings.lora, settings.seed)
    _set_dropout(model, settings.dropout)
    _freeze_unused(model, encoder)
    lengths = [module.max_seq_length for module in transformers(model)]
    with _prepared(model, settings.max_length), tempfile.TemporaryDirectory(prefix="dagr-train-") as scratch:
        sharing = settings.fsdp and workers > 1
        collator = Collator(model, data, encoder.prompts(), rank, workers, cached(settings.losses), sharing)
        objective = Objective(model, settings.losses)
        arguments = _arguments(settings, encoder, device, workers, len(batches), scratch, checkpoints is not None)
        trainer = _Trainer(
            model=model, args=arguments, train_dataset=batches, loss=objective, data_collator=collator, callbacks=[]
        )
        trainer.remove_callback(PrinterCallback)
        if sharing:
            trainer.shard()
        progress = trainer.progress
        if dev is not None:
            trainer.add_callback(_Evaluator(trainer, dev, lengths, settings, len(batches)))
        if checkpoints is not None:
            trainer.add_callback(CheckpointSaver(checkpoints))
        for callback in callbacks:
            trainer.add_callback(callback)
        resume = None
        if checkpoints is not None:
            last = Path(scratch) / "last"
            if checkpoints.last(last) is not None:
                resume = last
                trainer.restore(last)
        started = time.time()
        if not progress.stopped:
            # On a CPU the fused attention's backward pass is slower than the plain one: 15.0 s, not 11.7 s.
            backend = torch.nn.attention.SDPBackend.MATH
            with torch.nn.attention.sdpa_kernel([backend]) if device == "cpu" else contextlib.nullcontext():
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        seconds = time.time() - started
        weights: Weights = {}
        if trainer.sharded:
            weights = progress.best if progress.dev else trainer.weights()
        tally = _sum_over_workers(collator.tally, model.device)
    if progress.best and not trainer.sharded:
        model.load_state_dict(progress.best, strict=False)
    steps = len(progress.losses)
    return TrainingResult(
        weights=weights,
        losses=loss_curve([float(loss) for loss in progress.losses]),
        dev=progress.dev,
        best_step=max(progress.dev, key=lambda score: (score[1], -score[0]))[0] if progress.dev else steps,
        counts={
            "examples": len(examples),
            "steps": steps,
            "negatives": len(examples.negatives) / len(examples),
            "repeats": repeats(examples, batches[:steps]),
            "effective_negatives": {k: v / tally["samples"] for k, v in objective.tally.items()},
            "padding": 1 - tally["tokens"] / max(tally["padded"], 1),
        },
        samples=tally["samples"],
        seconds=seconds,
    )


class _Trainer(SentenceTransformerTrainer):
    """The library's trainer, over batches that are already planned and distributed.

    A checkpoint has only the trained weights, without a copy of the base, which can be loaded again.
    """

    def __init__(self, *, data_collator: Collator, loss: Objective, **options: Any) -> None:
        super().__init__(data_collator=data_collator, loss=loss, **options)
        self.collator, self.objective, self.progress = data_collator, loss, _Progress()
        self.sharded = False

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Disabled: the library's card counts the data's tokens and queries the hub about the base. See `model_card`."""

    def preprocess_dataset(self, dataset: Any = None, dataset_name: str | None = None) -> Any:
        """Batches of numbers have no columns."""
        return dataset

    def get_train_dataloader(self) -> DataLoader:
        """Not distributed by accelerate: each item is this worker's share of a step."""
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=lambda items: self.collator(items[0]))

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """Records the loss of every step, which is the loss of the whole batch on each worker."""
        loss = super().training_step(*args, **options)
        self.progress.losses.append(loss)
        return loss

    def shard(self) -> None:
        """Shards the model over the workers. Call it before training."""
        sharded.shard(self.model)
        # tells the library that the model handles its own placement, so that it is not wrapped in DDP
        self.is_distributed_loading_by_transformers = self.sharded = True

    def weights(self) -> Weights:
        """A copy of the trained weights. If they are sharded, only the first worker has them."""
        if self.sharded:
            return sharded.weights(self.model)
        parameters = self.model.named_parameters()
        return {name: p.detach().cpu().clone() for name, p in parameters if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        weights = self.weights()
        if not self.args.should_save:
            return
        folder, progress = Path(output_dir or self.args.output_dir), self.progress
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)
        if progress.best:
            save_file({name: value.contiguous() for name, value in progress.best.items()}, folder / BEST)
        state = {
            "losses": [float(loss) for loss in progress.losses],
            "dev": progress.dev,
            "waited": progress.waited,
            "stopped": progress.stopped,
            "negatives": self.objective.tally,
        }
        (folder / PROGRESS).write_text(json.dumps(state))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharded.optimizer_state(self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint) / name, weights_only=True) for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        sharded.load_optimizer_state(self.model, self.optimizer.optimizer, state)
        self.lr_scheduler.load_state_dict(schedule)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        Path(output_dir, f"tally-{self.args.process_index}.json").write_text(json.dumps(self.collator.tally))

    def restore(self, folder: Path) -> None:
        """Restores the state that the library does not handle."""
        state, progress = json.loads((folder / PROGRESS).read_text()), self.progress
        progress.losses, progress.waited, progress.stopped = state["losses"], state["waited"], state["stopped"]
        progress.dev = [(step, value) for step, value in state["dev"]]
        progress.best = load_file(folder / BEST) if (folder / BEST).exists() else {}
        self.objective.tally = Counter(state["negatives"])
        if self.args.process_index == 0:  # adds the counts of all former workers, whose number may differ
            for file in folder.glob("tally-*.json"):
                self.collator.tally.update(json.loads(file.read_text()))

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        weights = load_file(Path(checkpoint_path) / WEIGHTS)
        if self.sharded:
            sharded.load_weights(self.model, weights)
        else:
            self.model.load_state_dict(weights, strict=False)


class CheckpointSaver(TrainerCallback):
    """Copies the library's checkpoints to the stage's folder, which outlives this machine."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % args.save_steps:  # the library also saves at the end, but then the model itself is saved
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.checkpoints.put(state.global_step, folder)
        shutil.rmtree(folder)


class _Evaluator(TrainerCallback):
    """nDCG@10 on the dev set before the first step, at regular intervals and after the last; keeps the best weights."""

    def __init__(self, trainer: _Trainer, dev: Dev, lengths: list[int], settings: Settings, steps: int) -> None:
        self.trainer, self.dev, self.lengths, self.patience = trainer, dev, lengths, settings.patience
        self.steps, self.every = steps, settings.eval_every or max(steps // EVALUATIONS, 1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.progress.dev:
            self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == self.steps:
            self._evaluate(state.global_step)
            control.should_training_stop |= self.trainer.progress.stopped

    def _evaluate(self, step: int) -> None:
        progress = self.trainer.progress
        value = self.dev.score(self._embed)
        if value > max((score for _, score in progress.dev), default=-1.0):
            progress.best, progress.waited = self.trainer.weights(), 0
        else:
            progress.waited += 1
        progress.dev.append((step, value))
        progress.stopped = self.patience is not None and progress.waited >= self.patience

    def _embed(self, texts: Sequence[str], queries: bool) -> np.ndarray:
        """Unit vectors in the order of the texts. Each worker computes its share."""
        model, collator = self.trainer.model, self.trainer.collator
        prompt, task = collator.prompts[0 if queries else 1], TASKS[0 if queries else 1]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        share = order[collator.rank :: collator.workers]
        # FSDP requires the same number of passes on all workers
        share += order[:1] * (-(-len(texts) // collator.workers) - len(share))
        parts, training = [], model.training
        at_once = TEXTS.get(model.device.type, TEXTS["cuda"])
        model.eval()
        with _max_lengths(model, self.lengths), torch.no_grad():
            for start in range(0, len(share), at_once):
                window = [texts[i] for i in share[start : start + at_once]]
                tokens = model.preprocess(window, prompt=prompt or None, task=task)
                tokens = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in tokens.items()}
                vectors = model(tokens | {"task": task})["sentence_embedding"].float()
                parts.append(normalize(truncate_embeddings(vectors, model.truncate_dim), dim=1))
        model.train(training)
        by_length = gather(torch.cat(parts), len(texts)).cpu().numpy()
        vectors = np.empty_like(by_length)
        vectors[order] = by_length
        return vectors


def _arguments(
    settings: Settings, encoder: Encoder, device: str, workers: int, steps: int, scratch: str, saves: bool
) -> SentenceTransformerTrainingArguments:
    bf16 = settings.precision == "bf16"
    if settings.precision == "auto":
        bf16 = compute_dtype(encoder.dtype, device) == torch.bfloat16
    schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    arguments = SentenceTransformerTrainingArguments(
        output_dir=scratch,
        num_train_epochs=1,  # the plan holds all epochs
        per_device_train_batch_size=1,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_steps=round(settings.warmup * steps),
        lr_scheduler_type=schedule,
        max_grad_norm=1.0,
        seed=settings.seed,
        bf16=bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        use_cpu=device == "cpu",
        ddp_backend=None if workers == 1 else "gloo" if device == "cpu" else "nccl",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # it happens at each pass, and workers make different numbers of passes
        save_strategy="steps" if saves and settings.checkpoint_every else "no",
        save_steps=settings.checkpoint_every or 1,
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    if workers == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # otherwise the library would use all visible GPUs
    return arguments


@contextlib.contextmanager
def _prepared(model: SentenceTransformer, length: int) -> Iterator[None]:
    """Sets the text length for training, at most the length for search, and pads at the end, so that passes can cut it.

    The pooling of decoders finds the last token by the mask, so the padding side does not matter to it.
    """
    modules = transformers(model)
    sides = [module.tokenizer.padding_side for module in modules]
    for module in modules:
        module.tokenizer.padding_side = "right"
    try:
        with _max_lengths(model, [min(length, module.max_seq_length) for module in modules]):
            yield
    finally:
        for module, side in zip(modules, sides, strict=True):
            module.tokenizer.padding_side = side


@contextlib.contextmanager
def _max_lengths(model: SentenceTransformer, lengths: Sequence[int]) -> Iterator[None]:
    """Inside, each transformer reads at most so many tokens."""
    modules = transformers(model)
    before = [module.max_seq_length for module in modules]
    for module, length in zip(modules, lengths, strict=True):
        module.max_seq_length = length
    try:
        yield
    finally:
        for module, length in zip(modules, before, strict=True):
            module.max_seq_length = length


def _set_dropout(model: SentenceTransformer, share: float) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora" not in name:
            module.p = share
        for attribute in ("attention_dropout", "attn_dropout", "dropout_prob"):  # arguments of fused attention
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, share)


def _freeze_unused(model: SentenceTransformer, encoder: Encoder) -> None:
    """Freezes weights without effect on embeddings (BERT's pooler), for whose gradients DDP would wait for ever."""
    model.train()
    for prompt, task in zip(encoder.prompts(), TASKS, strict=True):
        tokens = model.preprocess(["a text"], prompt=prompt or None, task=task)
        tokens = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in tokens.items()}
        embedding = model(tokens | {"task": task})["sentence_embedding"]
        if embedding.requires_grad:
            truncate_embeddings(embedding, model.truncate_dim).sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"train: base = {encoder.model!r} has no trainable weights; give another base")
    model.zero_grad(set_to_none=True)


def _sum_over_workers(tally: Counter[str], device: torch.device) -> Counter[str]:
    """The sum of the counts of all workers."""
    if not torch.distributed.is_initialized():
        return tally
    names = ("samples", "tokens", "padded")
    values = torch.tensor([tally[name] for name in names], device=device)
    torch.distributed.all_reduce(values)
    return Counter(dict(zip(names, values.tolist(), strict=True)))


def loss_curve(losses: Sequence[float]) -> list[tuple[int, float]]:
    """(step, mean loss since the last entry) every few steps and at the end."""
    ends = [*range(LOG_EVERY, len(losses), LOG_EVERY), len(losses)] if losses else []
    starts = [0, *ends]
    return [(end, sum(losses[start:end]) / (end - start)) for start, end in zip(starts, ends, strict=False)]
