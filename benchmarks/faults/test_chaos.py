"""A few faults of every kind that matters most, on a real cluster of three nodes: the benchmark in short."""

import json
import subprocess
import sys

import pytest

from benchmarks.faults.chaos import largest_shard, write_set
from benchmarks.harness import ROOT

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    "kinds",
    [
        ["actor_killed", "engine_killed", "driver_killed", "driver_told_to_stop", "part_truncated", "part_flipped"],
        ["raylet_killed", "node_removed", "node_added", "head_killed", "second_driver"],
    ],
    ids=["processes-and-files", "nodes-and-drivers"],
)
def test_nothing_is_lost_twice_or_different_after_faults(tmp_path, kinds) -> None:
    """In a process of its own: one that has made a cluster ends a minute after the cluster has."""
    write_set(tmp_path / "set", 450)
    words = ["--arms=ours", f"--kills={len(kinds)}", f"--kinds={','.join(kinds)}", "--passages=450", "--seed=5"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults.chaos", *words, "--limit=120", f"--json={tmp_path / 'found.json'}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (tmp_path / "found.json").exists(), done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())["ours"]
    assert found["finished"], found
    assert set(found["faults"]) == set(kinds), f"not all faults found something to strike: {found['faults']}"
    assert {k: found[k] for k in ("lost", "twice", "different", "other_bytes")} == {
        "lost": 0, "twice": 0, "different": 0, "other_bytes": 0,
    }  # fmt: skip
    assert found["rows"] > 4000
    assert found["spent"] <= 1.05 * found["one_pass"] + len(kinds) * 2 * largest_shard(tmp_path / "set")
    assert "deaf to SIGTERM" not in found["ends"]
    assert done.returncode == 0
