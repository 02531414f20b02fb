"""Shows progress: a live line on a terminal, or else a new line when something changes and every 30 s."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from dagr_ray.core.attempt import Progress
from dagr_ray.core.terminal import say, shown

EVERY_S = 30.0
ESTIMATE_EVERY_S = 5.0  # reading the folders of a study takes a while


def duration(seconds: float) -> str:
    """``95`` -> ``1m35s``; below a minute with one digit."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def size(count: float) -> str:
    """Bytes in readable units: ``1234567`` -> ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def describe(progress: Progress) -> str:
    """Shards, rows, rows/s, tokens/s, accepted share and time left, if known."""
    counts, cost, seconds = progress.counts, progress.cost, max(progress.seconds, 1e-9)
    words = [f"{progress.shards}/{progress.of} shards"]
    if "in" in counts:
        words.append(f"{counts['in']:,} rows")
        words.append(f"{(counts['in'] - progress.resumed_rows) / seconds:,.0f} rows/s")
    if tokens := cost.get("prompt_tokens", 0) + cost.get("completion_tokens", 0):
        words.append(f"{tokens / seconds:,.0f} tokens/s")
    rejected = sum(counts.get("rejected", {}).values())
    if rejected and "out" in counts:
        words.append(f"{counts['out'] / (counts['out'] + rejected):.0%} accepted")
    if (remaining := remaining_seconds(progress)) is not None:
        words.append(f"{duration(remaining)} left")
    return ", ".join(words)


def remaining_seconds(progress: Progress) -> float | None:
    """Seconds until a stage's last shard ends, at the speed since its workers were ready; None before the first shard.

    A worker starts a shard when it has finished one, so the last end times show when the open shards were started. The
    time already spent on them is subtracted.
    """
    done, open_shards = progress.shards - progress.resumed, progress.of - progress.shards
    if done <= 0 or open_shards <= 0:
        return None
    ends = progress.ends or (progress.seconds,)
    lanes = min(progress.at_once, done + open_shards)
    a_shard = sum(end - progress.setup_s for end in ends) / done
    starts = (*ends, *[progress.setup_s] * (lanes - len(ends)))
    spent = sum(progress.seconds - at for at in starts[-min(lanes, open_shards) :])
    return max(open_shards * a_shard - spent, 0.0) / lanes


class Reporter:
    """Prints the progress of ``materialize`` and of a study to ``stream``. Cached stages are only counted."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        # seconds until a study's last trial ends, or None if unknown; set by `dagr study`
        self.remaining: Callable[[], float | None] = lambda: None
        self.estimated_at, self.estimate = 0.0, None  # type: float, float | None
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.quiet = quiet
        self.last = 0.0
        self.cached = 0
        self.started = time.time()
        self.working, self.since = "", 0.0  # the work in progress, in words, and its start
        self.turn = threading.RLock()
        if not quiet:
            threading.Thread(target=self._remind, name="dagr-progress", daemon=True).start()

    def __call__(self, progress: Progress) -> None:
        if self.quiet:
            return
        with self.turn:
            self._report(progress)

    def _remind(self) -> None:
        """Repeats the work in progress if nothing has changed for long, such as a training or an index in one piece."""
        while True:
            time.sleep(EVERY_S / 10)
            with self.turn:
                if self.working and time.time() - max(self.last, self.since) >= EVERY_S:
                    self._update(f"{self.working}, {duration(time.time() - self.since)} so far")

    def _report(self, progress: Progress) -> None:
        name = progress.stage.folder_name()
        if progress.state in ("start", "running", "trials"):
            if progress.state == "start" or not self.working:
                self.since = time.time() - progress.seconds
            trials = f"trials: {progress.shards} of {progress.of} done"
            self.working = trials if progress.state == "trials" else f"{name}: {describe(progress)}"
        elif progress.state != "trial" or progress.shards == progress.of:
            self.working = ""
        if progress.state == "cached":
            self.cached += 1
        elif progress.state == "trial":
            self._line(f"trial {progress.shards}/{progress.of} done in {duration(progress.seconds)}  {name}")
        elif progress.state == "trials":
            if self.live or time.time() - self.last >= EVERY_S:
                self._update(f"trials: {progress.shards} of {progress.of} done{self._trials_left()}")
        elif progress.state == "start":
            if progress.shards:
                self._line(f"{name}: resuming, {progress.shards} of {progress.of} shards are finished")
            elif progress.of > 1:
                self._update(f"{name}: {progress.of} shards")
        elif progress.state == "done":
            self._line(f"{name}: done in {duration(progress.seconds)}  {describe(progress)}")
        elif progress.state == "running" and (self.live or time.time() - self.last >= EVERY_S):
            self._update(f"{name}: {describe(progress)}")

    def _trials_left(self) -> str:
        """The estimated time left. It is not based on the number of trials, because their sizes differ by orders of magnitude."""
        if time.time() - self.estimated_at >= ESTIMATE_EVERY_S:
            self.estimate, self.estimated_at = self.remaining(), time.time()
        return "" if self.estimate is None else f", about {duration(self.estimate)} left"

    def _line(self, text: str, end: str = "\n") -> None:
        say(f"[{duration(time.time() - self.started)}] {text}", to=self.stream, end=end, over=self.live)
        self.last = time.time()

    def _update(self, text: str) -> None:
        self._line(shown(text)[:150] if self.live else text, end="" if self.live else "\n")
