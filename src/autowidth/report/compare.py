"""Several runs side by side: their figures, their courses, their widths, and the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autowidth.report.figures import LINES, Cell, Figure, View, course_figures, percent, text
from autowidth.report.story import Story
from autowidth.report.words import counted, short

TALLEST = 900
"""Pixels that the picture of widths takes at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a page says of several runs. headings, rows: a row for each run; differences: a row for each setting."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    figures: tuple[Figure, ...]
    differences: tuple[tuple[str, ...], ...]


def compared(stories: Sequence[Story]) -> Comparison:
    """The comparison of these runs, which have different names."""
    figures = [frontier_figure(stories), *course_figures(stories), final_widths_figure(stories)]
    return Comparison(
        headings=("run", "accuracy", "MACs", "parameters", "removed", "inserted", "reviews", "predictions, Spearman",
                  "seconds"),
        rows=tuple(_row(story) for story in stories),
        figures=tuple(figure for figure in figures if figure is not None),
        differences=_differences(stories),
    )  # fmt: skip


def _row(story: Story) -> tuple[Cell, ...]:
    accuracy = None if story.accuracy is None else f"{100 * story.accuracy:.2f} %"
    costs = [
        None if now is None else short(now) + (f" ({percent(now / start)})" if start else "")
        for now, start in ((story.macs, story.macs_start), (story.params, story.params_start))
    ]
    spearman = story.fidelity.spearman
    return (
        story.name, accuracy, *costs, story.removed, story.inserted, len(story.reviews),
        None if spearman is None else round(spearman, 2), None if story.seconds is None else round(story.seconds, 1),
    )  # fmt: skip


def _differences(stories: Sequence[Story]) -> tuple[tuple[str, ...], ...]:
    """(Setting, its value in each run) where they are not all equal."""
    tables = [_flat(story.settings) for story in stories]
    names = dict.fromkeys(name for table in tables for name in table if name != "out")
    rows = [(name, *(table.get(name, "-") for table in tables)) for name in names]
    return tuple(row for row in rows if len(set(row[1:])) > 1)


def _flat(settings: Any, prefix: str = "") -> dict[str, str]:
    """Settings with those of tables behind a dot, as text."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def frontier_figure(stories: Sequence[Story]) -> Figure | None:
    """Accuracy against MACs, a point for each run; None where no accuracy is known."""
    known = [(n, s) for n, s in enumerate(stories) if s.accuracy is not None and s.macs is not None]
    if not known:
        return None
    traces = tuple(
        {
            "type": "scatter", "mode": "markers+text", "name": text(s.name), "x": [s.macs], "y": [s.accuracy],
            "text": [text(s.name)], "textposition": "top center", "cliponaxis": False,
            "marker": {"size": 12, "color": f"var(--{LINES[n % len(LINES)]})"},
            "hovertemplate": "%{y:.2%} at %{x:.3s} MACs",
        }
        for n, s in known
    )  # fmt: skip
    shares = [s.accuracy or 0.0 for _, s in known]
    layout = {"xaxis": {"title": {"text": "MACs of one sample"}, "tickformat": "~s",
                        "range": [0, 1.15 * max(s.macs or 0 for _, s in known)]}, "showlegend": False,
              "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".1%",
                        "range": [min(shares) - 0.02, max(shares) + 0.02]}}  # fmt: skip
    best = max(known, key=lambda pair: pair[1].accuracy or 0.0)[1]
    return Figure(
        key="frontier", title="Accuracy against MACs", height=340,
        views=(View(label="Accuracy", traces=traces, layout=layout),),
        summary=f"{counted(len(known), 'run')}; the most accurate is {best.name} with {percent(best.accuracy or 0)}.",
        headings=("run", "MACs", "accuracy"),
        rows=tuple((s.name, s.macs, f"{100 * (s.accuracy or 0):.2f} %") for _, s in known),
    )  # fmt: skip


def final_widths_figure(stories: Sequence[Story]) -> Figure | None:
    """Layers by runs: how wide they are at the end, in the order of the first run that has them."""
    widths = [{layer.name: (layer.now, layer.start) for layer in story.layers} for story in stories]
    names = list(dict.fromkeys(name for table in widths for name in table))
    if not names:
        return None
    z = [[round(t[n][0] / t[n][1], 4) if n in t else None for t in widths] for n in names]
    cells = [[t[n][0] if n in t else None for t in widths] for n in names]
    trace = {
        "type": "heatmap", "x": [text(s.name) for s in stories], "y": [text(n) for n in names], "z": z,
        "text": cells, "zmin": 0, "zmid": 1, "zmax": 2, "xgap": 2, "ygap": 1, "name": "width",
        "colorscale": [[0, "var(--scale-low)"], [0.25, "var(--scale-less)"], [0.5, "var(--scale-same)"],
                       [0.75, "var(--scale-more)"], [1, "var(--scale-high)"]],
        "colorbar": {"title": {"text": "of the start", "side": "right"}, "thickness": 10, "tickformat": ".0%",
                     "outlinewidth": 0},
        "hovertemplate": "<b>%{y}</b><br>%{x}: %{text} filters, %{z:.0%} of the start<extra></extra>",
        **({"texttemplate": "%{text}", "textfont": {"size": 11}} if len(names) * len(stories) <= 700 else {}),
    }  # fmt: skip
    layout = {"yaxis": {"autorange": "reversed", "type": "category", "automargin": True},
              "xaxis": {"type": "category", "side": "top"}}  # fmt: skip
    return Figure(
        key="final", title="Widths at the end", height=min(TALLEST, 110 + 22 * len(names)),
        views=(View(label="Widths", traces=(trace,), layout=layout),),
        summary=f"Filters of {counted(len(names), 'layer')} at the end of {counted(len(stories), 'run')}.",
        headings=("layer", *(s.name for s in stories)),
        rows=tuple((n, *row) for n, row in zip(names, cells, strict=True)),
    )  # fmt: skip
