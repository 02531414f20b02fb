"""What the README tells people to type does what it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dagr_ray.cli.main import VERBS
from tests.conftest import tiny_beir

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
TEXT = "\n".join(body for kind, body in BLOCKS if not kind).replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for line in TEXT.splitlines()]
VERB_LINES = [c for c in COMMANDS if re.match(r"(ray job submit .*-- +)?dagr [a-z]+", c)]


def _run(words: list[str], cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def test_make_targets_of_the_readme_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"study", "test", "setup"} <= named
    for target in sorted(named):
        assert _run(["make", "-n", target], ROOT).returncode == 0, target


def test_every_verb_is_in_the_readme() -> None:
    missing = [verb for verb in VERBS if not re.search(rf"`?\b{verb}\b", README)]
    assert not missing


@pytest.mark.parametrize("command", VERB_LINES)
def test_commands_are_understood(command: str, tmp_path: Path) -> None:
    """A command with a collection that is not there fails for that reason and no other."""
    words = shlex.split(command[command.index("dagr ") :])
    swapped = [
        w.replace("my-collection", "no-such-folder").replace("s3://bucket/collection", "no-such-folder") for w in words
    ]
    swapped = [w.replace("s3://bucket/runs", "runs") for w in swapped]
    place = [] if "--runs" in swapped or swapped[1] == "preview" else ["--runs", str(tmp_path)]
    done = _run([sys.executable, "-m", "dagr_ray.cli.main", *swapped[1:], *place], ROOT)
    known = ("no-such-folder", "no study in", "no generated row", "no folder")
    assert done.returncode == 2, (command, done.stderr)
    assert any(reason in done.stderr for reason in known), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("verb", ["check", "preview"])
def test_commands_work_on_a_collection(verb: str, tmp_path: Path) -> None:
    command = next(c for c in VERB_LINES if c.startswith(f"dagr {verb} "))
    data = tiny_beir(tmp_path / "set")
    words = [w.replace("my-collection", str(data)) for w in shlex.split(command)[1:]]
    more = ["generator=crop"] if verb == "preview" else []
    place = ["--runs", str(tmp_path / "runs")] if verb == "check" else []
    done = _run([sys.executable, "-m", "dagr_ray.cli.main", *words, *more, *place], ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    """Its study without the arm that is trained: what two baselines have to go through is all but training."""
    code = "\n".join(body for kind, body in BLOCKS if kind == "python")
    assert "volume=0,1000" in code
    tiny_beir(tmp_path / "my-collection")
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    done = _run([sys.executable, "-c", code.replace("volume=0,1000", "volume=0")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 2000
    assert "nDCG@10" in done.stdout and "bm25" in done.stdout.lower()
    assert any((tmp_path / "runs").glob("study-beir-*/study.json"))


def test_paths_and_links_of_the_readme_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    scripts = re.findall(r"python (benchmarks/\w+\.py)", README)
    missing = [path for path in [*links, *scripts] if not (ROOT / path).exists()]
    assert not missing
    tree = next(body for _, body in BLOCKS if body.startswith("dagr_ray/"))
    modules = set(re.findall(r"\b(\w+\.py)\b", tree))
    there = {p.name for p in (ROOT / "dagr_ray").glob("*.py")} - {"__init__.py"}
    there |= {p.name for p in (ROOT / "jobs").glob("*.py")}
    assert modules == there
