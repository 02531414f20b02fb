"""Validates vLLM's own engine arguments: the place in which each may be set, and its value."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dagr_ray.core import environment
from dagr_ray.core.config import ConfigError
from dagr_ray.core.paths import absolute, is_uri
from dagr_ray.core.placement import Pool

# Read by vLLM when it is imported or started. What the user has set stands.

# Arguments that change only the speed, and belong into the placement. All others are part of the engine's fingerprint.
SPEED = frozenset(
    """
    tensor_parallel_size pipeline_parallel_size distributed_executor_backend disable_custom_all_reduce
    enable_expert_parallel enable_eplb eplb_config expert_placement_strategy all2all_backend numa_bind numa_bind_nodes
    numa_bind_cpus gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override cpu_offload_gb
    cpu_offload_params offload_backend offload_group_size offload_num_in_group offload_prefetch_step offload_params
    kv_offloading_size kv_offloading_backend max_num_seqs max_num_batched_tokens max_num_scheduled_tokens
    long_prefill_token_threshold long_prefill_token_threshold_adaptive enable_chunked_prefill async_scheduling
    enable_prefix_caching prefix_caching_hash_algo block_size enforce_eager compilation_config cudagraph_capture_sizes
    max_cudagraph_capture_size optimization_level performance_mode max_parallel_loading_workers download_dir
    safetensors_load_strategy safetensors_prefetch_num_threads safetensors_prefetch_block_size stream_interval
    """.split()
)
# maximum ranks of a LoRA adapter that vLLM accepts
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Arguments that the engine sets itself, with the remedy for the user.
ELSEWHERE = {
    "model": "set the engine's own field model",
    "revision": "set the engine's own field revision",
    "code_revision": "set the engine's own field revision",
    "dtype": "set the engine's own field dtype",
    "quantization": "set the engine's own field quantization",
    "max_model_len": "set the engine's own field max_model_len",
    "enable_lora": "set the engine's own field lora",
    "max_lora_rank": "set the engine's own field lora; its rank is read from the adapter",
    "max_loras": "set the engine's own field lora",
    "seed": "set the seed of the Generate stage: every request has a seed of its own",
    "tokenizer": "put the tokenizer into the model's folder",
    "tokenizer_revision": "set the engine's own field revision",
    "skip_tokenizer_init": "leave it out: prompts are text",
    "runner": "leave it out: this engine generates",
    "convert": "leave it out: this engine generates",
    "trust_remote_code": "use a model that vLLM knows: code from a model's folder is never run",
    "hf_token": "set HF_TOKEN in the environment of the workers: keys are no part of a recipe",
    "generation_config": "set Sampling's fields: a model folder's own defaults are not used",
    "override_generation_config": "set Sampling's fields",
    "data_parallel_size": "set the placement's workers: each has an engine",
    "disable_log_stats": "leave it out",
    "use_tqdm_on_load": "leave it out",
}


def prepare_environment() -> None:
    """Sets the environment variables that vLLM reads at import, unless the user has set them."""
    environment.set_defaults(environment.VLLM)


def check_arguments(given: Mapping[str, Any], placement: bool) -> None:
    """Raises ConfigError if vLLM has no such argument, refuses the value, or the argument belongs into another place.

    ``placement`` is true for the pool's ``engine_args`` and false for the engine's. Imports vLLM if there are any, which
    takes seconds.
    """
    where = "the placement's engine_args" if placement else "vllm: engine_args"
    for name, value in given.items():
        if name in ELSEWHERE:
            shown = name if name == "hf_token" else f"{name} = {value!r}"
            raise ConfigError(f"{where}: {shown} is not allowed here; {ELSEWHERE[name]}")
    if not given:
        return
    _check_paths(where, "", given)
    hints = _hints()
    for name, value in given.items():
        if name not in hints or name.startswith("_"):
            near = difflib.get_close_matches(name, [known for known in hints if known not in ELSEWHERE], 3, 0.5)
            nearest = f"; the nearest: {', '.join(near)}" if near else ""
            raise ConfigError(f"{where}: vLLM has no argument {name!r}{nearest}; check its spelling or remove it")
        _check_value(where, name, value, hints[name])
        if placement and name not in SPEED:
            raise ConfigError(
                f"{where}: {name} = {value!r} can change the text; set it in the engine: engine_args={{{name!r}: ...}}"
            )
        if not placement and name in SPEED:
            raise ConfigError(
                f"{where}: {name} = {value!r} only changes the speed; set it in the placement, below [generate.engine_args]"
            )


def _check_paths(where: str, name: str, value: Any) -> None:
    """Raises ConfigError for a path that is relative: a worker stands in another folder than the person who typed it."""
    if isinstance(value, Mapping):
        for inner, each in value.items():
            _check_paths(where, f"{name}.{inner}".lstrip("."), each)
    elif isinstance(value, list | tuple):
        for each in value:
            _check_paths(where, name, each)
    elif isinstance(value, str) and value and not os.path.isabs(value) and not is_uri(value):
        model = name.endswith(".model") and os.path.isdir(value)
        if model or name.endswith(("_dir", "_path")) or re.match(r"\.{1,2}(/|$)|~", value):
            raise ConfigError(
                f"{where}: {name} = {value!r} is relative, and a worker stands in another folder; give {absolute(value)!r}"
            )


def _check_value(where: str, name: str, value: Any, hint: Any) -> None:
    if hint is Any:
        return
    try:
        # from JSON: refuses "8" for 8, but accepts a list for a set and a string for a member of an enum
        TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        inside = "".join(f".{part}" for part in first["loc"] if isinstance(part, str) and part.isidentifier())
        raise ConfigError(f"{where}: {name}{inside} = {first['input']!r}: {first['msg']}") from None


def _hints() -> dict[str, Any]:
    """The type of each of vLLM's engine arguments; Any if JSON values cannot be checked against it."""
    prepare_environment()
    from vllm.engine.arg_utils import EngineArgs

    names = vars(sys.modules[EngineArgs.__module__])
    hints: dict[str, Any] = {}
    for name, annotation in EngineArgs.__annotations__.items():
        try:
            hint = typing.get_type_hints(type(name, (), {"__annotations__": {name: annotation}}), globalns=names)[name]
            TypeAdapter(hint)
        except Exception:  # a name that vLLM imports for type checkers only, or a class without a schema
            hint = Any
        hints[name] = hint
    return hints


def parallel_sizes(pool: Pool) -> tuple[int, int]:
    """Tensor and pipeline parallel size of each worker's engine. Raises ConfigError if they do not match its GPUs.

    By default the model is split over all GPUs of a worker by tensor parallelism.
    """
    if pool.gpus > 1 and pool.gpus != int(pool.gpus):
        raise ConfigError(f"placement: gpus = {pool.gpus:g} per worker; give a whole number, or at most 1")
    gpus = max(int(pool.gpus), 1)
    pipeline = pool.engine_args.get("pipeline_parallel_size", 1)
    tensor = pool.engine_args.get("tensor_parallel_size", max(gpus // pipeline, 1) if _is_size(pipeline) else 1)
    for name, size in (("tensor_parallel_size", tensor), ("pipeline_parallel_size", pipeline)):
        if not _is_size(size):
            raise ConfigError(f"placement: {name} = {size!r}; give a whole number of GPUs")
    if tensor * pipeline != gpus:
        raise ConfigError(
            f"placement: tensor_parallel_size = {tensor} times pipeline_parallel_size = {pipeline} takes {tensor * pipeline} "
            f"GPUs, but a worker has gpus = {pool.gpus:g}; set gpus = {tensor * pipeline}, or change the sizes"
        )
    return tensor, pipeline


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def lora_rank(adapter: str) -> int:
    """The smallest maximum rank for an adapter that vLLM accepts. Raises ConfigError if the folder has no adapter."""
    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file() or not any(folder.glob("adapter_model.*")):
        raise ConfigError(
            f"vllm: lora = {adapter!r} is not an adapter: adapter_config.json or adapter_model.safetensors is missing; "
            "give a folder saved by PEFT"
        )
    try:
        rank = int(json.loads((folder / "adapter_config.json").read_text())["r"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"vllm: adapter_config.json of {adapter!r} has no valid rank r; save it again") from None
    fitting = [limit for limit in RANKS if limit >= rank]
    if not fitting:
        raise ConfigError(f"vllm: lora = {adapter!r} has rank {rank}; vLLM takes at most {RANKS[-1]}")
    return fitting[0]


def structured(schema: Mapping[str, Any] | None, regex: str | None) -> Any:
    """vLLM's ``StructuredOutputsParams`` for a JSON schema or a regular expression; None if there is neither."""
    if schema is None and regex is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    if schema is not None:
        return StructuredOutputsParams(json=dict(schema))
    return StructuredOutputsParams(regex=regex)


def structured_backend(schema: Mapping[str, Any] | None, regex: str | None) -> str:
    """The vLLM backend that supports the schema or expression. Raises ConfigError if none does. Imports vLLM."""
    prepare_environment()
    from vllm import SamplingParams
    from vllm.v1.structured_output.backend_guidance import validate_guidance_grammar
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    params = SamplingParams(structured_outputs=structured(schema, regex))
    try:
        validate_xgrammar_grammar(params)
        return "xgrammar"
    except Exception as error:  # vLLM's own classes, and those of the backend
        cause = str(error).strip()
    try:
        validate_guidance_grammar(params, tokenizer=None)
        return "guidance"
    except Exception:
        name, value = ("regex", regex) if schema is None else ("json_schema", dict(schema))
        reason = cause.splitlines()[-1][:200]
        raise ConfigError(f"vllm: {name} = {str(value)[:200]!r} is not supported: {reason}; simplify it") from None
