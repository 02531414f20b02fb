"""Draws scaling curves as SVG: a panel for each data set and base, and a line with an interval for each generator."""

from __future__ import annotations

import contextlib
import io
import os
from typing import TYPE_CHECKING, Any

from dagr_ray.core import environment
from dagr_ray.core.artifact import Json
from dagr_ray.core.config import ConfigError
from dagr_ray.core.storage import scratch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that people with any colour vision can distinguish (Okabe and Ito); markers differ too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def curves_svg(summary: Json) -> str:
    """An ``<svg>`` element without scripts or external references; empty if no curve has been measured yet.

    The same summary gives the same bytes. Labels are text, which matplotlib escapes.
    """
    # its caches, among them the list of fonts, which takes seconds: HOME may be one that cannot be written
    with contextlib.suppress(ConfigError):  # without a scratch folder it makes one of its own
        environment.set_defaults({"MPLCONFIGDIR": os.path.join(scratch(), "matplotlib")})
    import matplotlib

    curves = summary["curves"]
    if not curves:
        return ""
    sets = [s for s in summary["sets"] if any(c["set"] == s["name"] for c in curves)]
    bases = list(dict.fromkeys(c["base"] for c in curves))
    labels = list(dict.fromkeys(c["label"] for c in curves))
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "dagr",
        "font.family": "sans-serif",
        "font.size": 9,
    }
    with matplotlib.rc_context(settings):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6 * len(bases), 2.9 * len(sets) + 0.3), layout="constrained")
        panels = figure.subplots(len(sets), len(bases), squeeze=False, sharex=True)
        for i, data in enumerate(sets):
            for j, base in enumerate(bases):
                panel_curves = [c for c in curves if c["set"] == data["name"] and c["base"] == base]
                _panel(panels[i][j], summary, data, panel_curves, labels)
                role = {"in": "in distribution", "out": "out of distribution"}[data["role"]]
                panels[i][j].set_title(f"{base} on {data['name']}\n{role}, {data['queries']:,} queries", fontsize=9)
            panels[i][0].set_ylabel(summary["measure"])
        for panel in panels[-1]:
            panel.set_xlabel("generated queries trained on")
        handles: dict[str, Any] = {}
        for panel in panels.flat:
            handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None}, transparent=False)
    text = sink.getvalue()
    return text[text.index("<svg") :]


def _panel(panel: Axes, summary: Json, data: Json, curves: list[Json], labels: list[str]) -> None:
    for curve in curves:
        k = labels.index(curve["label"])
        points = curve["points"]
        x = [p["used"] for p in points]
        colour = COLOURS[k % len(COLOURS)]
        panel.fill_between(x, [p["low"] for p in points], [p["high"] for p in points], color=colour, alpha=0.13, lw=0)
        marker = MARKERS[k % len(MARKERS)]
        panel.plot(x, [p["mean"] for p in points], color=colour, marker=marker, ms=4.5, lw=1.6, label=curve["label"])
    bm25 = next((t for t in summary["trials"] if t["kind"] == "bm25" and data["name"] in t["scores"]), None)
    if bm25 is not None:
        level = bm25["scores"][data["name"]][summary["measure"]]["mean"]
        panel.axhline(level, color="#555", lw=1, ls=(0, (4, 3)), label="BM25")
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", color="#e4e4e4", lw=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
