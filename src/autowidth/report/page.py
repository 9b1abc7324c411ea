"""From a story and its pictures to one file of HTML that needs nothing but a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from autowidth.errors import AutoWidthError
from autowidth.report.compare import Comparison, compared
from autowidth.report.figures import Figure, figures_of, percent
from autowidth.report.story import Story
from autowidth.report.words import counted, short


class MissingPackageError(AutoWidthError, ImportError):
    """A package that draws the page is not installed."""


ROWS = 2000
"""Rows of a table that a page carries; of more it shows the first, and says so."""


MARK = 'name="generator" content="autowidth"'
"""Stands near the top of every page that is written here."""


def is_page(file: Path) -> bool:
    """Whether the file is a page that was written here, and may be replaced by another."""
    with file.open("rb") as stream:
        return MARK.encode() in stream.read(4096)


def page_of(story: Story) -> str:
    """The page of one run."""
    figures = figures_of(story)
    payload = {
        "figures": _specs(figures),
        "worths": [asdict(w) for w in story.worths],
        "settings": dict(story.settings),
    }
    groups = list(dict.fromkeys(w.group for w in story.worths))
    return _rendered(
        "run.html.j2", payload, title=story.title, story=story, cards=_cards(story),
        figures={f.key: f for f in figures}, groups=groups, reviews_with_worths=_reviews_with_worths(story),
        settings=_flat(story.settings),
    )  # fmt: skip


def page_of_several(stories: Sequence[Story]) -> str:
    """The page that compares runs."""
    comparison: Comparison = compared(stories)
    title = "Comparison of " + ", ".join(story.name for story in stories)
    return _rendered(
        "compare.html.j2", {"figures": _specs(comparison.figures)}, title=title, stories=stories,
        comparison=comparison, figures={f.key: f for f in comparison.figures},
    )  # fmt: skip


def _rendered(template: str, payload: Mapping[str, Any], **values: Any) -> str:
    """The page with styles, scripts and data inside. The scripts are let in by a number that data cannot know."""
    packed = _packed(json.dumps(payload, allow_nan=False, separators=(",", ":"), default=list).encode())
    nonce = hashlib.sha256(packed.encode()).hexdigest()[:32]
    page = _environment().get_template(template).render(
        **values, nonce=nonce, data=packed, plotly=_plotly(), style=_asset("page.css"), script=_asset("page.js"),
        rows_shown=ROWS,
    )  # fmt: skip
    return str(page)


@cache
def _environment() -> Any:
    """What fills the templates; everything that is filled in is escaped. Raises MissingPackageError."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingPackageError(_missing("jinja2")) from error
    loader = jinja2.FunctionLoader(_asset)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"short": short, "percent": percent, "cell": _cell}
    return environment


@cache
def _plotly() -> str:
    """The script that draws, packed. Raises MissingPackageError."""
    try:
        script = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    except (ImportError, FileNotFoundError) as error:
        raise MissingPackageError(_missing("plotly")) from error
    return _packed(script)


def _missing(package: str) -> str:
    return f"the report is drawn with {package}, which is not installed: pip install 'autowidth[report]'"


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _asset(name: str) -> str:
    return resources.files("autowidth.report").joinpath("assets", name).read_text(encoding="utf-8")


def _specs(figures: Sequence[Figure]) -> dict[str, Any]:
    """The pictures as the script of the page draws them."""
    return {
        f.key: {"height": f.height, "views": [{"data": view.traces, "layout": view.layout} for view in f.views]}
        for f in figures
    }


def _cell(value: object) -> str:
    """A cell of a table."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _reviews_with_worths(story: Story) -> list[tuple[int, str]]:
    """(Number, label) of the reviews whose worths the page carries, the last one first."""
    numbers = sorted({w.review for w in story.worths}, reverse=True)
    return [(n, f"review {n} of {len(story.reviews)}, step {story.reviews[n - 1].event.step:,}") for n in numbers]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings with those of tables behind a dot, as text."""
    found: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return found


def _cards(story: Story) -> list[tuple[str, str, str]]:
    """(What, figure, what it was before) of the run at a glance."""
    found = []
    if story.accuracy is not None:
        before = f"{percent(story.accuracy_start)} before training, " if story.accuracy_start is not None else ""
        found.append(("accuracy", f"{100 * story.accuracy:.2f} %", f"{before}{story.part} images"))
    for what, start, now in (("MACs", story.macs_start, story.macs), ("parameters", story.params_start, story.params)):
        if start and now:
            found.append((what, percent(now / start), f"{short(now)} of {short(start)}"))
    if story.reviews:
        came = f"{story.inserted:,} inserted, {story.alive:,} of them alive"
        found.append(("filters removed", f"{story.removed:,}", came))
    if story.latency:
        found.append(("time an image", f"{story.latency[1]:.3g} ms", f"{story.latency[0]:.3g} ms before"))
    if story.seconds:
        share = f"{percent(story.review_seconds / story.seconds)} of it in {counted(len(story.reviews), 'review')}"
        found.append(("training", _duration(story.seconds), share if story.reviews else "no reviews"))
    return found


def _duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
