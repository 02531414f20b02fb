"""vLLM as an engine: the model runs in the worker's own process, so ending the worker by any means frees all of it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dagr_ray import tables
from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError, content_hash
from dagr_ray.engines import Completion, Engine, Sampling
from dagr_ray.strategies import Prompt

# Read by vLLM when it is imported or started. What the user has set stands.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings at the start of a CPU engine are many and all about what is set here
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; unset, vLLM takes half of the memory of the machine
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait: 4 times slower where the cores are shared
}
# No token of the known vocabularies stands for more characters than this (long runs of spaces); a passage is cut to so
# many per token before it is tokenised, so that a text of 100 MB costs nothing.
CHARACTERS_PER_TOKEN = 128
_opened: list[_Session] = []


class VLLM(Engine):
    """A local model served by vLLM (Kwon et al. 2023, arXiv 2309.06180), on a CPU or GPU, whichever build is installed.

    ``model`` is a folder (identified by the bytes of its files) or a hub id, which needs a ``revision``. Prompts go in
    as they are, as text to be continued: few-shot prompts need no chat template. A passage that does not fit into
    ``max_model_len`` next to ``max_tokens`` of answer is cut at its end; instructions and exemplars never are.

    >>> VLLM(model="org/name", revision="0f2c1a9").model_name()
    'org/name@0f2c1a9'
    """

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "vllm"
    model: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantization: str | None = None
    max_model_len: Annotated[int, Field(ge=64)] = 1024

    @model_validator(mode="after")
    def _folder_has_no_revision(self) -> VLLM:
        if self.revision is not None and Path(self.model).is_dir():
            raise ConfigError(
                f"vllm: revision = {self.revision!r} means nothing for the folder {self.model!r}; leave it out"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """A folder stands for its files, wherever it lies. Raises ConfigError for a hub id without a revision."""
        if Path(self.model).is_dir():
            return super().identity() | {"model": content_hash(self.model)}
        if self.revision is None:
            raise ConfigError(
                f"vllm: model = {self.model!r} is no folder here, and a hub id needs a revision (a commit); "
                "give the path of a folder, or revision=..."
            )
        return super().identity()

    def model_name(self) -> str:
        return f"{self.model}@{self.revision}" if self.revision else Path(self.model).name

    def check(self) -> None:
        if find_spec("vllm") is None:
            raise ConfigError(
                "engine vllm: the package is not installed; "
                "run `make setup`, or: pip install 'dagr-ray[cpu]' (with a GPU: [gpu])"
            )
        self.identity()
        folder = Path(self.model)
        if not folder.is_dir():
            return
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"vllm: model = {self.model!r} has no config.json; give a folder in the Hugging Face format"
            )
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise ConfigError(
                f"vllm: model = {self.model!r} has no weights (*.safetensors); copy the whole model there"
            )
        longest = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
        if longest and self.max_model_len > longest:
            raise ConfigError(
                f"vllm: max_model_len = {self.max_model_len}, but {folder.name} reads at most {longest}; lower it"
            )

    def open(self, pool: Pool) -> _Session:
        """Starts the engine in this process; one that was open here before is closed first. Raises ConfigError."""
        self.check()
        for earlier in list(_opened):
            earlier.close()  # vLLM's process group is one to a process
        session = _Session(self, pool)
        _opened.append(session)
        return session


class _Session:
    """An engine and its tokenizer. Prompts are tokenised here, piece by piece, so that corpus text stays text."""

    def __init__(self, config: VLLM, pool: Pool) -> None:
        self.config = config
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # In a process of its own an engine starts 25 s later on two cores, takes one, and outlives a killed worker.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        local = Path(config.model).is_dir()
        if local:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self.pieces: dict[str, list[int]] = {}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # what the placement gives a worker, or its share of a machine that has more
        threads = max(int(pool.cpus), cores // max(pool.workers, 1), 1)
        with _undone():
            # Ray sets one thread for each CPU that a worker asks for; torch and vLLM's kernels read it when they are loaded
            os.environ["OMP_NUM_THREADS"] = str(threads)
            try:
                self.llm = self._start(pool, local, threads)
                self.tokenizer = self.llm.get_tokenizer()
            except Exception as error:
                _release()
                cause = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
                raise ConfigError(
                    f"vllm: {config.model!r} does not start: {type(error).__name__}: {cause.strip()}"
                ) from error
        with_bos, without = self.tokenizer("a").input_ids, self.tokenizer("a", add_special_tokens=False).input_ids
        self.start = with_bos[: with_bos.index(without[0])]
        assert len(self.start) <= 1, f"{config.model!r} starts a text with several special tokens: {self.start}"

    def _start(self, pool: Pool, local: bool, threads: int) -> Any:
        import torch
        from vllm import LLM
        from vllm.platforms import current_platform

        config = self.config
        options: dict[str, Any] = {}
        if current_platform.is_cpu():
            torch.set_num_threads(threads)
            # Blocks of 32 tokens, not 128: less of a prompt lies behind the last full block, where nothing is reused. That
            # took 25 % less time over 40 prompts with 2 samples.
            options["block_size"] = 32
            # A prompt prefilled in chunks ends a seeded request on the CPU: "CPU Generator does not use offset".
            options |= {"enforce_eager": True, "enable_chunked_prefill": False}
            options["max_num_batched_tokens"] = max(4096, config.max_model_len)
        else:
            share = pool.gpus if 0 < pool.gpus < 1 else 1.0
            options["gpu_memory_utilization"] = 0.9 * share
            if pool.gpus > 1:
                options |= {"tensor_parallel_size": int(pool.gpus), "distributed_executor_backend": "mp"}
        return LLM(
            model=str(Path(config.model).absolute()) if local else config.model,
            revision=config.revision,
            tokenizer_revision=config.revision,
            dtype=config.dtype,
            quantization=config.quantization,
            max_model_len=config.max_model_len,
            enable_prefix_caching=True,
            trust_remote_code=False,
            generation_config="vllm",  # not the folder's own top_k and the like, which nobody asked for
            use_tqdm_on_load=False,
            seed=0,
            **options,
        )

    # -- prompts ----------------------------------------------------------------------------------------------------

    def tokenise(self, text: str) -> list[int]:
        """Tokens of a text; ``<|im_start|>`` inside it is twelve characters, not a token."""
        return self.tokenizer(
            tables.clean(text), add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids

    def _fixed(self, text: str) -> list[int]:
        # `before` and `after` are the same for every row of a stage
        if text not in self.pieces:
            if len(self.pieces) > 64:
                self.pieces.clear()
            self.pieces[text] = self.tokenise(text)
        return self.pieces[text]

    def encode(self, prompt: Prompt, max_tokens: int) -> tuple[list[int], bool]:
        """Tokens of a prompt, and whether its passage was cut. Raises ValueError where it cannot fit."""
        before, after = self.start + self._fixed(prompt.before), self._fixed(prompt.after)
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
        """``n`` completions for each prompt: one request, whose sample ``i`` is drawn with ``seed + i``."""
        from vllm import SamplingParams

        made: list[list[Completion]] = [[] for _ in prompts]
        asked: list[tuple[int, list[int], bool]] = []
        for i, prompt in enumerate(prompts):
            try:
                asked.append((i, *self.encode(prompt, sampling.max_tokens)))
            except ValueError as error:
                made[i] = _failed(n, str(error))
        wanted = [
            SamplingParams(
                n=n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seeds[i],
                stop=list(prompts[i].stop),
            )
            for i, _, _ in asked
        ]
        answers = self._answers([tokens for _, tokens, _ in asked], wanted)
        for (i, tokens, cut), answer in zip(asked, answers, strict=True):
            if isinstance(answer, str):
                made[i] = _failed(n, answer)
                continue
            made[i] = [
                Completion(
                    raw=tables.clean(output.text),
                    finish_reason=output.finish_reason,
                    prompt_tokens=len(tokens),
                    cached_tokens=answer.num_cached_tokens or 0,
                    completion_tokens=len(output.token_ids),
                    truncated=cut,
                )
                for output in sorted(answer.outputs, key=lambda output: output.index)
            ]
        return made

    def _answers(self, prompts: list[list[int]], wanted: list[Any]) -> list[Any]:
        """vLLM's answer to each prompt, or its error. One bad prompt ends a whole call: halve it and ask again."""
        if not prompts:
            return []
        requests: list[Any] = [{"prompt_token_ids": tokens} for tokens in prompts]
        try:
            return self.llm.generate(requests, wanted, use_tqdm=False)
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                raise RuntimeError(f"the engine of {self.config.model!r} died: {error}") from error
            self._drop_unfinished()
            if len(prompts) == 1:
                return [f"{type(error).__name__}: {error}"[:500]]
        half = len(prompts) // 2
        return self._answers(prompts[:half], wanted[:half]) + self._answers(prompts[half:], wanted[half:])

    def _drop_unfinished(self) -> None:
        # an error inside a step leaves the other requests queued: their answers would come with the next call
        engine = self.llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def close(self) -> None:
        """Frees the model and the cache. A second call does nothing."""
        if self not in _opened:
            return
        _opened.remove(self)
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.tokenizer
        _release()


def _failed(n: int, error: str) -> list[Completion]:
    return [Completion(None, None, 0, 0, 0, error=error) for _ in range(n)]


@contextlib.contextmanager
def _undone() -> Iterator[None]:
    """Takes back what starting vLLM does to the process: environment for children, a dead ``torch.set_num_threads``."""
    before = {name: os.environ.get(name) for name in ("LD_PRELOAD", "OMP_NUM_THREADS")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if "torch" in sys.modules:
            torch = sys.modules["torch"]
            torch.set_num_threads = torch._C.set_num_threads  # type: ignore[attr-defined]


def _release() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()
