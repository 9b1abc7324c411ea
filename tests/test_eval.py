"""What is there already: a run or a network with weights is measured, and a run tells the class of pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autowidth.checkpoint import load_, read_run
from autowidth.lab.data import CorruptImageError, DataError, load
from autowidth.lab.evaluating import evaluate_model, evaluate_run
from autowidth.lab.loop import train
from autowidth.lab.models import build
from autowidth.lab.predicting import picture_files, predicted
from autowidth.lab.result import Result
from autowidth.lab.saved import open_run
from autowidth.lab.settings import settings_of
from test_cli import program

PUBLISHED = os.environ.get("PUBLISHED_CIFAR10")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of two classes, 20 x 24, that differ in colour."""
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label, colour in (("blue", (30, 60, 200)), ("red", (200, 60, 30))):
        (place / label).mkdir()
        for number in range(20):
            pixels = np.clip(np.array(colour) + rng.normal(0, 20, (24, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / label / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def result(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run on them that removed filters, and what it ended with."""
    budget = {"name": "budget", "macs": 0.6, "schedule": {"count": 1, "begin": 0.2, "end": 1.0}}
    table = {
        "model": "resnet8", "width": 0.5, "data": f"folder:{pictures}", "size": 16, "pool": 2, "epochs": 12,
        "batch_size": 8, "policy": budget, "threads": 1, "device": "cpu", "lr": 0.05,
        "out": tmp_path_factory.mktemp("runs") / "run",
    }  # fmt: skip
    return train(settings_of(table))


def folder_of(result: Result) -> Path:
    assert result.out is not None
    return Path(result.out)


# ---- eval ------------------------------------------------------------------------------------------------------------


def test_a_run_is_as_good_as_it_said(result: Result) -> None:
    found = evaluate_run(folder_of(result))
    assert (found.accuracy, found.macs, found.params) == (result.accuracy, result.macs, result.params)
    assert found.loss == pytest.approx(result.loss, rel=1e-5)
    assert found.images == 8 and result.macs < result.macs_start


def test_a_model_with_the_weights_of_a_run_is_the_run(result: Result, pictures: Path) -> None:
    table = {"model": "resnet8", "width": 0.5, "data": f"folder:{pictures}", "size": 16, "pool": 2, "device": "cpu"}
    found = evaluate_model(settings_of({**table, "weights": folder_of(result)}))
    assert (found.accuracy, found.macs, found.loss) == (result.accuracy, result.macs, pytest.approx(result.loss))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "digits"}, "images of digits have a size of their own"),
        ({"size": 32}, r"takes images of shape \(3, 8, 8\), those of pictures0, pooled to 16 x 16 are \(3, 16, 16\)"),
    ],
)
def test_images_that_a_run_does_not_take_are_refused(result: Result, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_run(folder_of(result), **changes)


def test_other_classes_are_refused_and_other_names_are_said(
    result: Result, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, sources in {"three": ("blue", "red", "red"), "renamed": ("blue", "red")}.items():
        for number, source in enumerate(sources):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"class{number}").symlink_to(pictures / source)
    with pytest.raises(DataError, match=r"tells 2 classes \(blue, red\) apart, in this order, three, .* has 3 classes"):
        evaluate_run(folder_of(result), data=f"folder:{tmp_path / 'three'}")
    assert evaluate_run(folder_of(result), data=f"folder:{tmp_path / 'renamed'}").accuracy == result.accuracy
    assert "the run has 2 classes (blue, red), renamed, pooled to 8 x 8 has 2 classes (class0, class1)" in caplog.text


def test_the_command_measures_a_run_and_a_model(result: Result, tmp_path: Path) -> None:
    found = program("eval", result.out or "", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["accuracy"] == result.accuracy
    torch.save(build("resnet8", in_channels=1).state_dict(), tmp_path / "w.pt")
    plain = program("eval", "resnet8", "--weights", str(tmp_path / "w.pt"), "--data", "digits", "--threads", "1")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.startswith("resnet8 on digits: accuracy ") and "on 359 test images" in plain.stdout


MISTAKES = [
    (["resnet8"], "resnet8 has fresh weights, of which nothing can be measured: give --weights FILE"),
    (["."], "is a folder without run.json"),
    (["resnet8", "--weights", "nowhere.pt"], "there is no such file"),
    (["resnet21", "--weights", "nowhere.pt"], "nearest is resnet20"),
    (["resnet8", "--weights", "w", "--normalize", "imagenut"], "neither imagenet nor means"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_gets_one_sentence(arguments: list[str], message: str) -> None:
    found = program("eval", *arguments)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert message in found.stderr


def test_what_a_run_brings_cannot_be_given(result: Result) -> None:
    found = program("eval", result.out or "", "--weights", "w.pt")
    assert found.returncode == 2 and "which brings its own" in found.stderr


@pytest.mark.slow
@pytest.mark.skipif(PUBLISHED is None, reason="PUBLISHED_CIFAR10 names no folder")
@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.9173), (56, 0.9339)])
def test_published_networks_are_measured_by_the_command(depth: int, accuracy: float) -> None:
    place = Path(PUBLISHED or "")
    weights, data = place / "pretrained-cifar10" / f"resnet{depth}.safetensors", f"cifar10:{place / 'cifar10-raw'}"
    options = ["--weights", str(weights), "--data", data, "--normalize", "imagenet", "--json", "--device", "cpu"]
    found = program("eval", f"resnet{depth}-padding", *options)
    assert round(json.loads(found.stdout)["accuracy"], 4) == accuracy


# ---- predict ---------------------------------------------------------------------------------------------------------


def test_a_picture_gets_the_scores_that_it_has_as_one_of_the_data(result: Result, pictures: Path) -> None:
    opened = open_run(folder_of(result))
    files = picture_files([pictures])
    found = {p.file: p for p in predicted(opened, files, top=2)}
    images = load(f"folder:{pictures}", size=16, pool=2)
    network = build("resnet8", num_classes=2, width=0.5)
    load_(network, folder_of(result), example_inputs=torch.zeros(2, 3, 8, 8))
    ours = sorted(p.probabilities[p.classes.index("red")] for p in found.values())
    theirs = [
        chance
        for part in ("train", "test")
        for x, _ in images.plain_batches(part, 8)  # type: ignore[arg-type]
        for chance in network.eval()(x).softmax(1)[:, 1].tolist()
    ]
    assert ours == pytest.approx(sorted(theirs), abs=1e-5)
    assert all(sum(p.probabilities) == pytest.approx(1) and p.probabilities[0] >= 0.5 for p in found.values())
    assert read_run(folder_of(result)).extra["classes"] == ["blue", "red"]


def test_a_gray_run_takes_coloured_pictures(tmp_path: Path) -> None:
    table = {"model": "resnet8", "width": 0.25, "data": "digits", "limit": 64, "epochs": 1, "policy": {"name": "never"}}
    train(settings_of({**table, "out": tmp_path / "run", "threads": 1, "device": "cpu"}))
    digit = load("digits").test.images[0, 0]
    gray = (digit * 255).round().byte().numpy()
    Image.fromarray(np.stack([gray] * 3, 2)).save(tmp_path / "digit.png")
    opened = open_run(tmp_path / "run")
    (found,) = predicted(opened, [tmp_path / "digit.png"], top=10)
    x = (torch.from_numpy(gray).float() / 255 - opened.scaling.mean[0]) / opened.scaling.std[0]
    expected = opened.network(x[None, None]).softmax(1)[0]
    assert [found.probabilities[found.classes.index(str(n))] for n in range(10)] == pytest.approx(
        expected.tolist(), abs=1e-4
    )


def test_what_is_no_picture_is_refused(result: Result, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    opened = open_run(folder_of(result))
    with pytest.raises(CorruptImageError, match=r"notes\.png: no readable image"):
        list(predicted(opened, [tmp_path / "notes.png"]))
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "holds no file"), (tmp_path / "nowhere", "no such file")):
        with pytest.raises(DataError, match=message):
            picture_files([path])


def test_the_command_tells_the_class_of_pictures(result: Result, pictures: Path) -> None:
    file = str(pictures / "red" / "0.png")
    found = program("predict", result.out or "", file, str(pictures / "blue"), "--top", "2", "--json")
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(lines) == 21 and lines[0]["file"] == file and sorted(lines[0]["classes"]) == ["blue", "red"]
    plain = program("predict", result.out or "", file)
    assert plain.stdout == f"{file}: {lines[0]['classes'][0]} {lines[0]['probabilities'][0]:.1%}\n"
    missing = program("predict", "nowhere", file)
    assert missing.returncode == 2 and "no run at nowhere" in missing.stderr
