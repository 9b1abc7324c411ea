"""What a notebook shows of a channel map, an event and a history: well-formed, complete, harmless."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from autowidth.history import History
from autowidth.lab.models import build
from autowidth.notebook import MOST, bar, table
from autowidth.trace import trace
from records import written


def parsed(text: str) -> ET.Element:
    """The HTML as a tree; raises where tags do not match."""
    return ET.fromstring(f"<all>{text}</all>")


def cells(tree: ET.Element, number: int = 0) -> list[list[str]]:
    """The text of the rows of the n-th table."""
    found = list(tree.iter("table"))[number]
    return [["".join(cell.itertext()) for cell in row.iter("td")] for row in found.iter("tr")][1:]


def test_a_channel_map_shows_its_groups_to_scale_and_why_axes_are_frozen() -> None:
    channel_map = trace(build("resnet8", in_channels=1), torch.zeros(1, 1, 8, 8))
    tree = parsed(channel_map._repr_html_())
    assert [(row[0], int(row[1])) for row in cells(tree)] == list(channel_map.widths.items())
    assert cells(tree, 1) == [["model input", "1"], ["model output", "2"]]
    lengths = [float(rect.get("width", "nan")) for rect in tree.iter("rect") if float(rect.get("width", "0"))]
    widths = list(channel_map.widths.values())
    assert lengths == pytest.approx([160 * width / max(widths) for width in widths], abs=0.1)


def test_an_event_and_a_history_show_what_happened(tmp_path: Path) -> None:
    history = written(tmp_path / "h", layers=5, reviews=4)
    tree, last = parsed(history._repr_html_()), history.events[-1]
    assert [(r[0], int(r[1]), int(r[2])) for r in cells(tree)] == [
        (group, width, last.widths[group]) for group, width in history.widths_start.items()
    ]
    assert [(int(r[0]), int(r[2]), int(r[3])) for r in cells(tree, 1)] == [
        (e.step, sum(e.removed.values()), sum(e.inserted.values())) for e in history
    ]
    rows = cells(parsed(last._repr_html_()))
    before = history.events[-2].widths
    assert [(r[0], int(r[1]), int(r[2])) for r in rows] == [(g, before[g], w) for g, w in last.widths.items()]
    assert parsed(History({})._repr_html_()) is not None


def test_names_that_hold_marks_are_text() -> None:
    evil = "<script>alert(1)</script>&"
    tree = parsed(table((evil,), [(evil,)], title=evil) + History({evil: 3})._repr_html_())
    assert list(tree.iter("script")) == []
    assert cells(tree) == [[evil]]


def test_a_long_table_says_how_many_rows_it_leaves_out() -> None:
    tree = parsed(table(("n",), [(n,) for n in range(MOST + 7)], title="many"))
    assert len(cells(tree)) == MOST
    assert "and 7 more" in "".join(tree.itertext())


def test_a_wider_layer_is_told_from_a_narrower_one() -> None:
    assert "#1f9a64" in bar(5, before=3, most=8)
    assert "#1f9a64" not in bar(3, before=5, most=8)
    assert 'aria-label="3 of 5"' in bar(3, before=5, most=8)
