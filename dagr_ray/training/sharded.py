"""Weights and optimizer state in shares, one for each worker: PyTorch's FSDP2, on GPUs and, with gloo, on CPUs.

Not by accelerate, which takes DDP on a CPU without a word, so that nothing of it could be tested there.
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

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def shard(model: SentenceTransformer) -> None:
    """Spreads the weights over the workers, layer by layer, in place; each is whole only while its layer is at work."""
    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    layers = {name for module in transformers(model) for name in module.auto_model._no_split_modules or ()}
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # and then divided: gloo cannot average


def weights(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    """The weights that are trained, whole, on the first worker; all workers have to ask."""
    first, found = torch.distributed.get_rank() == 0, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.detach().full_tensor()
            if first:
                found[name] = whole.cpu()
    return found


def load_weights(model: SentenceTransformer, whole: dict[str, torch.Tensor]) -> None:
    """Puts whole weights, which every worker gives, into the shares."""
    set_model_state_dict(model, whole, options=WHOLE)


def optimizer_state(model: SentenceTransformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, whole, on the first worker; all workers have to ask."""
    return get_optimizer_state_dict(model, optimizer, options=WHOLE)


def load_optimizer_state(model: SentenceTransformer, optimizer: torch.optim.Optimizer, whole: dict[str, Any]) -> None:
    """Puts a whole state, which every worker gives, into the shares."""
    set_optimizer_state_dict(model, optimizer, whole, options=WHOLE)
