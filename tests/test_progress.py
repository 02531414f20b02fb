"""Progress as lines: what a log of a cluster job shows."""

import io

import pytest

from dagr_ray import progress
from dagr_ray.stage import Progress
from dagr_ray.stages.corpus import PyDocs

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
