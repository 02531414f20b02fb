"""What may know what: the package, its tests and its benchmarks."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("folder", "others"), [("dagr_ray", "tests|benchmarks"), ("tests", "benchmarks"), ("benchmarks", "tests")]
)
def test_a_folder_imports_nothing_of_the_others(folder: str, others: str) -> None:
    """Also not in a string of code that another process runs, which the import contracts cannot see."""
    imported = re.compile(rf"(?:^|\n|\\n|;)\s*(?:from|import) (?:{others})\b")
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 20
    offenders = [str(path.relative_to(ROOT)) for path in files if imported.search(path.read_text())]
    assert not offenders
