"""The prose of the package is plain English: conditions begin with "if", and "where" names places."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dagr_ray"
# Folders and modules in plain words. Add yours when it is done.
ROOMS = (
    "annotation", "cli", "core", "engines", "filters", "formats", "leakage", "losses", "miners", "packages.py", "prompts.py",
    "quickstart", "recipes", "report", "retrieval", "stages", "strategies", "study", "teachers", "training",
)  # fmt: skip
MOST = 0.3  # uses of "where" for each "if"; ordinary technical English has fewer


def prose(source: str) -> str:
    """Docstrings, without the code of their examples, and comments."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (ast.get_docstring(node) or "").splitlines()
            texts += [line for line in lines if not line.lstrip().startswith((">>>", "..."))]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join([*texts, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


def count(word: str, texts: list[str]) -> int:
    return sum(len(re.findall(rf"\b{word}\b", text, re.IGNORECASE)) for text in texts)


def test_prose_has_docstrings_and_comments_only():
    source = (
        '"""Where if."""\nwhere = 1 if True else 2  # if\n\n\ndef f():\n    """Of.\n\n    >>> 1 if 1 else 2\n    """\n'
    )
    assert (count("if", [prose(source)]), count("where", [prose(source)])) == (2, 1)


@pytest.mark.parametrize("room", ROOMS)
def test_conditions_begin_with_if(room):
    path = PACKAGE / room
    texts = [prose(file.read_text()) for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    where, conditions = count("where", texts), count("if", texts)
    assert where <= MOST * conditions, (
        f"{where} x where and {conditions} x if: write conditions with if, times with when"
    )
