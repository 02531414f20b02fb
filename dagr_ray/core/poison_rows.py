"""What a dead worker leaves behind: marks of the rows that it had begun, from which the next one learns what to doubt.

A row that ends its worker (a crash of the engine, no answer within the deadline) would do so for ever, because Ray
replaces dead workers without end. So a range of rows is marked before it is begun and unmarked with its receipt. Where
a worker died, the range that it had begun is begun again in smaller ranges: about the square root of its rows, then
single rows. A row that twice was alone in a worker that died, or once in one that hung or raised, is given up.
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

DIED, STOPPED, ENDED, DONE = "engine_crash", "stopped", "ended", "done"  # done: with it, all of the shard has ended
MEMORY = "out_of_memory"  # while the machine was short of it: whatever dies then may have been ended for others
Range = tuple[int, int]


@dataclass
class Mark:
    """Rows ``start`` to ``stop`` of a shard, begun by an attempt. ``cause`` is empty where the worker just died."""

    shard: int
    start: int
    stop: int
    attempt: str
    inline: bool = False  # in the driver's own process: its death, too, may be the fault of a row
    cause: str = ""
    detail: str = ""
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    began: float = field(default_factory=time.time)

    @property
    def file(self) -> str:
        """Where it lies in the stage's folder."""
        return f"tries/{self.shard:05d}-{self.name}.json"


@dataclass
class Given:
    """Why a row is given up."""

    reason: str
    detail: str


def narrow(start: int, stop: int, marks: Sequence[Mark]) -> tuple[list[Range], dict[int, Given]]:
    """The ranges to begin in turn, and the rows to give up, after the deaths that ``marks`` tell of (in order).

    >>> dead = lambda a, b: Mark(0, a, b, "1")
    >>> narrow(0, 9, [])
    ([(0, 9)], {})
    >>> narrow(0, 9, [dead(0, 9)])[0]
    [(0, 3), (3, 6), (6, 9)]
    >>> narrow(0, 9, [dead(0, 9), dead(3, 6)])[0]
    [(0, 3), (3, 4), (4, 5), (5, 6), (6, 9)]
    >>> ranges, given_up = narrow(0, 9, [dead(0, 9), dead(3, 6), dead(4, 5), dead(4, 5)])
    >>> ranges, given_up[4].reason
    ([(0, 3), (3, 4), (5, 6), (6, 9)], 'engine_crash')
    """
    ranges: list[Range] = [(start, stop)]
    given_up: dict[int, Given] = {}
    alone: set[int] = set()
    for mark in marks:
        doubted = (mark.start, mark.stop)
        if doubted not in ranges:
            continue  # of another writer, who was somewhere else
        at, rows = ranges.index(doubted), mark.stop - mark.start
        if rows > 1:
            step = math.isqrt(rows) if doubted == (start, stop) else 1
            ranges[at : at + 1] = [(i, min(i + step, mark.stop)) for i in range(mark.start, mark.stop, step)]
        elif mark.cause or mark.start in alone:
            del ranges[at]
            given_up[mark.start] = Given(mark.cause or DIED, mark.detail or "its worker died twice with this row alone")
        else:
            alone.add(mark.start)
    return ranges, given_up


class Tries:
    """The marks of one folder, as one worker sees and writes them."""

    def __init__(self, folder: Artifact, attempt: str, inline: bool) -> None:
        self.folder, self.attempt, self.inline = folder, attempt, inline

    def left(self, shard: int) -> list[Mark]:
        """Marks of a shard that ended without a receipt, oldest first."""
        names = [name for name in self.folder.listing("tries") if name.startswith(f"{shard:05d}-")]
        found = [self.folder.read_json(f"tries/{name}") for name in names]
        known = {each.name for each in fields(Mark)}
        marks = (Mark(**{key: each for key, each in value.items() if key in known}) for value in found if value)
        return sorted(marks, key=lambda mark: mark.began)

    def doubted(self, marks: Sequence[Mark]) -> list[Mark]:
        """Those that speak against rows: of a worker that died under this driver, or of a driver that did the work itself.

        A worker that died together with its driver tells nothing, nor does a try that was called off or came to its end, nor
        one that died while memory was short.
        """
        ours = (mark for mark in marks if mark.attempt == self.attempt or (self.inline and mark.inline))
        return [mark for mark in ours if mark.cause not in (STOPPED, ENDED, DONE, MEMORY)]

    def begin(self, shard: int, start: int, stop: int) -> Mark:
        """Marks rows as begun."""
        mark = Mark(shard, start, stop, self.attempt, self.inline)
        self._write(mark)
        return mark

    def ended(self, mark: Mark, cause: str, detail: str) -> None:
        """Notes in a mark how its try ended, where the worker lives to tell."""
        mark.cause, mark.detail = cause, detail[:500]
        self._write(mark)

    def _write(self, mark: Mark) -> None:
        self.folder.write_bytes(mark.file, shapes.sealed_json(self.folder.name, mark.file, asdict(mark), indent=None))

    def forget(self, marks: Sequence[Mark]) -> None:
        """Takes marks away: their shard has its receipt."""
        for mark in marks:
            self.folder.remove(mark.file)


class Turns:
    """Any number of shards at once, or one alone: a doubted range runs while nothing else is in the process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._waiting = 0

    @property
    def is_alone(self) -> bool:
        """Whether one shard has the process for itself."""
        return self._inside == -1

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Together with other shards."""
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
        """With nothing else in this process."""
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
    """Calls ``late`` with a mark whose range takes longer than ``deadline_s``, and ``scarce`` with all while ``is_short()``.

    A process that was stopped and goes on (SIGSTOP, a suspended machine) has not worked meanwhile: the time that counts
    is that in which this thread ran.
    """

    TICK_S = 0.5

    def __init__(
        self,
        deadline_s: float,
        late: Callable[[Mark], None],
        is_short: Callable[[], bool] = lambda: False,
        scarce: Callable[[Mark], None] = lambda mark: None,
    ) -> None:
        self.deadline_s, self.late, self.is_short, self.scarce = deadline_s, late, is_short, scarce
        self.running: dict[str, tuple[Mark, float]] = {}
        self.clock = 0.0
        threading.Thread(target=self._watch, name="dagr-watchdog", daemon=True).start()

    @contextmanager
    def over(self, mark: Mark) -> Iterator[None]:
        """Watches a range while it runs."""
        self.running[mark.name] = (mark, self.clock)
        try:
            yield
        finally:
            self.running.pop(mark.name, None)

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(self.TICK_S)
            now = time.monotonic()
            self.clock += min(now - before, 2 * self.TICK_S)
            before = now
            if self.running and self.is_short():
                for mark, _ in list(self.running.values()):
                    self.scarce(mark)
            for mark, began in list(self.running.values()):
                if self.clock - began > self.deadline_s:
                    self.late(mark)
