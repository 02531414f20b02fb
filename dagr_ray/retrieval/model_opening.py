"""Checks that an encoder opens and returns vectors, once for each content, in its own process, before anything starts.

``model_folder`` detects most damage in the files. Other damage (weights of another shape, a missing tensor, an id above the
vocabulary, NaN) shows only when the model is opened, which takes seconds and memory. A separate process frees the memory of
the driver, and successful checks are remembered.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagr_ray.core import environment
from dagr_ray.core.config import ConfigError, digest, from_json
from dagr_ray.core.terminal import say
from dagr_ray.quickstart import models
from dagr_ray.retrieval.encoder import TASKS, Encoder, Task, encode, load

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# A larger folder is only opened by the worker that uses it, because a driver may lack the memory.
MOST_BYTES = 2**31
PATIENCE_S = 600
NOT_HERE = 3  # exit code: the library is not installed
TEXTS = ("a text", "Another, somewhat longer: 12 words, 3 signs and a name, Zoë.")


def check(encoders: Iterable[Encoder]) -> None:
    """Raises ConfigError if one of the encoders does not open. Hub ids and folders over 2 GiB are not checked."""
    import_paths = [str(Path(__file__).parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
    unknown = {encoder.fingerprint(): encoder for encoder in encoders if encoder.local and not _is_known(encoder)}
    for encoder in unknown.values():
        sizes = [path.stat().st_size for path in encoder.folder.rglob("*.safetensors")]
        mark = models.cache_dir() / "opened" / digest(encoder.identity())
        if sum(sizes) > MOST_BYTES or mark.is_file():
            continue
        try:
            done = subprocess.run(
                # -P: nothing is imported from the user's working directory
                [sys.executable, "-P", "-m", "dagr_ray.retrieval.model_opening"],
                env=environment.with_values({"PYTHONPATH": os.pathsep.join(import_paths)}),
                input=json.dumps(encoder.to_json()), capture_output=True, text=True, timeout=PATIENCE_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise ConfigError(
                f"encoder: model = {encoder.model!r} did not open in {PATIENCE_S} s; give another model"
            ) from late
        if done.returncode == NOT_HERE:
            continue  # a driver does not need the library; a worker reports if it is missing
        output = done.stdout.strip().splitlines()
        if done.returncode or not output or output[-1] != "opened":
            lines = output or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ConfigError(
                lines[-1] if output else f"encoder: model = {encoder.model!r} cannot be opened: {lines[-1][:300]}"
            )
        with contextlib.suppress(OSError):  # without the mark, the next run checks again
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _is_known(encoder: Encoder) -> bool:
    """Whether it is the quick start's encoder with the published checksum, and no more than its number of layers."""
    return (
        encoder.folder == models.minilm_folder()
        and (encoder.layers or 0) <= models.MINILM_LAYERS
        and bool(models.minilm())
    )


def try_opening(encoder: Encoder) -> None:
    """Opens an encoder and encodes a few texts. Raises ConfigError."""
    import torch

    missing: set[str] = set()
    with _collect_missing_weights(missing):
        model = load(encoder, "cpu")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ConfigError(f"encoder: model = {encoder.model!r}: {name} has numbers that are not finite")
    dimensions = []
    for task, prompt in zip(TASKS, encoder.prompts(), strict=True):
        texts = [*TEXTS, "long " * min(2 * (encoder.max_length or 512), 4096)]
        try:
            dimension, used = _used_weights(model, prompt, task)
            dimensions.append(dimension)
            if len(set(dimensions)) == 1:
                encode(model, texts, prompt, "float32", task)
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(f"encoder: model = {encoder.model!r} cannot encode a {task}: {reason}") from error
        lacking = sorted(name for name in missing if any(weight.endswith(f".{name}") for weight in used))
        if lacking:
            raise ConfigError(
                f"encoder: model = {encoder.model!r} lacks weights that its vectors need, such as {lacking[0]}; "
                "copy the folder again, or give another model"
            )
    if len(set(dimensions)) > 1:
        raise ConfigError(
            f"encoder: model = {encoder.model!r}: queries have {dimensions[0]} dimensions, documents {dimensions[1]}; "
            "give another model"
        )


@contextlib.contextmanager
def _collect_missing_weights(names: set[str]) -> Iterator[None]:
    """Collects the names of weights that no file has. transformers initialises them at random and only logs it."""
    from transformers import modeling_utils

    real = getattr(modeling_utils, "log_state_dict_report", None)

    def report(*args: Any, **options: Any) -> None:
        names.update(getattr(options.get("loading_info"), "missing_keys", ()))
        assert real is not None
        real(*args, **options)

    if real is not None:
        modeling_utils.log_state_dict_report = report
    try:
        yield
    finally:
        if real is not None:
            modeling_utils.log_state_dict_report = real


def _used_weights(model: SentenceTransformer, prompt: str, task: Task) -> tuple[int, list[str]]:
    """The dimension of the vectors, and the weights that they depend on; BERT's pooler, for example, has no effect."""
    tokens = model.preprocess(list(TEXTS), prompt=prompt or None, task=task)
    vectors = model(tokens, task=task)["sentence_embedding"]
    if vectors.requires_grad:
        vectors.sum().backward()
    used = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return vectors.shape[1], used


def main() -> int:
    """Reads an encoder as JSON, and prints "opened" or the error in one line."""
    try:
        try_opening(from_json(json.load(sys.stdin), Encoder))
    except ConfigError as error:
        say(error)
        return 1
    except ModuleNotFoundError:
        return NOT_HERE
    say("opened")
    return 0


if __name__ == "__main__":
    sys.exit(main())
