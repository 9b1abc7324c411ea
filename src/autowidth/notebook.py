"""Tables and bars in HTML for notebooks: names and numbers in, text out."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol


class Review(Protocol):
    """What is shown of an event."""

    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def predicted(self) -> float | None: ...
    @property
    def measured(self) -> float | None: ...
    @property
    def macs_before(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def widths(self) -> Mapping[str, int]: ...
    @property
    def worths(self) -> Mapping[str, tuple[float, float, float]]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def removed(self) -> Mapping[str, int]: ...
    @property
    def inserted(self) -> Mapping[str, int]: ...


class Reviews(Protocol):
    """What is shown of a history."""

    @property
    def widths_start(self) -> Mapping[str, int]: ...
    @property
    def removed_total(self) -> int: ...
    @property
    def inserted_total(self) -> int: ...
    def __iter__(self) -> Iterator[Review]: ...


GREY, BLUE, GREEN = "#9aa5b1", "#3b78c4", "#1f9a64"
"""Of what was there before, of what is there now, and of what has come; they are seen on white and on black."""

MOST = 200
"""Rows of a table; of more it says how many there are."""


def review_table(event: Review) -> str:
    """Every channel group before and after a review, and what its filters were worth."""
    left, came = event.removed, event.inserted
    before = {group: width + left.get(group, 0) - came.get(group, 0) for group, width in event.widths.items()}
    most = max([1, *event.widths.values(), *before.values()])
    rows = [
        (group, before[group], width, bar(width, before=before[group], most=most), left.get(group, 0),
         came.get(group, 0), *(f"{worth:.2e}" for worth in event.worths.get(group, ())))
        for group, width in event.widths.items()
    ]  # fmt: skip
    losses = [(name, change) for name, change in (("predicted", event.predicted), ("measured", event.measured))]
    parts = [f"{name} {change:+.4f} nats" for name, change in losses if change is not None]
    title = ", ".join(
        [f"Review at step {event.step}: {event.macs:,} of {event.macs_before:,} MACs", *parts, *event.notes]
    )
    headings = ("channel group", "before", "after", "", "left", "came", "weakest", "median", "strongest (nats)")
    return table(headings, rows, title=title)


def history_tables(history: Reviews) -> str:
    """The widths at the start and now, and a row for each review."""
    events, start = list(history), history.widths_start
    now = events[-1].widths if events else start
    most = max([1, *start.values(), *now.values()])
    widths = [(g, w, now.get(g, w), bar(now.get(g, w), before=w, most=most)) for g, w in start.items()]
    rows = [
        (e.step, e.macs, sum(e.removed.values()), sum(e.inserted.values()), "" if e.loss is None else f"{e.loss:.4f}")
        for e in events
    ]
    title = f"{len(events)} reviews: {history.removed_total:,} filters removed, {history.inserted_total:,} inserted"
    return table(("channel group", "start", "now", ""), widths, title=title) + table(
        ("step", "MACs", "left", "came", "loss (nats)"), rows, title="Reviews"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, title: str) -> str:
    """A table with a title. Cells are text, but for those that `bar` has made."""
    head = "".join(f'<th style="text-align:left">{html.escape(heading)}</th>' for heading in headings)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{_cell(cell)}</td>' for cell in row) + "</tr>"
        for row in rows[:MOST]
    )
    more = f"<p>and {len(rows) - MOST} more</p>" if len(rows) > MOST else ""
    return (
        f"<div><p><b>{html.escape(title)}</b></p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{more}</div>"
    )


class Bar(str):
    """A picture in a cell, in HTML that is taken as it is."""


def bar(now: float, *, before: float | None = None, most: float) -> Bar:
    """A bar as long as `now`, over a pale one as long as `before`, on a scale that ends at `most`."""
    width = 160 / most if most > 0 else 0.0
    parts = [(before or 0, GREY, 0.45), (now, BLUE if before is None or now <= before else GREEN, 1.0)]
    drawn = "".join(
        f'<rect x="0" y="1" height="11" width="{length * width:.1f}" fill="{colour}" fill-opacity="{opacity}"/>'
        for length, colour, opacity in sorted(parts, key=lambda part: -part[0])
    )
    said = f"{now:g}" if before is None else f"{now:g} of {before:g}"
    return Bar(f'<svg width="162" height="13" role="img" aria-label="{said}">{drawn}</svg>')


def _cell(cell: object) -> str:
    return cell if isinstance(cell, Bar) else html.escape(f"{cell:,}" if isinstance(cell, int) else str(cell))
