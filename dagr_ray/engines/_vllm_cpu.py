"""Speeds up vLLM's build for CPUs: kernels for norms without its compiler, and memory that is kept between steps.

Imports vLLM and torch, so an engine imports it only when it starts.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
import vllm._custom_ops  # noqa: F401  loads the kernels
from torch import Tensor
from vllm import ir

PROVIDER = "dagr_ray_cpu"
_VECTOR = 8  # numbers that the kernels read at once; the size of a row must be a multiple of it
# parameters of glibc's mallopt(3)
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def norm_kernels(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that make an engine on a CPU compute norms in one pass over the batch; empty if that has no effect.

    vLLM uses these kernels only on GPUs. On a CPU it relies on its compiler; without it (``enforce_eager``) a norm takes
    nine passes, a sixth of all time with a model of 135 million parameters.
    """
    one_process = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1) == 1
    if not (arguments.get("enforce_eager") and one_process):
        return {}  # the kernels are not registered in the engine's other processes
    if PROVIDER not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes_norm)(_norm)
        ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_norm_of_sum, inplace=True)(_norm_of_sum)
    given = dict(arguments.get("kernel_config") or {})
    first = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER], **(given.get("ir_op_priority") or {})}
    return {"kernel_config": {**given, "ir_op_priority": first}}


def _plain(weight: Tensor | None, variance_size: int | None, *read: Tensor) -> bool:
    same_dtype = weight is None or weight.dtype == read[0].dtype
    aligned = all(tensor.is_contiguous() and tensor.shape[-1] % _VECTOR == 0 for tensor in read)
    return variance_size is None and same_dtype and aligned


# vLLM requires the names, types and defaults of its own operations


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
    """Makes this process keep the memory that a step frees for the next step, until ``give_memory_back``.

    The logits of a batch of 256 are 50 MB. By default glibc requests that memory from the system and returns it at each
    step, and the system zeroes it page by page. Arrays of over 64 MB do not fit into a heap of glibc's threads and are still
    returned. An engine in its own process uses vLLM's tcmalloc instead.
    """
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: 1 << 30})


def give_memory_back() -> None:
    """Undoes ``keep_memory`` and returns free memory to the system."""
    _set({_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 << 10})
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _set(options: Mapping[int, int]) -> None:
    libc = ctypes.CDLL(None)
    for option, value in options.items():
        if hasattr(libc, "mallopt"):  # only glibc has it
            libc.mallopt(option, value)
