"""Writes the page of a study: one file, no network, no scripts. The template escapes all texts of corpora and models."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.terminal import shown
from dagr_ray.report import verdict
from dagr_ray.report.charts import curves_svg
from dagr_ray.report.lineage import Folders
from dagr_ray.report.rows import samples
from dagr_ray.report.text import seed_lines

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = "report.html"


def write_page(summary: Json, runs: str, study_folder: str) -> str:
    """Writes ``report.html`` into the study's folder; returns its path."""
    folder = Artifact(runs, study_folder)
    folder.write_bytes(PAGE, render(summary, runs).encode())
    return f"{folder.path}/{PAGE}"


def _samples(folders: Folders, generator: Json) -> list[Json]:
    none: list[Json] = []
    return folders.read_or(generator["folder"], lambda _: samples(folders, generator), none)


def render(summary: Json, runs: str) -> str:
    """The page's HTML, from a summary and its folders."""
    folders = Folders(runs)
    rows = [(generator, _samples(folders, generator)) for generator in summary["generators"]]
    # the chart is markup, in which matplotlib has escaped the labels; everything else on the page is text
    template = _environment().get_template("page.html")
    return template.render(s=summary, samples=rows, chart=curves_svg(summary), seeds=seed_lines(summary))


def visible(value: Any) -> Any:
    """A text that is safe on a page: invisible characters, and marks that reverse a line, are spelled out."""
    return shown(value) if type(value) is str else value  # markup is a string of another type


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dagr_ray.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "dollars": verdict.dollars,
        "duration": verdict.duration,
        "signed": verdict.signed,
        "p_text": verdict.p_text,
        "day": lambda seconds: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)),
        "pretty": lambda value: json.dumps(value, ensure_ascii=False),
    }
    environment.tests |= {"gain": verdict.is_gain, "loss": verdict.is_loss}
    return environment
