"""Weights and optimizer state sharded over the workers by PyTorch's FSDP2, on GPUs and, with gloo, on CPUs.

accelerate is not used for this: on a CPU it silently falls back to DDP, so that nothing could be tested there.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from dagr_ray.retrieval.encoder import transformers

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def shard(model: SentenceTransformer) -> None:
    """Shards the weights over the workers, layer by layer, in place. A layer is gathered only while it computes."""
    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    layers = {name for module in transformers(model) for name in module.auto_model._no_split_modules or ()}
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # sums and then divides, because gloo cannot average


def weights(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    """The full trained weights on the first worker. All workers must call this."""
    first, full = torch.distributed.get_rank() == 0, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = parameter.detach().full_tensor()
            if first:
                full[name] = tensor.cpu()
    return full


def load_weights(model: SentenceTransformer, full: dict[str, torch.Tensor]) -> None:
    """Loads full weights, which every worker passes, into the shards."""
    set_model_state_dict(model, full, options=FULL)


def optimizer_state(model: SentenceTransformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The full optimizer state on the first worker. All workers must call this."""
    return get_optimizer_state_dict(model, optimizer, options=FULL)


def load_optimizer_state(model: SentenceTransformer, optimizer: torch.optim.Optimizer, full: dict[str, Any]) -> None:
    """Loads a full optimizer state, which every worker passes, into the shards."""
    set_optimizer_state_dict(model, optimizer, full, options=FULL)
