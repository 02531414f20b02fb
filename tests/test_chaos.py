"""A few faults of every kind that matters most, on a real cluster of three nodes: what benchmarks/chaos.py does at length."""

import random

import pytest

from benchmarks.chaos import Chaos, Ours, largest_shard, write_set


@pytest.mark.parametrize(
    "kinds",
    [
        ["actor_killed", "engine_killed", "driver_killed", "driver_told_to_stop", "part_truncated", "part_flipped"],
        ["raylet_killed", "node_removed", "node_added", "head_killed", "second_driver"],
    ],
    ids=["processes-and-files", "nodes-and-drivers"],
)
def test_nothing_is_lost_twice_or_different_after_faults(tmp_path, kinds) -> None:
    write_set(tmp_path / "set", 450)
    (tmp_path / "ours").mkdir()
    arm = Ours(tmp_path / "ours", tmp_path / "set")
    chaos = Chaos(arm, random.Random(5), kinds, None)
    try:
        report = chaos.run(len(kinds), limit_s=120)
    finally:
        if chaos.nodes.cluster is not None:
            chaos.nodes.stop()
    found = arm.compare(arm.number + 1)
    assert report["finished"], arm.ends
    assert len(report["faults"]) == len(kinds), f"not all faults found something to strike: {report['faults']}"
    assert {k: found[k] for k in ("lost", "twice", "different", "other_bytes")} == {
        "lost": 0, "twice": 0, "different": 0, "other_bytes": 0,
    }  # fmt: skip
    assert found["rows"] > 4000
    assert arm.spent() <= 1.05 * found["one_pass"] + len(kinds) * 2 * largest_shard(tmp_path / "set")
    assert "deaf to SIGTERM" not in arm.ends
