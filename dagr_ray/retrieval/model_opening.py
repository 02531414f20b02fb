"""Whether an encoder opens and gives vectors: tried once for each content, in a process of its own, before anything starts.

Most damage is seen in the files (``model_folder``). What is left (weights of another shape, a tensor that is not there, an
id above the vocabulary, numbers that are none) shows when the model is opened, which takes seconds and memory: a driver
that only hands out work keeps neither, and what has opened is remembered.
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

# A larger folder is opened by the worker that works with it: a driver may have no place for it.
MOST_BYTES = 2**31
PATIENCE_S = 600
NOT_HERE = 3  # exit code: the library is not installed
TEXTS = ("a text", "Another, somewhat longer: 12 words, 3 signs and a name, Zoë.")


def check(encoders: Iterable[Encoder]) -> None:
    """Raises ConfigError where one of the encoders does not open. Hub ids and folders over 2 GiB are not tried."""
    found = [str(Path(__file__).parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
    for encoder in {each.fingerprint(): each for each in encoders if each.local and not _is_known(each)}.values():
        sizes = [path.stat().st_size for path in encoder.folder.rglob("*.safetensors")]
        mark = models.cache_dir() / "opened" / digest(encoder.identity())
        if sum(sizes) > MOST_BYTES or mark.is_file():
            continue
        try:
            done = subprocess.run(
                # -P: nothing is imported from the folder in which the user stands
                [sys.executable, "-P", "-m", "dagr_ray.retrieval.model_opening"],
                env=environment.with_values({"PYTHONPATH": os.pathsep.join(found)}),
                input=json.dumps(encoder.to_json()), capture_output=True, text=True, timeout=PATIENCE_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise ConfigError(
                f"encoder: model = {encoder.model!r} did not open in {PATIENCE_S} s; give another model"
            ) from late
        if done.returncode == NOT_HERE:
            continue  # a driver needs none of it; a worker says what it lacks
        told = done.stdout.strip().splitlines()
        if done.returncode or not told or told[-1] != "opened":
            said = told or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ConfigError(
                said[-1] if told else f"encoder: model = {encoder.model!r} cannot be opened: {said[-1][:300]}"
            )
        with contextlib.suppress(OSError):  # else it is tried again the next time
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _is_known(encoder: Encoder) -> bool:
    """Whether it is the quick start's encoder, whose file has the published checksum, with as many layers or fewer."""
    return (
        encoder.folder == models.minilm_folder()
        and (encoder.layers or 0) <= models.MINILM_LAYERS
        and bool(models.minilm())
    )


def tried(encoder: Encoder) -> None:
    """Opens an encoder and encodes a few texts. Raises ConfigError."""
    import torch

    gone: set[str] = set()
    with _told_what_is_missing(gone):
        model = load(encoder, "cpu")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ConfigError(f"encoder: model = {encoder.model!r}: {name} holds numbers that are not finite")
    wide = []
    for task, prompt in zip(TASKS, encoder.prompts(), strict=True):
        texts = [*TEXTS, "long " * min(2 * (encoder.max_length or 512), 4096)]
        try:
            dimension, needed = _needed(model, prompt, task)
            wide.append(dimension)
            if len(set(wide)) == 1:
                encode(model, texts, prompt, "float32", task)
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(f"encoder: model = {encoder.model!r} cannot encode a {task}: {reason}") from error
        lacking = sorted(name for name in gone if any(each.endswith(f".{name}") for each in needed))
        if lacking:
            raise ConfigError(
                f"encoder: model = {encoder.model!r} lacks weights that its vectors need, such as {lacking[0]}; "
                "copy the folder anew, or give another model"
            )
    if len(set(wide)) > 1:
        raise ConfigError(
            f"encoder: model = {encoder.model!r}: queries have {wide[0]} dimensions and documents {wide[1]}"
        )


@contextlib.contextmanager
def _told_what_is_missing(names: set[str]) -> Iterator[None]:
    """Adds the names of weights that no file has: transformers draws them at random, and says so in a log alone."""
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


def _needed(model: SentenceTransformer, prompt: str, task: Task) -> tuple[int, list[str]]:
    """The dimension of a vector, and the weights that it depends on: BERT's pooler, say, is there and not used."""
    tokens = model.preprocess(list(TEXTS), prompt=prompt or None, task=task)
    vectors = model(tokens, task=task)["sentence_embedding"]
    if vectors.requires_grad:
        vectors.sum().backward()
    needed = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return vectors.shape[1], needed


def main() -> int:
    """Reads an encoder as JSON and prints whether it opens, or why not in one line."""
    try:
        tried(from_json(json.load(sys.stdin), Encoder))
    except ConfigError as error:
        say(error)
        return 1
    except ModuleNotFoundError:
        return NOT_HERE
    say("opened")
    return 0


if __name__ == "__main__":
    sys.exit(main())
