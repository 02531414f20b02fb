"""One step of a training in a process of its own, one of several: what its loss and its gradients are.

Started by tests/test_train_steps.py from a server that has imported all this once.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from dagr_ray import retriever
from dagr_ray.artifact import Artifact
from dagr_ray.retriever import Encoder
from dagr_ray.training import loop, texts
from dagr_ray.training.settings import Settings


class Seen(TrainerCallback):
    """Copies the gradients before the optimizer sees them."""

    def __init__(self) -> None:
        self.gradients: dict[str, np.ndarray] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        named = more["model"].named_parameters()
        self.gradients = {name: p.grad.numpy().copy() for name, p in named if p.grad is not None}


def steps(
    rank: int, workers: int, port: int, encoder: Encoder, folder: Artifact, cases: dict[str, Settings], out: str
) -> None:
    """Writes {case: (loss, gradients, counts)} of one worker as a file."""
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
        model = retriever.load(encoder, device="cpu")
        made = loop.fit(model, encoder, data, settings, rank=rank, workers=workers, callbacks=[seen])
        found[name] = (made.losses, seen.gradients, made.counts)
    Path(out, f"{workers}-{rank}").write_bytes(pickle.dumps(found))
    if workers > 1:
        torch.distributed.destroy_process_group()
