"""The fidelity suite: its numbers are what they say, its truth is what surgery would do."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from autowidth.channels import IndexMap
from autowidth.engine import AutoWidth
from autowidth.lab.baselines import IMPORTANCES
from autowidth.lab.bench import BenchError, Standing, Suite, bench
from autowidth.lab.data import ImageSet
from autowidth.lab.loop import train
from autowidth.lab.loop_parts import probe_batches
from autowidth.lab.models import build
from autowidth.lab.plots import fidelity_plot
from autowidth.lab.prepare import load_images
from autowidth.lab.settings import Settings
from autowidth.lab.suites.fidelity import (
    BLOCKS,
    LEAST,
    OURS,
    SHARES,
    TRUTHS,
    Look,
    ceiling,
    fidelity,
    fidelity_table,
    judged,
    look_at,
    rank_correlation,
    stratified,
    watched_run,
    within,
)
from autowidth.policy import Budget, Never
from autowidth.review import shares
from autowidth.review.batches import count, mean_loss, of_pairs
from autowidth.review.calibrate import Calibration
from autowidth.review.reconstruct import readers_without
from autowidth.review.state import named_tensors, precise_norms, quiet
from autowidth.surgery import apply_
from autowidth.trace import trace

CE = of_pairs(F.cross_entropy)

fidelity_suite = sys.modules[fidelity.__module__]

REPOSITORY = Path(__file__).resolve().parent.parent

# ---- numbers ---------------------------------------------------------------------------------------------------------

NUMBERS = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=20)


@given(NUMBERS)
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    p, t = np.array(pairs, dtype=float).T
    found = rank_correlation(p, t)
    if np.ptp(t) == 0:
        assert found is None
    elif np.ptp(p) == 0:
        assert found == 0.0
    else:
        assert found == pytest.approx(spearmanr(p, t).statistic)


def test_what_a_criterion_does_not_say_is_left_out() -> None:
    p, t = np.array([1.0, np.nan, 2.0, 3.0]), np.array([5.0, -99.0, 6.0, 7.0])
    assert rank_correlation(p, t) == pytest.approx(1.0)
    assert rank_correlation(p[:3], t[:3]) is None


def test_within_groups_only_ranks_inside_a_group_count_and_large_groups_count_more() -> None:
    group = ["a"] * 6 + ["b"] * 12 + ["c"] * (LEAST - 1)
    truth = np.arange(23.0)
    predicted = np.concatenate([1000 + np.arange(6.0), -np.arange(12.0), -np.arange(LEAST - 1.0)])
    assert within(group, predicted, truth) == pytest.approx((6 * 1.0 + 12 * -1.0) / 18)
    assert within(group[:3], predicted[:3], truth[:3]) is None


def noisy_blocks(noise: float, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Groups, true loss changes (m,), and what ten blocks show of them (10, m)."""
    rng = np.random.default_rng(seed)
    signal_ = rng.normal(size=400)
    blocks = signal_ + noise * math.sqrt(BLOCKS) * rng.normal(size=(BLOCKS, 400))
    return [f"g{n // 100}" for n in range(400)], signal_, blocks


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_the_ceiling_is_what_the_truth_itself_would_reach(noise: float) -> None:
    group, truth, blocks = noisy_blocks(noise)
    reached = within(group, truth, blocks.mean(axis=0))
    assert reached is not None
    assert ceiling(group, blocks) == pytest.approx(reached, abs=0.05)
    assert ceiling(group, blocks) == pytest.approx(1 / math.sqrt(1 + noise**2), abs=0.06)


def test_the_ceiling_of_a_truth_without_noise_is_one_and_of_noise_alone_nothing() -> None:
    group, truth, _ = noisy_blocks(0)
    assert ceiling(group, np.tile(truth, (BLOCKS, 1))) == pytest.approx(1.0)
    assert ceiling(group, np.random.default_rng(0).normal(size=(BLOCKS, 400))) == pytest.approx(0.0, abs=0.35)
    assert ceiling(group, np.zeros((BLOCKS, 400))) is None


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 40), min_size=1, max_size=8),
    st.integers(1, 150),
    st.integers(0, 9),
)
def test_the_sample_is_even_over_groups_and_takes_no_filter_twice(
    widths: dict[str, int], count: int, seed: int
) -> None:
    picks = stratified(widths, count, np.random.default_rng(seed))
    assert len(set(picks)) == len(picks)
    assert all(0 <= channel < widths[name] for name, channel in picks)
    taken = {name: sum(n == name for n, _ in picks) for name in widths}
    assert all(taken[name] >= min(LEAST, width) for name, width in widths.items())
    least = sum(min(LEAST, width) for width in widths.values())
    assert len(picks) == max(least, min(count, sum(widths.values())))
    open_to = [taken[name] for name, width in widths.items() if taken[name] < width]
    assert not open_to or max(taken.values()) - min(open_to) <= 1


def test_every_filter_may_be_sampled() -> None:
    widths = {"a": 20, "b": 7}
    seen = {pick for seed in range(200) for pick in stratified(widths, 14, np.random.default_rng(seed))}
    assert len(seen) == 27


def small_look() -> Look:
    truth = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.5, 9.0])
    return Look(
        group=("a",) * 6 + ("b",) * 2,
        channel=tuple(range(8)),
        blocks={"removed": np.stack([truth - 0.1, truth + 0.1] * 2), "compensated": np.tile(-truth, (4, 1))},
        predictions={
            "same": truth / 2,
            "contrary": -truth,
            "dumb": np.array([np.nan] * 8),
            "half": np.where(np.arange(8) < 4, truth, np.nan),
        },
        units={"same": "nats", "contrary": None, "dumb": None, "half": "nats"},
        seconds={"same": 1.23456, "contrary": 0.0, "dumb": 0.0, "half": 0.0},
        coefficients=(1.0, 0.5),
        truth_samples=40,
    )


def test_records_by_hand() -> None:
    same, contrary, dumb, half, *other = judged(small_look())
    assert same == {
        "truth": "removed", "criterion": "same", "unit": "nats", "spearman": pytest.approx(1),
        "spearman_within": pytest.approx(1), "ceiling_within": pytest.approx(1),
        "ratio": pytest.approx(2), "count": 8, "seconds": 1.235,
    }  # fmt: skip
    assert (contrary["spearman"], contrary["ratio"]) == (pytest.approx(-1), None)
    assert (dumb["spearman"], dumb["spearman_within"], dumb["count"]) == (None, None, 0)
    assert (half["spearman"], half["spearman_within"], half["count"]) == (pytest.approx(1), None, 4)
    assert [(r["truth"], r["criterion"]) for r in other] == [
        ("compensated", name) for name in ("same", "contrary", "dumb", "half")
    ]
    assert (other[0]["spearman"], other[0]["ratio"]) == (pytest.approx(-1), pytest.approx(-2))


def test_the_table_shows_means_over_seeds_best_first() -> None:
    about = {"model": "m", "data": "d", "moment": 0.1, "probe_samples": 64, "truth_samples": 40}
    records = [{**about, "seed": 0, **r} for r in judged(small_look())]
    records += [{**r, "seed": 1, "spearman": 0.5} for r in records if r["criterion"] == "same"]
    text = fidelity_table(records)
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["importance", "10% of the run", "seconds"]
    assert rows[2] == ["half", "1.00 / - / 1.00", "0.00"]
    assert rows[3] == ["same", "0.75 / 1.00 / 2.00", "1.24"]
    assert rows[4] == ["contrary", "-1.00 / -1.00", "0.00"]
    assert rows[5] == ["dumb", "- / -", "0.00"]
    assert rows[6] == ["ceiling", "/ 1.00", ""]
    assert rows[9] == ["contrary", "1.00 / 1.00", "0.00"]
    assert len(rows) == 14
    assert "Seeds 0, 1" in fidelity_table(records)


def test_the_picture_has_a_panel_for_every_model_and_truth_and_names_every_criterion(tmp_path: Path) -> None:
    records = [
        {"data": "digits", "model": model, "truth": truth, "criterion": criterion, "moment": moment, "spearman": 0.5,
         "seed": 0}
        for model in ("resnet8", "vgg8") for truth in ("removed", "compensated") for criterion in ("autowidth", "l1")
        for moment in (0.1, 1.0)
    ]  # fmt: skip
    records[0]["spearman"] = None  # a figure that is not defined leaves a gap
    fidelity_plot(records, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.count('<g id="axes_') == 4
    assert text.count("<!-- autowidth -->") == text.count("<!-- l1 -->") == 4
    fidelity_plot([], tmp_path / "nothing.svg")
    assert not (tmp_path / "nothing.svg").exists()


def test_an_empty_table_is_a_table() -> None:
    assert fidelity_table([]).startswith("# ")


# ---- the fidelity suite ----------------------------------------------------------------------------------------------


def tiny(**changes: Any) -> Suite:
    options: dict[str, Any] = {
        "models": ("resnet8",), "epochs": 1, "filters": 24, "limit": 800, "truth": 100, "probe_samples": 96,
        "width": 0.4,
    }  # fmt: skip
    return fidelity(**options | changes)


def settings_of(suite: Suite) -> Settings:
    settings = suite.units[0].settings
    named = {name: settings[name] for name in ("data", "model", "seed")}
    return Settings.model_validate({**settings["training"], **named})


def bits(network: torch.nn.Module) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in network.state_dict().values()]


def looked_at(images: ImageSet, settings: Settings) -> tuple[list[tuple[float, Look]], AutoWidth]:
    """A run whose engine is looked at on the way."""
    looks: list[tuple[float, Look]] = []
    engines: list[AutoWidth] = []

    def look(share: float, engine: AutoWidth) -> None:
        scoring, blocks = fidelity_suite._scoring(images, 0, 96), fidelity_suite._blocks(images)
        looks.append((share, look_at(engine, scoring, blocks, filters=24, rng=np.random.default_rng(0))))
        engines.append(engine)

    watched_run(settings, images, SHARES, look)
    return looks, engines[-1]


@pytest.mark.parametrize(
    "recipe", [{}, {"schedule": "cosine", "cycles": 2, "label_smoothing": 0.1}, {"ema": 0.9, "channels_last": True}]
)
def test_the_run_is_that_of_the_training_file_by_all_settings_and_looking_does_not_disturb_it(
    recipe: dict[str, Any],
) -> None:
    settings = settings_of(tiny(limit=400)).model_copy(update=recipe)
    images = load_images(settings)
    followed: list[torch.nn.Module] = []  # with an average the result is that, and not what the engine is attached to
    plain = train(
        settings.model_copy(update={"policy": Never()}), watch=lambda engine: followed.append(engine.model)
    )  # fmt: skip
    looks, engine = looked_at(images, settings)
    assert bits(engine.model) == bits(followed[-1])
    assert (bits(plain.network) == bits(followed[-1])) == ("ema" not in recipe)
    assert [share for share, _ in looks] == list(SHARES)


@pytest.fixture(scope="module")
def trained() -> tuple[ImageSet, AutoWidth]:
    """A network at the end of its run, its reviews behind it."""
    settings = settings_of(tiny())
    images = load_images(settings)
    engines: list[AutoWidth] = []
    watched_run(settings, images, [1.0], lambda share, engine: engines.append(engine))
    engines[0].model.train()  # the run ends with an evaluation
    return images, engines[0]


def test_reviews_take_place_as_the_budget_would_and_change_nothing_but_the_calibration(
    trained: tuple[ImageSet, AutoWidth],
) -> None:
    _, engine = trained
    assert [event.step for event in engine.history] == list(Budget().reviews(engine.total_steps))
    assert [event.step for event in engine.history] == [1, 2, 3, 4, 5, 6, 7, 8]  # of 12 steps
    assert all(not event.maps and event.fidelity is not None for event in engine.history)
    assert engine.calibration.coefficients != Calibration().coefficients
    built = trace(build("resnet8", in_channels=1, width=0.4), torch.zeros(1, 1, 8, 8))
    assert engine.history.widths_start == engine.widths == built.widths


def test_images_of_the_truth_were_seen_by_nobody_else(trained: tuple[ImageSet, AutoWidth]) -> None:
    images, _ = trained
    keys = lambda split: {image.numpy().tobytes() for image in split.images}  # noqa: E731
    truth = [x for block in fidelity_suite._blocks(images) for x, _ in block]
    scored = [x for x, _ in fidelity_suite._scoring(images, 0, 96)]
    scaled = lambda split: {  # noqa: E731
        x.numpy().tobytes()
        for x in fidelity_suite.Batches(split, batch_size=2000, mean=images.mean, std=images.std, shuffle=False)
        .at(0)
        .__next__()[0]
    }
    assert images.held_out is not None
    assert not keys(images.held_out) & (keys(images.train) | keys(images.test))
    assert {i.numpy().tobytes() for x in truth for i in x} <= scaled(images.held_out)
    assert {i.numpy().tobytes() for x in scored for i in x} <= scaled(images.train)
    assert sum(map(len, truth)) == 100
    assert sum(map(len, scored)) == 96
    assert len(images.train) == 800
    reviewed = next(iter(probe_batches(images, 0).at(0)))[0][:96]
    assert not torch.equal(torch.cat(scored), reviewed)  # the first review's: measures should not know them better


def test_the_truth_is_what_the_loss_does_without_the_filter(trained: tuple[ImageSet, AutoWidth]) -> None:
    images, engine = trained
    scoring, blocks = fidelity_suite._scoring(images, 0, 96), fidelity_suite._blocks(images)
    before = bits(engine.model)
    look = look_at(engine, scoring, blocks, filters=24, rng=np.random.default_rng(0))
    assert bits(engine.model) == before
    assert engine.model.training
    x, y = (torch.cat(parts) for parts in zip(*(batch for block in blocks for batch in block), strict=True))
    network = engine.model
    with quiet(network) as among, precise_norms(network, scoring, CE, among=among), torch.no_grad():
        whole = F.cross_entropy(network(x), y).item()
        for number in (0, 9, 23):
            group = engine.channel_map.group(look.group[number])
            saved = {n: p.clone() for n, p in network.named_parameters()}
            for place in group.with_role("read"):
                weight = network.get_parameter(place.axis.name)
                for position in place.index[look.channel[number]]:
                    weight.select(place.axis.dim, position).zero_()
            change = F.cross_entropy(network(x), y).item() - whole
            for n, p in network.named_parameters():
                p.copy_(saved[n])
            assert look.blocks["removed"][:, number].mean() == pytest.approx(change, rel=1e-3, abs=1e-6)


def test_the_compensated_truth_is_what_the_engine_would_find_after_surgery(
    trained: tuple[ImageSet, AutoWidth],
) -> None:
    """Removed for real by the engine's own steps, a filter leaves the loss that was measured."""
    images, engine = trained
    scoring, blocks = fidelity_suite._scoring(images, 0, 96), fidelity_suite._blocks(images)
    look = look_at(engine, scoring, blocks, filters=24, rng=np.random.default_rng(0))
    batch = tuple(torch.cat(parts) for parts in zip(*(b for block in blocks for b in block), strict=True))
    assert not np.allclose(look.blocks["removed"], look.blocks["compensated"])
    for number in (3, 20):
        name, channel = look.group[number], look.channel[number]
        with quiet(engine.model) as among, precise_norms(engine.model, scoring, CE, among=among):
            _, known = fidelity_suite._ours(engine.model, engine.channel_map, scoring, (1.0, 0.0))
            network = copy.deepcopy(engine.model)
        before, live = mean_loss(network, [batch], CE), named_tensors(network)
        for key, content in readers_without({name: [channel]}, engine.channel_map, known, live).items():
            live[key].data.copy_(content)
        apply_(network, engine.channel_map, {name: IndexMap.removing([channel], engine.widths[name])})
        after = mean_loss(network, [batch], CE)
        assert look.blocks["compensated"][:, number].mean() == pytest.approx(after - before, rel=1e-2, abs=1e-5)


def test_predictions_are_those_of_each_measure_for_the_sampled_filters(trained: tuple[ImageSet, AutoWidth]) -> None:
    images, engine = trained
    scoring = fidelity_suite._scoring(images, 0, 96)
    look = look_at(engine, scoring, [[scoring[0]]], filters=24, rng=np.random.default_rng(0))
    assert set(look.predictions) == {*OURS, *IMPORTANCES}
    network, c = engine.model, look.coefficients
    assert c == engine.calibration.coefficients
    both = c[0] * look.predictions["autowidth-next"] + c[1] * look.predictions["autowidth-own"]
    np.testing.assert_allclose(look.predictions["autowidth"], both, rtol=1e-5)
    with quiet(network) as among, precise_norms(network, scoring, CE, among=among):
        for name in ("l1", "taylor-gate", "hrank"):
            found = IMPORTANCES[name].importance(network, engine.channel_map, scoring, CE, generator=torch.Generator())
            expected = [found[g][n].item() for g, n in zip(look.group, look.channel, strict=True)]
            np.testing.assert_allclose(look.predictions[name], expected, rtol=1e-5)


def test_the_worths_are_those_of_the_engine(trained: tuple[ImageSet, AutoWidth]) -> None:
    """Looked at with the data of a review, it gives the worths that the review would decide on."""
    _, engine = trained
    with quiet(engine.model) as among:
        scoring = engine._reviewer.look().scoring
        with precise_norms(engine.model, scoring, CE, among=among):
            found, _ = fidelity_suite._ours(engine.model, engine.channel_map, scoring, engine.calibration.coefficients)
    decided: dict[str, np.ndarray] = {}
    reviewer = engine._reviewer
    original = reviewer._judge
    reviewer._judge = lambda *seen: (found := original(*seen), decided.update(found.worths))[0]  # type: ignore[method-assign]
    alone = shares.Look(scoring=scoring, held_out=[], scored=count(scoring), held=0)
    reviewer.look = lambda: alone  # type: ignore[method-assign]
    engine.review()
    assert decided
    for name, worths in decided.items():
        np.testing.assert_allclose(found["autowidth"][name].numpy(), worths, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[Standing]]:
    """The folder, records and reports of a tiny fidelity suite."""
    out, told = tmp_path_factory.mktemp("results"), list[Standing]()
    records = bench(tiny(limit=300, truth=60, filters=12), out, processes=1, report=told.append)
    return out, records, told


def test_a_real_unit_yields_a_record_for_every_moment_and_criterion(
    results: tuple[Path, list[dict[str, Any]], list[Standing]],
) -> None:
    out, records, told = results
    expected = {(s, t, c) for s in SHARES for t in TRUTHS for c in (*OURS, *IMPORTANCES)}
    assert {(r["moment"], r["truth"], r["criterion"]) for r in records} == expected
    assert len(records) == len(expected)
    for r in records:
        assert (r["model"], r["data"], r["seed"], r["probe_samples"], r["truth_samples"]) == (
            "resnet8", "digits", 0, 96, 60
        )  # fmt: skip
        assert (r["ratio"] is not None) == (r["unit"] == "nats")
        assert -1 <= r["spearman"] <= 1
    assert json.loads((out / "fidelity.json").read_text()) == records
    assert (out / "fidelity.md").read_text() == fidelity_table(records)
    assert [(t.unit, t.done, t.total) for t in told] == [("resnet8-seed0", 1, 1)]
    assert sorted(p.name for p in out.rglob("*")) == [
        "fidelity", "fidelity.json", "fidelity.md", "fidelity.svg", "resnet8-seed0.json"
    ]  # fmt: skip


def test_a_finished_unit_says_how_it_came_about_and_nothing_about_whose_machine_it_was(
    results: tuple[Path, list[dict[str, Any]], list[Standing]],
) -> None:
    out, records, _ = results
    text = (out / "fidelity" / "resnet8-seed0.json").read_text()
    unit = json.loads(text)
    assert unit["records"] == records
    assert unit["command"] == "autowidth bench fidelity --data digits --models resnet8 --seeds 0 --epochs 1"
    assert unit["environment"]["torch"] == torch.__version__
    assert unit["environment"]["threads"] == 1
    assert unit["environment"]["cores"] == os.cpu_count()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", unit["environment"]["revision"] or "0" * 40)
    assert unit["settings"]["training"]["limit"] == 360
    names = (str(out), str(REPOSITORY), str(Path.home()), socket.gethostname())
    assert not [name for name in names if len(name) > 4 and name in text]
    for moment in unit["raw"]:
        measured = [block for blocks in moment["truth_blocks"].values() for block in blocks]
        columns = (moment["group"], moment["channel"], *measured, *moment["predictions"].values())
        assert len({len(column) for column in columns}) == 1


def test_records_can_be_worked_out_again_from_the_raw_numbers(
    results: tuple[Path, list[dict[str, Any]], list[Standing]],
) -> None:
    out, records, _ = results
    unit = json.loads((out / "fidelity" / "resnet8-seed0.json").read_text())
    for moment in unit["raw"]:
        for kind, blocks in moment["truth_blocks"].items():
            truth = np.mean(blocks, axis=0)
            for name, predicted in moment["predictions"].items():
                key = (moment["moment"], kind, name)
                (record,) = [r for r in records if (r["moment"], r["truth"], r["criterion"]) == key]
                if (kind, name) == ("removed", "autowidth"):  # nobody stands in: it is told so
                    predicted = moment["predictions"]["autowidth-next"]
                assert record["spearman"] == pytest.approx(spearmanr(predicted, truth).statistic)


def test_the_folder_can_be_asked_for_the_same_only(
    results: tuple[Path, list[dict[str, Any]], list[Standing]],
) -> None:
    out, records, _ = results
    told = list[Standing]()
    assert bench(tiny(limit=300, truth=60, filters=12), out, report=told.append) == records
    assert [t.seconds for t in told] == [None]
    with pytest.raises(BenchError, match="filters 12, here it is 13"):
        bench(tiny(limit=300, truth=60, filters=13), out)
    with pytest.raises(BenchError, match="epochs=1, here it is epochs=2"):
        bench(tiny(limit=300, truth=60, filters=12, epochs=2, seeds=(1,)), out)


def test_a_setting_that_came_later_is_no_other_setting(
    results: tuple[Path, list[dict[str, Any]], list[Standing]], tmp_path: Path
) -> None:
    out, records, _ = results
    (tmp_path / "fidelity").mkdir()
    file = "fidelity/resnet8-seed0.json"
    unit = json.loads((out / file).read_text())
    del unit["settings"]["training"]["warmup"]
    (tmp_path / file).write_text(json.dumps(unit))
    assert bench(tiny(limit=300, truth=60, filters=12), tmp_path) == records
    unit["settings"]["training"]["warmup"] = 0.5
    (tmp_path / file).write_text(json.dumps(unit))
    with pytest.raises(BenchError, match=r"warmup=0\.5, here it is warmup=0\.2"):
        bench(tiny(limit=300, truth=60, filters=12), tmp_path)


def test_a_suite_is_described_by_its_units_alone() -> None:
    """What a worker gets must not depend on the order or number of other units."""
    one, both = tiny(seeds=(1,)), tiny(seeds=(0, 1))
    assert one.units[0] == both.units[1]
    assert replace(one, units=()) == replace(both, units=())
