"""Shapes at equal cost: all cost the same, proposals repeat, a planted optimum is found, a kill costs nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autowidth.lab.bench import Record, Suite
from autowidth.lab.studies import shapes
from autowidth.lab.studies.shape_settings import SETTINGS, space_of, uniform_shape
from autowidth.lab.studies.shapes import FINALISTS, SEEDS, Plan, first_trials, found_shapes, main, study
from autowidth.lab.studies.shapes_report import draw, table
from autowidth.lab.studies.surrogate import APART, Surrogate, climbed, proposals
from autowidth.lab.studies.widths import Shape, distance, log_widths, random_direction, structured

SMALL = "resnet8-digits"
NETWORKS = ("resnet20-mini", "vgg8-mini", SMALL)
FOUND = [("autowidth-seed0-macs0.25-start1", (16, 4, 9, 20, 30, 20)), ("autowidth-l1-seed0-macs0.25-start1", (9,) * 6)]
PLANTED: Shape = (12, 5, 16, 16, 26, 30)
"""The best shape of the small network in tests that need no training."""


def accuracy_of(shape: Shape, seed: int = 0, noise: float = 0.0) -> float:
    """A bowl in log widths around `PLANTED`, and noise that repeats."""
    drawn = np.random.default_rng([*shape, seed]).standard_normal()
    return 0.7 - 0.3 * distance(shape, PLANTED) ** 2 + noise * float(drawn)


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1.5))
def test_the_nearest_shape_lies_in_the_band_and_within_the_bounds(name: str, seed: int, radius: float) -> None:
    space = space_of(name)
    offset = random_direction(len(space.dense), radius, np.random.default_rng(seed))
    shape = space.nearest(log_widths(uniform_shape(name)) + offset)
    if shape is not None:
        assert 0.24 <= space.cost.at(np.array(shape, float)) / space.cost.at(np.array(space.dense, float)) <= 0.25
        assert all(2 <= w <= 2 * dense for w, dense in zip(shape, space.dense, strict=True))
    else:
        assert radius > 0.5, "near uniform width there is always a shape"


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("factor", [0.1, 1.0, 7.0])
def test_a_common_factor_changes_nothing(name: str, factor: float) -> None:
    space = space_of(name)
    logs = log_widths(space.dense) + 0.3 * np.linspace(-1, 1, len(space.dense))
    assert space.nearest(logs + np.log(factor)) == space.nearest(logs)


def test_bounds_that_leave_no_shape_give_none() -> None:
    uniform = log_widths(uniform_shape(SMALL))
    assert replace(space_of(SMALL), low=0.2499999).nearest(uniform) is None
    assert replace(space_of(SMALL), least=16).nearest(uniform) is None
    assert replace(space_of(SMALL), most=0.3).nearest(uniform) is None


def test_the_share_is_that_of_counted_macs() -> None:
    space = space_of("resnet20-mini")
    assert space.cost.at(np.array(space.dense, float)) == 10203776
    assert space.admits(uniform_shape("resnet20-mini"))
    assert not space.admits(space.dense)


@pytest.mark.parametrize(("by", "group"), [(-9.0, 1), (9.0, 5)])
def test_a_shape_beyond_the_bounds_is_not_admitted(by: float, group: int) -> None:
    space, offset = space_of(SMALL), np.zeros(6)
    offset[group] = by
    loose = replace(space, least=1, most=50.0).nearest(log_widths(uniform_shape(SMALL)) + offset)
    assert loose is not None and space.low <= space.share(loose) <= space.high
    assert not space.admits(loose)
    tight = space.nearest(log_widths(loose))
    assert tight is not None and tight[group] == (2 if by < 0 else 2 * space.dense[group])


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 2))
def test_a_random_direction_has_its_radius(seed: int, radius: float) -> None:
    offset = random_direction(8, radius, np.random.default_rng(seed))
    assert np.sqrt(np.mean(offset**2)) == pytest.approx(radius)


def test_structured_directions_say_what_they_do() -> None:
    names = space_of("resnet20-mini").cost.names
    by = dict(structured(names))
    inner = np.array([".first." in name for name in names])
    late = np.array([name.startswith("stages.2") for name in names])
    assert (by["insides narrow"][inner] < 0).all() and (by["insides narrow"][~inner] > 0).all()
    assert (by["early wide"][late] < 0).all() and by["early wide"][0] > 0
    assert (by["insides of stage 2 narrow"] < 0).tolist() == (inner & late).tolist()


# ---- the first shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_shapes_differ_and_cost_the_same_and_come_again(name: str) -> None:
    space, found = space_of(name), FOUND if name == SMALL else []
    trials = first_trials(name, found)
    assert trials == first_trials(name, found)
    assert [t.seed for t in trials[: len(SEEDS)]] == list(SEEDS)
    assert {t.widths for t in trials[: len(SEEDS)]} == {uniform_shape(name)}
    repeats = Counter(t.widths for t in trials)
    assert repeats.pop(uniform_shape(name)) == len(SEEDS) and set(repeats.values()) == {1}
    assert all(space.admits(t.widths) for t in trials)
    for origin in {t.origin for t in trials}:
        seeds = [t.seed for t in trials if t.origin == origin]
        assert seeds == [SEEDS[n % len(SEEDS)] for n in range(len(seeds))], "no origin has a seed of its own"
    first = {t.origin for t in trials[len(SEEDS) : len(SEEDS) + 4]}
    assert len(first) >= min(4, len({t.origin for t in trials}) - 1), "what is cut short has seen all origins"


def test_what_our_runs_found_comes_first_and_is_scaled_where_it_costs_too_much() -> None:
    trials = first_trials(SMALL, FOUND)
    found = [t for t in trials if t.source == FOUND[0][0]]
    assert trials[len(SEEDS)] == found[0] and found[0].origin == "found-scaled" and found[0].widths != FOUND[0][1]
    assert any(t.origin == "around-found" for t in trials) and any(t.origin == "between" for t in trials)
    assert not any(t.origin in ("around-found", "between") for t in first_trials(SMALL, FOUND[1:]))


def test_shapes_are_read_from_the_units_of_a_comparison(tmp_path: Path) -> None:
    def write(stem: str, method: str, *widths: list[int]) -> None:
        records = [{"model": "resnet8", "method": method, "widths": w} for w in widths]
        (tmp_path / f"{stem}.json").write_text(json.dumps({"records": records}))

    write("autowidth-own-resnet8-seed0-macs0.25-start1", "autowidth-own", [4, 5])
    write("autowidth-resnet8-seed0-macs0.25-start1", "autowidth", [4, 5], [4, 5])
    write("autowidth-random-resnet8-seed0-macs0.25-start1", "autowidth-random", [9, 9])
    write("l1-resnet8-seed0-macs0.25-start1", "l1", [8, 8])
    assert found_shapes(tmp_path, "resnet8") == [("autowidth-seed0-macs0.25-start1", (4, 5))]


# ---- the model -------------------------------------------------------------------------------------------------------


def trained(count: int, noise: float) -> tuple[list[Shape], list[float]]:
    found = [t.widths for t in first_trials(SMALL, FOUND)[2:]][:count]
    return found, [accuracy_of(shape, noise=noise) for shape in found]


def test_the_model_finds_a_planted_optimum() -> None:
    space = space_of(SMALL)
    known, accuracies = trained(30, noise=0.005)
    before = min(distance(shape, PLANTED) for shape in known)
    for turn in range(2):
        near = proposals(space, Surrogate.fitted(known, accuracies), known, 10, seed=turn)
        known, accuracies = [*known, *near], accuracies + [accuracy_of(shape, noise=0.005) for shape in near]
    surrogate = Surrogate.fitted(known, accuracies)
    best = known[int(surrogate.smoothed(known).argmax())]
    assert distance(best, PLANTED) < min(0.15, before)
    assert surrogate.noise == pytest.approx(0.005, rel=0.6)
    assert surrogate.smoothed([climbed(space, surrogate, best)])[0] >= surrogate.smoothed([best])[0]


def test_proposals_repeat_and_differ_and_cost_the_same() -> None:
    space = space_of(SMALL)
    known, accuracies = trained(25, noise=0.01)
    surrogate = Surrogate.fitted(known, accuracies)
    near = proposals(space, surrogate, known, 12, seed=3)
    assert near == proposals(space, Surrogate.fitted(known, accuracies), known, 12, seed=3)
    assert near != proposals(space, surrogate, known, 12, seed=4)
    assert len(near) == 12 and all(space.admits(shape) for shape in near)
    everything = [*near, *known]
    assert all(distance(one, other) >= APART for n, one in enumerate(near) for other in everything[n + 1 :])


def test_a_shape_left_out_is_expected_as_by_a_model_without_it() -> None:
    known, accuracies = trained(20, noise=0.01)
    known, accuracies = [*known, known[0]], [*accuracies, 0.5]
    surrogate = Surrogate.fitted(known, accuracies)
    kernel, shift, scale = surrogate.process.kernel_, surrogate.shift, surrogate.scale
    for n, shape in enumerate(known):
        rest = [m for m, other in enumerate(known) if other != shape]
        x, y = surrogate.covered[rest], (surrogate.observed[rest] - shift) / scale
        slow = kernel(surrogate.covered[[n]], x) @ np.linalg.solve(kernel(x), y) * scale + shift
        assert surrogate.left_out()[n] == pytest.approx(slow[0], abs=1e-6)


# ---- the study -------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    """What ends a study in the middle."""


class Trainings:
    """Takes the place of `bench`: a unit's record is known without training. Ends after `lasting` units."""

    def __init__(self, lasting: int = 10**6) -> None:
        self.lasting = lasting
        self.made: dict[str, list[Record]] = {}
        self.order: list[str] = []

    def __call__(self, suite: Suite, out: Path, **_: Any) -> list[Record]:
        for unit in suite.units:
            if unit.name not in self.made:
                if len(self.order) >= self.lasting:
                    raise KilledError
                self.order.append(unit.name)
                self.made[unit.name] = [self.record(unit.settings, part) for part in unit.settings["parts"]]
        return [record for records in self.made.values() for record in records]

    @staticmethod
    def record(settings: Any, part: str) -> Record:
        told = {key: settings[key] for key in ("setting", "widths", "seed", "origin", "source", "epochs")}
        accuracy = accuracy_of(tuple(settings["widths"]), settings["seed"], noise=0.01)
        return {
            **told, "part": part, "accuracy": accuracy, "loss": 1.0, "macs": 245, "macs_dense": 1000, "params": 9,
            "seconds": 1.0,
        }  # fmt: skip


def run(out: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch, count: int = 40) -> list[Record]:
    monkeypatch.setattr(shapes, "bench", trainings)
    monkeypatch.setattr(shapes, "found_shapes", lambda folder, model: FOUND)
    return study([SMALL], "digits", out, count=count, found=out)


def test_a_study_trains_its_count_and_repeats_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = run(tmp_path, Trainings(), monkeypatch)
    held = [r for r in records if r["part"] == "held_out"]
    assert len({tuple(r["widths"]) for r in held}) == 40
    assert len({(tuple(r["widths"]), r["seed"]) for r in held}) == len(held), "no training is made twice"
    tested = {tuple(r["widths"]) for r in records if r["part"] == "test"}
    assert uniform_shape(SMALL) in tested and FINALISTS <= len(tested) <= FINALISTS + 2
    for shape in tested:
        for part in ("held_out", "test"):
            assert {r["seed"] for r in records if tuple(r["widths"]) == shape and r["part"] == part} == set(SEEDS)
    nearest = sorted({tuple(r["widths"]) for r in held}, key=lambda shape: distance(shape, PLANTED))
    assert set(nearest[:3]) & tested, "what is best is repeated"


@pytest.mark.parametrize("lasting", [2, 33, 52, 60])
def test_a_killed_study_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: int
) -> None:
    whole = Trainings()
    run(tmp_path / "whole", whole, monkeypatch)
    cut = Trainings(lasting)
    with pytest.raises(KilledError):
        run(tmp_path / "cut", cut, monkeypatch)
    cut.lasting = 10**6
    run(tmp_path / "cut", cut, monkeypatch)
    assert cut.order == whole.order
    assert len(set(cut.order)) == len(cut.order)


def test_a_larger_count_goes_on_from_a_finished_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Trainings()
    run(tmp_path, trainings, monkeypatch, count=36)
    before = len(trainings.order)
    records = run(tmp_path, trainings, monkeypatch, count=40)
    assert len({tuple(r["widths"]) for r in records}) == 40
    assert trainings.order[before:] and Plan.opened(SMALL, tmp_path, count=40, found=[]).trials


def test_tables_and_pictures_come_from_the_records_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = run(tmp_path, Trainings(), monkeypatch)
    text = table(records)
    assert f"## {SMALL}" in text and "40 shapes" in text and "| uniform " in text and "| ours, seed0 " in text
    assert text.count("| best by model") >= FINALISTS - 2 and "rank correlation" in text
    draw(records, tmp_path / "shapes.svg")
    assert (tmp_path / "shapes.svg").stat().st_size > 1000
    assert table(records[:2]).count("| uniform ") == 1


def test_one_shape_is_trained_by_the_command_and_not_again(tmp_path: Path) -> None:
    widths = ",".join(map(str, uniform_shape(SMALL)))
    asked = ["--data", "digits", "--setting", SMALL, "--out", str(tmp_path), "--epochs", "1", "--widths", widths]
    main([*asked, "--seed", "1"])
    (file,) = (tmp_path / "shapes").glob("*.json")
    written = file.stat().st_mtime_ns
    main([*asked, "--seed", "1"])
    assert file.stat().st_mtime_ns == written
    (record,) = json.loads((tmp_path / "shapes.json").read_text())
    assert record.keys() >= {
        "setting", "widths", "macs", "macs_dense", "params", "accuracy", "loss", "seed", "part", "epochs", "seconds",
        "origin",
    }  # fmt: skip
    assert record["widths"] == list(uniform_shape(SMALL)) and (record["seed"], record["part"]) == (1, "held_out")
    assert 0.24 <= record["macs"] / record["macs_dense"] <= 0.25
    assert "--widths " + widths in json.loads(file.read_text())["command"]
    steps = [look["step"] for look in record["early"]]
    assert (
        steps == sorted(steps)
        and steps[0] == 0
        and len(steps) == 4
        and all(0 < look["loss"] < 5 for look in record["early"])
    )


def test_published_weights_are_looked_at_right_after_the_cut_and_fresh_ones_at_shares_of_the_run() -> None:
    assert SETTINGS["resnet20-published"].early(312) == (1, 10, 50, 200)
    assert SETTINGS["resnet20-published"].early(50) == (1, 10)
    assert SETTINGS["resnet20-mini"].early(1000) == (100, 300, 600)
    assert SETTINGS["resnet20-mini"].early(2) == (1,)
