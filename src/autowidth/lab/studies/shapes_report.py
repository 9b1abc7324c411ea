"""What the trained shapes say: a table and a picture of their records."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from autowidth.lab.studies.shape_settings import is_ours
from autowidth.lab.studies.surrogate import Surrogate
from autowidth.lab.studies.widths import Shape, distance
from autowidth.lab.tables import markdown, spread

Record = Mapping[str, Any]

ENOUGH = 20
"""Shapes of a setting before a model of them is fitted for the tables."""

COLOURS = {"uniform": "#1d3557", "found": "#c1121f", "model": "#2a9d8f", "other": "#adb5bd"}

logger = logging.getLogger(__name__)


# ---- table -----------------------------------------------------------------------------------------------------------


def table(records: Sequence[Record]) -> str:
    """The records as Markdown: for every setting how far shapes differ, the best ones, and how well they are known."""
    text = [
        "# Shapes at equal cost\n",
        "Every shape (width per channel group) is trained by one recipe, from fresh weights (`published`: cut out of "
        "published weights, which have seen the held-out images, and fine-tuned); shapes of one setting cost the same "
        "within a percent of the dense MACs. Accuracy in percent on training images that are held out, "
        "and for the repeats on test images, mean over seeds and standard deviation between them. A model of accuracy "
        "over log widths (a Gaussian process) chooses where to look next; `by model` is what it expects of a shape.\n",
        "Command: `python -m autowidth.lab.studies.shapes --data cifar10:PATH --setting SETTING --out results`\n",
    ]
    for setting in dict.fromkeys(r["setting"] for r in records):
        text += _section(setting, [r for r in records if r["setting"] == setting])
    return "\n".join(text)


def _section(setting: str, records: Sequence[Record]) -> list[str]:
    own = [100 * r["accuracy"] for r in records if r["origin"] == "own-run"]
    records = [r for r in records if r["origin"] != "own-run"]
    held = [r for r in records if r["part"] == "held_out"]
    shapes = list(dict.fromkeys(tuple(r["widths"]) for r in held))
    lines = [f"## {setting}\n", f"{len(shapes)} shapes, {len(held)} trainings on held-out images."]
    surrogate = _surrogate(held) if len(shapes) >= ENOUGH else None
    if surrogate is not None:
        lines.append(_fidelity(surrogate))
    noise = _noise(held)
    if noise is not None:
        lines.append(f"Seed noise, from shapes with repeats: standard deviation {100 * noise:.2f} points.")
    if own:
        lines.append(
            f"Runs in which our engine chose the shapes of its rows: {spread(own, counted=True)} % on held-out images."
        )
    headings = ("shape", "widths", "distance from uniform", "held-out %", "test %", "by model %", "MACs %")
    reference = _uniform(records)
    rows = [_row(name, shape, records, surrogate, reference) for name, shape in _rows(records, surrogate)]
    return [*lines, "", markdown(headings, rows), ""]


def _surrogate(held: Sequence[Record]) -> Surrogate:
    return _fitted(tuple((tuple(r["widths"]), r["accuracy"]) for r in held))


@lru_cache(maxsize=8)
def _fitted(seen: tuple[tuple[Shape, float], ...]) -> Surrogate:
    return Surrogate.fitted([shape for shape, _ in seen], [accuracy for _, accuracy in seen])


def _fidelity(surrogate: Surrogate) -> str:
    expected, observed = surrogate.left_out(), surrogate.observed
    rank = float(spearmanr(expected, observed).statistic)
    squared = 1 - float(np.sum((observed - expected) ** 2) / np.sum((observed - observed.mean()) ** 2))
    return (
        f"The model, each shape left out in turn: rank correlation {rank:.2f}, R^2 {squared:.2f}; "
        f"it takes {100 * surrogate.noise:.2f} points for noise."
    )


def _noise(held: Sequence[Record]) -> float | None:
    """Standard deviation between seeds, pooled over the shapes that have several; None where there are none."""
    by_shape: dict[Shape, list[float]] = {}
    for r in held:
        by_shape.setdefault(tuple(r["widths"]), []).append(r["accuracy"])
    several = [values for values in by_shape.values() if len(values) > 1]
    if not several:
        return None
    freedom = sum(len(values) - 1 for values in several)
    return float(np.sqrt(sum(statistics.variance(values) * (len(values) - 1) for values in several) / freedom))


def _uniform(records: Sequence[Record]) -> Shape | None:
    return next((tuple(r["widths"]) for r in records if r["origin"] == "uniform"), None)


def _rows(records: Sequence[Record], surrogate: Surrogate | None) -> list[tuple[str, Shape]]:
    """Uniform, ours, the best by model: those with repeats, or five of them where there are no repeats yet."""
    named: dict[Shape, str] = {}
    tested = {tuple(r["widths"]) for r in records if r["part"] == "test"}
    for r in records:
        shape = tuple(r["widths"])
        if r["origin"] == "uniform":
            named.setdefault(shape, "uniform")
        elif is_ours(r["setting"], r["source"]):
            named.setdefault(shape, "ours, " + r["source"].split("-")[1])
    rows = sorted(((name, shape) for shape, name in named.items()), key=lambda row: (row[0] != "uniform", row[0]))
    others = list(dict.fromkeys(tuple(r["widths"]) for r in records if tuple(r["widths"]) not in named))
    if surrogate is not None and others:
        ranked = [others[n] for n in np.argsort(-surrogate.smoothed(others))]
        best = [shape for shape in ranked if shape in tested] or ranked[:5]
        rows += [(f"best by model, {number}", shape) for number, shape in enumerate(best, 1)]
    return rows


def _row(
    name: str, shape: Shape, records: Sequence[Record], surrogate: Surrogate | None, reference: Shape | None
) -> list[str]:
    mine = [r for r in records if tuple(r["widths"]) == shape]
    return [
        name,
        " ".join(map(str, shape)),
        f"{distance(shape, reference):.2f}" if reference else "",
        spread([100 * r["accuracy"] for r in mine if r["part"] == "held_out"], none="", counted=True),
        spread([100 * r["accuracy"] for r in mine if r["part"] == "test"], none="", counted=True),
        f"{100 * surrogate.smoothed([shape])[0]:.2f}" if surrogate is not None else "",
        f"{100 * mine[0]['macs'] / mine[0]['macs_dense']:.1f}",
    ]


# ---- picture ---------------------------------------------------------------------------------------------------------


def draw(records: Sequence[Record], file: Path) -> None:
    """Writes an SVG with, for every setting, accuracy on held-out images against distance from uniform width.

    Without matplotlib nothing is drawn, and a warning says so.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture: matplotlib is not installed, pip install 'autowidth[bench]'")
        return
    settings = list(dict.fromkeys(r["setting"] for r in records))
    if not settings:
        return
    figure = Figure(figsize=(7 * len(settings), 5.5), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for panel, setting in zip(panels, settings, strict=True):
        mine = [r for r in records if r["setting"] == setting and r["part"] == "held_out"]
        _panel(panel, setting, [r for r in mine if r["origin"] != "own-run"])
    figure.savefig(file, metadata={"Date": None})


def _panel(panel: Any, setting: str, records: Sequence[Record]) -> None:
    """The dots of one setting: everything in grey below, what has a name above; a line at the mean of uniform width."""
    reference = _uniform(records)
    labels = {
        "other": "random and structured shapes",
        "found": "found by our runs",
        "model": "proposed by the model",
        "uniform": "uniform width",
    }
    for order, (kind, label) in enumerate(labels.items()):
        mine = [r for r in records if _kind(r["origin"]) == kind]
        if not mine:
            continue
        x = [distance(r["widths"], reference) if reference else 0.0 for r in mine]
        panel.scatter(
            x, [100 * r["accuracy"] for r in mine], s=46 if kind == "uniform" else 22, color=COLOURS[kind],
            marker="D" if kind == "uniform" else "o", alpha=0.85, linewidths=0, zorder=order + 2,
            label=f"{label} ({len(mine)})",
        )  # fmt: skip
    uniform = [100 * r["accuracy"] for r in records if r["origin"] == "uniform"]
    if uniform:
        panel.axhline(statistics.mean(uniform), color=COLOURS["uniform"], linewidth=1, linestyle="--", zorder=1)
    panel.set_title(f"{setting}, held-out images, equal MACs")
    panel.set_xlabel("distance from uniform width (root mean square of log width)")
    panel.set_ylabel("accuracy, %")
    panel.grid(alpha=0.25)
    if records:
        panel.legend(loc="lower left", fontsize=9)


def _kind(origin: str) -> str:
    if origin in ("uniform", "model"):
        return origin
    return "found" if origin in ("found", "found-scaled") else "other"
