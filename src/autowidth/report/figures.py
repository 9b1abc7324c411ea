"""From what a page says to its pictures: Plotly figures as plain tables, each with a sentence and its data in rows.

Colours are names of the page's style (`var(--left)`), which the page fills in when the theme changes.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from autowidth.history import Fidelity
from autowidth.report.story import LayerStory, ReviewStory, Story
from autowidth.report.words import counted, short

Trace: TypeAlias = dict[str, Any]
Cell: TypeAlias = "str | int | float | None"

WRITTEN = 700
"""Cells of the picture of widths up to which each shows its number."""

MARKED = 4000
"""Cells up to which who left and who came is marked in the picture of widths."""

SIDE = 0.36
"""How far from the middle of its cell a mark stands, in cells."""

HATCHED = {"shape": "/", "fillmode": "overlay", "fgcolor": "var(--panel)", "size": 6, "solidity": 0.25}
"""How frozen layers are filled."""

TALLEST = 900
"""Pixels that the picture of widths takes at most, unless the reader makes it taller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One way to look at a figure: traces, and what it sets of the layout."""

    label: str
    traces: tuple[Trace, ...]
    layout: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture. summary: what it shows, for who cannot see it. headings, rows: its data as a table."""

    key: str
    title: str
    summary: str
    views: tuple[View, ...]
    headings: tuple[str, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()
    height: int = 300


def figures_of(story: Story) -> tuple[Figure, ...]:
    """All pictures of a run that its record has data for."""
    found = [widths_figure(story), network_figure(story), *course_figures((story,)), *fidelity_figures(story)]
    return tuple(figure for figure in found if figure is not None)


def text(words: str) -> str:
    """Words as a Plotly label shows them: it reads some marks of HTML in labels."""
    return html.escape(words, quote=False)


def percent(share: float) -> str:
    """A share for people: 49.3 %."""
    return f"{100 * share:.3g} %"


# ---- widths over time ------------------------------------------------------------------------------------------------


def widths_figure(story: Story) -> Figure | None:
    """Layers by reviews: the width as a share of that at the start, who left, who came."""
    layers = story.layers
    if not layers or not story.reviews:
        return None
    names = [text(layer.name) for layer in layers]
    when = [r.number for r in story.reviews]
    share = [[round(w / layer.start, 4) for w in layer.widths] for layer in layers]
    cells, count = [[*layer.widths] for layer in layers], len(layers) * (len(when) + 1)
    gap = 1 if count <= MARKED else 0
    top = max(2.0, max(map(max, share)))
    heat = {
        "type": "heatmap", "x": [0, *when], "y": names, "z": share, "text": cells, "zmin": 0, "zmid": 1,
        "zmax": top, "colorscale": _scale(top), "xgap": gap, "ygap": gap,
        "hovertemplate": "<b>%{y}</b><br>after review %{x}: %{text} filters, %{z:.0%} of the start<extra></extra>",
        "colorbar": _bar("of the start", tickformat=".0%"), "name": "width",
        **({"texttemplate": "%{text}", "textfont": {"size": 10}} if count <= WRITTEN else {}),
    }  # fmt: skip
    marks = _marks(story) if count <= MARKED else ()
    height = min(TALLEST, 130 + max(14, 22 if count <= WRITTEN else 14) * len(layers))
    layout = {
        "xaxis": {"title": {"text": "review; 0 is the start"}, "tickformat": "d", "showgrid": False,
                  **({"dtick": 1} if len(when) <= 24 else {})},
        "yaxis": {"autorange": "reversed", "type": "category", "automargin": True},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }  # fmt: skip
    views = (
        View(label="Widths", traces=(heat, *marks), layout=layout),
        View(label="Filters that left", traces=(_moves(story, when, names, "removed"),), layout=layout),
        View(label="Filters that came", traces=(_moves(story, when, names, "inserted"),), layout=layout),
    )
    return Figure(
        key="widths", title="Widths of every layer over time", views=views, height=height,
        summary=f"Width of {counted(len(layers), 'layer')} at the start and after each of "
        f"{counted(len(when), 'review')}. {story.summary}",
        headings=("layer", "start", "now", "least", "most", "left", "came"),
        rows=tuple(
            (y.name, y.start, y.now, min(y.widths), max(y.widths), sum(y.removed), sum(y.inserted)) for y in layers
        ),
    )  # fmt: skip


def _scale(top: float) -> list[list[Any]]:
    """Colours from nothing left over as wide as at the start to twice as wide and more (`top` times)."""
    middle = 1 / top
    return [[0, "var(--scale-low)"], [0.5 * middle, "var(--scale-less)"], [middle, "var(--scale-same)"],
            [min(1.5 * middle, 0.999), "var(--scale-more)"], [1, "var(--scale-high)"]]  # fmt: skip


def _bar(title: str, **more: Any) -> dict[str, Any]:
    """A narrow colour bar."""
    return {"title": {"text": title, "side": "right"}, "thickness": 10, "outlinewidth": 0, **more}


def _marks(story: Story) -> tuple[Trace, ...]:
    """Triangles where filters left and where they came."""
    found = []
    sides = (("removed", "left", "triangle-down", -SIDE), ("inserted", "came", "triangle-up", SIDE))
    for what, name, symbol, side in sides:
        at = [
            (number + side, text(layer.name), count)
            for layer in story.layers
            for number, count in enumerate(getattr(layer, what), start=1)
            if count
        ]
        if at:
            x, y, counts = zip(*at, strict=True)
            found.append({
                "type": "scatter", "mode": "markers", "name": f"filters {name}", "x": x, "y": y, "customdata": counts,
                "marker": {"symbol": symbol, "size": 8, "color": f"var(--{name})",
                           "line": {"width": 1, "color": "var(--panel)"}},
                "hovertemplate": f"<b>%{{y}}</b><br>%{{customdata}} {name}<extra></extra>",
            })  # fmt: skip
    return tuple(found)


def _moves(story: Story, when: Sequence[int], names: Sequence[str], what: str) -> Trace:
    """How many filters left, or came, at every review in every layer."""
    colour = "left" if what == "removed" else "came"
    z = [list(getattr(layer, what)) for layer in story.layers]
    most = max(1, max(max(row, default=0) for row in z))
    return {
        "type": "heatmap", "x": list(when), "y": list(names), "z": z, "zmin": 0, "zmax": most, "xgap": 1, "ygap": 1,
        "colorscale": [[0, "var(--panel)"], [1, f"var(--{colour})"]], "colorbar": _bar(f"filters that {colour}"),
        "hovertemplate": f"<b>%{{y}}</b><br>review %{{x}}: %{{z}} {colour}<extra></extra>", "name": colour,
    }  # fmt: skip


# ---- before and after ------------------------------------------------------------------------------------------------


def network_figure(story: Story) -> Figure | None:
    """The network before and after, a bar for each layer, as tall as the layer is wide."""
    layers = story.layers
    if not layers:
        return None
    views = [View(label="Widths to scale", traces=_silhouette(layers), layout=_layers_axis(layers) | {
        "yaxis": {"visible": False, "fixedrange": True}})]  # fmt: skip
    if all(layer.macs is not None for layer in layers):
        views.append(View(label="MACs", traces=_macs_bars(layers), layout=_layers_axis(layers) | {
            "yaxis": {"title": {"text": "MACs of one sample"}, "tickformat": "~s"}}))  # fmt: skip
    return Figure(
        key="network", title="The network before and after", views=tuple(views), height=360,
        summary=f"A bar for each of {counted(len(layers), 'layer')} in the order of the forward pass, as tall as the "
        f"layer has filters: pale before, full after. The widest has {max(y.start for y in layers)} filters before "
        f"and {max(y.now for y in layers)} after.",
        headings=("number", "layer", "before", "after", "share", "MACs before", "MACs after"),
        rows=tuple(
            (n, y.name, y.start, y.now, percent(y.now / y.start), *(_maybe(m) for m in (y.macs_start, y.macs)))
            for n, y in enumerate(layers, 1)
        ),
    )  # fmt: skip


def _maybe(macs: float | None) -> str:
    return "unknown" if macs is None else short(macs)


def _layers_axis(layers: Sequence[LayerStory]) -> dict[str, Any]:
    return {
        "barmode": "overlay", "bargap": 0.12 if len(layers) <= 120 else 0,
        "xaxis": {"title": {"text": "layer, from the input to the output"}, "range": [0.4, len(layers) + 0.6],
                  "tickformat": "d"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }  # fmt: skip


def _silhouette(layers: Sequence[LayerStory]) -> tuple[Trace, ...]:
    """Bars around one middle line."""
    about = [f"{text(layer.name)}<br>{layer.start} before, {layer.now} after" for layer in layers]
    numbers = range(1, len(layers) + 1)

    def bars(name: str, widths: Sequence[int], colour: str, at: Sequence[int], **more: Any) -> Trace:
        return {
            "type": "bar", "name": name, "x": [numbers[n] for n in at], "y": [widths[n] for n in at],
            "base": [-widths[n] / 2 for n in at], "marker": {"color": colour, **more}, "hoverinfo": "text",
            "hovertext": [about[n] for n in at],
        }  # fmt: skip

    start, now = [y.start for y in layers], [y.now for y in layers]
    free = [n for n, y in enumerate(layers) if y.group is not None]
    fixed = [n for n, y in enumerate(layers) if y.group is None]
    wider = [n for n in free if now[n] > start[n]]
    rest = [n for n in free if now[n] <= start[n]]
    after = bars("after", now, "var(--accent)", rest)
    if len(layers) <= 26:
        after |= {"text": [now[n] for n in rest], "textposition": "inside", "insidetextanchor": "middle",
                  "textangle": 0, "textfont": {"color": "var(--on-accent)"}, "constraintext": "none"}  # fmt: skip
    found = [bars("before", start, "var(--before)", [n for n in free if n not in wider]), after]
    if wider:
        found += [bars("after, wider", now, "var(--came)", wider), bars("before", start, "var(--accent)", wider)]
        found[-1]["showlegend"] = False
    if fixed:
        found.append(bars("frozen", now, "var(--grey)", fixed, pattern=HATCHED))
    return tuple(found)


def _macs_bars(layers: Sequence[LayerStory]) -> tuple[Trace, ...]:
    """What every layer takes, before and after."""
    numbers, names = list(range(1, len(layers) + 1)), [text(layer.name) for layer in layers]
    columns = (("before", [y.macs_start for y in layers], "before"), ("after", [y.macs for y in layers], "accent"))
    return tuple(
        {
            "type": "bar", "name": name, "x": numbers, "y": macs, "marker": {"color": f"var(--{colour})"},
            "customdata": names, "hovertemplate": f"%{{customdata}}<br>%{{y:.3s}} MACs {name}<extra></extra>",
        }
        for name, macs, colour in columns
    )  # fmt: skip


# ---- the course ------------------------------------------------------------------------------------------------------


def course_figures(stories: Sequence[Story]) -> list[Figure]:
    """Accuracy, loss, MACs and parameters over time, a line for each run."""
    several = len(stories) > 1
    in_epochs = all(r.epoch is not None for s in stories for r in s.reviews)
    found = []
    for key, title, what in (("accuracy", "Accuracy", "accuracy"), ("loss", "Loss", "loss"), ("macs", "MACs", "macs"),
                             ("params", "Parameters", "params")):  # fmt: skip
        traces = [t for n, story in enumerate(stories) for t in _course(story, what, n, several, in_epochs)]
        if not traces:
            continue
        tickformat = {"accuracy": ".0%", "loss": "~g"}.get(what, "~s")
        yaxis = {"tickformat": tickformat, "rangemode": "normal" if what in ("accuracy", "loss") else "tozero"}
        time = "epoch" if in_epochs else "step"
        layout = {"xaxis": {"title": {"text": time}, "rangemode": "tozero"}, "yaxis": yaxis,
                  "showlegend": several or len(traces) > 1,
                  "shapes": [] if several else _moments(stories[0], in_epochs),
                  "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}}  # fmt: skip
        found.append(Figure(
            key=key, title=title, views=(View(label=title, traces=tuple(traces), layout=layout),), height=260,
            summary=_course_summary(stories, title, traces),
            headings=("line", time, title.lower()), rows=tuple(row for trace in traces for row in _points(trace)),
        ))  # fmt: skip
    return found


def _points(trace: Trace) -> list[tuple[Cell, ...]]:
    """The points of a line as rows."""
    return [
        (html.unescape(trace["name"]), _rounded(x), _rounded(y)) for x, y in zip(trace["x"], trace["y"], strict=True)
    ]


def _rounded(value: float | int) -> float:
    """A number as a table shows it."""
    return value if isinstance(value, int) else float(f"{value:.5g}")


def _course_summary(stories: Sequence[Story], title: str, traces: Sequence[Trace]) -> str:
    ends = "; ".join(f"{t['name']}: from {t['y'][0]:.4g} to {t['y'][-1]:.4g}" for t in traces[:6])
    return f"{title} over the run. {ends}."


LINES = ("accent", "left", "came", "violet", "olive", "grey")
"""Colours of runs that are compared, by turns."""


def _course(story: Story, what: str, number: int, several: bool, in_epochs: bool) -> list[Trace]:
    """The lines of one run."""
    colour = f"var(--{LINES[number % len(LINES)]})"
    dash = ("solid", "dash", "dot")[number // len(LINES) % 3]
    line = {"color": colour, "width": 2, "dash": dash}
    label = text(story.name) if several else ""
    if what in ("macs", "params"):
        return _cost_line(story, what, label or what.replace("params", "parameters"), line, in_epochs)
    at = [(_when(e.epoch, e.step, in_epochs), getattr(e, what)) for e in story.epochs]
    known = [(x, y) for x, y in at if y is not None]
    if what == "accuracy" and story.accuracy_start is not None:
        known.insert(0, (0, story.accuracy_start))
    name = {"accuracy": f"on {story.part} images", "loss": "training, mean of an epoch"}[what]
    found = [_line(label or name, known, line)] if known else []
    if what == "loss" and not several:
        probed = [
            (_at(r, in_epochs), r.event.loss)
            for r in story.reviews
            if r.event.loss is not None and r.event.step  # before the first step it is not the loss on labels
        ]
        if probed:
            probe = _line("probe, before a review", probed, {"color": "var(--left)", "width": 1, "dash": "dot"})
            found.append(probe | {"mode": "lines+markers", "marker": {"size": 5, "color": "var(--left)"}})
    return found


def _cost_line(story: Story, what: str, label: str, line: dict[str, Any], in_epochs: bool) -> list[Trace]:
    """MACs or parameters, which change at reviews."""
    start = story.macs_start if what == "macs" else story.params_start
    if start is None:
        return []
    at = [(0, start), *((_at(r, in_epochs), getattr(r.event, what)) for r in story.reviews)]
    if story.epochs and (end := _when(story.epochs[-1].epoch, story.epochs[-1].step, in_epochs)) > at[-1][0]:
        at.append((end, at[-1][1]))
    return [_line(label, at, line | {"shape": "hv"})]


def _line(name: str, points: Sequence[tuple[float, float]], line: dict[str, Any]) -> Trace:
    x, y = zip(*points, strict=True)
    mode = "lines" if len(points) > 1 else "markers"
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, "line": line,
            "marker": {"color": line["color"], "size": 7}, "hovertemplate": "%{x:.4g}: %{y}"}  # fmt: skip


def _when(epoch: int, step: int, in_epochs: bool) -> int:
    return epoch if in_epochs else step


def _at(review: ReviewStory, in_epochs: bool) -> float:
    return review.event.step if review.epoch is None or not in_epochs else round(review.epoch, 3)


def _moments(story: Story, in_epochs: bool) -> list[dict[str, Any]]:
    """Thin lines where reviews were, unless there are too many to see."""
    if len(story.reviews) > 60:
        return []
    return [
        {"type": "line", "xref": "x", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1, "layer": "below",
         "line": {"color": "var(--line)", "width": 1}}
        for x in (_at(r, in_epochs) for r in story.reviews)
    ]  # fmt: skip


# ---- predictions -----------------------------------------------------------------------------------------------------


def fidelity_figures(story: Story) -> list[Figure]:
    """How well predictions held: of plans, and of single filters."""
    events = [(r.number, r.event) for r in story.reviews]
    plans = [(n, e.predicted, e.measured) for n, e in events if e.predicted is not None and e.measured is not None]
    ranks = [(n, e.fidelity, e.fidelity.spearman) for n, e in events if e.fidelity and e.fidelity.spearman is not None]
    return [*([_plans(plans)] if plans else []), *([_ranks(ranks)] if ranks else [])]


def _ranks(ranks: Sequence[tuple[int, Fidelity, float]]) -> Figure:
    """How well the worths of audited filters ranked them, review by review."""
    x, y = [n for n, _, _ in ranks], [spearman for _, _, spearman in ranks]
    trace = {
        "type": "scatter", "mode": "lines+markers", "name": "Spearman", "x": x, "y": y,
        "customdata": [fidelity.count for _, fidelity, _ in ranks], "line": {"color": "var(--accent)"},
        "hovertemplate": "review %{x}: %{y:.2f} on %{customdata} filters<extra></extra>",
    }  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "review"}, "tickformat": "d"}, "showlegend": False,
        "yaxis": {"range": [min(-0.1, min(y) - 0.05), 1.05], "title": {"text": "rank correlation"}},
    }  # fmt: skip
    return Figure(
        key="ranks", title="How well worths ranked single filters", height=280,
        views=(View(label="Spearman", traces=(trace,), layout=layout),),
        summary=f"Spearman's rank correlation of predicted and true loss changes, by review: {min(y):.2f} to "
        f"{max(y):.2f}, last {y[-1]:.2f}.",
        headings=("review", "Spearman", "slope, true per predicted", "filters taken away"),
        rows=tuple(
            (n, _rounded(spearman), None if f.slope is None else _rounded(f.slope), f.count) for n, f, spearman in ranks
        ),
    )  # fmt: skip


def _plans(plans: Sequence[tuple[int, float, float]]) -> Figure:
    """What plans were predicted to cost, and what they cost when they were tried."""
    numbers, x, y = zip(*plans, strict=True)
    low, high = min(0.0, *x, *y), max(1e-6, *x, *y)
    points = {
        "type": "scatter", "mode": "markers+lines", "name": "plan", "x": x, "y": y, "customdata": numbers,
        "marker": {"size": 9, "color": "var(--accent)"}, "line": {"width": 0.5, "color": "var(--grey)"},
        "hovertemplate": "review %{customdata}: predicted %{x:.3g}, measured %{y:.3g} nats<extra></extra>",
    }  # fmt: skip
    diagonal = {"type": "scatter", "mode": "lines", "name": "as predicted", "x": [low, high], "y": [low, high],
                "line": {"dash": "dash", "color": "var(--muted)"}, "hoverinfo": "skip"}  # fmt: skip
    layout = {"xaxis": {"title": {"text": "predicted loss change, nats"}},
              "yaxis": {"title": {"text": "measured, nats"}},
              "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}}  # fmt: skip
    return Figure(
        key="plans", title="What plans were predicted to cost, and did", height=280,
        views=(View(label="Plans", traces=(diagonal, points), layout=layout),),
        summary=f"{counted(len(plans), 'plan')}: predicted {sum(x):.3g} nats in all, measured {sum(y):.3g}.",
        headings=("review", "predicted, nats", "measured, nats"),
        rows=tuple((n, _rounded(p), _rounded(m)) for n, p, m in plans),
    )  # fmt: skip
