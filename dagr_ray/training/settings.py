"""The settings of a training for the loop."""

from __future__ import annotations

from dataclasses import dataclass

from dagr_ray.losses import Loss
from dagr_ray.losses.info_nce import InfoNCE
from dagr_ray.training.lora import LoRA


@dataclass(frozen=True)
class Settings:
    """Fields of the stage ``Train``, which documents them, and of the pool."""

    losses: tuple[Loss, ...] = (InfoNCE(),)
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    lr: float = 2e-5
    max_length: int = 128
    warmup: float = 0.1
    schedule: str = "linear"
    weight_decay: float = 0.01
    dropout: float = 0.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    lora: LoRA | None = None
    curriculum: bool = False
    seed: int = 0
    eval_every: int | None = None
    patience: int | None = None
    checkpoint_every: int | None = None
    fsdp: bool = False


@dataclass(frozen=True)
class GeneratorSettings:
    """What tuning a generator does. ``batch_size`` pairs are one step of all workers; lengths are in tokens."""

    epochs: int
    batch_size: int
    lr: float
    warmup: float
    max_length: int
    max_answer: int
    seed: int
    lora: LoRA | None
    checkpoint_every: int
