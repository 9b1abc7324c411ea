"""Pictures of measurements, drawn from their records."""

from __future__ import annotations

import logging
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

Record = Mapping[str, Any]
R = TypeVar("R", bound=Record)

OURS, CONTROL, TOOL, PUBLISHED = "#c1121f", "#1d3557", "#e09f3e", "#8d99ae"
"""Colours of our method and its ablations, of the controls, of other tools, and of published methods."""

CONTROLS = ("dense", "uniform", "retrained")

LABEL = 0.045
"""Distance between two names at the ends of lines, in units of the rank correlation."""

logger = logging.getLogger(__name__)


def planned_epochs(record: Record) -> int:
    """The epochs of the comparison that a record belongs to: half of its own for a method that takes twice as many."""
    longer = re.search(r"-x(\d+)$", record["method"])
    return int(record["epochs"]) // (int(longer[1]) if longer else 1)


def kinds_of(records: Sequence[R], *entries: str) -> dict[tuple[Any, ...], list[R]]:
    """The records that are compared with each other, by their values of these entries and by planned epochs."""
    kinds: dict[tuple[Any, ...], list[R]] = {}
    for record in records:
        kinds.setdefault((*(record[entry] for entry in entries), planned_epochs(record)), []).append(record)
    return kinds


def accuracy_plot(records: Sequence[Record], file: Path) -> None:
    """Writes an SVG with, for every data set, model and length, accuracy against MACs and seconds to the result.

    A dot is a method's mean over seeds. Ours, the controls, the best at their cost and the best of each other kind have
    names and bars from the worst seed to the best; the others are a cloud. The scale is that of those who come close;
    who does not is listed. Without matplotlib nothing is drawn, and a warning says so.
    """
    kinds = kinds_of(records, "data", "part", "model")
    drawn = _figure(len(kinds))
    if drawn is None:
        return
    figure, panels = drawn
    named: dict[Any, list[Dot]] = {}
    for (by_macs, by_seconds), ((data, part, model, epochs), mine) in zip(panels, kinds.items(), strict=True):
        named[by_macs] = _frontier(
            by_macs, mine, lambda r: 100 * r["macs"] / r["macs_dense"], "MACs, % of the dense network"
        )
        named[by_seconds] = _frontier(
            by_seconds, mine, lambda r: r["cpu_seconds"], "processor seconds to the finished network"
        )
        by_macs.set_title(f"{model} on {data}, {epochs} epochs, {part.replace('_', ' ')} images")
    _legend(figure)
    figure.draw_without_rendering()  # from here on panels know where their points lie
    for panel, dots in named.items():
        _names(panel, dots)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A method on a panel: its mean over seeds, the worst and the best of them, in percent; whether it has its name."""

    name: str
    method: str
    x: float
    y: float
    low: float
    high: float
    named: bool = False


def frontier_of(dots: Sequence[Dot]) -> list[Dot]:
    """Those that no other beats in accuracy at no more cost, by rising cost."""
    found: list[Dot] = []
    for dot in sorted(dots, key=lambda d: (d.x, -d.y)):
        if not found or dot.y > found[-1].y:
            found.append(dot)
    return found


def _dots(records: Sequence[Record], x_of: Callable[[Record], float]) -> list[Dot]:
    """A dot for each method; named are ours, the controls, the frontier, and the best of the other two kinds."""
    found = []
    for key in dict.fromkeys((r["method"], r["policy"], r["start"]) for r in records):
        rows = [r for r in records if (r["method"], r["policy"], r["start"]) == key]
        y = [100 * r["accuracy"] for r in rows]
        x = statistics.mean(x_of(r) for r in rows)
        found.append(
            Dot(name=_name(*key), method=key[0], x=x, y=statistics.mean(y), low=min(y), high=max(y))
        )  # fmt: skip
    named = {id(dot) for dot in found if _is_in_front(dot.method)} | {id(dot) for dot in frontier_of(found)}
    for colour in (TOOL, PUBLISHED):
        kind = [dot for dot in found if _colour(dot.method) == colour]
        named |= {id(max(kind, key=lambda dot: dot.y))} if kind else set()
    return [replace(dot, named=id(dot) in named) for dot in found]


def _is_in_front(method: str) -> bool:
    """Whether a method is ours as it is meant to be used, or a control; ablations are not."""
    return method.removesuffix("-x2") in ("autowidth", *CONTROLS)


def range_of(dots: Sequence[Dot]) -> tuple[float, float]:
    """The accuracies that a panel shows, in percent: all of those with names, and no outliers below the others."""
    means = sorted(dot.y for dot in dots)
    lower, _, upper = statistics.quantiles(means, n=4) if len(means) > 1 else (means[0],) * 3
    low = min([max(means[0], lower - 1.5 * (upper - lower)), *(dot.low for dot in dots if dot.named)])
    high = max(dot.high for dot in dots)
    room = 0.06 * max(high - low, 0.5)
    return low - room, high + room


def _frontier(panel: Any, records: Sequence[Record], x_of: Callable[[Record], float], label: str) -> list[Dot]:
    """Ours and the controls in front, the rest as a cloud; who is out of range is said below. Returns who is named."""
    dots = _dots(records, x_of)
    low, high = range_of(dots)
    best = frontier_of(dots)
    panel.step([d.x for d in best], [d.y for d in best], where="post", color="#b9c0c9", linewidth=1, zorder=1)
    for dot in dots:
        colour, front = _colour(dot.method), 3 if dot.named else 2
        if dot.named:
            panel.plot([dot.x, dot.x], [dot.low, dot.high], color=colour, linewidth=1, alpha=0.5, zorder=front)
        panel.plot(dot.x, dot.y, "o", color=colour, markersize=7 if dot.named else 4, alpha=0.95 if dot.named else 0.4,
                   zorder=front, markeredgewidth=0)  # fmt: skip
    panel.set_ylim(low, high)
    panel.margins(x=0.12)
    outside = sorted((d for d in dots if d.y < low), key=lambda d: -d.y)
    if outside:
        listed = ", ".join(f"{d.name} {d.y:.1f}" for d in outside[:6])
        more = f" and {len(outside) - 6} more" if len(outside) > 6 else ""
        panel.text(0.99, 0.015, f"below the picture: {listed}{more}", transform=panel.transAxes, fontsize=7.5,
                   ha="right", color="#555555")  # fmt: skip
    panel.set_xlabel(label)
    panel.set_ylabel("accuracy, %")
    panel.grid(alpha=0.25)
    return [dot for dot in dots if dot.named]


def _legend(figure: Any) -> None:
    """What the colours mean, above all panels."""
    kinds = ((OURS, "autowidth (pale: its ablations)"), (CONTROL, "controls"), (PUBLISHED, "published measures"),
             (TOOL, "other tools"))  # fmt: skip
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], marker="o", linestyle="", color=colour, label=name) for colour, name in kinds]
    marks.append(Line2D([], [], color="#b9c0c9", label="best at this cost"))
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False, fontsize=9)


PLACES = [(x * reach, y * reach) for reach in (1, 2, 3, 4.5, 6) for x, y in
          ((9, 0), (8, 7), (8, -7), (-9, 0), (-8, 7), (-8, -7), (0, 10), (0, -10))]  # fmt: skip
"""Where a name may stand beside its dot, in points, the best place first."""


def _names(panel: Any, dots: Sequence[Dot]) -> None:
    """The names of the dots where they cover neither each other nor another dot, with a line to a dot far away."""
    scale = 72 / panel.figure.dpi
    at = {id(dot): panel.transData.transform((dot.x, dot.y)) * scale for dot in dots}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at.values()]
    left, bottom, right, top = (side * scale for side in panel.bbox.extents)
    for dot in sorted(dots, key=lambda d: -d.y):
        x, y = at[id(dot)]
        width, height = 4.9 * len(dot.name), 10
        boxes = [
            (x + dx - (width if dx < 0 else width / 2 if dx == 0 else 0), y + dy - height / 2) for dx, dy in PLACES
        ]
        free = [
            n for n, (bx, by) in enumerate(boxes)
            if bx > left and bx + width < right and by > bottom and by + height < top
            and not any(bx < c and bx + width > a and by < d and by + height > b for a, b, c, d in taken)
        ]  # fmt: skip
        best = free[0] if free else 0
        (dx, dy), (bx, by) = PLACES[best], boxes[best]
        taken.append((bx, by, bx + width, by + height))
        panel.annotate(
            dot.name, (dot.x, dot.y), xytext=(dx, dy), textcoords="offset points", fontsize=8, va="center",
            ha="right" if dx < 0 else "center" if dx == 0 else "left", color=_colour(dot.method), zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.7},
            arrowprops={"arrowstyle": "-", "color": _colour(dot.method), "linewidth": 0.5} if best >= 8 else None,
        )  # fmt: skip


def _colour(method: str) -> str:
    if method.startswith("autowidth"):
        return OURS
    if method.removesuffix("-x2") in CONTROLS:
        return CONTROL
    return TOOL if method.startswith(("torch-pruning", "gromo")) else PUBLISHED


def _name(method: str, policy: str, start: float) -> str:
    """A method's name; with its policy and its start where these are not the usual ones."""
    extra = [policy] if policy == "auto" else []
    extra += [f"from {start:g}x"] if start != 1 else []
    return " ".join([method, *extra])
