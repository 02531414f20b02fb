"""This checkout: its root, its commit, and what a script says of itself."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commit(root: Path = ROOT) -> str:
    """The short commit of a checkout; with a plus if files differ from it."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    head = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    # the pages that benchmarks write do not change what they measure
    words = ["git", "status", "--porcelain", "-uno", "--", ".", ":!docs", ":!benchmarks/*.md", ":!benchmarks/**/*.md"]
    changed = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False).stdout
    return (head or "?") + ("+" if changed.strip() else "")


def title(script: Path) -> str:
    """The first sentence of a script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text())) or script.stem).split("\n")[0]


def module_of(script: str | Path) -> str:
    """``benchmarks.speed.search`` for a script's file."""
    return ".".join(Path(script).resolve().relative_to(ROOT).with_suffix("").parts)
