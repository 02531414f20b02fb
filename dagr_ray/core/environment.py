"""The environment variables that the package reads and sets: ``docs/environment.md`` is the same list, with explanations.

``core.ray_start`` sets Ray's own as it starts Ray, and ``engines.vllm`` takes back what starting vLLM sets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# Each variable that is read, and what an unset or empty one means.
READ = {
    "DAGR_RUNS": "runs",
    "DAGR_SCRATCH": "",
    "DAGR_CACHE": "",
    "DAGR_DEBUG": "",
    "DAGR_RAY_ALONE": "",  # set by a driver for the processes of a Ray that it started for itself
    "RAY_ADDRESS": "",
    "RAY_TMPDIR": "",
    "RAY_AUTH_TOKEN": "",
    "RAY_memory_usage_threshold": "0.95",  # Ray's own default
    "MLFLOW_TRACKING_URI": "",
    "VLLM_CPU_KVCACHE_SPACE": "",
    "XDG_CACHE_HOME": "",
    "PYTHONPATH": "",
    "PYTHONUTF8": "",
}
# Those that name a folder, and that workers read too.
FOLDERS = ("TMPDIR", "RAY_TMPDIR", "HOME", "HF_HOME", "DAGR_CACHE", "DAGR_SCRATCH")
# Set by the command `dagr` for itself and its workers, unless they are set.
COMMAND = {
    "RAY_DEDUP_LOGS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONWARNINGS": "ignore",
    "PYTHONUTF8": "1",  # of workers: libraries there write files, whatever the terminal's encoding
}
# Set before vLLM is imported, unless they are set.
VLLM = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings at the start of a CPU engine are many and all about what is set here
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait: 4 times slower where the cores are shared
}
# Set before a study is logged to MLflow, unless they are set: a server that does not answer holds nobody up for long.
MLFLOW = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def get(name: str) -> str:
    """The value of a variable of ``READ``, or its default if it is unset or empty. Raises KeyError for another name.

    >>> os.environ["DAGR_RUNS"] = ""
    >>> get("DAGR_RUNS")
    'runs'
    """
    default = READ[name]
    return os.environ.get(name) or default


def debug() -> bool:
    """Whether DAGR_DEBUG asks for tracebacks and the libraries' messages."""
    return bool(get("DAGR_DEBUG"))


def key(name: str) -> str:
    """The secret in a variable that a recipe names, without spaces around it; empty if it is unset."""
    return os.environ.get(name, "").strip()


def set_defaults(values: Mapping[str, str]) -> None:
    """Sets the variables that are not set."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def with_values(values: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with ``values``, for a process to be started."""
    return os.environ | values
