"""Options of the command: every setting is one, with the help and the bounds of its field; and what they stand for."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from torch.optim import SGD, AdamW
from typer.testing import CliRunner

from autowidth.checkpoint import read_run
from autowidth.cli import app
from autowidth.cli.door import UsageError
from autowidth.cli.options import NESTED, PANELS, TABLES, all_settings, given, merged, settings_options
from autowidth.lab import data
from autowidth.lab.data import DataError
from autowidth.lab.models import build
from autowidth.lab.optimizers import optimizer_of
from autowidth.lab.prepare import free_folder, load_images
from autowidth.lab.settings import Settings, SettingsError, settings_of
from autowidth.policy import Budget
from test_cli import CONFIG, program

# ---- the help --------------------------------------------------------------------------------------------------------


@functools.cache
def helped(command: str) -> str:
    """The help of a command in lines that nothing folds."""
    found = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400", "TERM": "dumb"})
    assert found.exit_code == 0
    return re.sub(r"[\s│]+", " ", found.output)


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name not in TABLES])
def test_every_setting_is_an_option_with_the_help_of_its_field(name: str) -> None:
    text = helped("train")
    assert f" --{name.replace('_', '-')} " in text
    assert re.sub(r"\s+", " ", str(Settings.model_fields[name].description)) in text


def test_every_field_of_a_table_is_named() -> None:
    text = helped("train")
    for name in NESTED:
        assert re.search(rf"[ ,]{re.escape(name)}[ ,]", text), name
    assert {"policy.limits.multiple", "policy.schedule.end", "policy.macs", "effort.probe_samples"} <= set(NESTED)


def test_basic_options_come_first_and_the_others_under_headings() -> None:
    text = helped("train")
    places = [text.index(f" {title} ") for title in PANELS]
    assert places == sorted(places)
    assert max(text.index(f" --{name} ") for name in ("model", "data", "epochs", "lr", "macs")) < places[0]
    assert sorted(all_settings()) == sorted(name for name in Settings.model_fields if name not in TABLES)
    named = [name for names in PANELS.values() for name in names]
    assert len(named) == len(set(named)) and set(named) <= set(Settings.model_fields)


def test_a_setting_under_no_heading_is_an_option_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PANELS, "Machine")  # type: ignore[arg-type]
    seen: list[dict[str, Any]] = []

    @settings_options("bf16", "epochs", "augment")
    def command(other: bool = False, **options: Any) -> None:
        seen.append({"other": other, **options})

    small = typer.Typer()
    small.command()(command)
    done = CliRunner().invoke(small, ["--bf16", "--augment", "light"])
    assert done.exit_code == 0, done.output
    assert given(seen[0]) == {"other": False, "bf16": True, "augment": "light"}
    assert "Further settings" in CliRunner().invoke(small, ["--help"]).output


# ---- what options stand for ------------------------------------------------------------------------------------------


def test_pairs_fill_tables_and_options_go_on_top() -> None:
    pairs = ("policy.limits.multiple=8", "policy.macs=0.5", "effort.probe_samples=64", "bf16=false", "device=cpu")
    table = given({"epochs": 3, "lr": None}, pairs)
    assert table == {
        "epochs": 3, "policy": {"limits": {"multiple": 8}, "macs": 0.5}, "effort": {"probe_samples": 64},
        "bf16": False, "device": "cpu",
    }  # fmt: skip
    both = merged(table, {"policy": {"name": "budget", "macs": 0.3}})
    assert both["policy"] == {"name": "budget", "macs": 0.3, "limits": {"multiple": 8}}
    policy = settings_of(both).policy
    assert isinstance(policy, Budget) and (policy.macs, policy.limits.multiple) == (0.3, 8)
    for wrong in ("policy", "=3"):
        with pytest.raises(UsageError, match=r"sets nothing: give NAME=VALUE"):
            given({}, (wrong,))
    with pytest.raises(SettingsError, match=r"did you mean policy\.limits\.multiple"):
        settings_of(given({}, ("policy.limits.multipel=8",)))


def test_options_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(CONFIG)
    line = (
        "train --config run.toml --optimizer adamw --weight-decay 0.01 --momentum 0.8 --schedule cosine --ema 0.9 "
        "--augment none --label-smoothing 0.1 --holdout 0.2 --epochs 1 --set policy.limits.multiple=2 --macs 0.8"
    )
    done = program(*line.split(), "--quiet")
    assert done.returncode == 0, done.stderr
    kept = read_run("runs/resnet8-digits-0").extra["settings"]
    expected = {
        "optimizer": "adamw", "weight_decay": 0.01, "momentum": 0.8, "schedule": "cosine", "ema": 0.9,
        "augment": "none", "label_smoothing": 0.1, "holdout": 0.2, "lr": 0.001,
    }  # fmt: skip
    assert {name: kept[name] for name in expected} == expected
    assert kept["policy"]["limits"]["multiple"] == 2


def test_an_option_that_is_no_choice_is_refused() -> None:
    done = program("train", "--optimizer", "adan")
    assert done.returncode == 2 and "adamw" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(SettingsError, match=r"'augment'.*'none', 'light' or 'standard', got 'heavy'"):
        settings_of({"augment": "heavy"})


def test_the_optimizer_is_the_one_that_is_named() -> None:
    network = build("resnet8", in_channels=1)
    sgd = optimizer_of(network, settings_of({"momentum": 0.8, "weight_decay": 0.03}))
    adamw = optimizer_of(network, settings_of({"optimizer": "adamw", "momentum": 0.8, "lr": 0.5}))
    assert isinstance(sgd, SGD) and sgd.defaults["nesterov"] and sgd.defaults["momentum"] == 0.8
    assert isinstance(adamw, AdamW) and adamw.defaults["betas"] == (0.8, 0.999) and adamw.defaults["lr"] == 0.5
    for found in (sgd, adamw):
        assert sum(len(group["params"]) for group in found.param_groups) == len(list(network.parameters()))
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.03, 0.0]


# ---- what depends on other settings ----------------------------------------------------------------------------------


def test_given_weights_are_trained_on_gently_unless_told_otherwise() -> None:
    fresh, tuned = settings_of({}), settings_of({"weights": "w.pt", "policy": {"name": "budget", "macs": 0.5}})
    assert (fresh.lr, fresh.epochs, fresh.schedule, fresh.policy.limits.offer) == (0.1, 120, "one-cycle", 0.05)
    assert (tuned.lr, tuned.epochs, tuned.schedule, tuned.policy.limits.offer) == (0.02, 20, "cosine", 0.0)
    assert (tuned.policy.schedule.count, tuned.policy.macs) == (0, 0.5)
    others = settings_of({"weights": "w.pt", "policy": {"name": "auto"}}).policy.schedule
    assert (others.count, others.begin, others.end) == (4, 0.0, 0.12)
    own = settings_of({
        "weights": "w.pt", "lr": 0.3, "epochs": 7, "schedule": "one-cycle",
        "policy": {"name": "budget", "schedule": {"end": 0.9}, "limits": {"offer": 0.1, "multiple": 4}},
    })  # fmt: skip
    assert (own.lr, own.epochs, own.schedule) == (0.3, 7, "one-cycle")
    assert (own.policy.schedule.begin, own.policy.schedule.end, own.policy.limits.offer) == (0.06, 0.9, 0.1)
    assert settings_of(tuned.model_dump()) == tuned
    assert settings_of({"weights": "w.pt", "policy": {"name": "never"}}).policy.aim == "without reviews"


def test_the_rate_is_that_of_the_optimizer() -> None:
    rates = [settings_of({"optimizer": name, "weights": w}).lr for name in ("sgd", "adamw") for w in (None, "w.pt")]
    assert rates == [0.1, 0.02, 0.001, 0.0001]


# ---- pictures --------------------------------------------------------------------------------------------------------


def pictures(place: Path, *extents: tuple[int, int]) -> Path:
    """Ten pictures (H, W) of each extent in each of two classes."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (place / label).mkdir(parents=True)
        for number, (height, width) in enumerate(extents * 10):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / label / f"{number}.png")
    return place


def test_pictures_of_one_size_are_taken_as_they_are(tmp_path: Path) -> None:
    images = data.load(f"folder:{pictures(tmp_path / 'photos', (30, 24))}")
    assert images.image_shape == (3, 30, 24) and images.resized == ""
    original = np.asarray(Image.open(tmp_path / "photos" / "a" / "0.png")).transpose(2, 0, 1)
    assert any((image == original).all() for image in [*images.train.images.numpy(), *images.test.images.numpy()])


CHOSEN = [
    (((30, 24), (40, 60), (50, 41)), 40, r"they have 3 sizes"),
    (((600, 20),), 16, r"all are 600 x 20"),
    (((5, 6), (6, 5)), 5, r"they have 2 sizes"),
    (((300, 320), (400, 300)), 224, r"they have 2 sizes"),
]


@pytest.mark.parametrize(("extents", "side", "why"), CHOSEN)
def test_pictures_that_differ_or_are_large_get_a_side_that_is_told(
    tmp_path: Path, extents: tuple[tuple[int, int], ...], side: int, why: str
) -> None:
    images = data.load(f"folder:{pictures(tmp_path / 'photos', *extents)}")
    assert images.image_shape == (3, side, side)
    assert f"images resized to {side} x {side} ({why}; size sets another)" in str(images)


def test_a_lying_picture_counts_as_it_is_seen(tmp_path: Path) -> None:
    place = pictures(tmp_path / "photos", (30, 24))
    for file in sorted(place.rglob("*.png"))[:3]:
        exif = Image.Exif()
        exif[0x0112] = 6  # it lies on its side: 24 x 30 pixels in the file are 30 x 24 to the eye
        Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    assert data.load(f"folder:{place}").image_shape == (3, 30, 24)


def test_a_rectangle_may_be_asked_for(tmp_path: Path) -> None:
    text = f"folder:{pictures(tmp_path / 'photos', (30, 24), (10, 12))}"
    for above in (100, 0):
        assert data.load(text, size=(12, 20), stream_above=above, workers=0).image_shape == (3, 12, 20)
    with pytest.raises(DataError, match="resized"):
        data.load(text, size=(0, 20))


def test_augmentation_is_told_and_can_be_asked_for(tmp_path: Path) -> None:
    text = f"folder:{pictures(tmp_path / 'photos', (16, 24))}"
    told = {
        level: load_images(settings_of({"data": text, "augment": level}))
        for level in (None, "none", "light", "standard")
    }
    assert "training images moved by up to 2 pixels and flipped at random" in str(told[None])
    assert told["standard"].augmentation == told[None].augmentation
    assert "training images moved by up to 2 pixels;" in str(told["light"])
    assert "training images as they are" in str(told["none"])
    plain = next(iter(told["none"].training_batches(4, seed=0)))[0]
    moved = next(iter(told["standard"].training_batches(4, seed=0)))[0]
    assert plain.shape == moved.shape and not plain.equal(moved)
    digits = load_images(settings_of({"augment": "light"})).augmentation
    assert (digits.padding, digits.edge, digits.flip) == (1, "zero", False)


# ---- folders of runs -------------------------------------------------------------------------------------------------


def test_a_run_that_names_no_folder_replaces_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(CONFIG)
    written = []
    for _ in range(2):
        done = program("train", "--config", "run.toml", "--epochs", "1", "--no-edit", "--quiet", "--json")
        assert done.returncode == 0, done.stderr
        written.append(json.loads(done.stdout)["out"])
    assert written == ["runs/resnet8-digits-0", "runs/resnet8-digits-0-2"]
    assert free_folder("resnet8-digits-0") == Path("runs/resnet8-digits-0-3")
    assert free_folder("my net:Net-folder:/photos/") == Path("runs/my-net-Net-folder-photos")
