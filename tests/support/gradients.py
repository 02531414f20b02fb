"""One step of a training in a process of its own, one of several: what its loss and its gradients are.

Started by tests/training/test_train_steps.py from a server that has imported all this once.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from dagr_ray.core.artifact import Artifact
from dagr_ray.retrieval.encoder import Encoder, load
from dagr_ray.training import loop, texts
from dagr_ray.training.checkpoints import Checkpoints
from dagr_ray.training.settings import Settings


class Seen(TrainerCallback):
    """Copies the gradients before the optimizer sees them."""

    def __init__(self) -> None:
        self.gradients: dict[str, np.ndarray] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        for name, parameter in more["model"].named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                self.gradients[name] = _some(whole.detach().numpy())


def _some(gradient: np.ndarray) -> np.ndarray:
    """A copy; of an embedding, the rows of the words that occur, with their numbers in front."""
    if gradient.ndim == 1 or len(gradient) < 10_000:
        return gradient.copy()
    rows = np.flatnonzero(np.abs(gradient).max(1))
    return np.hstack([rows[:, None], gradient[rows]])


class Fault(TrainerCallback):
    """Every worker ends at a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == args.save_steps + 1:
            raise KeyboardInterrupt


def _resumed(
    rank: int, workers: int, encoder: Encoder, data: texts.Data, settings: Settings, out: Path
) -> tuple[Any, ...]:
    """The losses, and the weights by their means, of a training that is stopped and goes on from its checkpoint."""
    folder, done = Artifact(str(out.parent), out.name), Seen()
    for attempt, faults in (("a", [Fault()]), ("b", [done])):
        to = Checkpoints(folder, attempt, rank, workers)
        model = load(encoder, device="cpu")
        try:
            made = loop.fit(
                model, encoder, data, settings, rank=rank, workers=workers, checkpoints=to, callbacks=faults
            )
        except KeyboardInterrupt:
            assert attempt == "a"
    return made.losses, done.gradients, made.counts, _means(made, model) if rank == 0 else {}


def _means(made: loop.TrainingResult, model: Any) -> dict[str, tuple[float, float]]:
    ended = made.weights or {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: (w.mean().item(), w.abs().mean().item()) for name, w in ended.items()}


def steps(
    rank: int, workers: int, port: int, encoder: Encoder, folder: Artifact, cases: dict[str, Settings], out: str
) -> None:
    """Writes {case: (loss, gradients, counts, weights afterwards by their means)} of one worker as a file."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if workers > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=workers)
    data = texts.fetch(folder, folder, folder)
    found = {}
    for name, settings in cases.items():
        seen = Seen()
        model = load(encoder, device="cpu")
        made = loop.fit(model, encoder, data, settings, rank=rank, workers=workers, callbacks=[seen])
        if settings.checkpoint_every:
            found[f"{name}-resumed"] = _resumed(rank, workers, encoder, data, settings, Path(out, f"{name}-{workers}"))
        found[name] = (made.losses, seen.gradients, made.counts, _means(made, model) if rank == 0 else {})
    Path(out, f"{workers}-{rank}").write_bytes(pickle.dumps(found))
    if workers > 1:
        torch.distributed.destroy_process_group()
