"""Runs folders of 0.1, in which stages have other types: listed and shown, never taken for a folder of today."""

import os

import pytest

from dagr_ray import moved
from dagr_ray.cli import inspect, main, results
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError, plugins
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Stage, load_stage
from dagr_ray.stages.mix import HumanPairs
from dagr_ray.stages.sources import Beir
from tests.conftest import tiny_beir
from tests.support.studies import made_study


def make_older(runs: str, name: str, old_type: str) -> str:
    """Renames a folder as if its stage had ``old_type``; returns the new name."""
    folder = Artifact(runs, name)
    for file in ("plan.json", "manifest.json"):
        value = folder.read_json(file)
        if value is not None and value.get("stage"):
            value["stage"]["type"] = old_type
            folder.write_json(file, value)
    older = f"{old_type}-{name.rpartition('-')[2]}"
    os.rename(folder.path, f"{runs}/{older}")
    return older


def run_verb(*words: str) -> int:
    args = main.parser().parse_args(words)
    return getattr(inspect if hasattr(inspect, words[0]) else results, words[0])(args) or 0


def test_an_older_folder_is_shown_and_not_reused(tmp_path, capsys):
    runs = str(tmp_path / "runs")
    stage = HumanPairs(data=Beir(path=str(tiny_beir(tmp_path / "set"))), split="dev")
    local = Placement(light=Pool(workers=0))
    name = materialize(stage, runs, local).name
    older = make_older(runs, name, "human")
    for words in (["ls"], ["show", older], ["bill", older]):
        assert run_verb(*words, "--runs", runs) == 0, words
        assert name[-12:] in capsys.readouterr().out
    with pytest.raises(ConfigError, match="of another version: type 'human' of 0.1 is 'human-pairs' now") as refusal:
        load_stage(Artifact(runs, older))
    assert "\n" not in str(refusal.value)
    again = materialize(stage, runs, local)
    assert again.name == name and os.path.isdir(f"{runs}/{older}"), "built anew, beside the older folder"


def test_a_report_reads_a_study_with_older_folders(tmp_path, capsys):
    runs, study = made_study(tmp_path, {"home": [0.5] * 60}, {8: {"home": [0.6] * 60}})
    [name] = [name for name in os.listdir(runs) if name.startswith("select-")]
    folder = Artifact(runs, name)
    for file in ("plan.json", "manifest.json"):
        value = folder.read_json(file)
        value["stage"]["type"] = "labelled"
        folder.write_json(file, value)
    assert run_verb("report", study, "--runs", runs) == 0, capsys.readouterr().err


def test_every_older_name_still_imports():
    for module, names in moved.RENAMED.items():
        for old, new in names.items():
            home = __import__(f"dagr_ray.{module}", fromlist=[old])
            assert getattr(home, old) is getattr(home, new), f"{module}.{old}"
    assert set(moved.TYPES.values()) <= set(plugins(Stage)) and not set(moved.TYPES) & set(plugins(Stage))
