"""A picture of a run: the width of every layer over its reviews, and the network before and after.

    autowidth train --auto --out runs/demo
    python -m autowidth.lab.studies.widths_picture runs/demo docs/widths.svg

The picture of the README is that of the first command's run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autowidth.checkpoint import read_run
from autowidth.errors import AutoWidthError
from autowidth.history import History

BEFORE, AFTER = "#c9ced6", "#c1121f"
"""Colours of the network as it was and as it is."""


class PictureError(AutoWidthError, ValueError):
    """A run of which there is nothing to draw."""


def draw(history: History, result: dict[str, Any], file: Path) -> None:
    """Writes an SVG: at the left widths over reviews, as shares of the start; at the right widths before and after.

    `result` is what run.json says of the run: accuracy (a share), macs, macs_start.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = list(history.widths_start)
    with mpl.rc_context({"svg.hashsalt": "widths", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        over, sizes = figure.subplots(1, 2, width_ratios=(1, 1.25))
        _over_reviews(over, history, names)
        _before_and_after(sizes, history, names)
        share = result["macs"] / result["macs_start"]
        figure.suptitle(f"{result['accuracy']:.1%} accuracy with {share:.0%} of the MACs: what a run did to its widths")
        figure.savefig(file, metadata={"Date": None})


def _over_reviews(panel: Any, history: History, names: Sequence[str]) -> None:
    """A line per channel group."""
    steps = [0, *(event.step for event in history), history.events[-1].total_steps]
    for name in names:
        start = history.widths_start[name]
        widths = [start, *(event.widths[name] for event in history)]
        shares = [100 * width / start for width in [*widths, widths[-1]]]
        panel.step(steps, shares, where="post", color=AFTER, alpha=0.55, linewidth=1.2)
    panel.set_ylim(0)
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("width, % of the start")
    panel.spines[["top", "right"]].set_visible(False)


def _before_and_after(panel: Any, history: History, names: Sequence[str]) -> None:
    """A bar per channel group, the first at the top."""
    rows, end = range(len(names)), history.events[-1].widths
    panel.barh(rows, [history.widths_start[name] for name in names], color=BEFORE, label="at the start")
    bars = panel.barh(rows, [end[name] for name in names], color=AFTER, height=0.5, label="at the end")
    panel.bar_label(bars, labels=[f" {history.widths_start[name]} → {end[name]}" for name in names], fontsize=7.5)
    panel.set_yticks(rows, names, fontsize=7.5)
    panel.invert_yaxis()
    panel.set_xlabel("filters")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="upper right", fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m autowidth.lab.studies.widths_picture", description="Draws a run.")
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("file", type=Path, help="the SVG to write")
    asked = parser.parse_args(arguments)
    run = read_run(asked.run)
    history = run.history()
    if history is None or not len(history) or "result" not in run.extra:
        raise PictureError(f"{asked.run} has no reviews, so there is nothing to draw: name a run that has made some")
    draw(history, run.extra["result"], asked.file)


if __name__ == "__main__":
    main()
