"""Reports of a study: tables, significance tests, curves, the page, and the trace of a single training row."""

from dagr_ray.report.page import write_page
from dagr_ray.report.rows import trace
from dagr_ray.report.summary import summarise
from dagr_ray.report.text import markdown_table, terminal_table

__all__ = ["markdown_table", "summarise", "terminal_table", "trace", "write_page"]
