"""vLLM as an engine. The model runs in the worker's own process, so that ending the worker always frees its memory."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError, JsonObject, OmitWhenDefault, content_hash
from dagr_ray.core.paths import FileOrFolder, ModelName
from dagr_ray.core.placement import Pool
from dagr_ray.engines import Completion, Engine, Sampling
from dagr_ray.engines._feeding import Feeding, Request, longest_first
from dagr_ray.engines._vllm_arguments import (
    check_arguments,
    lora_rank,
    parallel_sizes,
    prepare_environment,
    structured,
    structured_backend,
)
from dagr_ray.engines._vllm_memory import Need, cache_of_one, cache_on_cpu, check_cpu, check_gpu, on_cpu, weights_of
from dagr_ray.prompts import Prompt
from dagr_ray.quickstart.models import (
    SMOLLM2,
    SMOLLM2_SHAPE,
    folder_of,
    smollm2_content,
    smollm2_package,
    unpacked,
)

# The most characters of a token in the known vocabularies (long runs of spaces). A passage is cut to so many per token
# before it is tokenised, so that a text of 100 MB costs nothing.
CHARACTERS_PER_TOKEN = 128
Change = Callable[[dict[str, Any]], dict[str, Any]]
_open_sessions: list[_VLLMSession] = []


class VLLM(Engine):
    """A local model served by vLLM (Kwon et al. 2023, arXiv 2309.06180), on a CPU or GPU, by the installed build.

    ``model`` is a folder (identified by the bytes of its files; each machine fetches a folder at a URI such as
    ``s3://bucket/model`` once), ``package://smollm2`` (the quick start's model, unpacked once on each machine), or a hub id,
    which needs a ``revision``. Prompts are plain text to continue, because few-shot prompts need no chat template. A passage
    that does not fit into ``max_model_len`` besides ``max_tokens`` of answer is cut at its end; instructions and exemplars
    are never cut.

    >>> VLLM(model="org/name", revision="0f2c1a9").model_name()
    'org/name@0f2c1a9'
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "vllm"
    tells_probabilities: ClassVar[bool] = True
    model: ModelName
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantization: str | None = None
    max_model_len: Annotated[int, Field(ge=64)] = 1024
    lora: Annotated[FileOrFolder | None, OmitWhenDefault()] = None
    json_schema: Annotated[JsonObject | None, OmitWhenDefault()] = None
    regex: Annotated[str | None, OmitWhenDefault()] = None
    engine_args: Annotated[JsonObject, OmitWhenDefault()] = {}

    @model_validator(mode="after")
    def _fields_agree(self) -> VLLM:
        if self.revision is not None and (self.model == SMOLLM2 or self.folder.is_dir()):
            raise ConfigError(
                f"vllm: revision = {self.revision!r} has no effect on the folder {self.model!r}; remove it"
            )
        if self.json_schema is not None and self.regex is not None:
            raise ConfigError("vllm: json_schema and regex cannot both be set; remove one of them")
        return self

    @property
    def folder(self) -> Path:
        """The model's folder on this machine. It does not exist for a hub id, or before the model is unpacked."""
        return folder_of(self.model)

    def identity(self) -> dict[str, Any]:
        """Folders by the content of their files. Raises ConfigError for a hub id without a revision."""
        identity = super().identity()
        if self.lora is not None:
            identity["lora"] = content_hash(self.lora)
        if self.model == SMOLLM2:
            identity["model"] = smollm2_content()
        elif self.folder.is_dir():
            identity["model"] = content_hash(self.folder)
        elif self.revision is None:
            raise ConfigError(
                f"vllm: model = {self.model!r} is not a folder here, and a hub id needs a revision (a commit); "
                "give the path of a folder, or revision=..."
            )
        return identity

    def tunable_folder(self) -> Path:
        if not self.folder.is_dir():
            raise ConfigError(f"vllm: model = {self.model!r} is no folder here and cannot be tuned; give its folder")
        if self.quantization or self.lora:
            raise ConfigError("vllm: quantization and lora mean nothing to a model that is tuned; leave them out")
        return self.folder

    def with_model(self, folder: Path) -> VLLM:
        return self.model_copy(update={"model": str(folder), "revision": None})

    def model_name(self) -> str:
        name = f"{self.model}@{self.revision}" if self.revision else self.folder.name
        return f"{name}+{Path(self.lora).name}" if self.lora else name

    def cores(self, pool: Pool) -> float:
        """Without a GPU, the engine computes on all its cores of the machine, whatever was requested from Ray."""
        return float(_threads(pool)) if on_cpu() else super().cores(pool)

    def check(self, pool: Pool | None = None) -> None:
        """Raises ConfigError for errors that are visible before anything starts; with a pool, also for that pool."""
        _check_installed()
        self.identity()
        shape = self._check_folder()
        if self.lora is not None:
            lora_rank(self.lora)
        if pool is not None:
            tensor, _ = parallel_sizes(pool)
            heads = shape.get("num_attention_heads")
            if heads and heads % tensor:
                raise ConfigError(
                    f"vllm: tensor_parallel_size = {tensor} does not divide the {heads} attention heads of "
                    f"{self.model_name()}; give another number of gpus, or pipeline_parallel_size"
                )
        check_arguments(self.engine_args, placement=False)
        if pool is not None:
            check_arguments(pool.engine_args, placement=True)
        if self._structured():
            structured_backend(self.json_schema, self.regex)

    def _structured(self) -> bool:
        return self.json_schema is not None or self.regex is not None

    def _check_folder(self) -> dict[str, Any]:
        """The content of config.json; empty if the model is not on this machine."""
        folder = self.folder
        if self.model == SMOLLM2 and not folder.is_dir():
            smollm2_package()
            return self._check_length(SMOLLM2_SHAPE)
        if not folder.is_dir():
            return {}
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"vllm: model = {self.model!r} has no config.json; give a folder in the Hugging Face format"
            )
        weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
        if not weights and self.engine_args.get("load_format") != "dummy":
            raise ConfigError(
                f"vllm: model = {self.model!r} has no weights (*.safetensors); copy the complete model there"
            )
        try:
            shape = json.loads((folder / "config.json").read_text())
        except ValueError as error:
            raise ConfigError(
                f"vllm: config.json of {self.model!r} is not JSON: {error}; copy the model again"
            ) from None
        return self._check_length(shape)

    def _check_length(self, shape: dict[str, Any]) -> dict[str, Any]:
        longest = shape.get("max_position_embeddings")
        if longest and self.max_model_len > longest:
            raise ConfigError(
                f"vllm: max_model_len = {self.max_model_len}, but {self.folder.name} reads at most {longest}; lower it"
            )
        return shape

    def arguments(self, pool: Pool) -> dict[str, Any]:
        """The arguments of ``vllm.LLM`` on this machine."""
        local = self.folder.is_dir()
        arguments: dict[str, Any] = {
            "model": str(self.folder.absolute()) if local else self.model,
            "revision": self.revision,
            "tokenizer_revision": self.revision,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "max_model_len": self.max_model_len,
            "enable_prefix_caching": True,
            "trust_remote_code": False,
            "generation_config": "vllm",  # not the folder's own top_k and similar, which no config sets
            "use_tqdm_on_load": False,
            "seed": 0,
        }
        if on_cpu():
            # Blocks of 32 tokens, not 128: fewer tokens of a prompt are after the last full block and cannot be reused. That
            # took 25 % less time for 40 prompts with 2 samples.
            arguments["block_size"] = 32
            # On a CPU, a seeded request fails if its prompt is prefilled in chunks: "CPU Generator does not use offset".
            arguments |= {"enforce_eager": True, "enable_chunked_prefill": False}
            arguments["max_num_batched_tokens"] = max(4096, self.max_model_len)
            arguments["kv_cache_memory_bytes"] = cache_on_cpu(pool.engine_args)
        else:
            arguments["gpu_memory_utilization"] = 0.9 * (pool.gpus if 0 < pool.gpus < 1 else 1.0)
        tensor, pipeline = parallel_sizes(pool)
        if tensor * pipeline > 1:
            arguments |= {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
            arguments["distributed_executor_backend"] = "mp"
        if self.lora is not None:
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(self.lora)}
        if self._structured():
            # white space between JSON's tokens may contain the strategy's stop, and small models fill max_tokens with it
            backend = structured_backend(self.json_schema, self.regex)
            arguments["structured_outputs_config"] = {"backend": backend, "disable_any_whitespace": True}
        return arguments | dict(self.engine_args) | dict(pool.engine_args)

    def check_memory(self, pool: Pool) -> None:
        """Raises ConfigError if the model cannot fit into the free memory of this machine."""
        folder = self.folder
        if not folder.is_dir():
            return  # the size of a hub's model is not known here
        shape, arguments = self._check_folder(), self.arguments(pool)
        share = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
        quantised = self.quantization is not None or "quantization_config" in shape
        weights = weights_of(folder, self.dtype, quantised) // share
        if on_cpu():
            check_cpu(f"vllm: {self.model_name()}", Need(weights, arguments["kv_cache_memory_bytes"]))
            return
        import torch

        free, total = torch.cuda.mem_get_info()
        need = Need(weights, cache_of_one(shape, self.max_model_len, self.dtype) // share)
        check_gpu(f"vllm: {self.model_name()}", need, free, total, arguments["gpu_memory_utilization"])

    def open(self, pool: Pool) -> _VLLMSession:
        """Starts the engine in this process, after closing an earlier one. Raises ConfigError."""
        _check_installed()
        unpacked(self.model)
        for earlier in list(_open_sessions):
            earlier.close()  # vLLM has one process group per process
        self.check_memory(pool)
        self.check(pool)
        session = _VLLMSession(self, pool)
        _open_sessions.append(session)
        return session


def _check_installed() -> None:
    if find_spec("vllm") is None:
        raise ConfigError(
            "engine vllm: the package is not installed; "
            "run `make setup`, or: pip install 'dagr-ray[cpu]' (with a GPU: [gpu])"
        )


class _VLLMSession:
    """An engine and its tokenizer. Prompts are tokenised here part by part, so that corpus text stays text."""

    def __init__(self, config: VLLM, pool: Pool) -> None:
        self.config = config
        self.pieces: dict[str, list[int]] = {}
        self.tokenising = threading.Lock()
        try:
            self.feeding = Feeding(lambda: _start_fast(config, pool), _end, config.lora)
        except Exception as error:
            _release()
            raise ConfigError(f"vllm: {config.model!r} does not start: {_cause(error)}") from error
        # a copy, because the engine's thread decodes with the original while callers set flags of this one
        self.tokenizer = copy.deepcopy(self.feeding.llm.get_tokenizer())
        with_bos, without = self.tokenizer("a").input_ids, self.tokenizer("a", add_special_tokens=False).input_ids
        self.start = with_bos[: with_bos.index(without[0])]
        assert len(self.start) <= 1, f"{config.model!r} starts a text with several special tokens: {self.start}"

    # -- prompts ----------------------------------------------------------------------------------------------------

    def tokenise(self, text: str) -> list[int]:
        """Tokens of a text. ``<|im_start|>`` inside it is twelve characters, not a special token."""
        with self.tokenising:
            return self.tokenizer(
                tables.clean(text), add_special_tokens=False, split_special_tokens=True, verbose=False
            ).input_ids

    def _fixed(self, text: str) -> list[int]:
        # `before` and `after` are equal for all rows of a stage
        tokens = self.pieces.get(text)
        if tokens is None:
            if len(self.pieces) > 64:
                self.pieces.clear()
            tokens = self.pieces[text] = self.tokenise(text)
        return tokens

    def encode(self, prompt: Prompt, max_tokens: int, after: list[int] | None = None) -> tuple[list[int], bool]:
        """Tokens of a prompt, and whether its passage was cut. Raises ValueError if it cannot fit.

        ``after`` are the tokens of the prompt's end, if they are known.
        """
        before, after = self.start + self._fixed(prompt.before), after or self._fixed(prompt.after)
        room = self.config.max_model_len - max_tokens - len(before) - len(after)
        if room < 1:
            raise ValueError(
                f"the prompt without its passage has {len(before) + len(after)} tokens; with max_tokens = {max_tokens} "
                f"nothing is left of max_model_len = {self.config.max_model_len}"
            )
        passage = self.tokenise(prompt.passage[: room * CHARACTERS_PER_TOKEN])
        return before + passage[:room] + after, len(passage) > room or len(prompt.passage) > room * CHARACTERS_PER_TOKEN

    # -- completions ------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, n: int
    ) -> list[list[Completion]]:
        """``n`` completions for each prompt in one request, whose sample ``i`` has the seed ``seed + i``."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        completions: list[list[Completion]] = [[] for _ in prompts]
        requests: list[tuple[int, bool, Request]] = []
        for i, prompt in enumerate(prompts):
            try:
                tokens, cut = self.encode(prompt, sampling.max_tokens)
            except ValueError as error:
                completions[i] = _errors(n, str(error))
                continue
            params = SamplingParams(
                n=n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seeds[i],
                stop=list(prompt.stop),
                logprobs=0 if sampling.logprob else None,  # 0 means only the sampled token
                output_kind=RequestOutputKind.FINAL_ONLY,
                structured_outputs=structured(self.config.json_schema, self.config.regex),
            )
            requests.append((i, cut, Request(tokens, params)))
        self.feeding.ask(longest_first([(prompts[i].passage, request) for i, _, request in requests]))
        for i, cut, request in requests:
            answer = request.answer
            if isinstance(answer, str):
                completions[i] = _errors(n, answer)
                continue
            completions[i] = [
                Completion(
                    raw=tables.clean(output.text),
                    finish_reason=output.finish_reason,
                    prompt_tokens=len(request.tokens),
                    cached_tokens=answer.num_cached_tokens or 0,
                    completion_tokens=len(output.token_ids),
                    truncated=cut,
                    logprob=_mean(output.cumulative_logprob, len(output.token_ids)),
                )
                for output in sorted(answer.outputs, key=lambda output: output.index)
            ]
        return completions

    def close(self) -> None:
        """Frees the model and the cache; waiting callers get a RuntimeError. A second call does nothing."""
        if self not in _open_sessions:
            return
        _open_sessions.remove(self)
        self.feeding.close()
        del self.tokenizer
        _release()


def _threads(pool: Pool) -> int:
    """A worker's CPUs of the placement, or its share of the machine's cores if that is more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(int(pool.cpus), cores // max(pool.workers, 1), 1)


def start(config: VLLM, pool: Pool, change: Change = dict) -> Any:
    """The ``vllm.LLM`` of a config in this process; only the calling thread may step it. Raises vLLM's exceptions.

    ``change`` gets the config's arguments once vLLM may be imported, and returns the arguments to use.
    """
    prepare_environment()
    # An engine in its own process starts 25 s later on two cores, occupies one, and survives a killed worker.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if config.folder.is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    threads = _threads(pool)
    arguments = config.arguments(pool)
    with _restore_process_state():
        # Ray sets one thread per requested CPU; torch and vLLM's kernels read the variable when they are loaded
        os.environ["OMP_NUM_THREADS"] = str(threads)
        # vLLM would prefer it to the placement's setting
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        import torch
        from vllm import LLM

        if on_cpu():
            torch.set_num_threads(threads)
        return LLM(**change(arguments))


def _start_fast(config: VLLM, pool: Pool) -> Any:
    """``start``, with the optimisations of ``_vllm_cpu`` on a CPU."""

    def change(arguments: dict[str, Any]) -> dict[str, Any]:
        from dagr_ray.engines import _vllm_cpu

        _vllm_cpu.keep_memory()
        return arguments | _vllm_cpu.norm_kernels(arguments)

    return start(config, pool, change if on_cpu() else dict)


def _end(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


# Patterns in the errors of vLLM's start, and the remedies.
REMEDIES = (
    (r"safetensor|deserializ|unpickl", "the weights are damaged: copy the model again"),
    (
        r"out of memory|free memory|available memory|cannot allocate|memoryerror",
        "free some memory, or take a smaller model",
    ),
    (r"architecture|model type|not supported for now", "vLLM does not support this model: take one that it lists"),
    (r"bfloat16|float16|dtype", "this device does not support the dtype: set another dtype"),
    (
        r"quantiz|config file for",
        "the weights have another quantisation: set quantization to it, or remove quantization",
    ),
    (r"tokenizer|sentencepiece", "copy tokenizer.json into the model's folder"),
    (r"size|shape|weights|parameter", "config.json and the weights do not match: copy both from one model"),
    (r"lora", "the adapter does not fit the model: give one that was trained on it"),
    (r"cuda|nccl|driver|device", "look at nvidia-smi: a GPU with a driver for this build must be free"),
)


def _cause(error: BaseException) -> str:
    """One line with vLLM's error and a remedy."""
    text = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
    text = f"{type(error).__name__}: {' '.join(text.split())}"
    remedy = next((say for pattern, say in REMEDIES if re.search(pattern, text, re.IGNORECASE)), None)
    return f"{text[:300]}; {remedy or 'set VLLM_LOGGING_LEVEL=INFO and read the log of its worker'}"


def _mean(total: float | None, tokens: int) -> float | None:
    """The mean log-probability; None if it is not finite (structured output may force impossible tokens)."""
    mean = total / tokens if total is not None and tokens else None
    return mean if mean is not None and math.isfinite(mean) else None


def _errors(n: int, error: str) -> list[Completion]:
    return [Completion(None, None, 0, 0, 0, error=error) for _ in range(n)]


@contextlib.contextmanager
def _restore_process_state() -> Iterator[None]:
    """Restores the process state that starting vLLM changes: environment, ``torch.set_num_threads``, SIGSEGV handler.

    A JVM in the process (Lucene's) uses SIGSEGV internally and crashes if another handler receives it.
    """
    before = {name: os.environ.get(name) for name in ("LD_PRELOAD", "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE")}
    libc, handler = ctypes.CDLL(None), ctypes.create_string_buffer(256)  # larger than any struct sigaction
    libc.sigaction(signal.SIGSEGV, None, handler)
    try:
        yield
    finally:
        libc.sigaction(signal.SIGSEGV, handler, None)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if "torch" in sys.modules:
            torch = sys.modules["torch"]
            torch.set_num_threads = torch._C.set_num_threads  # type: ignore[attr-defined]


def _release() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory, parallel_state

    try:
        cleanup_dist_env_and_memory()
    except ValueError:
        # a training in this process has destroyed all of torch's process groups, including vLLM's
        for name, value in list(vars(parallel_state).items()):
            if isinstance(value, parallel_state.GroupCoordinator):
                setattr(parallel_state, name, None)
        cleanup_dist_env_and_memory()
    gc.collect()
    if on_cpu():
        from dagr_ray.engines import _vllm_cpu

        _vllm_cpu.give_memory_back()
