"""The loop: sentence-transformers' trainer over planned batches, with checkpoints and the choice of the best weights."""

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
from dagr_ray.training.step import TEXTS, Collator, Objective, cached, gathered
from dagr_ray.training.texts import Data

log = logging.getLogger("dagr")
LOG_EVERY = 4
EVALUATIONS = 10  # in a training, unless `eval_every` says otherwise
WEIGHTS, BEST, PROGRESS = "weights.safetensors", "best.safetensors", "progress.json"
Weights = dict[str, torch.Tensor]


@dataclass
class Fitted:
    """What a training came to. ``weights`` are those that it trained, on rank 0 and where the model itself is in shares."""

    weights: Weights
    losses: list[tuple[int, float]]  # (step, mean since the last one)
    dev: list[tuple[int, float]]  # (step, nDCG@10)
    best_step: int
    counts: dict[str, Any]
    samples: int
    seconds: float


@dataclass
class _Progress:
    """What a checkpoint holds besides weights, optimizer and random states."""

    losses: list[Any] = field(default_factory=list)  # of each step
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
) -> Fitted:
    """Trains the model in place, as one of ``workers`` that have a process group where there are several.

    Goes on from the last checkpoint, if there is one. With ``dev``, the model ends with its best weights of all evaluations.
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
            trainer.add_callback(_Saver(checkpoints))
        for callback in callbacks:
            trainer.add_callback(callback)
        resume = None
        if checkpoints is not None:
            found = Path(scratch) / "last"
            if checkpoints.last(found) is not None:
                resume = found
                trainer.restore(found)
        started = time.time()
        if not progress.stopped:
            # On a CPU the fused attention's backward pass takes longer than the plain one: 15.0 against 11.7 s.
            backend = torch.nn.attention.SDPBackend.MATH
            with torch.nn.attention.sdpa_kernel([backend]) if device == "cpu" else contextlib.nullcontext():
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        seconds = time.time() - started
        weights: Weights = {}
        if trainer.sharded:
            weights = progress.best if progress.dev else trainer.weights()
        tally = _summed(collator.tally, model.device)
    if progress.best and not trainer.sharded:
        model.load_state_dict(progress.best, strict=False)
    done = len(progress.losses)
    return Fitted(
        weights=weights,
        losses=_curve([float(loss) for loss in progress.losses]),
        dev=progress.dev,
        best_step=max(progress.dev, key=lambda each: (each[1], -each[0]))[0] if progress.dev else done,
        counts={
            "examples": len(examples),
            "steps": done,
            "negatives": len(examples.negatives) / len(examples),
            "repeats": repeats(examples, batches[:done]),
            "effective_negatives": {k: v / tally["samples"] for k, v in objective.tally.items()},
            "padding": 1 - tally["tokens"] / max(tally["padded"], 1),
        },
        samples=tally["samples"],
        seconds=seconds,
    )


class _Trainer(SentenceTransformerTrainer):
    """The library's trainer, over batches that are planned and dealt out already.

    A checkpoint holds the weights that are trained, and no copy of a base that can be loaded again.
    """

    def __init__(self, *, data_collator: Collator, loss: Objective, **options: Any) -> None:
        super().__init__(data_collator=data_collator, loss=loss, **options)
        self.collator, self.objective, self.progress = data_collator, loss, _Progress()
        self.sharded = False

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The library's card counts the data's tokens and asks the hub about the base; ours is `model_card`."""

    def preprocess_dataset(self, dataset: Any = None, dataset_name: str | None = None) -> Any:
        """Batches of numbers have no columns."""
        return dataset

    def get_train_dataloader(self) -> DataLoader:
        """Not dealt out by accelerate: each item is this worker's share of a step."""
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=lambda items: self.collator(items[0]))

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """The loss of every step is kept: it is that of the whole batch, on each worker."""
        loss = super().training_step(*args, **options)
        self.progress.losses.append(loss)
        return loss

    def shard(self) -> None:
        """Spreads the model over the workers. To be called before it is trained."""
        sharded.shard(self.model)
        # the library's word for a model whose placement is its own affair: not to be wrapped in DDP
        self.is_distributed_loading_by_transformers = self.sharded = True

    def weights(self) -> Weights:
        """A copy of the weights that are trained. Where they are sharded, the first worker alone has them."""
        if self.sharded:
            return sharded.weights(self.model)
        found = self.model.named_parameters()
        return {name: p.detach().cpu().clone() for name, p in found if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        weights = self.weights()
        if not self.args.should_save:
            return
        folder, progress = Path(output_dir or self.args.output_dir), self.progress
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)
        if progress.best:
            save_file({name: value.contiguous() for name, value in progress.best.items()}, folder / BEST)
        kept = {
            "losses": [float(loss) for loss in progress.losses],
            "dev": progress.dev,
            "waited": progress.waited,
            "stopped": progress.stopped,
            "negatives": self.objective.tally,
        }
        (folder / PROGRESS).write_text(json.dumps(kept))

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
        """Reads back what the library does not know of."""
        kept, progress = json.loads((folder / PROGRESS).read_text()), self.progress
        progress.losses, progress.waited, progress.stopped = kept["losses"], kept["waited"], kept["stopped"]
        progress.dev = [(step, value) for step, value in kept["dev"]]
        progress.best = load_file(folder / BEST) if (folder / BEST).exists() else {}
        self.objective.tally = Counter(kept["negatives"])
        if self.args.process_index == 0:  # what all workers counted, however many there were
            for file in folder.glob("tally-*.json"):
                self.collator.tally.update(json.loads(file.read_text()))

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        weights = load_file(Path(checkpoint_path) / WEIGHTS)
        if self.sharded:
            sharded.load_weights(self.model, weights)
        else:
            self.model.load_state_dict(weights, strict=False)


class _Saver(TrainerCallback):
    """Brings what the library has saved to where it outlives this machine."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % args.save_steps:  # the library saves at the end too, where the model itself is saved
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.checkpoints.put(state.global_step, written)
        shutil.rmtree(written)


class _Evaluator(TrainerCallback):
    """nDCG@10 on the dev set before the first step, every so many steps, and after the last; keeps the best weights."""

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
        if value > max((each for _, each in progress.dev), default=-1.0):
            progress.best, progress.waited = self.trainer.weights(), 0
        else:
            progress.waited += 1
        progress.dev.append((step, value))
        progress.stopped = self.patience is not None and progress.waited >= self.patience

    def _embed(self, texts: Sequence[str], queries: bool) -> np.ndarray:
        """Unit vectors, in the order of the texts; each worker computes its share."""
        model, collator = self.trainer.model, self.trainer.collator
        prompt, task = collator.prompts[0 if queries else 1], TASKS[0 if queries else 1]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        share = order[collator.rank :: collator.workers]
        # with FSDP, all workers have to make the same number of passes
        share += order[:1] * (-(-len(texts) // collator.workers) - len(share))
        parts, training = [], model.training
        at_once = TEXTS.get(model.device.type, TEXTS["cuda"])
        model.eval()
        with _cut(model, self.lengths), torch.no_grad():
            for start in range(0, len(share), at_once):
                some = [texts[i] for i in share[start : start + at_once]]
                tokens = model.preprocess(some, prompt=prompt or None, task=task)
                tokens = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in tokens.items()}
                vectors = model(tokens | {"task": task})["sentence_embedding"].float()
                parts.append(normalize(truncate_embeddings(vectors, model.truncate_dim), dim=1))
        model.train(training)
        found = gathered(torch.cat(parts), len(texts)).cpu().numpy()
        placed = np.empty_like(found)
        placed[order] = found
        return placed


def _arguments(
    settings: Settings, encoder: Encoder, device: str, workers: int, steps: int, scratch: str, saves: bool
) -> SentenceTransformerTrainingArguments:
    rough = settings.precision == "bf16"
    if settings.precision == "auto":
        rough = compute_dtype(encoder.dtype, device) == torch.bfloat16
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
        bf16=rough,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        use_cpu=device == "cpu",
        ddp_backend=None if workers == 1 else "gloo" if device == "cpu" else "nccl",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # at each pass, of which workers do not make the same number
        save_strategy="steps" if saves and settings.checkpoint_every else "no",
        save_steps=settings.checkpoint_every or 1,
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    if workers == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the library would spread the model over all GPUs that it sees
    return arguments


@contextlib.contextmanager
def _prepared(model: SentenceTransformer, length: int) -> Iterator[None]:
    """Texts are cut for training, no later than for search, and padded at the end, where it can be cut off, pass by pass.

    The pooling of decoders finds the last token by the mask, on either side.
    """
    found = transformers(model)
    sides = [module.tokenizer.padding_side for module in found]
    for module in found:
        module.tokenizer.padding_side = "right"
    try:
        with _cut(model, [min(length, module.max_seq_length) for module in found]):
            yield
    finally:
        for module, side in zip(found, sides, strict=True):
            module.tokenizer.padding_side = side


@contextlib.contextmanager
def _cut(model: SentenceTransformer, lengths: Sequence[int]) -> Iterator[None]:
    """Each transformer reads so many tokens."""
    found = transformers(model)
    before = [module.max_seq_length for module in found]
    for module, length in zip(found, lengths, strict=True):
        module.max_seq_length = length
    try:
        yield
    finally:
        for module, length in zip(found, before, strict=True):
            module.max_seq_length = length


def _set_dropout(model: SentenceTransformer, share: float) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora" not in name:
            module.p = share
        for number in ("attention_dropout", "attn_dropout", "dropout_prob"):  # given to fused attention
            if isinstance(getattr(module, number, None), float):
                setattr(module, number, share)


def _freeze_unused(model: SentenceTransformer, encoder: Encoder) -> None:
    """Weights that no embedding depends on (BERT's pooler) get no gradient, on which workers would wait for ever."""
    model.train()
    for prompt, task in zip(encoder.prompts(), TASKS, strict=True):
        tokens = model.preprocess(["a text"], prompt=prompt or None, task=task)
        tokens = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in tokens.items()}
        found = model(tokens | {"task": task})["sentence_embedding"]
        if found.requires_grad:
            truncate_embeddings(found, model.truncate_dim).sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"train: base = {encoder.model!r} has no weights that can be trained; give another base")
    model.zero_grad(set_to_none=True)


def _summed(tally: Counter[str], device: torch.device) -> Counter[str]:
    """The counts of all workers."""
    if not torch.distributed.is_initialized():
        return tally
    names = ("samples", "tokens", "padded")
    values = torch.tensor([tally[name] for name in names], device=device)
    torch.distributed.all_reduce(values)
    return Counter(dict(zip(names, values.tolist(), strict=True)))


def _curve(losses: Sequence[float]) -> list[tuple[int, float]]:
    """(step, mean of the steps since the last one) every few steps and at the end."""
    ends = [*range(LOG_EVERY, len(losses), LOG_EVERY), len(losses)] if losses else []
    starts = [0, *ends]
    return [(end, sum(losses[start:end]) / (end - start)) for start, end in zip(starts, ends, strict=False)]
