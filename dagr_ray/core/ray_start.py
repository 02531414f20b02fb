"""Starts Ray on this machine, or joins a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from typing import Any

from dagr_ray.core import environment
from dagr_ray.core.config import ConfigError
from dagr_ray.core.job_imports import pickle_job_modules_by_value
from dagr_ray.core.storage import own_temporary

ALONE = "DAGR_RAY_ALONE"
ANSWER_S = 12.0  # for a cluster's port to open, and again for its reply
# A socket's path has at most 107 bytes, of which Ray's names below its folder take 64.
SESSIONS_BYTES = 107 - 64


# Tokens that this process made for its own Ray. Ray reads a token once per process, so the next Ray gets the same one.
_drawn_tokens: set[str] = set()


def is_alone() -> bool:
    """Whether this driver started Ray only for itself: Ray ends with the driver and has no dashboard."""
    return bool(environment.get(ALONE))


def connect(address: str | None = None) -> None:
    """Starts or joins Ray, unless this program has called ``ray.init`` before, in a notebook for example.

    ``address`` None joins the cluster named by RAY_ADDRESS, or else starts Ray on this machine alone, on localhost.
    Raises ConfigError within half a minute if no cluster answers at the address.
    """
    # The JVM (Lucene) and Ray both handle SIGSEGV; without this, a harmless JVM signal ends the process.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    source = "--address" if address else "RAY_ADDRESS"
    address = address or environment.get("RAY_ADDRESS") or "local"
    if address == "local":
        # Ray reads this at import: the head serves this machine alone, with every port on 127.0.0.1.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Saves a process in each training: this machine is never preempted with notice.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        if "ray" not in sys.modules:  # otherwise Ray enables tokens itself
            os.environ["RAY_AUTH_MODE"] = "token"
    # Ray Train checks its workers every 2 s by default, which adds up over a dozen short trainings.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # Disables Tune's own tables and logger files: the study prints and records its trials itself.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Tune's Ctrl-C handler waits 10 s to save trials, whose state is in the stages' folders anyway, and then goes on.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Suppresses notes about pools and actor arguments on which a user cannot act.
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    pickle_job_modules_by_value()
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.pop(ALONE, None)
    if address != "local" and environment.get("RAY_AUTH_TOKEN") in _drawn_tokens:
        from ray._raylet import AuthenticationTokenLoader

        del os.environ["RAY_AUTH_TOKEN"]  # an inherited token stays: the cluster may ask for it
        AuthenticationTokenLoader.instance().reset_cache()
    if address == "local":
        # without "local", Ray would try for minutes to join a killed cluster that left its address behind
        options |= {"include_dashboard": False, "_temp_dir": _session_folder()}
        # Ray's child processes inherit both; in a file, the token would have to lie in HOME
        os.environ[ALONE] = "1"
        if "RAY_AUTH_TOKEN" not in os.environ:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            _drawn_tokens.add(os.environ["RAY_AUTH_TOKEN"])
    else:
        address = _head_address(address, source)
    _start(address, options)


def _start(address: str, options: dict[str, Any]) -> None:
    """``ray.init``, without its SIGTERM handlers, which end the program with code 15 and no message."""
    import ray

    if not environment.debug():
        # It prints a page about each dead worker to standard output, in the middle of a verb's JSON.
        ray._private.worker.listen_error_messages = lambda worker, stopped: None
    in_main_thread = threading.current_thread() is threading.main_thread()
    old_handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **options)
    except SystemExit as stop:
        if in_main_thread and stop.code == signal.SIGTERM and callable(old_handler):
            old_handler(signal.SIGTERM, None)
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, old_handler)


def _session_folder() -> str:
    """The folder for a new Ray's sessions (sockets, logs, spilled objects). Ray opens its folder to all users, so it lies
    inside one that no other user can read. Raises ConfigError if no folder is usable.
    """
    places = [environment.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp"]
    for place in places:
        if place:
            with contextlib.suppress(OSError):
                folder = f"{own_temporary(os.path.abspath(place))}/ray"
                if len(os.fsencode(folder)) <= SESSIONS_BYTES:
                    return folder
    raise ConfigError(
        f"no place for Ray's sockets: {places[0] or places[1]!r} cannot be written or has a long name; set RAY_TMPDIR to a "
        f"folder that you can write, with a name of at most {SESSIONS_BYTES - 20} bytes"
    )


def _head_address(address: str, source: str) -> str:
    """The host and port of a running cluster. Raises ConfigError if none answers: Ray would retry for ever, silently."""
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient

    setting = f"{source} = {address!r}"
    remedy = f"start a cluster there, or {'unset RAY_ADDRESS' if source == 'RAY_ADDRESS' else 'leave --address out'}"
    remedy += " to use this machine alone"
    if "://" in address:
        raise ConfigError(
            f"{setting} is not the address of a cluster's head; give host:port of its GCS, such as 10.0.0.5:6379, on a machine of "
            "the cluster, or send the job with `ray job submit`"
        )
    try:
        head = canonicalize_bootstrap_address(address)
        host, _, port = (head or "").rpartition(":")
        if not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError
    except ConnectionError:
        raise ConfigError(f"{setting}: no running cluster was found on this machine; {remedy}") from None
    except (ValueError, OSError):
        raise ConfigError(
            f"{setting} is not host:port, such as 10.0.0.5:6379; correct it, or {remedy.partition('or ')[2]}"
        ) from None
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=deadline - time.monotonic()).close()
            break
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() + 1 > deadline:
                why = str(error.strerror or error).lower()
                raise ConfigError(f"{setting}: no Ray cluster answers there ({why}); {remedy}") from None
            time.sleep(1)  # the cluster may be starting
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            GcsClient(address=head).internal_kv_get(b"session_name", b"session", timeout=ANSWER_S)
            answers.append(None)
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # Ray itself gives up after 40 s
    thread.start()
    thread.join(ANSWER_S)
    if not answers or answers[0] is not None:
        why = " ".join(str(answers[0]).split())[:200] if answers else "the server there does not speak Ray's protocol"
        raise ConfigError(f"{setting}: no Ray cluster answers there ({why}); {remedy}")
    assert head is not None
    return head
