"""How verbs print: JSON and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dagr_ray.config import packed


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    print(json.dumps(packed(value), indent=1, ensure_ascii=False))


def print_table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> None:
    """Prints rows below their head, in columns as wide as their widest cell."""
    cells = [list(head), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
