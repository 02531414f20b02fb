"""The files that CONTRIBUTING.md shows are a package of plugins that works as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_beir

ROOT = Path(__file__).parents[2]
FILES = dict(
    re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
)
KINDS = ("strategy", "engine", "filter", "teacher", "loss", "stage")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the package, registered by an entry point, the program that uses it, and a collection."""
    home = tmp_path_factory.mktemp("contributing")
    for name, text in FILES.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text)
    modules = sorted(Path(name).stem for name in FILES if name.startswith("mine/"))
    (home / "mine" / "__init__.py").write_text(f"from . import {', '.join(modules)}\n")
    (home / "mine-1.0.dist-info").mkdir()
    (home / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (home / "mine-1.0.dist-info" / "entry_points.txt").write_text("[dagr_ray.plugins]\nmine = mine\n")
    tiny_beir(home / "my-collection")
    return home


def run(home, *words):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(home), str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *words], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_each_kind_has_an_example_of_twenty_lines():
    assert len(FILES) == len(KINDS) + 1
    for name, text in FILES.items():
        code = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
        lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("from ", "import "))]
        assert name == "use.py" or 5 < len(lines) <= 20, (name, len(lines))


def test_every_plugin_of_the_page_is_found_and_its_example_holds(home):
    code = """
import doctest, importlib, sys
from dagr_ray.core.config import plugins
from dagr_ray.core.stage import Stage
from dagr_ray.engines import Engine
from dagr_ray.filters import Filter
from dagr_ray.losses import Loss
from dagr_ray.strategies import Strategy
from dagr_ray.teachers import Teacher
for base in (Strategy, Engine, Filter, Teacher, Loss, Stage):
    print(base.__name__.lower(), *(n for n, c in plugins(base).items() if c.__module__.startswith("mine.")))
assert doctest.testmod(importlib.import_module("mine.short_query")).attempted == 1
sys.exit(doctest.testmod(importlib.import_module("mine.short_query")).failed)
"""
    found = dict(line.split() for line in run(home, "-c", code).splitlines())
    assert found == dict(
        zip(KINDS, ("short-query", "first-words", "digits", "overlap", "hinge", "long-passages"), strict=True)
    )


@pytest.mark.slow
def test_the_six_work_together(home):
    lines = run(home, "use.py").splitlines()
    assert [line.split()[0] for line in lines] == ["label", "train"]
    assert any((home / "runs").glob("score-digits-*/manifest.json"))
    assert any((home / "runs").glob("long-passages-*/manifest.json"))
