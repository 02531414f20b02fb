"""Tunes a causal language model on prompts and their answers: transformers' trainer, the loss on the answers alone."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from dagr_ray.core.config import ConfigError
from dagr_ray.training.checkpoints import Checkpoints
from dagr_ray.training.loop import PROGRESS, CheckpointSaver, loss_curve
from dagr_ray.training.lora import with_adapters
from dagr_ray.training.settings import GeneratorSettings

log = logging.getLogger("dagr")
IGNORED = -100
Row = tuple[list[int], list[int]]  # the tokens of a prompt, and of its answer


@dataclass
class Tuned:
    """What a tuning came to. ``tokens`` are those of all passes, ``cut`` the pairs whose prompt did not fit."""

    losses: list[tuple[int, float]]
    steps: int
    tokens: int
    cut: int
    seconds: float


def encoded(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, max_length: int, max_answer: int
) -> tuple[list[Row], int]:
    """Token ids of each prompt and answer, and how many prompts were cut at their beginning.

    A prompt is tokenised as vLLM does it, with what the tokenizer puts in front; an answer ends with a line break, at which
    generation stops, and the model's end of text.
    """
    rows, cut = [], 0
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for text, query in pairs:
        answer = tokenizer(f" {query}\n", add_special_tokens=False)["input_ids"][:max_answer] + end
        prompt = tokenizer(text)["input_ids"]
        room = max_length - len(answer)
        cut += len(prompt) > room
        rows.append((prompt[-room:], answer))
    return rows, cut


class _Collator:
    """One worker's share of a batch. Rows end together, so that the answers' logits are the last ones and no others are made."""

    def __init__(self, rows: Sequence[Row], pad: int, rank: int, workers: int) -> None:
        self.rows, self.pad, self.rank, self.workers = rows, pad, rank, workers
        self.tokens = 0

    def __call__(self, batch: Sequence[int]) -> dict[str, Any]:
        everyone = [self.rows[i] for i in batch]
        # a batch with fewer rows than workers: some work on a row that counts nothing
        own = everyone[self.rank :: self.workers]
        counted = bool(own)
        own = own or everyone[:1]
        width = max(len(prompt) + len(answer) for prompt, answer in own)
        kept = max(len(answer) for _, answer in own) + 1
        ids = torch.full((len(own), width), self.pad)
        mask = torch.zeros_like(ids)
        labels = torch.full((len(own), kept), IGNORED)
        for row, (prompt, answer) in enumerate(own):
            ids[row, width - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
            mask[row, width - len(prompt) - len(answer) :] = 1
            if counted:
                labels[row, kept - len(answer) :] = torch.tensor(answer)
        self.tokens += int(mask.sum()) if counted else 0
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "logits_to_keep": kept,
            "labels": labels,
            "total": sum(len(answer) for _, answer in everyone),
        }


class _Trainer(Trainer):
    """Over batches that are planned: each item is the list of a step's rows, of which a worker takes its share."""

    def __init__(self, *, workers: int, **options: Any) -> None:
        super().__init__(**options)
        self.workers, self.losses = workers, list[torch.Tensor]()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        kept = {"losses": [float(loss) for loss in self.losses], "tokens": self.data_collator.tokens}
        (Path(output_dir or self.args.output_dir) / PROGRESS).write_text(json.dumps(kept))

    def restore(self, folder: Path) -> None:
        """Reads back what the library does not know of."""
        kept = json.loads((folder / PROGRESS).read_text())
        self.losses = [torch.tensor(loss) for loss in kept["losses"]]
        self.data_collator.tokens = kept["tokens"]  # the first worker's, whose share is about that of any other

    def get_train_dataloader(self) -> DataLoader:
        collator = self.data_collator
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=lambda items: collator(items[0]))

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The mean over the tokens of all answers of the batch, on however many workers."""
        labels, total = inputs.pop("labels"), inputs.pop("total")
        logits = model(**inputs, use_cache=False).logits.float()
        summed = cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        # the gradients of several workers are averaged
        loss = summed * self.workers / total
        seen = loss.detach().clone()
        if self.workers > 1:
            torch.distributed.all_reduce(seen)
            seen /= self.workers
        self.losses.append(seen)
        return (loss, None) if return_outputs else loss


def tune(
    model_path: Path,
    pairs: Sequence[tuple[str, str]],
    settings: GeneratorSettings,
    target: Path,
    *,
    rank: int = 0,
    workers: int = 1,
    device: str | None = None,
    checkpoints: Checkpoints | None = None,
) -> Tuned:
    """Tunes the model of a folder and, on the first worker, saves it to ``target`` in the weights' own type.

    The order of the pairs depends on the seed alone, and the loss is a mean over the batch's tokens, so the number of workers
    changes the order of additions and nothing else. Raises ConfigError if the folder holds no such model.
    """
    torch.manual_seed(settings.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tune-generator: model = {str(model_path)!r}: {' '.join(str(error).split())[:200]}"
        ) from error
    stored = model.dtype
    model = model.float()
    if settings.lora is not None:
        model = with_adapters(model, settings.lora, "CAUSAL_LM")
    rows, cut = encoded(pairs, tokenizer, settings.max_length, settings.max_answer)
    rng = np.random.default_rng(settings.seed)
    batches = [
        order[i : i + settings.batch_size].tolist()
        for order in (rng.permutation(len(rows)) for _ in range(settings.epochs))
        for i in range(0, len(rows), settings.batch_size)
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    collator = _Collator(rows, pad, rank, workers)
    on_cpu = (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu"
    with tempfile.TemporaryDirectory(prefix="dagr-tune-") as scratch:
        saves = checkpoints is not None and settings.checkpoint_every
        arguments = TrainingArguments(
            output_dir=scratch, num_train_epochs=1, per_device_train_batch_size=1, dataloader_pin_memory=False,
            learning_rate=settings.lr, warmup_steps=round(settings.warmup * len(batches)), weight_decay=0.0,
            lr_scheduler_type="linear", seed=settings.seed, bf16=True, use_cpu=on_cpu,
            ddp_backend=None if workers == 1 else "gloo" if on_cpu else "nccl", ddp_find_unused_parameters=False,
            save_strategy="steps" if saves else "no", save_steps=settings.checkpoint_every or 1,
            logging_strategy="no", report_to="none", disable_tqdm=True, log_level="error", remove_unused_columns=False,
        )  # fmt: skip
        trainer = _Trainer(workers=workers, model=model, args=arguments, train_dataset=batches, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        resume = None
        if checkpoints is not None:
            trainer.add_callback(CheckpointSaver(checkpoints))
            place = Path(scratch) / "last"
            if checkpoints.last(place) is not None:
                resume = str(place)
                trainer.restore(place)
        started = time.time()
        trainer.train(resume_from_checkpoint=resume)
        seconds = time.time() - started
    tokens = torch.tensor(collator.tokens)
    if workers > 1:
        torch.distributed.all_reduce(tokens)
    if rank == 0:
        _save(model, tokenizer, stored, target)
    losses = [float(loss) for loss in trainer.losses]
    return Tuned(loss_curve(losses), len(batches), int(tokens), cut, seconds)


def _save(model: Any, tokenizer: Any, dtype: torch.dtype, target: Path) -> None:
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    model.to(dtype).save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)
