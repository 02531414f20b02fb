"""Runs shards of a stage in one process: opens the stage once, runs several shards at once if it can, writes receipts.

A stage that can skip rows (``skip_row``) survives rows that kill or hang its engine: see ``poison_rows``. Any other stage
tries a shard three times.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import pyarrow as pa

from dagr_ray.core import blame, job_imports, ray_pool
from dagr_ray.core.artifact import Artifact, Damaged, Json, add_up
from dagr_ray.core.config import ConfigError
from dagr_ray.core.folder import reads_only
from dagr_ray.core.placement import Pool
from dagr_ray.core.poison_rows import (
    DIED,
    DONE,
    ENDED,
    MEMORY,
    STOPPED,
    Mark,
    Range,
    RangeMarks,
    SharedLock,
    SkipReason,
    Watchdog,
    split_ranges,
)
from dagr_ray.core.stage import EngineDied, Inputs, OutOfReach, Output, Run, StageFailed
from dagr_ray.core.terminal import say

if TYPE_CHECKING:
    from dagr_ray.core.stage import Stage


TRIES_PER_SHARD = 3
HUNG, RAISED = "engine_hang", "engine_error"
SKIP_REASONS = (DIED, HUNG, RAISED)


def out_of_reach_message(folder: Artifact, error: BaseException) -> str:
    """The message for a stage that could not read, write, or reach a server."""
    return (
        f"{folder.path}: {blame.reason(error)}; no row was skipped for it: check that the disk has room and that the stage's "
        "inputs and servers are reachable, then run again: finished shards are kept"
    )


def out_of_memory_message(folder: Artifact, stage: Stage, pool: Pool, error: BaseException) -> str:
    """The message for a stage that ran out of memory, or whose workers died silently, with what to change."""
    problem = f"memory ran out ({blame.reason(error)})"
    if blame.is_of_a_death(error):
        problem = "its workers died, most often for lack of memory (a worker's log says more)"
    remedy = (
        f"lower workers (now {pool.workers}), shard_rows (now {pool.shard_rows}) or in_flight (now {pool.in_flight})"
    )
    if stage.starts_workers:
        remedy = f"lower workers (now {pool.workers}), take a smaller model, batch or length"
    return (
        f"{folder.path}: {problem}; in the placement's [{stage.pool}] {remedy}, or free some memory, then run again: "
        "finished shards are kept"
    )


def concat_outputs(outputs: list[Output]) -> Output:
    """The outputs of several ranges, in order, as one output."""
    if len(outputs) == 1:
        return outputs[0]
    total = Output()
    for output in outputs:
        for name, rows in output.tables.items():
            total.tables[name] = pa.concat_tables([total.tables[name], rows]) if name in total.tables else rows
        total.files += output.files
        add_up(total.counts, output.counts)
        add_up(total.cost, output.cost)
    # in one piece, so that the bytes of a part do not depend on the ranges
    total.tables = {name: rows.combine_chunks() for name, rows in total.tables.items()}
    return total


class Opener:
    """Picklable factory of a worker; called in the worker's process."""

    def __init__(self, stage: Stage, inputs: Inputs, folder: Artifact, pool: Pool, attempt: str) -> None:
        self.stage, self.inputs, self.folder, self.pool, self.attempt = stage, inputs, folder, pool, attempt
        self.job_folders = job_imports.job_folders()

    def __call__(self) -> Callable[[ray_pool.Shard], Json]:
        job_imports.add_job_folders(self.job_folders)
        return _Worker(self)


class _Clock:
    """A worker's seconds since the last receipt. Receipts of overlapping shards add up to the true total.

    ``busy_s``: at least one shard was running; ``idle_s``: none was; ``cpu_s``: CPU time of the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = 0
        self._at, self._cpu = time.monotonic(), time.process_time()
        self._spent = {"busy_s": 0.0, "idle_s": 0.0}

    def _tick(self) -> None:
        now = time.monotonic()
        self._spent["busy_s" if self._active else "idle_s"] += now - self._at
        self._at = now

    @contextmanager
    def busy(self) -> Iterator[None]:
        with self._lock:
            self._tick()
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._tick()
                self._active -= 1

    def charge(self) -> Json:
        """Returns the seconds since the last call."""
        with self._lock:
            self._tick()
            cpu = time.process_time()
            spent = {**self._spent, "cpu_s": cpu - self._cpu}
            self._spent, self._cpu = {"busy_s": 0.0, "idle_s": 0.0}, cpu
            return spent


class _Worker:
    """An open stage. Called with shards, from several threads if the stage is ``concurrent``."""

    def __init__(self, opener: Opener) -> None:
        self.stage, self.inputs, self.folder = opener.stage, opener.inputs, opener.folder
        self.pool, self.attempt = opener.pool, opener.attempt
        self.inline = self.pool.workers == 0 or self.stage.starts_workers
        self.range_marks, self.lock = RangeMarks(self.folder, self.attempt, self.inline), SharedLock()
        opening = time.monotonic()
        self.run = self._open() if self.inline else self._open_with_mark()
        self.started = [{"start_s": time.monotonic() - opening}]
        self.clock = _Clock()
        self.watchdog: Watchdog | None = None
        # only the main thread can be interrupted
        if self.stage.can_skip_rows and self.inline and threading.current_thread() is threading.main_thread():
            self.watchdog = Watchdog(self.pool.deadline_s, self._on_late)
            signal.signal(signal.SIGUSR1, signal.default_int_handler)
        elif not self.inline:
            deadline_s = self.pool.deadline_s if self.stage.can_skip_rows else math.inf
            self.watchdog = Watchdog(deadline_s, self._on_late, ray_pool.is_memory_short, self._on_low_memory)

    def _open_with_mark(self) -> Run:
        """Opens the stage. Raises StageFailed if workers keep dying of it: Ray would replace them for ever."""
        start_marks = [name for name in self.folder.listing("starts") if name.startswith(f"{self.attempt}-")]
        if len(start_marks) > self.pool.workers:  # up to this many workers may be opening right now
            raise StageFailed(
                f"{self.folder.name}: {len(start_marks)} workers died while they opened the stage, most often for lack of "
                "memory; free some, give the placement fewer workers or take a smaller model, and read the worker's log"
            )
        mark = f"starts/{self.attempt}-{uuid.uuid4().hex[:12]}"
        self.folder.write_bytes(mark, b"")
        try:
            run = self._open()
        except BaseException:
            self.folder.remove(mark)
            raise
        for mark_file in (*(f"starts/{name}" for name in start_marks), mark):
            self.folder.remove(mark_file)
        return run

    def _open(self) -> Run:
        with self._reads_only():
            run = self.stage.open(self.inputs, self.folder, self.pool)

        def bounded(start: int, stop: int) -> Output:
            with self._reads_only():
                return run(start, stop)

        return bounded

    def _reads_only(self) -> contextlib.AbstractContextManager[object]:
        """What a stage reads is among its inputs: another folder could change without its being built again."""
        return reads_only(self.stage.type, (self.folder, *self.inputs.values()))

    def __call__(self, shard: ray_pool.Shard) -> Json:
        try:
            return self._run_shard(shard)
        except (ConfigError, StageFailed, Damaged):
            raise
        except Exception as error:
            if blame.is_of_the_machine(error) or (isinstance(error, AssertionError) and self._inputs_missing()):
                raise OutOfReach(out_of_reach_message(self.folder, error)) from error
            raise

    def _run_shard(self, shard: ray_pool.Shard) -> Json:
        unfinished = self.range_marks.unfinished(shard["shard"])
        # if a worker dies right after its commit, the driver never gets the receipt, and Ray runs the shard again
        receipt = self.folder.receipt(shard["shard"])
        if receipt is not None and receipt.get("rows") == [shard["start"], shard["stop"]]:
            self.range_marks.forget(unfinished)
            return receipt
        self._check_commits(shard, unfinished)
        suspects = self.range_marks.suspects(unfinished) if self.stage.can_skip_rows else []
        with self.lock.alone() if suspects else self.lock.shared(), self.clock.busy():
            if not self.stage.can_skip_rows:
                output, done = self._run_whole(shard, unfinished)
                return self._commit(shard, output, done, unfinished)
            output, done, failed = self._run_ranges(shard, suspects)
            return self._commit(shard, output, done, unfinished + failed)

    def _check_commits(self, shard: ray_pool.Shard, unfinished: list[Mark]) -> None:
        """Raises StageFailed if workers keep dying after they finish a shard, or of memory: no row is at fault."""
        if (
            died := sum(mark.attempt == self.attempt and mark.cause == MEMORY for mark in unfinished)
        ) >= TRIES_PER_SHARD:
            error = MemoryError(
                f"{died} workers were killed at shard {shard['shard']} while the machine was short of memory"
            )
            raise StageFailed(out_of_memory_message(self.folder, self.stage, self.pool, error))
        if sum(mark.attempt == self.attempt and mark.cause == DONE for mark in unfinished) >= TRIES_PER_SHARD:
            raise StageFailed(
                f"{self.folder.name}: shard {shard['shard']} was finished {TRIES_PER_SHARD} times and its worker died while "
                "it wrote the result, most often for lack of memory; free some, or give the placement a smaller shard_rows"
            )

    def _commit(self, shard: ray_pool.Shard, output: Output, done: list[Mark], lost_marks: list[Mark]) -> Json:
        spent = self.clock.charge() | (self.started.pop() if self.started else {}) | output.cost
        if lost_marks:
            share = sum(mark.stop - mark.start for mark in lost_marks) / max(shard["stop"] - shard["start"], 1)
            spent["lost_tries"] = len(lost_marks)
            spent["lost_tokens"] = round((spent.get("prompt_tokens", 0) + spent.get("completion_tokens", 0)) * share)
        details = {
            "rows": [shard["start"], shard["stop"]],
            "counts": output.counts,
            "cost": spent,
            "attempt": int(self.attempt.split("-")[0]),
            "at": time.time(),
            "on": ray_pool.node_id(),
            "pid": os.getpid(),
            "cpus": self.stage.cores_held(self.pool),
        }
        receipt = self.folder.commit(shard["shard"], output.tables, details, output.files)
        self.range_marks.forget([*lost_marks, *done])
        return receipt

    def _run_whole(self, shard: ray_pool.Shard, unfinished: list[Mark]) -> tuple[Output, list[Mark]]:
        number = shard["shard"]
        tries = sum(mark.attempt == self.attempt for mark in unfinished)
        if tries >= TRIES_PER_SHARD:
            raise StageFailed(
                f"{self.folder.name}: shard {number} killed its worker {tries} times; "
                f"look at its rows with `dagr show {self.folder.name}` and at the worker's log, then run again"
            )
        mark = self.range_marks.begin(number, shard["start"], shard["stop"])
        with self.watchdog.watching(mark) if self.watchdog else nullcontext():
            return self.run(shard["start"], shard["stop"]), [mark]

    def _run_ranges(self, shard: ray_pool.Shard, suspects: list[Mark]) -> tuple[Output, list[Mark], list[Mark]]:
        """The shard's output without the skipped rows, and the marks of ranges that ended and that failed here. All marks
        stay until the receipt is written: if the worker dies before, their cost is lost with it.
        """
        start, stop = shard["start"], shard["stop"]
        failed: list[Mark] = []
        marks: list[Mark] = []
        done: dict[Range, Output] = {}
        while True:
            ranges, skipped = split_ranges(start, stop, [*suspects, *failed])
            self._check_engine(shard, skipped)
            pending = [rows_range for rows_range in ranges if rows_range not in done]
            if not pending:
                break
            mark, output = self._range(shard["shard"], *pending[0])
            if output is None:
                failed.append(mark)
                continue
            marks.append(mark)
            done[pending[0]] = output
            self.range_marks.set_cause(mark, ENDED if pending[1:] else DONE, "")
        for row, why in skipped.items():
            with self._reads_only():
                done[row, row + 1] = self.stage.skip_row(self.inputs, row, why.reason, why.detail)
        return concat_outputs([done[rows_range] for rows_range in sorted(done)]), marks, failed

    def _range(self, number: int, start: int, stop: int) -> tuple[Mark, Output | None]:
        """A range's mark and its output; the output is None if the range failed and this process can go on."""
        mark = self.range_marks.begin(number, start, stop)
        try:
            with self.watchdog.watching(mark) if self.watchdog else nullcontext():
                return mark, self.run(start, stop)
        except (ConfigError, StageFailed, Damaged, ModuleNotFoundError, KeyboardInterrupt) as end:
            if not (isinstance(end, KeyboardInterrupt) and mark.cause == HUNG):
                self._mark_stopped(mark, end)
                raise
        except EngineDied as error:
            if self.lock.is_alone or self.inline:
                self.range_marks.set_cause(mark, DIED, str(error))
            if not self.inline:
                os._exit(70)  # ends all of the engine with the process; Ray starts another
            self.run = self._open()
        except Exception as error:
            if blame.is_of_the_machine(error) or self._inputs_missing():
                self._mark_stopped(mark, error)
                raise OutOfReach(out_of_reach_message(self.folder, error)) from error
            if blame.is_of_memory(error) and stop - start == 1:
                # a smaller range needs less memory; if one row needs too much, another program may hold the memory
                self._mark_stopped(mark, error)
                raise StageFailed(out_of_memory_message(self.folder, self.stage, self.pool, error)) from error
            self.range_marks.set_cause(mark, RAISED, f"{type(error).__name__}: {error}")
        return mark, None

    def _mark_stopped(self, mark: Mark, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # the full or unreachable disk may be this one
            self.range_marks.set_cause(mark, STOPPED, str(error))

    def _inputs_missing(self) -> bool:
        """Whether an input of the stage, or its own folder, is missing now."""
        try:
            contents = [self.folder.read_bytes("plan.json"), *(folder.manifest for folder in self.inputs.values())]
        except OSError:
            return True
        return any(content is None for content in contents)

    def _check_engine(self, shard: ray_pool.Shard, skipped: dict[int, SkipReason]) -> None:
        limit = max(TRIES_PER_SHARD, (shard["stop"] - shard["start"]) // 20)
        if len(skipped) > limit:
            why = next(iter(skipped.values()))
            raise StageFailed(
                f"{self.folder.name}: {len(skipped)} rows of shard {shard['shard']} failed alone, the first with "
                f"{why.reason}: {why.detail}; the rows are not at fault: fix the strategy or the engine and run again"
            )

    def _on_low_memory(self, mark: Mark) -> None:
        if not mark.cause:
            with contextlib.suppress(OSError):
                self.range_marks.set_cause(mark, MEMORY, "the machine was short of memory")

    def _on_late(self, mark: Mark) -> None:
        if self.lock.is_alone or self.inline:
            self.range_marks.set_cause(mark, HUNG, f"no answer within {self.pool.deadline_s:g} s")
        if self.inline:
            # unlike _thread.interrupt_main, a real signal also ends a wait inside a system call; Ctrl-C is the user's
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            return
        say(f"rows {mark.start} to {mark.stop}: no answer in {self.pool.deadline_s:g} s", to=sys.stderr)
        os._exit(75)
