"""A worker of a stage: opens it once, runs its shards, several at once where it can, and accounts for each.

A stage that can give a row up (``refuse``) survives rows that end or hang its engine: see ``tries``. Any other has three
tries for a shard.
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
    Given,
    Mark,
    Range,
    Tries,
    Turns,
    Watchdog,
    narrow,
)
from dagr_ray.core.stage import EngineDied, Inputs, OutOfReach, Output, Run, StageFailed
from dagr_ray.core.terminal import say

if TYPE_CHECKING:
    from dagr_ray.core.stage import Stage


TRIES_PER_SHARD = 3
HUNG, RAISED = "engine_hang", "engine_error"
GIVEN_UP = (DIED, HUNG, RAISED)  # why a row is


def out_of_reach(folder: Artifact, error: BaseException) -> str:
    """The line for a stage that could not read, write or ask."""
    return (
        f"{folder.path}: {blame.reason(error)}; no row was given up for it: see that the disk has room and that what the stage "
        "reads and asks is there, then run again: finished shards are kept"
    )


def out_of_memory(folder: Artifact, stage: Stage, pool: Pool, error: BaseException) -> str:
    """The line for a stage that ran out of memory, or whose workers died without a word, with what to change."""
    what = f"memory ran out ({blame.reason(error)})"
    if blame.is_of_a_death(error):
        what = "its workers died, most often for want of memory (a worker's log says more)"
    change = (
        f"lower workers (now {pool.workers}), shard_rows (now {pool.shard_rows}) or in_flight (now {pool.in_flight})"
    )
    if stage.starts_workers:
        change = f"lower workers (now {pool.workers}), take a smaller model, batch or length"
    return (
        f"{folder.path}: {what}; in the placement's [{stage.pool}] {change}, or free some memory, then run again: "
        "finished shards are kept"
    )


def joined(outputs: list[Output]) -> Output:
    """The output of rows that were done in several ranges, in order."""
    if len(outputs) == 1:
        return outputs[0]
    whole = Output()
    for each in outputs:
        for name, rows in each.tables.items():
            whole.tables[name] = pa.concat_tables([whole.tables[name], rows]) if name in whole.tables else rows
        whole.files += each.files
        add_up(whole.counts, each.counts)
        add_up(whole.cost, each.cost)
    # in one piece, so that the bytes of a part do not tell in how many ranges it was made
    whole.tables = {name: rows.combine_chunks() for name, rows in whole.tables.items()}
    return whole


class Opener:
    """Picklable recipe for a worker; called in the worker's process."""

    def __init__(self, stage: Stage, inputs: Inputs, folder: Artifact, pool: Pool, attempt: str) -> None:
        self.stage, self.inputs, self.folder, self.pool, self.attempt = stage, inputs, folder, pool, attempt
        self.beside = job_imports.beside()

    def __call__(self) -> Callable[[ray_pool.Shard], Json]:
        job_imports.import_beside(self.beside)
        return _Worker(self)


class _Clock:
    """Seconds of a worker since the last receipt, so that receipts add up to the whole whatever overlaps.

    ``busy_s`` is the time with at least one shard at work, ``idle_s`` the rest, ``cpu_s`` that of the process.
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
        """What has been spent since the last call."""
        with self._lock:
            self._tick()
            cpu = time.process_time()
            spent = {**self._spent, "cpu_s": cpu - self._cpu}
            self._spent, self._cpu = {"busy_s": 0.0, "idle_s": 0.0}, cpu
            return spent


class _Worker:
    """An opened stage. Called with shards, from several threads where the stage is ``concurrent``."""

    def __init__(self, opener: Opener) -> None:
        self.stage, self.inputs, self.folder = opener.stage, opener.inputs, opener.folder
        self.pool, self.attempt = opener.pool, opener.attempt
        self.inline = self.pool.workers == 0 or self.stage.starts_workers
        self.tries, self.turns = Tries(self.folder, self.attempt, self.inline), Turns()
        began = time.monotonic()
        self.run = self._open() if self.inline else self._open_marked()
        self.started = [{"start_s": time.monotonic() - began}]
        self.clock = _Clock()
        self.watchdog: Watchdog | None = None
        # a thread that is not the main one cannot be interrupted
        if self.stage.rescues and self.inline and threading.current_thread() is threading.main_thread():
            self.watchdog = Watchdog(self.pool.deadline_s, self._late)
            signal.signal(signal.SIGUSR1, signal.default_int_handler)
        elif not self.inline:
            deadline_s = self.pool.deadline_s if self.stage.rescues else math.inf
            self.watchdog = Watchdog(deadline_s, self._late, ray_pool.memory_is_short, self._scarce)

    def _open_marked(self) -> Run:
        """Opens the stage. Raises StageFailed where workers keep dying of it: Ray would replace them for ever."""
        began = [name for name in self.folder.listing("starts") if name.startswith(f"{self.attempt}-")]
        if len(began) > self.pool.workers:  # at most so many more are being opened right now
            raise StageFailed(
                f"{self.folder.name}: {len(began)} workers died while they opened the stage, most often for want of memory; "
                "free some, give the placement fewer workers or take a smaller model, and look at the worker's log"
            )
        mark = f"starts/{self.attempt}-{uuid.uuid4().hex[:12]}"
        self.folder.write_bytes(mark, b"")
        try:
            run = self._open()
        except BaseException:
            self.folder.remove(mark)
            raise
        for each in (*(f"starts/{name}" for name in began), mark):
            self.folder.remove(each)
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
            return self._done(shard)
        except (ConfigError, StageFailed, Damaged):
            raise
        except Exception as error:
            if blame.is_of_the_machine(error) or (isinstance(error, AssertionError) and self._lost()):
                raise OutOfReach(out_of_reach(self.folder, error)) from error
            raise

    def _done(self, shard: ray_pool.Shard) -> Json:
        left = self.tries.left(shard["shard"])
        # a worker that dies right after its commit never sends the receipt to the driver, and Ray asks again
        receipt = self.folder.receipt(shard["shard"])
        if receipt is not None and receipt.get("rows") == [shard["start"], shard["stop"]]:
            self.tries.forget(left)
            return receipt
        self._check_commits(shard, left)
        doubted = self.tries.doubted(left) if self.stage.rescues else []
        with self.turns.alone() if doubted else self.turns.shared(), self.clock.busy():
            if not self.stage.rescues:
                output, done = self._simply(shard, left)
                return self._commit(shard, output, done, left)
            output, done, failed = self._rescue(shard, doubted)
            return self._commit(shard, output, done, left + failed)

    def _check_commits(self, shard: ray_pool.Shard, left: list[Mark]) -> None:
        """Raises StageFailed if workers keep dying of a shard that they have done, or of memory: its rows are not to blame."""
        if (died := sum(mark.attempt == self.attempt and mark.cause == MEMORY for mark in left)) >= TRIES_PER_SHARD:
            error = MemoryError(
                f"{died} workers were ended at shard {shard['shard']} while the machine was short of it"
            )
            raise StageFailed(out_of_memory(self.folder, self.stage, self.pool, error))
        if sum(mark.attempt == self.attempt and mark.cause == DONE for mark in left) >= TRIES_PER_SHARD:
            raise StageFailed(
                f"{self.folder.name}: shard {shard['shard']} was done {TRIES_PER_SHARD} times and its worker died while it "
                "wrote the result, most often for want of memory; free some, or give the placement a smaller shard_rows"
            )

    def _commit(self, shard: ray_pool.Shard, output: Output, done: list[Mark], lost: list[Mark]) -> Json:
        spent = self.clock.charge() | (self.started.pop() if self.started else {}) | output.cost
        if lost:
            share = sum(mark.stop - mark.start for mark in lost) / max(shard["stop"] - shard["start"], 1)
            spent["lost_tries"] = len(lost)
            spent["lost_tokens"] = round((spent.get("prompt_tokens", 0) + spent.get("completion_tokens", 0)) * share)
        more = {
            "rows": [shard["start"], shard["stop"]],
            "counts": output.counts,
            "cost": spent,
            "attempt": int(self.attempt.split("-")[0]),
            "at": time.time(),
            "on": ray_pool.where(),
            "pid": os.getpid(),
            "cpus": self.stage.cores_held(self.pool),
        }
        receipt = self.folder.commit(shard["shard"], output.tables, more, output.files)
        self.tries.forget([*lost, *done])
        return receipt

    def _simply(self, shard: ray_pool.Shard, left: list[Mark]) -> tuple[Output, list[Mark]]:
        number = shard["shard"]
        tries = sum(mark.attempt == self.attempt for mark in left)
        if tries >= TRIES_PER_SHARD:
            raise StageFailed(
                f"{self.folder.name}: shard {number} ended its worker {tries} times; "
                f"look at its rows with `dagr show {self.folder.name}` and at the worker's log, then run again"
            )
        mark = self.tries.begin(number, shard["start"], shard["stop"])
        with self.watchdog.over(mark) if self.watchdog else nullcontext():
            return self.run(shard["start"], shard["stop"]), [mark]

    def _rescue(self, shard: ray_pool.Shard, doubted: list[Mark]) -> tuple[Output, list[Mark], list[Mark]]:
        """The shard's output without the rows that had to be given up, and the marks of tries that ended and that
        failed here: all stay until the receipt is there, because what they cost is lost with a worker that dies before.
        """
        start, stop = shard["start"], shard["stop"]
        failed: list[Mark] = []
        marks: list[Mark] = []
        done: dict[Range, Output] = {}
        while True:
            ranges, given_up = narrow(start, stop, [*doubted, *failed])
            self._check_engine(shard, given_up)
            pending = [each for each in ranges if each not in done]
            if not pending:
                break
            mark, output = self._range(shard["shard"], *pending[0])
            if output is None:
                failed.append(mark)
                continue
            marks.append(mark)
            done[pending[0]] = output
            self.tries.ended(mark, ENDED if pending[1:] else DONE, "")
        for row, why in given_up.items():
            with self._reads_only():
                done[row, row + 1] = self.stage.refuse(self.inputs, row, why.reason, why.detail)
        return joined([done[each] for each in sorted(done)]), marks, failed

    def _range(self, number: int, start: int, stop: int) -> tuple[Mark, Output | None]:
        """A range's mark and its output, which is None where it failed and this process can go on."""
        mark = self.tries.begin(number, start, stop)
        try:
            with self.watchdog.over(mark) if self.watchdog else nullcontext():
                return mark, self.run(start, stop)
        except (ConfigError, StageFailed, Damaged, ModuleNotFoundError, KeyboardInterrupt) as end:
            if not (isinstance(end, KeyboardInterrupt) and mark.cause == HUNG):
                self._stopped(mark, end)
                raise
        except EngineDied as error:
            if self.turns.is_alone or self.inline:
                self.tries.ended(mark, DIED, str(error))
            if not self.inline:
                os._exit(70)  # all of the engine goes with the process; Ray starts another
            self.run = self._open()
        except Exception as error:
            if blame.is_of_the_machine(error) or self._lost():
                self._stopped(mark, error)
                raise OutOfReach(out_of_reach(self.folder, error)) from error
            if blame.is_of_memory(error) and stop - start == 1:
                # a smaller range needs less; what is too much for a row alone may be another program's
                self._stopped(mark, error)
                raise StageFailed(out_of_memory(self.folder, self.stage, self.pool, error)) from error
            self.tries.ended(mark, RAISED, f"{type(error).__name__}: {error}")
        return mark, None

    def _stopped(self, mark: Mark, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # the disk that is full, or away, is this one
            self.tries.ended(mark, STOPPED, str(error))

    def _lost(self) -> bool:
        """Whether something that the stage reads, or its own folder, is not there now."""
        try:
            there = [self.folder.read_bytes("plan.json"), *(folder.manifest for folder in self.inputs.values())]
        except OSError:
            return True
        return any(each is None for each in there)

    def _check_engine(self, shard: ray_pool.Shard, given_up: dict[int, Given]) -> None:
        limit = max(TRIES_PER_SHARD, (shard["stop"] - shard["start"]) // 20)
        if len(given_up) > limit:
            why = next(iter(given_up.values()))
            raise StageFailed(
                f"{self.folder.name}: {len(given_up)} rows of shard {shard['shard']} failed alone, the first with "
                f"{why.reason}: {why.detail}; the fault is not in the rows: mend the engine and run again"
            )

    def _scarce(self, mark: Mark) -> None:
        if not mark.cause:
            with contextlib.suppress(OSError):
                self.tries.ended(mark, MEMORY, "the machine was short of memory")

    def _late(self, mark: Mark) -> None:
        if self.turns.is_alone or self.inline:
            self.tries.ended(mark, HUNG, f"no answer within {self.pool.deadline_s:g} s")
        if self.inline:
            # unlike _thread.interrupt_main, a real signal also ends a wait inside a system call; Ctrl-C is the user's
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            return
        say(f"rows {mark.start} to {mark.stop}: no answer in {self.pool.deadline_s:g} s", to=sys.stderr)
        os._exit(75)
