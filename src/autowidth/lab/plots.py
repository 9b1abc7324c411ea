"""Pictures of measurements, drawn from their records."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

OURS, CONTROL, TOOL, PUBLISHED = "#c1121f", "#1d3557", "#e09f3e", "#8d99ae"
"""Colours of our method and its ablations, of the controls, of other tools, and of published methods."""

CONTROLS = ("dense", "uniform", "retrained")

LABEL = 0.045
"""Distance between two names at the ends of lines, in units of the rank correlation."""

logger = logging.getLogger(__name__)


def accuracy_plot(records: Sequence[Record], file: Path) -> None:
    """Writes an SVG with, for every data set and model, accuracy against MACs and against seconds to the result.

    A dot is a method's mean over seeds, its bar reaches from the worst seed to the best. Without matplotlib nothing
    is drawn, and a warning says so.
    """
    keys = list(dict.fromkeys((r["data"], r["part"], r["model"]) for r in records))
    drawn = _figure(len(keys))
    if drawn is None:
        return
    figure, panels = drawn
    for (by_macs, by_seconds), (data, part, model) in zip(panels, keys, strict=True):
        mine = [r for r in records if (r["data"], r["part"], r["model"]) == (data, part, model)]
        _scatter(by_macs, mine, lambda r: 100 * r["macs"] / r["macs_dense"], "MACs, % of the dense network")
        _scatter(by_seconds, mine, lambda r: r["cpu_seconds"], "processor seconds to the finished network")
        by_macs.set_title(f"{model} on {data}, {part.replace('_', ' ')} images")
    figure.savefig(file, metadata={"Date": None})


def fidelity_plot(records: Sequence[Record], file: Path) -> None:
    """Writes an SVG with, for every model and truth, each measure's rank correlation with it over the run.

    A line is a measure's mean over seeds. Without matplotlib nothing is drawn, and a warning says so.
    """
    models = list(dict.fromkeys((r["data"], r["model"]) for r in records))
    drawn = _figure(len(models))
    if drawn is None:
        return
    figure, panels = drawn
    for row, (data, model) in zip(panels, models, strict=True):
        for panel, truth in zip(row, ("removed", "compensated"), strict=True):
            mine = [r for r in records if (r["data"], r["model"], r["truth"]) == (data, model, truth)]
            _lines(panel, mine)
            panel.set_title(f"{model} on {data}, filters {truth}")
    figure.savefig(file, metadata={"Date": None})


def _lines(panel: Any, records: Sequence[Record]) -> None:
    """A line for every measure, its name where it ends; names keep a distance from each other."""
    ends = []
    for name in dict.fromkeys(r["criterion"] for r in records):
        known = [r for r in records if r["criterion"] == name and r["spearman"] is not None]
        x = sorted({r["moment"] for r in known})
        y = [statistics.mean(r["spearman"] for r in known if r["moment"] == moment) for moment in x]
        if x:
            ends.append((y[-1], x[-1], name))
            ours = name.startswith("autowidth")
            panel.plot([100 * m for m in x], y, "o-", color=_colour(name), linewidth=2.5 if ours else 1, markersize=3)
    height = math.inf
    for y_end, x_end, name in sorted(ends, reverse=True):
        height = min(y_end, height - LABEL)
        panel.annotate(
            name, (100 * x_end, y_end), xytext=(104, height), textcoords="data", fontsize=7, color=_colour(name),
            va="center",
        )  # fmt: skip
    panel.set_xlim(0, 125)
    panel.set_ylim(-0.75, 1.05)
    panel.set_xlabel("% of the run")
    panel.set_ylabel("Spearman's rank correlation with the true loss change")
    panel.grid(alpha=0.25)


def _figure(rows: int) -> tuple[Any, Any] | None:
    """A figure of so many rows of two panels, and the panels; None without rows, or without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture: matplotlib is not installed, pip install 'autowidth[bench]'")
        return None
    if not rows:
        return None
    figure = Figure(figsize=(13, 5.5 * rows), layout="constrained")
    return figure, figure.subplots(rows, 2, squeeze=False)


def _scatter(panel: Any, records: Sequence[Record], x_of: Any, label: str) -> None:
    """Dots, bars and names of all methods on one panel."""
    for key in dict.fromkeys((r["method"], r["policy"], r["start"]) for r in records):
        rows = [r for r in records if (r["method"], r["policy"], r["start"]) == key]
        x = statistics.mean(x_of(r) for r in rows)
        y = [100 * r["accuracy"] for r in rows]
        mean, colour = statistics.mean(y), _colour(key[0])
        panel.errorbar(
            x, mean, yerr=[[mean - min(y)], [max(y) - mean]], fmt="o", color=colour, capsize=2, markersize=5, alpha=0.9
        )
        panel.annotate(_name(*key), (x, mean), xytext=(5, 3), textcoords="offset points", fontsize=7, color=colour)
    panel.set_xlabel(label)
    panel.set_ylabel("accuracy, %")
    panel.grid(alpha=0.25)


def _colour(method: str) -> str:
    if method.startswith("autowidth"):
        return OURS
    if method in CONTROLS:
        return CONTROL
    return TOOL if method.startswith(("torch-pruning", "gromo")) else PUBLISHED


def _name(method: str, policy: str, start: float) -> str:
    """A method's name; with its policy and its start where these are not the usual ones."""
    extra = [policy] if policy == "auto" else []
    extra += [f"from {start:g}x"] if start != 1 else []
    return " ".join([method, *extra])
