"""What vLLM's build for CPUs leaves to others: kernels for norms without its compiler, and memory that steps keep.

Imports vLLM and torch, so an engine imports it when it starts.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
import vllm._custom_ops  # noqa: F401  loads the kernels
from torch import Tensor
from vllm import ir

PROVIDER = "dagr_ray_cpu"
_VECTOR = 8  # numbers that the kernels read at once; they refuse a row with a rest
# parameters of glibc's mallopt(3)
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def norm_kernels(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with which an engine on a CPU computes norms in one pass over the batch; none where that cannot help.

    vLLM takes these kernels of its own on GPUs alone. On a CPU it counts on its compiler; without it (``enforce_eager``)
    a norm is nine passes, a sixth of all time with a model of 135 million parameters.
    """
    alone = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1) == 1
    if not (arguments.get("enforce_eager") and alone):
        return {}  # other processes of an engine would not know the kernels
    if PROVIDER not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes_norm)(_norm)
        ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_norm_of_sum, inplace=True)(_norm_of_sum)
    given = dict(arguments.get("kernel_config") or {})
    first = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER], **(given.get("ir_op_priority") or {})}
    return {"kernel_config": {**given, "ir_op_priority": first}}


def _plain(weight: Tensor | None, variance_size: int | None, *read: Tensor) -> bool:
    alike = weight is None or weight.dtype == read[0].dtype
    whole = all(each.is_contiguous() and each.shape[-1] % _VECTOR == 0 for each in read)
    return variance_size is None and alike and whole


# vLLM wants the names, types and defaults of its own operations


def _takes_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return _plain(weight, variance_size, x)


def _norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def _takes_norm_of_sum(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _plain(weight, variance_size, x, x_residual)


def _norm_of_sum(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def keep_memory() -> None:
    """Has this process keep what an engine's step frees for the next step, until ``give_memory_back``.

    The logits of a batch of 256 are 50 MB: glibc gets so much from the system and gives it back at each step, and the
    system fills it with zeros, page by page. Arrays of over 64 MB, which no heap of glibc's threads holds, still go that
    way. An engine in a process of its own has vLLM's tcmalloc instead.
    """
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: 1 << 30})


def give_memory_back() -> None:
    """Undoes ``keep_memory`` and hands what is free to the system."""
    _set({_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 << 10})
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _set(options: Mapping[int, int]) -> None:
    libc = ctypes.CDLL(None)
    for option, value in options.items():
        if hasattr(libc, "mallopt"):  # glibc's, and nobody else's
            libc.mallopt(option, value)
