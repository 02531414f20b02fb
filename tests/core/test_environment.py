"""The list of environment variables, its page, and the code name the same variables."""

import doctest
import re
from pathlib import Path

import pytest

from dagr_ray.core import environment

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/environment.md").read_text()
# The names in the first column of the page's tables.
LISTED = {
    name for line in PAGE.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])
}
SOURCES = {path: path.read_text() for path in (ROOT / "dagr_ray").rglob("*.py")}


def row(name: str) -> str:
    return next(line for line in PAGE.splitlines() if line.startswith("| ") and f"`{name}`" in line.split("|")[1])


def test_the_page_lists_every_variable_with_its_default() -> None:
    for name, default in environment.READ.items():
        assert default in row(name).split("|")[2]
    for values in (environment.COMMAND, environment.VLLM, environment.MLFLOW):
        for name, value in values.items():
            assert f"`{value}`" in row(name).split("|")[2], name


def test_every_variable_of_ours_is_in_the_module_and_on_the_page() -> None:
    ours = {name for text in SOURCES.values() for name in re.findall(r"\bDAGR_[A-Z_]+\b", text)}
    assert ours <= environment.READ.keys() & LISTED
    folders = (ROOT / each for each in ("tests", "benchmarks", "scripts", "jobs"))
    others = {
        name
        for folder in folders
        for path in folder.rglob("*.py")
        for name in re.findall(r"environ[^\n]*\b(DAGR_[A-Z]+(?:_[A-Z]+)*)\b", path.read_text())
    }
    assert others <= LISTED and {name for name in LISTED if name.startswith("DAGR_")} <= ours | others


def test_the_environment_is_read_in_one_module() -> None:
    reading = r"os\.environ\.get\(|os\.getenv|os\.environ\[[^]]+\](?! ?=)"
    found = {
        path.relative_to(ROOT / "dagr_ray").as_posix() for path, text in SOURCES.items() if re.search(reading, text)
    }
    # one reads folders to make them absolute; one keeps what vLLM changes, to set it back
    assert found == {"core/environment.py", "core/paths.py", "core/ray_start.py", "engines/vllm.py"}
    named = {name for text in SOURCES.values() for name in re.findall(r'environment\.get\("(\w+)"\)', text)}
    assert named <= environment.READ.keys() and named >= environment.READ.keys() - {"DAGR_DEBUG", "DAGR_RAY_ALONE"}


def test_every_variable_that_is_set_is_on_the_page() -> None:
    setting = r'os\.environ(?:\.setdefault\(|\[)"(\w+)"'
    assert {name for text in SOURCES.values() for name in re.findall(setting, text)} <= LISTED


def test_the_values(monkeypatch) -> None:
    monkeypatch.setenv("DAGR_RUNS", "elsewhere")
    assert environment.get("DAGR_RUNS") == "elsewhere"
    assert doctest.testmod(environment) == (0, 2)
    with pytest.raises(KeyError):
        environment.get("HOME")
    monkeypatch.setenv("GIVEN_BY_A_USER", "7")
    monkeypatch.setenv("NOT_GIVEN", "")
    monkeypatch.delenv("NOT_GIVEN")
    environment.set_defaults({"GIVEN_BY_A_USER": "1", "NOT_GIVEN": "1"})
    assert environment.with_values({"A": "b"}).items() >= {("GIVEN_BY_A_USER", "7"), ("NOT_GIVEN", "1"), ("A", "b")}
