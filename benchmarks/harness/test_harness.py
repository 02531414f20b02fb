"""What every benchmark relies on: whose table is written, which bounds end a run, what memory is measured."""

import json
import re
import subprocess

import numpy as np
import pytest

from benchmarks.harness import Benchmark, commit, markdown, peak_memory
from benchmarks.harness.checkout import module_of


def test_pages_do_not_make_a_commit_another(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    for name in ("docs/results.md", "benchmarks/x.md", "benchmarks/speed/y.md", "code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("a")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    for name in ("docs/results.md", "benchmarks/x.md", "benchmarks/speed/y.md"):
        (tmp_path / name).write_text("b")
    clean = commit(tmp_path)
    (tmp_path / "code.py").write_text("b")
    assert re.fullmatch(r"[0-9a-f]+", clean) and commit(tmp_path) == f"{clean}+"


def made(folder, *words):
    bench = Benchmark(str(folder / "some.py"), "A benchmark.")
    bench.add("--rows", type=int, default=10)
    bench.add("--runs", free=True)
    bench.parse(words)
    return bench


def test_only_what_the_default_arguments_measure_becomes_the_table(tmp_path, capsys):
    table, figures = tmp_path / "some.md", tmp_path / "figures.json"
    bench = made(tmp_path, "--runs", "elsewhere", "--json", str(figures))
    bench.table(["what", "figure"], [["one", 1]])
    assert bench.finish() == 0
    assert table.read_text() == "| what | figure |\n|---|---:|\n| one | 1 |\n"
    assert json.loads(figures.read_text())["table"] == [table.read_text().rstrip("\n")]
    bench = made(tmp_path, "--rows", "3")
    bench.say("| 2 |")
    assert bench.finish() == 0
    assert "| 2 |" not in table.read_text() and "some.md is not written" in capsys.readouterr().out


def test_a_missed_bound_ends_a_run_with_1(tmp_path, capsys):
    bench = made(tmp_path)
    assert bench.bound("ratio", 0.97, at_least=0.97) and bench.bound("seconds", 5, at_most=5)
    assert bench.finish() == 0
    assert not bench.bound("ratio", 0.96, at_least=0.97)
    assert bench.finish() == 1
    assert "missed: ratio: 0.96 (at least 0.97)" in capsys.readouterr().err


def test_a_row_has_as_many_cells_as_the_head():
    assert markdown(["a", "b", "c"], [[1, 2, 3]], left=(0, -1))[1] == "|---|---:|---|"
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        markdown(["a", "b"], [[1]])


def test_peak_memory_is_that_of_the_process():
    before = peak_memory()
    held = np.ones(40 << 20, np.uint8)
    assert held.sum() and peak_memory() > 40 << 20 and peak_memory() >= before


def test_a_scripts_module_is_found_by_its_place():
    assert module_of(__file__) == "benchmarks.harness.test_harness"
