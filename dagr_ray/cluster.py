"""Where work runs: placements, and a fixed pool of Ray Data actors that maps over shards.

The only module that uses ray.data. The driver never holds rows: it hands out shard descriptors and gets back one small
dict of statistics for each. A worker reads its slice and commits its parts itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import platform
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field

from dagr_ray.config import Config, ConfigError, JsonObject, from_json
from dagr_ray.paths import absolute
from dagr_ray.store import own_temporary

Shard = dict[str, Any]
Worker = Callable[[Shard], dict[str, Any]]
ALONE = "DAGR_RAY_ALONE"
ANSWER_S = 12.0  # for a cluster's port to open, and again for its answer
# A socket's path has at most 107 bytes, of which Ray's names below its folder take 64.
SESSIONS_BYTES = 107 - 64


class Pool(Config):
    """A fixed-size pool of workers. ``workers=0`` runs the work in the calling process, without Ray.

    ``in_flight`` shards are at work in one worker at once, where its stage can. A range of rows that takes longer than
    ``deadline_s`` has hung: its worker is ended, and the row at fault looked for. ``engine_args`` are options of the
    engine under its own names that only change its speed. Of a training: ``checkpoint_every`` so many steps it can go
    on after a fault, and with ``fsdp`` each worker holds a share of the model's weights and of the optimizer's state.
    """

    workers: Annotated[int, Field(ge=0)] = 0
    cpus: Annotated[float, Field(ge=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    shard_rows: Annotated[int, Field(ge=1)] = 256
    in_flight: Annotated[int, Field(ge=1)] = 2
    deadline_s: Annotated[float, Field(gt=0)] = 1800.0
    engine_args: JsonObject = {}
    checkpoint_every: Annotated[int, Field(ge=1)] = 200
    fsdp: bool = False


class TokenPrices(Config):
    """Dollars for a million tokens of somebody else's model. ``cached`` is that of ``prompt`` unless it is given."""

    prompt: Annotated[float, Field(ge=0)] = 0.0
    cached: Annotated[float, Field(ge=0)] | None = None
    completion: Annotated[float, Field(ge=0)] = 0.0

    def usd(self, prompt: int = 0, cached: int = 0, completion: int = 0) -> float:
        """Dollars for so many tokens; ``cached`` are those of ``prompt`` that were not computed again.

        >>> TokenPrices(prompt=1, cached=0.5, completion=4).usd(prompt=3_000_000, cached=2_000_000, completion=500_000)
        4.0
        """
        hit = self.prompt if self.cached is None else self.cached
        return ((prompt - cached) * self.prompt + cached * hit + completion * self.completion) / 1e6


class Prices(Config):
    """What an hour of a machine costs, and ``tokens`` of an endpoint by the model's name (``default`` for any other).

    Zero where it is not known. A stage whose tokens have a price is billed by them, any other by the time of its pool.
    """

    cpu_hour: Annotated[float, Field(ge=0)] = 0.0
    gpu_hour: Annotated[float, Field(ge=0)] = 0.0
    tokens: dict[str, TokenPrices] = {}


class Placement(Config):
    """How fast, never what: nothing here enters a fingerprint."""

    name: str = "local"
    generate: Pool = Pool(workers=1, cpus=1, shard_rows=128)
    retrieve: Pool = Pool()
    light: Pool = Pool(shard_rows=16384)
    train: Pool = Pool(workers=1, cpus=0.9)
    trials: Annotated[int, Field(ge=1)] = 2
    prices: Prices = Prices(cpu_hour=0.05)


def load_placement(name: str) -> Placement:
    """A placement from a TOML file, or a built-in one by name (``local``). Raises ConfigError with what is allowed."""
    if name == "local":
        return Placement()
    path = Path(absolute(name)) if name else Path()
    if not path.is_file():
        raise ConfigError(
            f"placement {name!r} is not a file; allowed: local, or a TOML file such as cluster/one_gpu.toml"
        )
    try:
        return from_json(tomllib.loads(path.read_text()), Placement)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"placement {name!r} is not TOML: {error}; mend the file") from None


# Folders of the jobs that were loaded, the last one first: what lies there is importable. Those that were not before:
_beside: list[str] = []
_added: set[str] = set()


def beside() -> list[str]:
    """The folders of the jobs that this process has loaded."""
    return list(_beside)


def import_beside(folders: Sequence[str]) -> None:
    """Makes what lies in the folders importable, after all that is installed, so that nothing of that is covered."""
    for folder in reversed(folders):
        if folder in _added:
            sys.path.remove(folder)
            _added.remove(folder)
        if folder not in sys.path:
            sys.path.insert(len(sys.path) - len(_added), folder)
            _added.add(folder)
        _beside[:] = [folder, *(each for each in _beside if each != folder)]


@contextlib.contextmanager
def importing_beside(folder: str) -> Iterator[None]:
    """A job of the folder is loaded inside. What it and earlier jobs have imported from beside them is read anew."""
    for name, module in list(sys.modules.items()):
        if _home(module) in _added:
            del sys.modules[name]
    importlib.invalidate_caches()
    import_beside([folder])
    yield


def _home(module: ModuleType) -> str | None:
    """The folder that a module, or the package around it, lies in."""
    file, name = getattr(module, "__file__", None), getattr(module, "__name__", "")
    if not file or name.startswith("dagr_ray"):
        return None
    above = Path(file).parents
    up = name.count(".") + (Path(file).name == "__init__.py")
    return str(above[up]) if up < len(above) else None


def send_whole() -> None:
    """Classes and functions from beside a job are sent to workers whole: these may have no such folder."""
    from ray import cloudpickle

    for name, module in list(sys.modules.items()):
        if "." not in name and _beside and _home(module) in _beside:
            cloudpickle.register_pickle_by_value(module)


# By this process, for a Ray of its own; Ray reads a token once in a process, so the next one has the same.
_drawn_tokens: set[str] = set()


def is_alone() -> bool:
    """Whether Ray was started by a driver of ours for itself: it ends with that driver, and has no dashboard to ask."""
    return ALONE in os.environ


def connect(address: str | None = None) -> None:
    """Starts or joins Ray, unless this program has done so: ``ray.init`` before it holds, in a notebook for example.

    ``address`` None joins the cluster named by RAY_ADDRESS, and else starts Ray on this machine alone, on localhost.
    Raises ConfigError, within half a minute, if there is no cluster at the address.
    """
    # The JVM (Lucene) and Ray both claim SIGSEGV; without this a harmless JVM signal ends the process.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    source = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
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
    if address != "local" and os.environ.get("RAY_AUTH_TOKEN") in _drawn_tokens:
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

    if not os.environ.get("DAGR_DEBUG"):
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
    places = [os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp"]
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


def _actor(factory: Callable[[], Worker], name: str) -> type:
    """An actor class that opens its worker once and feeds it shards.

    The factory travels inside the class: as a constructor argument it would live in the object store, where a restarted
    actor may not find it again (ray#53727).
    """

    class ShardActor:
        def __init__(self) -> None:
            from ray.util.metrics import Gauge

            self.in_flight = Gauge("dagr_shards_in_flight", "Shards at work in a worker", ("stage", "pid"))
            self.in_flight.set_default_tags({"stage": name, "pid": str(os.getpid())})
            self.busy, self.lock = 0, threading.Lock()
            # told with the first shard: an error raised here arrives as a page of text
            self.refusal: dict[str, str | None] = {}
            try:
                self.worker = factory()
            except ConfigError as error:
                self.refusal = {"refusal": str(error)}
            except ModuleNotFoundError as error:
                self.refusal = {"refusal": str(error), "missing": error.name}

        def _count(self, more: int) -> None:
            with self.lock:
                self.busy += more
                self.in_flight.set(self.busy)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            if self.refusal:
                return {"result": [json.dumps(self.refusal)]}
            self._count(1)
            try:
                return {"result": [json.dumps(self.worker(json.loads(text))) for text in batch["shard"]]}
            finally:
                self._count(-1)

    return ShardActor


class _Meter:
    """What the receipts of a run say, in Ray's metrics: a cluster's Prometheus sees them on every node's metrics port."""

    def __init__(self, name: str, shards: int) -> None:
        from ray.util.metrics import Counter, Gauge

        self.tags, self.left = {"stage": name}, shards
        self.rows = Counter("dagr_rows", "Rows read by finished shards", ("stage",))
        self.accepted = Counter("dagr_rows_accepted", "Rows that finished shards wrote", ("stage",))
        self.rejected = Counter("dagr_rows_rejected", "Rows refused by finished shards", ("stage", "reason"))
        self.tokens = Counter("dagr_tokens", "Tokens of finished shards", ("stage", "kind"))
        self.queued = Gauge("dagr_shards_queued", "Shards that have no receipt yet", ("stage",))
        self.share = Gauge("dagr_busy_share", "Share of their time that workers were at work on shards", ("stage",))
        self.seconds = {"busy_s": 0.0, "idle_s": 0.0}
        self.queued.set(self.left, self.tags)

    def add(self, receipt: dict[str, Any]) -> None:
        """Counts a finished shard."""
        counts, cost = receipt.get("counts", {}), receipt.get("cost", {})
        self.left -= 1
        self.queued.set(self.left, self.tags)
        found: list[tuple[Any, int, dict[str, str]]] = [(self.rows, counts.get("in", 0), {})]
        found += [(self.accepted, counts.get("out", 0), {})]
        found += [(self.rejected, n, {"reason": reason}) for reason, n in counts.get("rejected", {}).items()]
        kinds = {"prompt": "prompt_tokens", "cached": "cached_tokens", "completion": "completion_tokens"}
        found += [(self.tokens, cost.get(key, 0), {"kind": kind}) for kind, key in kinds.items()]
        for counter, more, tags in found:
            if more > 0:  # Ray's counters refuse to grow by nothing
                counter.inc(more, self.tags | tags)
        self.seconds = {key: spent + cost.get(key, 0.0) for key, spent in self.seconds.items()}
        self.share.set(self.seconds["busy_s"] / max(sum(self.seconds.values()), 1e-9), self.tags)


def where() -> str:
    """The node that this process works on: Ray's id of it inside a worker, else the machine's name."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return ray.get_runtime_context().get_node_id()
    return platform.node()


def memory_is_short() -> bool:
    """Whether this machine, or its container, uses nearly as much memory as has Ray end a worker."""
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    share = float(os.environ.get("RAY_memory_usage_threshold", "0.95"))  # noqa: SIM112  Ray's own setting and default
    return get_used_memory() >= 0.95 * share * get_system_memory()


def map_shards(
    factory: Callable[[], Worker], shards: Sequence[Shard], pool: Pool, threads: int = 1, name: str = ""
) -> Iterator[dict[str, Any]]:
    """Runs every shard on the pool; yields each worker's statistics as shards end, in any order.

    ``factory`` is called once in each worker and returns the callable that does a shard, in ``threads`` threads at
    once. An exception of the user's code ends the run; a dead worker is replaced by Ray and its shards done again.
    ``name`` is the tag ``stage`` in Ray's metrics, which tell of this process's own work too, where Ray runs.
    """
    if not shards:
        return
    if pool.workers == 0:
        loaded = sys.modules.get("ray")
        here = _Meter(name, len(shards)) if loaded is not None and loaded.is_initialized() else None
        worker = factory()
        for shard in shards:
            receipt = worker(shard)
            if here is not None:
                here.add(receipt)
            yield receipt
        return
    import ray

    send_whole()
    if not ray.is_initialized():
        connect()  # Ray's own start would wait for a cluster that was killed and left its address behind
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # It warns every 30 s that an engine holds memory, which it does by design.
    context.issue_detectors_config.detectors = []
    rows = [{"shard": json.dumps(shard)} for shard in shards]
    mapped = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _actor(factory, name),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=pool.workers,
            max_tasks_in_flight_per_actor=max(threads, 2),  # one waits where one is at work
            enable_true_multi_threading=threads > 1,
            max_concurrent_calls_per_actor=threads if threads > 1 else None,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    meter = _Meter(name, len(shards))
    # without prefetching, so that a shard's statistics arrive when it ends
    for batch in mapped.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
        for text in batch["result"].to_pylist():
            receipt = json.loads(text)
            if "missing" in receipt:
                raise ModuleNotFoundError(receipt["refusal"], name=receipt["missing"])
            if "refusal" in receipt:
                raise ConfigError(receipt["refusal"])
            meter.add(receipt)
            yield receipt
