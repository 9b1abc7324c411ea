"""Pictures of measurements, drawn from their records."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

OURS, CONTROL, PEER, OTHER = "#c1121f", "#1d3557", "#e09f3e", "#8d99ae"
"""Colours of our method and its ablations, of the controls, of other tools, and of published criteria."""

CONTROLS = ("dense", "uniform", "retrained")

logger = logging.getLogger(__name__)


def accuracy_plot(records: Sequence[Record], file: Path) -> None:
    """Writes an SVG with, for every data set and model, accuracy against MACs and against seconds to the result.

    A dot is a method's mean over seeds, its bar reaches from the worst seed to the best. Without matplotlib nothing
    is drawn, and a warning says so.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture: matplotlib is not installed, pip install 'autowidth[bench]'")
        return
    keys = list(dict.fromkeys((r["data"], r["part"], r["model"]) for r in records))
    if not keys:
        return
    figure = Figure(figsize=(13, 5.5 * len(keys)), layout="constrained")
    panels = figure.subplots(len(keys), 2, squeeze=False)
    for (by_macs, by_seconds), (data, part, model) in zip(panels, keys, strict=True):
        mine = [r for r in records if (r["data"], r["part"], r["model"]) == (data, part, model)]
        _scatter(by_macs, mine, lambda r: 100 * r["macs"] / r["macs_dense"], "MACs, % of the dense network")
        _scatter(by_seconds, mine, lambda r: r["cpu_seconds"], "processor seconds to the finished network")
        by_macs.set_title(f"{model} on {data}, {part.replace('_', ' ')} images")
    figure.savefig(file, metadata={"Date": None})


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
    return PEER if method.startswith("torch-pruning") else OTHER


def _name(method: str, policy: str, start: float) -> str:
    """A method's name; with its policy and its start where these are not the usual ones."""
    extra = [policy] if policy == "auto" else []
    extra += [f"from {start:g}x"] if start != 1 else []
    return " ".join([method, *extra])
