"""Makes the environment: ``python3 scripts/setup.py [cpu|gpu]``. Standard library only; a second call costs nothing.

Every step leaves what is there and right, so an interrupted set-up is finished by calling it again. Variables: VENV
(the folder, ``.venv``) and TORCH_CPU_INDEX (where a CPU build of torch is when plain pip would take a CUDA build).
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
# --dry-run with reports is young, and an old pip fetches whole wheels to read their needs.
PIP = "pip>=25.0"


class SetupError(Exception):
    """One line for the user: what failed and what to do."""


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)


def pip(*arguments: str) -> None:
    """Runs pip in the environment; only its errors reach the screen."""
    # pip would compile every file of every package; see compile_what_is_imported
    options = ["-qq", "--disable-pip-version-check", "--no-compile"]
    command = [str(PYTHON), "-m", "pip", "install", *options, *arguments]
    if subprocess.run(command, check=False).returncode:
        what = " ".join(arguments)[:200]
        raise SetupError(f"pip install {what} failed for the reason above; mend it, then run make setup again")


def step(title: str, action: Callable[..., None], *arguments: object) -> None:
    """Runs one step and prints how long it took."""
    began = time.monotonic()
    action(*arguments)
    say(f"  {title}: {time.monotonic() - began:.0f} s")


def side_by_side(act: Callable[[Any], None], each: Sequence[Any]) -> None:
    """Acts on all at once; what fails first is raised when all have ended."""
    with ThreadPoolExecutor(len(each)) as threads:
        list(threads.map(act, each))


def stamp(profile: str) -> Path:
    """The file that says that this environment is complete: its name holds the hash of all that decides its content."""
    sources = [Path(__file__), ROOT / "pyproject.toml", *sorted(REQUIREMENTS.glob(f"{profile}*"))]
    content = b"\0".join(path.read_bytes() for path in sources)
    return VENV / f".dagr-{profile}-{hashlib.sha256(content).hexdigest()[:12]}"


def requirements(path: Path) -> dict[str, str]:
    """Exactly pinned requirements of a file that hold on this machine: canonical name -> version."""
    pinned = {}
    for line in path.read_text().splitlines():
        found = re.match(r"([\w.-]+)==([^\s;]+)(?:\s*;\s*platform_machine == \"(\w+)\")?", line)
        if found and found[3] in (None, platform.machine()):
            pinned[re.sub(r"[-_.]+", "-", found[1]).lower()] = found[2]
    return pinned


def installed() -> dict[str, str]:
    """What the environment holds: canonical name -> version, the local part (``+cpu``) included."""
    code = "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    listed = subprocess.run([str(PYTHON), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in json.loads(listed.stdout)}


def make_venv() -> None:
    """Makes the environment unless there is one with a working pip; removes half-installed packages from it."""
    test = [str(PYTHON), "-m", "pip", "--version"]
    if not PYTHON.exists() or subprocess.run(test, capture_output=True, check=False).returncode:
        if VENV.is_dir() and any(VENV.iterdir()) and not (VENV / "pyvenv.cfg").is_file():
            raise SetupError(f"{VENV} is a folder of something else; set VENV to another one, or empty it")
        make = [sys.executable, "-m", "venv", "--clear", str(VENV)]
        made = subprocess.run(make, capture_output=True, text=True, check=False)
        if made.returncode:
            reason = " ".join((made.stdout + made.stderr).split())[:300]
            raise SetupError(f"cannot make {VENV}: {reason}; on Debian and Ubuntu: apt-get install python3-venv")
    for info in VENV.glob("lib/python*/site-packages/*.dist-info"):
        # pip writes RECORD last: without it the package was cut short, and pip would take it for installed
        if not (info / "RECORD").is_file():
            shutil.rmtree(info)


def torch_requirement(version: str) -> list[str]:
    """pip's arguments for a CPU build: what pip finds by itself where that is one, else one from PyTorch's index."""
    if platform.system() == "Darwin":
        return [f"torch=={version}"]
    ask = [str(PYTHON), "-m", "pip", "install", "-qq", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-"]
    found = subprocess.run([*ask, f"torch=={version}"], capture_output=True, text=True, check=False)
    if found.returncode == 0:
        item = json.loads(found.stdout)["install"][0]
        if "+cpu" in item["metadata"]["version"]:
            return [f"torch=={version}"]
    return [f"torch=={version}+cpu", "--index-url", TORCH_CPU_INDEX]


def install_torch(version: str) -> None:
    """Installs torch by itself; its needs are in the lock."""
    have = installed().get("torch", "")
    if have.partition("+")[0] == version and (have.endswith("+cpu") or platform.system() == "Darwin"):
        return
    pip("--no-deps", *torch_requirement(version))


def missing(path: Path) -> list[str]:
    """The pinned requirements of a file that are not installed in that version."""
    have = installed()
    return [f"{name}=={version}" for name, version in requirements(path).items() if have.get(name) != version]


def install_pinned(path: Path, *options: str) -> None:
    """Installs what is missing of a file, and checks that it all is there."""
    lines = missing(path)
    if lines:
        # every package is named, so none waits for another; pip itself unpacks one after the other
        parts = min(os.cpu_count() or 1, 4, len(lines))
        side_by_side(lambda part: pip("--no-deps", *options, *lines[part::parts]), range(parts))
        lines = missing(path)
    if lines:
        raise SetupError(f"pip left out {', '.join(lines)}; remove {VENV} and run make setup again")


def unpack_models() -> None:
    """Unpacks the quick start's language model once."""
    if subprocess.run([str(PYTHON), "-m", "dagr_ray.quickstart.models"], cwd=ROOT, check=False).returncode:
        raise SetupError(
            f"the quick start's models are not usable (see above); try again: {PYTHON} -m dagr_ray.quickstart.models"
        )


def compile_what_is_imported() -> None:
    """Imports the large packages once, as the quick start does, which leaves their bytecode: a third of all files.

    Without it every process would compile them anew where Python is told to write none (PYTHONDONTWRITEBYTECODE).
    """
    large = (
        "from vllm import LLM; import vllm.v1.engine.core, vllm.model_executor.models.llama",
        "import faiss, ir_measures, mlflow, ray.data, ray.train.torch, ray.tune, sentence_transformers, ray.dashboard.agent",
    )
    commands = [[str(PYTHON), "-c", code] for code in large]
    for process in [subprocess.Popen(each, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for each in commands]:
        process.wait()


def build(profile: str) -> None:
    """All steps, in their order."""
    lock = REQUIREMENTS / f"{profile}.lock"
    pinned = requirements(lock)
    step("virtual environment", make_venv)
    step("pip", pip, PIP, f"setuptools=={pinned['setuptools']}", f"wheel=={pinned['wheel']}")
    steps: list[Any] = [(f"{len(pinned)} packages of {lock.name}", install_pinned, lock)]
    if profile == "cpu":
        torch = requirements(REQUIREMENTS / "cpu.in")["torch"]
        steps.append((f"torch {torch} for CPUs", install_torch, torch))
    side_by_side(lambda each: step(*each), steps)
    # pyserini and this package are built from source, with the setuptools of the lock
    step("packages without their needs", install_pinned, REQUIREMENTS / f"{profile}-nodeps.txt", "--no-build-isolation")
    step("dagr-ray", pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    last = [
        ("the quick start's language model", unpack_models),
        ("bytecode of what is imported", compile_what_is_imported),
    ]
    side_by_side(lambda each: step(*each), last)


def compatible_python() -> None:
    """Goes on with a Python that the project supports, or says which is missing."""
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
    parser.add_argument("--again", action="store_true", help="look at every package though the environment is complete")
    options = parser.parse_args()
    profile = options.profile
    done = stamp(profile)
    if done.exists() and PYTHON.exists() and not options.again:
        return 0
    try:
        compatible_python()
        other = next(VENV.glob(".dagr-gpu-*" if profile == "cpu" else ".dagr-cpu-*"), None)
        if other:
            raise SetupError(f"{VENV} holds the other profile; remove it, or set VENV to another folder")
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
