"""Pictures and weights brought by mistake: one sentence, code 2, nothing written; and what is read all the same."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from autowidth import IndexMap, load_, resize_, save
from autowidth.lab.data import DataError, load
from autowidth.lab.evaluating import evaluate_run
from autowidth.lab.loop import train
from autowidth.lab.models import build
from autowidth.lab.saved import open_run
from autowidth.lab.settings import settings_of
from autowidth.lab.weights import WeightsError, load_weights_
from test_cli import called


def pictures(place: Path, count: int = 10, classes: tuple[str, ...] = ("a", "b")) -> Path:
    """Noise, 12 x 12, no two pictures alike."""
    rng = np.random.default_rng(0)
    for label in classes:
        (place / label).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(place / label / f"{number}.png")
    return place


class Trap:
    """A pickle that writes a file when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("trapped"),))  # type: ignore[return-value]


# ---- one sentence ----------------------------------------------------------------------------------------------------


def empty_class(place: Path) -> str:
    (pictures(place / "photos") / "c").mkdir()
    return "--data folder:photos"


def one_class(place: Path) -> str:
    pictures(place / "photos", classes=("cat",))
    return "--data folder:photos"


def program_as_picture(place: Path) -> str:
    (pictures(place / "photos") / "a" / "0.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return "--data folder:photos"


def floats(place: Path) -> str:
    Image.fromarray(np.random.default_rng(0).random((12, 12), dtype=np.float32)).save(
        pictures(place / "photos") / "a" / "x.tiff"
    )
    return "--data folder:photos"


def other_network(place: Path) -> str:
    save_file(build("vgg8", in_channels=1).state_dict(), place / "w.safetensors")
    return "--weights w.safetensors"


def other_width(place: Path) -> str:
    save_file(build("resnet8", in_channels=1, width=0.5).state_dict(), place / "w.safetensors")
    return "--weights w.safetensors"


def half_a_file(place: Path) -> str:
    torch.save(build("resnet8", in_channels=1).state_dict(), place / "w.pt")
    (place / "w.pt").write_bytes((place / "w.pt").read_bytes()[:9000])
    return "--weights w.pt"


def with_code(place: Path) -> str:
    torch.save({"state_dict": build("resnet8", in_channels=1).state_dict(), "trap": Trap()}, place / "w.pt")
    return "--weights w.pt"


def growing(place: Path) -> str:
    save_file(build("resnet8", in_channels=1).state_dict(), place / "w.safetensors")
    return "--weights w.safetensors --macs 1.5"


MISTAKES: list[tuple[Callable[[Path], str], str]] = [
    (empty_class, "holds no file: put images into it or remove the class"),
    (one_class, "photos has one class only, cat: a network would be right without looking"),
    (program_as_picture, "its format is EPS, allowed are PNG"),
    (floats, "floating-point numbers"),
    (other_network, "do not fit ResNet:"),
    (other_width, "of another shape: stem.conv.weight is (8, 1, 3, 3) in the file and (16, 1, 3, 3) in the network"),
    (half_a_file, "copy or download it again"),
    (with_code, "would run code when read, so it was not read"),
    (growing, "asks for a larger network than the one whose weights are brought"),
]


@pytest.mark.parametrize(("made", "part"), MISTAKES, ids=[made.__name__ for made, _ in MISTAKES])
def test_a_mistake_gets_one_sentence_and_leaves_nothing(
    made: Callable[[Path], str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    line = f"train --model resnet8 {made(tmp_path)} --epochs 1 --quiet --device cpu --threads 1"
    before = sorted(tmp_path.rglob("*"))
    assert called(*line.split(), monkeypatch=monkeypatch) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and part in captured.err
    assert captured.err.startswith("autowidth: ") and captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_test_images_that_are_training_images_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    pictures(tmp_path / "photos" / "train")
    place = pictures(tmp_path / "photos" / "test", classes=("a",))
    (place / "b").mkdir()
    rng = np.random.default_rng(1)
    for number in range(10):
        for label in ("a", "b"):
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(place / label / f"{number}.png")
    for above in (100, 0):
        assert len(load(f"folder:{tmp_path / 'photos'}", stream_above=above, workers=0).test) == 20
        assert not caplog.messages
    shutil.copy(tmp_path / "photos" / "train" / "b" / "3.png", place / "a" / "copied.png")
    for above in (100, 0):
        caplog.clear()
        load(f"folder:{tmp_path / 'photos'}", stream_above=above, workers=0)
        (told,) = caplog.messages
        assert told.startswith("1 of 21 test images of photos (4.8 %) are training images too")


# ---- what is read all the same ---------------------------------------------------------------------------------------


def test_gray_printed_and_deep_pictures_are_what_they_show(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (16, 1))
    kinds = {
        "gray.png": Image.fromarray(ramp),
        "deep.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "deep.tiff": Image.fromarray(ramp.astype(np.uint16) * 257),
        "printed.tiff": Image.fromarray(np.stack([255 - ramp] * 3 + [ramp * 0], 2), mode="CMYK"),
        "clear.png": Image.fromarray(np.stack([ramp] * 3 + [ramp * 0 + 255], 2)),
    }
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number, (name, image) in enumerate(kinds.items()):
            image.save(tmp_path / label / f"{number}-{name}")
            image.save(tmp_path / label / f"again-{number}-{name}")
    images = load(f"folder:{tmp_path}", holdout=0.0)
    expected = torch.from_numpy(ramp).expand(3, 16, 16).int()
    for split in (images.train, images.test):
        assert isinstance(split.images, torch.Tensor)
        assert all((image.int() - expected).abs().max() <= 1 for image in split.images)


# ---- runs ------------------------------------------------------------------------------------------------------------


def narrowed() -> nn.Module:
    """A ResNet-8 with one group narrower than the others of its stage."""
    torch.manual_seed(3)
    network = build("resnet8", in_channels=1, width=0.25)
    resize_(network, {"stages.0.0.first.conv": IndexMap.removing([0, 2], 4)}, example_inputs=torch.zeros(2, 1, 8, 8))
    return network


def test_a_run_brings_all_but_its_head_where_a_new_one_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x, small = torch.randn(2, 1, 8, 8), narrowed()
    save(tmp_path / "run", small)
    model = build("resnet8", num_classes=3, in_channels=1, width=0.25)
    with pytest.raises(WeightsError):
        load_weights_(model, tmp_path / "run", example_inputs=x)
    fresh = load_weights_(model, tmp_path / "run", example_inputs=x, new_head=True)
    assert sorted(fresh) == ["head.linear.bias", "head.linear.weight"]
    assert "stay fresh: the weights in" in caplog.text
    state = model.state_dict()
    for name, tensor in small.state_dict().items():
        assert name in fresh or torch.equal(state[name], tensor)
    assert model(x).shape == (2, 3) and state["head.linear.weight"].abs().sum() > 0
    caplog.clear()
    same = build("resnet8", in_channels=1, width=0.25)
    assert load_weights_(same, tmp_path / "run", example_inputs=x, new_head=True) == ()
    assert "new_head has no effect" in caplog.text
    with torch.no_grad():
        assert torch.equal(same.eval()(x), small.eval()(x))
    with pytest.raises(WeightsError, match="of another network"):
        load_weights_(build("vgg8", in_channels=1), tmp_path / "run", example_inputs=x, new_head=True)


def test_a_run_is_measured_on_pictures_of_any_size(tmp_path: Path) -> None:
    table = {"model": "resnet8", "width": 0.25, "epochs": 1, "batch_size": 4, "policy": {"name": "never"}}
    data = f"folder:{pictures(tmp_path / 'photos')}"
    train(settings_of({**table, "data": data, "threads": 1, "device": "cpu", "out": tmp_path / "run"}))
    large = tmp_path / "large"
    for file in sorted((tmp_path / "photos").rglob("*.png")):
        (large / file.parent.name).mkdir(parents=True, exist_ok=True)
        side = 20 + int(file.stem)
        Image.open(file).resize((side, side + 5)).save(large / file.parent.name / file.name)
    assert evaluate_run(tmp_path / "run", data=f"folder:{large}").images == 4
    assert open_run(tmp_path / "run").input_shape == (3, 12, 12)
    with pytest.raises(DataError, match="takes images of shape"):
        evaluate_run(tmp_path / "run", data=f"folder:{large}", size=16)
    fresh = build("resnet8", num_classes=2, width=0.25)
    assert load_(fresh, tmp_path / "run", example_inputs=torch.zeros(2, 3, 12, 12)).widths
