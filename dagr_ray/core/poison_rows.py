"""Finds rows that crash or hang a worker. Each range is marked before it runs; after a crash, it is run in smaller ranges.

Without this, such a row would kill its worker for ever, because Ray replaces dead workers without limit. A mark is
removed when the range has its receipt. If a worker dies, its marked range is split: first into ranges of about the square
root of its rows, then into single rows. A row is skipped after two deaths of a worker that ran it alone, or after one
hang or exception.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields

from dagr_ray.core import shapes
from dagr_ray.core.artifact import Artifact

DIED, STOPPED, ENDED, DONE = "engine_crash", "stopped", "ended", "done"  # done: the last range of its shard ended
MEMORY = "out_of_memory"  # memory was short: a process that died then may have been killed because of others
Range = tuple[int, int]


@dataclass
class Mark:
    """Rows ``start`` to ``stop`` of a shard, started by an attempt. ``cause`` is empty if the worker died."""

    shard: int
    start: int
    stop: int
    attempt: str
    inline: bool = False  # run in the driver's own process, whose death may also be a row's fault
    cause: str = ""
    detail: str = ""
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    began: float = field(default_factory=time.time)

    @property
    def file(self) -> str:
        """Its path in the stage's folder."""
        return f"tries/{self.shard:05d}-{self.name}.json"


@dataclass
class SkipReason:
    """Why a row is skipped."""

    reason: str
    detail: str


def split_ranges(start: int, stop: int, marks: Sequence[Mark]) -> tuple[list[Range], dict[int, SkipReason]]:
    """The ranges to run, in order, and the rows to skip, after the failures in ``marks`` (oldest first).

    >>> dead = lambda a, b: Mark(0, a, b, "1")
    >>> split_ranges(0, 9, [])
    ([(0, 9)], {})
    >>> split_ranges(0, 9, [dead(0, 9)])[0]
    [(0, 3), (3, 6), (6, 9)]
    >>> split_ranges(0, 9, [dead(0, 9), dead(3, 6)])[0]
    [(0, 3), (3, 4), (4, 5), (5, 6), (6, 9)]
    >>> ranges, skipped = split_ranges(0, 9, [dead(0, 9), dead(3, 6), dead(4, 5), dead(4, 5)])
    >>> ranges, skipped[4].reason
    ([(0, 3), (3, 4), (5, 6), (6, 9)], 'engine_crash')
    """
    ranges: list[Range] = [(start, stop)]
    skipped: dict[int, SkipReason] = {}
    died_alone: set[int] = set()
    for mark in marks:
        suspect = (mark.start, mark.stop)
        if suspect not in ranges:
            continue  # from another writer with other ranges
        index, rows = ranges.index(suspect), mark.stop - mark.start
        if rows > 1:
            step = math.isqrt(rows) if suspect == (start, stop) else 1
            ranges[index : index + 1] = [(i, min(i + step, mark.stop)) for i in range(mark.start, mark.stop, step)]
        elif mark.cause or mark.start in died_alone:
            del ranges[index]
            skipped[mark.start] = SkipReason(
                mark.cause or DIED, mark.detail or "its worker died twice with this row alone"
            )
        else:
            died_alone.add(mark.start)
    return ranges, skipped


class RangeMarks:
    """The marks in one folder, as one worker reads and writes them."""

    def __init__(self, folder: Artifact, attempt: str, inline: bool) -> None:
        self.folder, self.attempt, self.inline = folder, attempt, inline

    def unfinished(self, shard: int) -> list[Mark]:
        """Marks of a shard without a receipt, oldest first."""
        names = [name for name in self.folder.listing("tries") if name.startswith(f"{shard:05d}-")]
        values = [self.folder.read_json(f"tries/{name}") for name in names]
        known = {item.name for item in fields(Mark)}
        marks = (Mark(**{key: item for key, item in value.items() if key in known}) for value in values if value)
        return sorted(marks, key=lambda mark: mark.began)

    def suspects(self, marks: Sequence[Mark]) -> list[Mark]:
        """The marks that make rows suspect: a worker died under this driver, or a driver died that ran the rows itself.

        A worker that died together with its driver is no evidence. Neither is a range that was cancelled or finished, nor a
        death while memory was short.
        """
        # what an earlier attempt wrote down about a row may be mended by now; only a death leaves no word
        died = (mark for mark in marks if self.inline and mark.inline and not mark.cause)
        relevant = [*(mark for mark in marks if mark.attempt == self.attempt), *died]
        return [mark for mark in relevant if mark.cause not in (STOPPED, ENDED, DONE, MEMORY)]

    def begin(self, shard: int, start: int, stop: int) -> Mark:
        """Marks rows before they run."""
        mark = Mark(shard, start, stop, self.attempt, self.inline)
        self._write(mark)
        return mark

    def set_cause(self, mark: Mark, cause: str, detail: str) -> None:
        """Writes into a mark how its range ended, if the worker is alive to do so."""
        mark.cause, mark.detail = cause, detail[:500]
        self._write(mark)

    def _write(self, mark: Mark) -> None:
        self.folder.write_bytes(mark.file, shapes.sealed_json(self.folder.name, mark.file, asdict(mark), indent=None))

    def forget(self, marks: Sequence[Mark]) -> None:
        """Removes marks, after their shard got its receipt."""
        for mark in marks:
            self.folder.remove(mark.file)


class SharedLock:
    """Lets several shards run at once, or one alone: a suspect range runs while nothing else is in the process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._waiting = 0

    @property
    def is_alone(self) -> bool:
        """Whether one shard has the process to itself."""
        return self._inside == -1

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Holds the lock together with other shards."""
        with self._changed:
            self._changed.wait_for(lambda: self._inside >= 0 and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the lock alone."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._inside == 0)
            self._waiting -= 1
            self._inside = -1
        try:
            yield
        finally:
            with self._changed:
                self._inside = 0
                self._changed.notify_all()


class Watchdog:
    """Calls ``on_late`` for a range that runs longer than ``deadline_s``, and ``on_low_memory`` for all while ``is_short()``.

    Only time in which this thread ran counts: a process that was stopped (SIGSTOP, a suspended machine) did no work then.
    """

    TICK_S = 0.5

    def __init__(
        self,
        deadline_s: float,
        on_late: Callable[[Mark], None],
        is_short: Callable[[], bool] = lambda: False,
        on_low_memory: Callable[[Mark], None] = lambda mark: None,
    ) -> None:
        self.deadline_s, self.late, self.is_short, self.scarce = deadline_s, on_late, is_short, on_low_memory
        self.running: dict[str, tuple[Mark, float]] = {}
        self.clock = 0.0
        threading.Thread(target=self._watch, name="dagr-watchdog", daemon=True).start()

    @contextmanager
    def watching(self, mark: Mark) -> Iterator[None]:
        """Watches a range while it runs."""
        self.running[mark.name] = (mark, self.clock)
        try:
            yield
        finally:
            self.running.pop(mark.name, None)

    def _watch(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(self.TICK_S)
            now = time.monotonic()
            self.clock += min(now - last, 2 * self.TICK_S)
            last = now
            if self.running and self.is_short():
                for mark, _ in list(self.running.values()):
                    self.scarce(mark)
            for mark, began in list(self.running.values()):
                if self.clock - began > self.deadline_s:
                    self.late(mark)
