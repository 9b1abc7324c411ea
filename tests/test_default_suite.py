"""The suite of the default, and the study of attempts: their rows, what they refuse, and one unit of each for real."""

from __future__ import annotations

import json

import pytest
import torch

from autowidth.lab.bench import BenchError
from autowidth.lab.data import digits
from autowidth.lab.studies import attempt_layouts
from autowidth.lab.studies.attempt_layouts import LAYOUT, layouts
from autowidth.lab.suites import find_suite
from autowidth.lab.suites.default import CASES, Case, default_table, images_for, measure, settings_for


def test_every_row_is_a_run_that_keeps_half_a_point() -> None:
    suite = find_suite("default", data="cifar10:PATH", weights="PATH", seeds=(0, 1))
    assert len(suite.units) == 2 * len(CASES) and len({unit.name for unit in suite.units}) == len(suite.units)
    for unit in suite.units:
        settings = settings_for(unit.settings)
        assert settings.keep == 0.5 and settings.seed == unit.settings["seed"] and settings.holdout == 0
        assert f"--tables {unit.settings['setting']}" in unit.command
        assert (settings.weights is None) == ("--weights" not in unit.command)


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"tables": ("nowhere",)}, "no row"),
        ({"tables": ("photos",)}, "cifar10:PATH"),
        ({"tables": ("photos",), "data": "digits"}, "cifar10:PATH"),
        ({"tables": ("published-resnet20",), "data": "cifar10:PATH"}, "--weights"),
    ],
)
def test_what_is_missing_is_named(asked: dict[str, object], word: str) -> None:
    with pytest.raises(BenchError, match=word):
        find_suite("default", **asked)


def test_photos_are_the_first_of_some_classes() -> None:
    settings = settings_for({"setting": "digits", "data": "digits", "seed": 0, "epochs": 1})
    images = images_for(settings, Case(model="resnet8", about="", data=None, classes=3, each=20))
    whole = digits()
    assert len(images.classes) == 3 and torch.bincount(images.train.labels).tolist() == [20, 20, 20]
    assert len(images.test) == int((whole.test.labels < 3).sum())
    places = [int((whole.train.labels == label).nonzero()[0]) for label in range(3)]
    first = [int((images.train.labels == label).nonzero()[0]) for label in range(3)]
    assert all(torch.equal(images.train.images[a], whole.train.images[b]) for a, b in zip(first, places, strict=True))


def test_the_table_says_what_was_lost_in_the_mean_and_at_worst() -> None:
    records = [
        {"setting": "digits", "seed": seed, "method": method, "accuracy": accuracy, "macs": macs, "macs_dense": 100,
         "epochs": 120, "seconds": seconds, "review_seconds": 1.0}
        for seed, dense, default in ((0, 0.9, 0.89), (1, 0.8, 0.82))
        for method, accuracy, macs, seconds in (("dense", dense, 100, 10.0), ("default", default, 20, 12.0))
    ]  # fmt: skip
    (row,) = [line for line in default_table(records).splitlines() if line.startswith("| digits")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["2", "85.00 ± 7.07"] and cells[4] == "-0.50, +1.00"
    assert cells[5:] == ["20 ± 0", "1.20", "8.3 ± 0.0"]


def test_a_unit_leaves_a_record_of_both_networks() -> None:
    (unit,) = find_suite("default", tables=("digits-short",), epochs=1).units
    outcome = measure(unit.settings)
    dense, default = json.loads(json.dumps([*outcome.records]))
    assert (dense["method"], default["method"]) == ("dense", "default")
    assert dense["macs"] == dense["macs_dense"] >= default["macs"]
    assert default["accuracy"] - dense["accuracy"] == pytest.approx(default["difference"])
    assert 0 < default["standard_error"] < 0.05


def test_layouts_are_what_differs() -> None:
    first, second = layouts("aim=0.15 count=2; rate=0.1")
    assert (first.aim, first.count, first.end) == (0.15, 2, LAYOUT.end) and second.rate == 0.1
    with pytest.raises(ValueError, match="no depth"):
        layouts("depth=3")


def test_the_study_sets_what_is_lost_beside_what_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    attempt_layouts.main(["--case", "digits-short", "--epochs", "1", "--layouts", "aim=0.6 count=2 probe=64 audit=64"])
    head, *table = capsys.readouterr().out.strip().splitlines()
    assert "of 287 held-out images" in head and len(table) == 3
    assert "aim=0.6 count=2" in table[-1] and ("stays" in table[-1] or "taken back" in table[-1])


def test_the_study_asks_pictures_too_that_attempts_do_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--case", "digits-short", "--epochs", "1", "--layouts", "aim=0.6 count=2 probe=64 audit=64"]
    attempt_layouts.main([*asked, "--part", "0.5"])
    head, _, row = capsys.readouterr().out.strip().splitlines()[-3:]
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (head, row)), strict=True))
    assert "±" in cells["made, points"] and "±" in cells["of others, points"]
    assert cells["made, points"] != cells["of others, points"]
    with pytest.raises(SystemExit):
        attempt_layouts.main([*asked, "--part", "0"])
