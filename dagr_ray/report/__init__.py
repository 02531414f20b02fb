"""Reports of a study: tables, significance tests, curves, the page, and the trace of a single training row.

Names are imported when they are asked for: what plans a study needs two numbers of ``decision``, and no page.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagr_ray.report.page import write_page
    from dagr_ray.report.rows import trace
    from dagr_ray.report.summary import summarise
    from dagr_ray.report.text import markdown_table, terminal_table

__all__ = ["markdown_table", "summarise", "terminal_table", "trace", "write_page"]
_MODULES = dict(zip(__all__, ("text", "summary", "text", "rows", "page"), strict=True))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
