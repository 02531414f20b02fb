"""Progress as lines: what a log of a cluster job shows."""

import io
import random
import re
import time
from contextlib import nullcontext
from typing import ClassVar

import pytest

from dagr_ray.cli import progress
from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.attempt import Progress
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.stages.sources import PyDocs

STAGE = PyDocs()


def _running(shards: int, seconds: float, **more) -> Progress:
    counts = {"in": 100 * shards, "out": 60 * shards, "rejected": {"length/too-short": 20 * shards}}
    cost = {"prompt_tokens": 4000, "completion_tokens": 1000}
    return Progress(STAGE, "running", shards, 10, 1000, counts, cost, seconds, **more)


def test_a_line_holds_rows_speed_tokens_share_and_time_left() -> None:
    said = progress.describe(_running(4, 20))
    assert said == "4/10 shards, 400 rows, 20 rows/s, 250 tokens/s, 75% accepted, 30.0s left"


def test_what_an_earlier_try_did_is_no_speed_of_this_one() -> None:
    said = progress.describe(_running(4, 20, resumed=2, resumed_rows=200))
    assert "10 rows/s" in said
    assert said.endswith("1m00s left")
    assert "left" not in progress.describe(_running(2, 20, resumed=2, resumed_rows=200))


def _simulated(shards: int, lanes: int, setup_s: float, shard_s: float) -> list[tuple[float, float]]:
    """(seconds said to be left, seconds really left) after every shard; shards take half to one and a half ``shard_s``."""
    chance, free, ends = random.Random(7), [setup_s] * lanes, []
    for _ in range(shards):
        lane = free.index(min(free))
        free[lane] += shard_s * chance.uniform(0.5, 1.5)
        ends.append(free[lane])
    ends.sort()
    found = []
    for n, at in enumerate(ends, 1):
        more = {"setup_s": setup_s, "at_once": lanes, "ends": tuple(ends[max(n - lanes, 0) : n])}
        found.append(
            (progress.remaining_seconds(Progress(STAGE, "running", n, shards, seconds=at, **more)), ends[-1] - at)
        )
    return found


@pytest.mark.parametrize(("shards", "lanes"), [(20, 1), (40, 2), (40, 8), (400, 16)])
@pytest.mark.parametrize(("setup_s", "shard_s"), [(0.0, 10.0), (120.0, 10.0), (300.0, 2.0)])
def test_the_time_left_is_right_whatever_the_start_takes(shards, lanes, setup_s, shard_s) -> None:
    found = _simulated(shards, lanes, setup_s, shard_s)
    # at first few are known, and those that end first are short ones
    for said, real in found[max(shards // 4, 2 * lanes) : -lanes]:
        assert said == pytest.approx(real, rel=0.35, abs=shard_s)
    for said, real in found[: -2 * lanes]:
        assert real / 2.5 < said + shard_s and said < 2.5 * (real + shard_s)


@pytest.mark.parametrize("state", ["running", "trials"])
def test_a_line_every_thirty_seconds_where_there_is_no_terminal(monkeypatch, state) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "time", lambda: now)
    stream = io.StringIO()
    reporter = progress.Reporter(stream)
    for now in range(1000, 1091):
        reporter(Progress(STAGE, state, 3, 10, seconds=now - 1000))
    assert len(stream.getvalue().splitlines()) == 4
    assert "\r" not in stream.getvalue()


def test_quiet_says_nothing() -> None:
    stream = io.StringIO()
    progress.Reporter(stream, quiet=True)(Progress(STAGE, "done", 1, 1))
    assert stream.getvalue() == ""


class Slow(Stage):
    """One shard that takes a second, and may fail then."""

    abstract: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ("queries",)
    fails: bool = False

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            time.sleep(1)
            if self.fails:
                raise ValueError("no good")
            return Output({"queries": tables.empty("queries")})

        return run


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_of_one_shard_shows_progress_until_it_ends(monkeypatch, tmp_path, fails) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.2)
    stream = io.StringIO()
    with nullcontext() if not fails else pytest.raises(ValueError, match="no good"):
        materialize(Slow(fails=fails), str(tmp_path), observe=progress.Reporter(stream))
    said = stream.getvalue().splitlines()
    reminders = [line for line in said if re.search(r"slow-.*: 0/1 shards, 0\.\ds so far$", line)]
    assert 2 <= len(reminders) <= 5, said
    time.sleep(0.5)
    assert stream.getvalue().splitlines() == said


def test_trials_that_are_over_are_not_under_way(monkeypatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.1)
    stream = io.StringIO()
    reporter = progress.Reporter(stream)
    reporter(Progress(STAGE, "trials", 1, 2, seconds=5))
    time.sleep(0.3)
    assert re.search(r"trials: 1 of 2 done, 5\.\ds so far$", stream.getvalue().splitlines()[-1])
    reporter(Progress(STAGE, "trial", 2, 2, seconds=6))
    said = stream.getvalue()
    time.sleep(0.3)
    assert stream.getvalue() == said
