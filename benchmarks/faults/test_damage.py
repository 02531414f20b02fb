"""Damage to any file and kills at any moment: a few rounds of the benchmark."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.harness import ROOT

pytestmark = pytest.mark.slow


def test_damage_and_kills_at_random_change_nothing(tmp_path, capsys) -> None:
    """Sixty rounds; more with DAGR_DAMAGE_ROUNDS, or by benchmarks/faults/damage.py."""
    rounds = int(os.environ.get("DAGR_DAMAGE_ROUNDS", "60"))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults.damage", f"--rounds={rounds}", "--seed=7", f"--json={tmp_path / 'found.json'}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (tmp_path / "found.json").exists(), done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    with capsys.disabled():  # the figures by kind, also of a test that passes
        print(f"\n{done.stdout}")
    assert found["told"] == [] and done.returncode == 0, found["told"]
    assert set(found["ends"]) == {"same", "mended"} and sum(found["ends"].values()) == rounds
    assert found["ends"]["mended"] > rounds / 4 and len(found["damages"]) > 10
