"""What the README and the pages beside it tell people to type does what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dagr_ray.cli.main import VERBS
from tests.conftest import tiny_beir

ROOT = Path(__file__).parents[2]
PAGES = {
    name: (ROOT / name).read_text() for name in ("README.md", "docs/cli.md", "docs/python.md", "docs/quickstart.md")
}
README = PAGES["README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(name: str, kind: str) -> list[str]:
    """The bodies of a page's fenced blocks of one kind."""
    return [body for found, body in FENCED.findall(PAGES[name]) if found == kind]


def commands() -> list[str]:
    """Every ``dagr`` command, in blocks and in the README's table of verbs."""
    texts = [body for name in ("README.md", "docs/cli.md") for body in blocks(name, "")]
    lines = [line.split("#")[0].strip() for line in "\n".join(texts).replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^\| `(dagr [^`]+)` \|", README, re.MULTILINE)
    return sorted({line for line in lines if re.match(r"(ray job submit .*-- +)?dagr [a-z]+", line)})


COMMANDS = commands()


def _run(words: list[str], cwd: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_make_targets_of_the_readme_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"study", "test", "setup", "check"} <= named
    for target in sorted(named):
        assert _run(["make", "-n", target], ROOT).returncode == 0, target


def test_every_verb_has_a_command() -> None:
    assert {command.partition("dagr ")[2].split()[0] for command in COMMANDS} == set(VERBS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("dagr doctor", "dagr track")])
def test_commands_are_understood(command: str, tmp_path: Path) -> None:
    """A command with a collection that is not there fails for that reason and no other."""
    words = shlex.split(command[command.index("dagr ") :])
    swapped = [
        w.replace("my-collection", "no-such-folder").replace("s3://bucket/collection", "no-such-folder") for w in words
    ]
    swapped = [w.replace("s3://bucket/runs", "runs") for w in swapped]
    without_runs = "--runs" in swapped or swapped[1] in ("preview", "plugins")
    place = [] if without_runs else ["--runs", str(tmp_path)]
    done = _run([sys.executable, "-m", "dagr_ray.cli.main", *swapped[1:], *place], ROOT)
    if swapped[1] in ("plugins", "ls"):
        assert done.returncode == 0, done.stderr
        return
    known = ("no-such-folder", "no study in", "no generated row", "no folder")
    assert done.returncode == 2, (command, done.stderr)
    assert any(reason in done.stderr for reason in known), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("verb", ["check", "preview"])
def test_commands_work_on_a_collection(verb: str, tmp_path: Path) -> None:
    command = next(c for c in COMMANDS if c.startswith(f"dagr {verb} "))
    data = tiny_beir(tmp_path / "set")
    words = [w.replace("my-collection", str(data)) for w in shlex.split(command)[1:]]
    more = ["generator=crop"] if verb == "preview" else []
    place = ["--runs", str(tmp_path / "runs")] if verb == "check" else []
    done = _run([sys.executable, "-m", "dagr_ray.cli.main", *words, *more, *place], ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5


@pytest.mark.cluster
def test_the_python_page_runs(tmp_path: Path) -> None:
    """Its study without the arm that is trained: what two baselines have to go through is all but training."""
    code = "\n".join(blocks("docs/python.md", "python"))
    assert "volume=0,1000" in code
    tiny_beir(tmp_path / "my-collection")
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    done = _run([sys.executable, "-c", code.replace("volume=0,1000", "volume=0")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 2000
    assert "nDCG@10" in done.stdout and "bm25" in done.stdout.lower()
    assert any((tmp_path / "runs").glob("study-beir-*/study.json"))


@pytest.mark.cluster
def test_the_recipe_and_the_filter_of_the_readme_run(tmp_path: Path) -> None:
    """Both, as they stand: the recipe trains a model and judges it, with the filter among its filters."""
    recipe, written = blocks("README.md", "python")
    assert len([line for line in recipe.splitlines() if line]) <= 12
    assert len([line for line in written.splitlines() if line]) <= 15
    tiny_beir(tmp_path / "my-collection")
    used = recipe.replace("held_out=[docs])", "held_out=[docs], extra_filters=[Capitals()])")
    assert used != recipe
    done = _run([sys.executable, "-c", f"{written}\n{used}"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"'nDCG@10': 0\.\d+", done.stdout)
    assert any((tmp_path / "runs").glob("score-capitals-*/manifest.json"))


@pytest.mark.parametrize(
    "name", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    modules = re.findall(r"python -m (benchmarks(?:\.\w+)+)", page.read_text())
    missing += [module for module in modules if not (ROOT / (module.replace(".", "/") + ".py")).exists()]
    assert not missing or name in ("CHANGELOG.md", "LOG.md")


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = next(body for body in blocks("README.md", "") if body.startswith("dagr_ray/"))
    inside = tree.partition("\njobs/")[0].partition("\n")[2]
    rooms = {p.parent.name for p in (ROOT / "dagr_ray").glob("*/__init__.py")}
    assert set(re.findall(r"\b(\w+)/", inside)) == rooms


def test_the_readme_shows_what_the_quick_start_page_shows() -> None:
    whole = PAGES["docs/quickstart.md"].splitlines()
    shown = README.partition("$ make study\n")[2].partition("\n```")[0].splitlines()
    assert len(shown) == 6 and all(line in whole for line in shown)
