"""Comparisons: records say what was run, controls stand beside, tables and pictures come from the records alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from autowidth.lab.bench import BenchError, bench
from autowidth.lab.methods import METHODS, UnknownMethodError
from autowidth.lab.plots import _figure, _frontier, _names, accuracy_plot, planned_epochs
from autowidth.lab.suites import find_suite
from autowidth.lab.suites.compare import RECIPES, comparison, measure, table

KEYS = {
    "method", "model", "seed", "start", "policy", "epochs", "accuracy", "macs", "macs_dense", "params", "seconds",
    "review_seconds", "widths",
}  # fmt: skip
"""What a record has at least."""


def record(**other: Any) -> dict[str, Any]:
    about = {
        "method": "autowidth", "policy": "budget 0.25", "data": "digits", "part": "test", "epochs": 2, "accuracy": 0.5,
        "loss": 1.0, "macs": 25, "macs_dense": 100, "params": 10, "seconds": 4.0, "cpu_seconds": 3.0,
        "review_seconds": 1.0, "probe_seconds": 0.3, "audit_seconds": 0.6, "decide_seconds": 0.02,
        "surgery_seconds": 0.08, "model": "resnet8", "seed": 0, "start": 1.0, "budget": 0.25, "widths": [1, 2],
    }  # fmt: skip
    return about | other


def cells(text: str) -> list[list[str]]:
    """The cells of all tables in a Markdown text, row by row."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_comparison_from_end_to_end(tmp_path: Path) -> None:
    methods = ("dense", "autowidth", "l1")
    suite = comparison("digits", methods=methods, epochs=2, budgets=(0.5,), seeds=(0, 1))
    assert len(suite.units) == 6
    records = bench(suite, tmp_path, processes=2)
    assert json.loads((tmp_path / "digits.json").read_text()) == records
    assert {(r["method"], r["seed"]) for r in records} == {(m, s) for m in (*methods, "retrained") for s in (0, 1)}
    for r in records:
        assert r.keys() >= KEYS
        assert r["macs"] == r["macs_dense"] if r["method"] == "dense" else r["macs"] <= 0.5 * r["macs_dense"]
        assert 0 < r["accuracy"] <= 1 and r["part"] == "test"
        assert (r["review_seconds"] > 0) == (r["method"] in ("autowidth", "l1"))
        parts = sum(r[f"{part}_seconds"] for part in ("probe", "audit", "decide", "surgery"))
        assert parts == pytest.approx(r["review_seconds"], abs=0.05)
    same = {r["seed"]: r["widths"] for r in records if r["method"] == "autowidth"}
    assert same == {r["seed"]: r["widths"] for r in records if r["method"] == "retrained"}
    assert ["dense", "none", "1x"] in [row[:3] for row in cells((tmp_path / "digits.md").read_text())]
    picture = (tmp_path / "digits.svg").read_text()
    named = re.findall(r"<!-- (.+) -->", picture)  # matplotlib writes a text as a comment in front of its glyphs
    assert {name: named.count(name) for name in (*methods, "retrained")} == dict.fromkeys((*methods, "retrained"), 2)


def test_a_unit_says_how_to_run_it_alone_and_that_runs_the_same() -> None:
    suite = comparison("digits", methods=("uniform",), epochs=2, budgets=(0.3,), starts=(0.5,), choose=True)
    (unit,) = suite.units
    assert unit.command == (
        "autowidth bench digits --data digits --models resnet8 --seeds 0 --methods uniform --budgets 0.3 --starts 0.5 "
        "--epochs 2 --choose"
    )
    first, second = measure(unit.settings).records[0], measure(unit.settings).records[0]
    kept = [name for name in first if not name.endswith("seconds")]
    assert [first[name] for name in kept] == [second[name] for name in kept]
    assert first["part"] == "held_out" and first["start"] == 0.5


def test_choices_are_made_on_training_images() -> None:
    suite = comparison("mini", data="cifar10:x", methods=("dense",), choose=True)
    training = suite.units[0].settings["training"]
    assert training["limit"] * (1 - training["holdout"]) == pytest.approx(20_000)
    final = comparison("mini", data="cifar10:x", methods=("dense",)).units[0].settings["training"]
    assert (final["limit"], final["holdout"]) == (20_000, 0.0)


def test_all_methods_get_the_same_recipe() -> None:
    for name, recipe in RECIPES.items():
        data = recipe.data or f"{recipe.kind}:x"
        units = comparison(name, data=data, methods=tuple(METHODS)).units
        assert len({json.dumps(u.settings["training"], sort_keys=True) for u in units}) == 1
        assert len({u.name for u in units}) == len(units)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"data": "digits"}, BenchError, "cifar10:PATH"),
        ({}, BenchError, "--data cifar10:PATH"),
        ({"data": "cifar10:x", "methods": ("autowith",)}, UnknownMethodError, "did you mean autowidth"),
        ({"data": "cifar10:x", "filters": 3}, BenchError, "knows no filters"),
    ],
)
def test_what_cannot_be_compared_is_refused(asked: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        find_suite("mini", **asked)


def test_the_table_is_the_mean_over_seeds_and_the_best_comes_first() -> None:
    records = [
        record(seed=0, accuracy=0.5),
        record(seed=1, accuracy=0.52),
        record(method="dense", policy="none", macs=100, accuracy=0.6, review_seconds=0.0),
        record(policy="auto", start=0.5, accuracy=0.1),
        record(budget=0.5, accuracy=0.9),
    ]
    text = table(records)
    rows = cells(text)
    assert rows[2] == ["dense", "none", "1x", "60.00", "100.0", "10", "3", "0.0", "0"]
    assert rows[3] == ["autowidth", "budget 0.25", "1x", "51.00 ± 1.41", "25.0", "10", "3", "25.0", "0, 1"]
    assert rows[4][:4] == ["autowidth", "auto", "0.5x", "10.00"]
    assert ["autowidth", "budget 0.25", "1x", "7.5", "15.0", "0.5", "2.0", "25.0"] in rows
    assert "50% of the MACs, 2 epochs" in text
    assert ["autowidth", "budget 0.25", "1x", "90.00", "25.0", "10", "3", "25.0", "0"] in rows


def test_what_trained_for_longer_has_a_table_of_its_own(tmp_path: Path) -> None:
    usual, longer = (comparison("digits", methods=("uniform",), epochs=n).units[0] for n in (None, 40))
    assert (usual.name, longer.name) == ("uniform-resnet8-seed0-macs0.25-start1", f"{usual.name}-epochs40")
    assert usual.settings["training"] == longer.settings["training"]  # so that one folder holds both
    records = [record(), record(method="uniform-x2", policy="uniform 0.25", epochs=4), record(epochs=4, accuracy=0.7)]
    assert [planned_epochs(r) for r in records] == [2, 2, 4]
    short, long = table(records).split("4 epochs\n")
    assert [row[0] for row in cells(short)[2:4]] == ["autowidth", "uniform-x2"]
    assert cells(long)[2][3] == "70.00"
    accuracy_plot(records, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count('<g id="axes_') == 4


def many(**more: float) -> list[dict[str, Any]]:
    """Records of twelve published methods around 60 %, ours, a control, and whatever is named with its accuracy."""
    rest = [record(method=f"published-{n}", policy="one-shot", accuracy=0.6 + n / 1000, macs=30) for n in range(12)]
    front = [record(accuracy=0.66), record(method="dense", policy="none", accuracy=0.7, macs=100, cpu_seconds=20.0)]
    return [*rest, *front, *(record(method=name, accuracy=a, macs=30) for name, a in more.items())]


def test_the_range_is_that_of_those_who_come_close_and_the_picture_says_who_does_not() -> None:
    _, panels = _figure(1) or (None, None)
    assert panels is not None
    panel = panels[0][0]
    named = _frontier(panel, many(failed=0.11), lambda r: r["macs"], "MACs")
    low, high = panel.get_ylim()
    assert 55 < low < 60 < 70 < high < 72
    said = [text.get_text() for text in panel.texts]
    assert said == ["below the picture: failed 11.0"]
    assert [dot.name for dot in named] == ["published-11", "autowidth", "dense"]


def test_names_cover_neither_each_other_nor_a_dot() -> None:
    figure, panels = _figure(1) or (None, None)
    assert panels is not None
    records = [record(method=name, policy="budget", accuracy=0.6 + n / 1e4, start=s, macs=25 + n)
               for n, (name, s) in enumerate([("autowidth", 1.0), ("autowidth", 2.0), ("autowidth", 0.5),
                                              ("retrained", 1.0), ("uniform", 1.0), ("dense", 1.0)])]  # fmt: skip
    panel = panels[0][0]
    named = _frontier(panel, records, lambda r: r["macs"], "MACs")
    figure.draw_without_rendering()
    _names(panel, named)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in panel.texts]
    assert len(boxes) == len(named) == 6
    for n, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:n])
        assert not any(box.contains(*panel.transData.transform((dot.x, dot.y))) for dot in named)


def test_the_picture_shows_every_method_of_every_model(tmp_path: Path) -> None:
    file = tmp_path / "plot.svg"
    accuracy_plot([record(), record(method="l1", accuracy=0.4), record(model="vgg8", method="dense")], file)
    first = file.read_text()
    assert first.count('<g id="axes_') == 4
    accuracy_plot([record(), record(method="l1", accuracy=0.4)], file)
    assert file.read_text().count('<g id="axes_') == 2
    accuracy_plot([], tmp_path / "nothing.svg")
    assert not (tmp_path / "nothing.svg").exists()
