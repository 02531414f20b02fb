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
from dagr_ray.core.job_imports import send_whole
from dagr_ray.core.storage import own_temporary

ALONE = "DAGR_RAY_ALONE"
ANSWER_S = 12.0  # for a cluster's port to open, and again for its answer
# A socket's path has at most 107 bytes, of which Ray's names below its folder take 64.
SESSIONS_BYTES = 107 - 64


# By this process, for a Ray of its own; Ray reads a token once in a process, so the next one has the same.
_drawn_tokens: set[str] = set()


def is_alone() -> bool:
    """Whether Ray was started by a driver of ours for itself: it ends with that driver, and has no dashboard to ask."""
    return bool(environment.get(ALONE))


def connect(address: str | None = None) -> None:
    """Starts or joins Ray, unless this program has done so: ``ray.init`` before it holds, in a notebook for example.

    ``address`` None joins the cluster named by RAY_ADDRESS, and else starts Ray on this machine alone, on localhost.
    Raises ConfigError, within half a minute, if there is no cluster at the address.
    """
    # The JVM (Lucene) and Ray both claim SIGSEGV; without this a harmless JVM signal ends the process.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    source = "--address" if address else "RAY_ADDRESS"
    address = address or environment.get("RAY_ADDRESS") or "local"
    if address == "local":
        # Read by Ray at import: a head for this machine alone, whose every port is on 127.0.0.1.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # One process less for each training: nobody takes this machine away with notice.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        if "ray" not in sys.modules:  # else Ray itself turns tokens on
            os.environ["RAY_AUTH_MODE"] = "token"
    # Ray Train looks at its workers every 2 s by default: with a dozen short trainings that adds up.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # Tune's own tables and logger files: the study prints and records its trials itself.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Its handler of Ctrl-C waits 10 s for trials to save what a stage's folder has anyway, and then goes on.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Notes about the runs of a pool, and about arguments of actors in the object store, that nobody can act on.
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    send_whole()
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.pop(ALONE, None)
    if address != "local" and environment.get("RAY_AUTH_TOKEN") in _drawn_tokens:
        from ray._raylet import AuthenticationTokenLoader

        del os.environ["RAY_AUTH_TOKEN"]  # one that was inherited stays: it may be what the cluster asks for
        AuthenticationTokenLoader.instance().reset_cache()
    if address == "local":
        # "local": without it, Ray would try for minutes to join a cluster that was killed and left its address behind
        options |= {"include_dashboard": False, "_temp_dir": _sessions()}
        # what Ray starts here inherits both; in a file, the token would have to lie in HOME
        os.environ[ALONE] = "1"
        if "RAY_AUTH_TOKEN" not in os.environ:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            _drawn_tokens.add(os.environ["RAY_AUTH_TOKEN"])
    else:
        address = _answering(address, source)
    _start(address, options)


def _start(address: str, options: dict[str, Any]) -> None:
    """``ray.init``, whose own handlers of SIGTERM end the program with code 15 and without a word."""
    import ray

    if not environment.debug():
        # It prints a page about each worker that died, on standard output, into what a verb prints as JSON.
        ray._private.worker.listen_error_messages = lambda worker, stopped: None
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **options)
    except SystemExit as stop:
        if here and stop.code == signal.SIGTERM and callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


def _sessions() -> str:
    """A new Ray's sessions (sockets, logs, spilled objects) lie where no other user can look: Ray opens its folder to all.

    Raises ConfigError if there is no place for it.
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


def _answering(address: str, source: str) -> str:
    """The host and port of a running cluster. Raises ConfigError if none answers: Ray would try for ever, without a word."""
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient

    named = f"{source} = {address!r}"
    remedy = f"start a cluster there, or {'unset RAY_ADDRESS' if source == 'RAY_ADDRESS' else 'leave --address out'}"
    remedy += " to use this machine alone"
    if "://" in address:
        raise ConfigError(
            f"{named} is not the address of a cluster's head; give host:port of its GCS, such as 10.0.0.5:6379, on a machine of "
            "the cluster, or send the job with `ray job submit`"
        )
    try:
        found = canonicalize_bootstrap_address(address)
        host, _, port = (found or "").rpartition(":")
        if not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError
    except ConnectionError:
        raise ConfigError(f"{named}: no running cluster was found on this machine; {remedy}") from None
    except (ValueError, OSError):
        raise ConfigError(
            f"{named} is not host:port, such as 10.0.0.5:6379; mend it, or {remedy.partition('or ')[2]}"
        ) from None
    until = time.monotonic() + ANSWER_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=until - time.monotonic()).close()
            break
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() + 1 > until:
                why = str(error.strerror or error).lower()
                raise ConfigError(f"{named}: no Ray cluster answers there ({why}); {remedy}") from None
            time.sleep(1)  # it may be starting
    heard: list[Exception | None] = []

    def ask() -> None:
        try:
            GcsClient(address=found).internal_kv_get(b"session_name", b"session", timeout=ANSWER_S)
            heard.append(None)
        except Exception as error:
            heard.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # Ray itself gives up after 40 s
    asking.start()
    asking.join(ANSWER_S)
    if not heard or heard[0] is not None:
        why = " ".join(str(heard[0]).split())[:200] if heard else "something is there that does not speak as Ray does"
        raise ConfigError(f"{named}: no Ray cluster answers there ({why}); {remedy}")
    assert found is not None
    return found
