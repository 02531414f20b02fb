"""A fixed pool of Ray Data actors that maps over shards."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dagr_ray.core import environment
from dagr_ray.core.config import ConfigError
from dagr_ray.core.job_imports import pickle_job_modules_by_value
from dagr_ray.core.placement import Pool
from dagr_ray.core.ray_start import connect

Shard = dict[str, Any]
Worker = Callable[[Shard], dict[str, Any]]


def _tag(name: str) -> str:
    r"""A folder's name as Ray's metrics take it: in ASCII.

    >>> _tag("beir-é-0f")
    'beir-\\xe9-0f'
    """
    return name.encode("ascii", "backslashreplace").decode()


def _actor(factory: Callable[[], Worker], name: str) -> type:
    """An actor class that opens its worker once and feeds it shards.

    The factory is part of the class: as a constructor argument it would live in the object store, where a restarted
    actor may not find it (ray#53727).
    """

    class ShardActor:
        def __init__(self) -> None:
            from ray.util.metrics import Gauge

            self.in_flight = Gauge("dagr_shards_in_flight", "Shards at work in a worker", ("stage", "pid"))
            self.in_flight.set_default_tags({"stage": _tag(name), "pid": str(os.getpid())})
            self.busy, self.lock = 0, threading.Lock()
            # returned with the first shard: an error raised here would reach the driver as a page of text
            self.open_error: dict[str, str | None] = {}
            try:
                self.worker = factory()
            except ConfigError as error:
                self.open_error = {"refusal": str(error)}
            except ModuleNotFoundError as error:
                self.open_error = {"refusal": str(error), "missing": error.name}

        def _count(self, more: int) -> None:
            with self.lock:
                self.busy += more
                self.in_flight.set(self.busy)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            if self.open_error:
                return {"result": [json.dumps(self.open_error)]}
            self._count(1)
            try:
                return {"result": [json.dumps(self.worker(json.loads(text))) for text in batch["shard"]]}
            finally:
                self._count(-1)

    return ShardActor


class _Meter:
    """Ray metrics of a run, from its receipts. A cluster's Prometheus reads them on every node's metrics port."""

    def __init__(self, name: str, shards: int) -> None:
        from ray.util.metrics import Counter, Gauge

        self.tags, self.shards_left = {"stage": _tag(name)}, shards
        self.rows = Counter("dagr_rows", "Rows read by finished shards", ("stage",))
        self.accepted = Counter("dagr_rows_accepted", "Rows that finished shards wrote", ("stage",))
        self.rejected = Counter("dagr_rows_rejected", "Rows rejected by finished shards", ("stage", "reason"))
        self.tokens = Counter("dagr_tokens", "Tokens of finished shards", ("stage", "kind"))
        self.queued = Gauge("dagr_shards_queued", "Shards that have no receipt yet", ("stage",))
        self.share = Gauge("dagr_busy_share", "Share of worker time spent on shards", ("stage",))
        self.seconds = {"busy_s": 0.0, "idle_s": 0.0}
        self.queued.set(self.shards_left, self.tags)

    def add(self, receipt: dict[str, Any]) -> None:
        """Counts a finished shard."""
        counts, cost = receipt.get("counts", {}), receipt.get("cost", {})
        self.shards_left -= 1
        self.queued.set(self.shards_left, self.tags)
        increments: list[tuple[Any, int, dict[str, str]]] = [(self.rows, counts.get("in", 0), {})]
        increments += [(self.accepted, counts.get("out", 0), {})]
        increments += [(self.rejected, n, {"reason": reason}) for reason, n in counts.get("rejected", {}).items()]
        kinds = {"prompt": "prompt_tokens", "cached": "cached_tokens", "completion": "completion_tokens"}
        increments += [(self.tokens, cost.get(key, 0), {"kind": kind}) for kind, key in kinds.items()]
        for counter, more, tags in increments:
            if more > 0:  # Ray's counters refuse an increment of 0
                counter.inc(more, self.tags | tags)
        self.seconds = {key: spent + cost.get(key, 0.0) for key, spent in self.seconds.items()}
        self.share.set(self.seconds["busy_s"] / max(sum(self.seconds.values()), 1e-9), self.tags)


def node_id() -> str:
    """The node of this process: Ray's node id inside a worker, else the machine's name."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return ray.get_runtime_context().get_node_id()
    return platform.node()


def is_memory_short() -> bool:
    """Whether this machine or container is within 5 % of the memory use at which Ray kills a worker."""
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    share = float(environment.get("RAY_memory_usage_threshold"))
    return get_used_memory() >= 0.95 * share * get_system_memory()


def map_shards(
    factory: Callable[[], Worker], shards: Sequence[Shard], pool: Pool, threads: int = 1, name: str = ""
) -> Iterator[dict[str, Any]]:
    """Runs every shard on the pool and yields each worker's receipts as shards finish, in any order.

    ``factory`` is called once in each worker and returns the function that runs a shard, in ``threads`` threads at once.
    An exception of the user's code ends the run; Ray replaces a dead worker and runs its shards again. ``name`` is the
    tag ``stage`` in Ray's metrics; if Ray is running, they also cover work in this process.
    """
    if not shards:
        return
    if pool.workers == 0:
        ray_module = sys.modules.get("ray")
        meter = _Meter(name, len(shards)) if ray_module is not None and ray_module.is_initialized() else None
        worker = factory()
        for shard in shards:
            receipt = worker(shard)
            if meter is not None:
                meter.add(receipt)
            yield receipt
        return
    import ray

    pickle_job_modules_by_value()
    if not ray.is_initialized():
        connect()  # Ray's own start would wait for a killed cluster that left its address behind
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray warns every 30 s that an engine holds memory, which is intended.
    context.issue_detectors_config.detectors = []
    rows = [{"shard": json.dumps(shard)} for shard in shards]
    mapped = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _actor(factory, name),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=pool.workers,
            max_tasks_in_flight_per_actor=max(threads, 2),  # one shard waits while one runs
            enable_true_multi_threading=threads > 1,
            max_concurrent_calls_per_actor=threads if threads > 1 else None,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    meter = _Meter(name, len(shards))
    # no prefetching, so that a shard's receipt arrives when the shard ends
    for batch in mapped.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
        for text in batch["result"].to_pylist():
            receipt = json.loads(text)
            if "missing" in receipt:
                raise ModuleNotFoundError(receipt["refusal"], name=receipt["missing"])
            if "refusal" in receipt:
                raise ConfigError(receipt["refusal"])
            meter.add(receipt)
            yield receipt
