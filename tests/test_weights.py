"""Weights that people bring: every form of file that is read, what is refused without being run, what does not fit."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from autowidth import IndexMap, load_, resize_, save
from autowidth.checkpoint import CheckpointError, read_run
from autowidth.lab.data import DataError, load
from autowidth.lab.loop import train
from autowidth.lab.loop_parts import evaluate
from autowidth.lab.models import build
from autowidth.lab.prepare import load_images
from autowidth.lab.saved import SavedError, open_run
from autowidth.lab.scaling import IMAGENET, Scaling, scaled_by
from autowidth.lab.settings import SettingsError, settings_from, settings_of
from autowidth.lab.weights import WeightsError, load_weights_, read_weights
from autowidth.version import __version__
from test_cli import program

PUBLISHED = os.environ.get("PUBLISHED_CIFAR10")
"""A folder with the published files (pretrained-cifar10) and CIFAR-10 (cifar10-raw)."""


def network(classes: int = 10, name: str = "resnet8", width: float = 0.25) -> nn.Module:
    return build(name, num_classes=classes, in_channels=1, width=width)


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in network().state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# ---- what is read ----------------------------------------------------------------------------------------------------


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


FORMS: dict[str, Any] = {
    "plain": lambda s: s,
    "ordered": OrderedDict,
    "under state_dict, with other things": lambda s: {"epoch": 3, "best": torch.tensor(0.9), "state_dict": s},
    "under model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "under model_state_dict": lambda s: {"model_state_dict": s},
    "under net": lambda s: {"net": s, "acc": 91.0},
    "under ema, two deep": lambda s: {"ema": {"state_dict": s}},
    "the model where an average is there too": lambda s: {"ema": {"x": torch.zeros(1)}, "model": s},
    "DataParallel": lambda s: {"state_dict": prefixed("module.", s)},
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "compiled, parallel, in a class": lambda s: prefixed("module._orig_mod.model.", s),
    "averaged": lambda s: {"n_averaged": torch.tensor(7), **prefixed("module.", s)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".th"])
def test_files_of_torch_save_are_read(tmp_path: Path, state: dict[str, Tensor], form: str, ending: str) -> None:
    file = tmp_path / f"weights{ending}"
    torch.save(FORMS[form](state), file)
    assert same(read_weights(file), state)


def test_a_safetensors_file_is_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(prefixed("module.", state), tmp_path / "weights.safetensors")
    assert same(read_weights(tmp_path / "weights.safetensors"), state)


def test_a_file_of_the_old_format_is_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "old.pth"), state)


def test_a_run_is_read_by_its_folder_or_its_file(tmp_path: Path) -> None:
    model = network()
    save(tmp_path / "run", model)
    for path in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        assert same(read_weights(path), dict(model.state_dict()))


# ---- what is refused -------------------------------------------------------------------------------------------------


class Touches:
    """What a pickle can do to whoever reads it: here, it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("plain_pickle", [True, False])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, ending: str, plain_pickle: bool) -> None:
    marker, file = tmp_path / "marker", tmp_path / f"evil{ending}"
    content = {"state_dict": {"weight": torch.zeros(1)}, "config": Touches(marker)}
    if plain_pickle:
        file.write_bytes(pickle.dumps({"config": Touches(marker)}))
    else:
        torch.save(content, file)
    with pytest.raises(WeightsError, match=r"would run code when read, so it was not read; save .*state_dict"):
        read_weights(file)
    assert not marker.exists()
    torch.load(file, weights_only=False) if not plain_pickle else pickle.loads(file.read_bytes())
    assert marker.exists(), "the file is harmless, so that the test could not fail"


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "module.pt")
    with pytest.raises(WeightsError, match="Python objects beside tensors"):
        read_weights(tmp_path / "module.pt")


def test_a_program_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch discourage it
        torch.jit.script(nn.ReLU()).save(str(tmp_path / "script.pt"))
    with pytest.raises(WeightsError, match="TorchScript archive"):
        read_weights(tmp_path / "script.pt")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_a_part_of_a_file_is_refused(tmp_path: Path, state: dict[str, Tensor], kind: str, share: float) -> None:
    file = tmp_path / ("half.safetensors" if kind == "safetensors" else "half.pt")
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match=r"not a whole .*copy or download it again"):
        read_weights(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, "there is no such file"),
        ("empty.pt", b"", "the file is empty"),
        ("empty.safetensors", b"", "the file is empty"),
        ("text.pt", b"hello, these are no weights", "not a whole file of torch.save"),
        ("net.onnx", b"x", r"allowed endings are \.safetensors, \.pt"),
        ("folder", "", r"a folder without run\.json"),
    ],
)
def test_what_is_no_file_of_weights_is_told_in_a_sentence(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    if content == "":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, "no tensors in it, but epoch, lr; looked for"),
        ({}, "no tensors in it, but nothing"),
        ([torch.zeros(1)], "a list in it"),
        (torch.zeros(1), "a Tensor in it"),
    ],
)
def test_a_file_without_a_state_dict_says_what_is_in_it(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "other.pt")


# ---- what fits -------------------------------------------------------------------------------------------------------


def test_a_network_takes_over_the_weights_and_keeps_its_tensors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "weights.safetensors")
    model = network()
    before = {name: id(p) for name, p in model.named_parameters()}
    assert load_weights_(model, tmp_path / "weights.safetensors") == ()
    assert same(dict(model.state_dict()), state)
    assert before == {name: id(p) for name, p in model.named_parameters()}


def test_a_network_whose_own_names_have_a_prefix_fits_too(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "weights.safetensors")
    wrapped = AveragedModel(network())
    load_weights_(wrapped, tmp_path / "weights.safetensors")
    assert same(dict(wrapped.module.state_dict()), state)


def test_counters_of_batches_may_be_missing(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file({n: t for n, t in state.items() if "num_batches" not in n}, tmp_path / "weights.safetensors")
    load_weights_(model := network(), tmp_path / "weights.safetensors")
    assert same(dict(model.state_dict()), state)


MISFITS = {
    "width": (network(width=0.5), r"of another shape: stem\.conv\.weight is \(4, 1, 3, 3\) in the file and \(8, "),
    "depth": (network(name="resnet14"), r"30 missing in the file: stages\.0\.1\.first\.conv\.weight"),
    "another network": (
        network(name="vgg8"),
        r"missing in the file: .* and \d+ more; .* in the file only: .*The remedy",
    ),
    "classes": (network(classes=7), r"2 of another shape: head\.linear\.weight is \(10, 16\).*--new-head"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path, state: dict[str, Tensor], kind: str) -> None:
    save_file(state, tmp_path / "weights.safetensors")
    model, message = MISFITS[kind]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights_(model, tmp_path / "weights.safetensors", new_head=kind != "classes")
    assert len(re.findall(r"\w+\.\w+", str(caught.value))) < 60
    assert same(dict(model.state_dict()), before)


def test_a_head_for_other_classes_stays_fresh_where_that_is_asked(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    save_file(state, tmp_path / "weights.safetensors")
    model = network(classes=7)
    fresh = {name: t.clone() for name, t in model.state_dict().items() if name.startswith("head.")}
    assert load_weights_(model, tmp_path / "weights.safetensors", new_head=True) == tuple(fresh)
    body = {name: t for name, t in state.items() if not name.startswith("head.")}
    assert same(dict(model.state_dict()), {**body, **fresh})
    assert "head.linear.weight stays fresh: 10 classes in the file, 7 here" in caplog.text


def test_a_fresh_head_that_is_not_needed_is_said(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    save_file(state, tmp_path / "weights.safetensors")
    assert load_weights_(network(), tmp_path / "weights.safetensors", new_head=True) == ()
    assert "new_head has no effect" in caplog.text


def test_a_run_brings_its_widths(tmp_path: Path) -> None:
    x = torch.randn(2, 1, 8, 8)
    small = network()
    group = "stages.0.0.first.conv"
    resize_(small, {group: IndexMap.removing([0, 2], 4)}, example_inputs=x)
    save(tmp_path / "run", small)
    model = network()
    load_weights_(model, tmp_path / "run", example_inputs=x)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), small.eval()(x))
    with pytest.raises(WeightsError, match="pass example_inputs"):
        load_weights_(network(), tmp_path / "run")
    with pytest.raises(WeightsError, match="of another network"):
        load_weights_(network(name="vgg8"), tmp_path / "run", example_inputs=x)
    with pytest.raises(CheckpointError, match="of another network"):
        load_(network(name="vgg8"), tmp_path / "run", example_inputs=x)


# ---- in a run --------------------------------------------------------------------------------------------------------


def short(**changes: Any) -> dict[str, Any]:
    """Settings of a run of seconds."""
    table = {"model": "resnet8", "width": 0.25, "data": "digits", "limit": 192, "epochs": 1, "batch_size": 32}
    return {**table, "policy": {"name": "never"}, "threads": 1, "device": "cpu", **changes}


def test_a_run_starts_from_weights_and_says_how_good_they_were(tmp_path: Path) -> None:
    first = train(settings_of(short(epochs=6, out=tmp_path / "first")))
    assert first.accuracy_start is None
    told: list[float | None] = []
    for weights in (tmp_path / "first", tmp_path / "first" / "model.safetensors"):
        second = train(settings_of(short(weights=weights, lr=1e-9)), report=lambda p: told.append(p.accuracy_start))
        assert second.accuracy_start == second.as_json()["accuracy_start"] == first.accuracy
    assert set(told) == {first.accuracy}


def test_a_run_from_weights_of_a_resized_network_starts_with_its_widths(tmp_path: Path) -> None:
    budget = {"name": "budget", "macs": 0.6, "schedule": {"count": 1, "begin": 0.5, "end": 1.0}}
    first = train(settings_of(short(policy=budget, width=0.5, out=tmp_path / "first")))
    assert first.widths != first.widths_start
    second = train(settings_of(short(weights=tmp_path / "first", width=0.5)))
    assert second.widths_start == first.widths and second.accuracy_start == first.accuracy


def test_weights_of_another_network_are_refused_before_training(tmp_path: Path) -> None:
    torch.save(network(name="resnet14").state_dict(), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="36 in the file only"):
        train(settings_of(short(weights=tmp_path / "w.pt", out=tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_brought_does_not_grow(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "w.pt")
    budget = {"name": "budget", "macs": 1.5}
    with pytest.raises(WeightsError, match=r"macs=1\.5 asks for a larger network than the one whose weights"):
        train(settings_of(short(weights=tmp_path / "w.pt", policy=budget)))
    train(settings_of(short(policy=budget, limit=64)))


def test_the_command_starts_from_weights(tmp_path: Path) -> None:
    torch.save({"state_dict": network().state_dict()}, tmp_path / "w.pth")
    numbers = ["--width", "0.25", "--epochs", "1", "--threads", "1"]
    options = ["--model", "resnet8", *numbers, "--no-edit", "--device", "cpu", "--json"]
    weights = ["--weights", str(tmp_path / "w.pth"), "--normalize", "0.3/0.4"]
    found = program("train", *options, *weights, "--out", str(tmp_path / "run"))
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert 0 <= result["accuracy_start"] <= 1
    assert f"{result['accuracy_start']:.2%} with the weights of {tmp_path / 'w.pth'}" in found.stderr
    assert f"({result['accuracy_start']:.2%} before training)" in found.stderr
    extra = json.loads((tmp_path / "run" / "run.json").read_text())["extra"]
    assert extra["normalization"] == {"mean": [0.3], "std": [0.4]}
    (tmp_path / "half.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:500])
    refused = program("train", *options, "--weights", str(tmp_path / "half.pth"), "--out", str(tmp_path / "other"))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "not a whole file" in refused.stderr


def test_a_run_says_what_it_is_of(tmp_path: Path) -> None:
    first = train(settings_of(short(out=tmp_path / "run", epochs=3)))
    extra = read_run(tmp_path / "run").extra
    assert extra["classes"] == [str(n) for n in range(10)] and extra["input_shape"] == [1, 8, 8]
    assert extra["model"] == "resnet8" and extra["version"] == __version__
    opened = open_run(tmp_path / "run")
    assert opened.scaling.mean == pytest.approx(load("digits", limit=192).mean, rel=1e-12)
    images = load("digits", limit=192)
    found, loss = evaluate(opened.network, images.plain_batches("test", 500), torch.contiguous_format)
    assert (found, loss) == (first.accuracy, pytest.approx(first.loss, rel=1e-6))


def test_a_run_that_does_not_say_what_it_is_of_is_told(tmp_path: Path) -> None:
    save(tmp_path / "run", network())
    with pytest.raises(SavedError, match=r"does not say its settings: .*autowidth\.load_"):
        open_run(tmp_path / "run")


# ---- how pixels are scaled -------------------------------------------------------------------------------------------

SCALED: list[tuple[Any, Scaling]] = [
    ("imagenet", IMAGENET),
    ("0.485,0.456,0.406,0.229,0.224,0.225", IMAGENET),
    ("0.485 0.456 0.406 / 0.229 0.224 0.225", IMAGENET),
    ([[0.5], [0.2]], Scaling((0.5,), (0.2,))),
    ({"mean": [0.5], "std": [0.2]}, Scaling((0.5,), (0.2,))),
]


@pytest.mark.parametrize(("text", "scaling"), SCALED)
def test_a_scaling_is_read_and_survives_json(
    text: Any, scaling: Scaling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of({"normalize": text})
    assert settings.normalize == scaling
    assert settings_of(json.loads(settings.model_dump_json())) == settings
    (tmp_path / "run.json").write_text(json.dumps({"normalize": text}))
    assert settings_from({}, config=tmp_path / "run.json").normalize == scaling
    if isinstance(text, str):
        monkeypatch.setenv("AUTOWIDTH_NORMALIZE", text)
        assert settings_from({}).normalize == scaling


@pytest.mark.parametrize("text", ["imagenut", "1,2,3", "", "0.5/0", "0.5/-1", "nan/1", [[0.5], [0.2, 0.1]], 3])
def test_what_is_no_scaling_is_refused(text: Any) -> None:
    with pytest.raises(SettingsError, match="'normalize"):
        settings_of({"normalize": text})


def test_images_are_scaled_as_asked() -> None:
    plain = load_images(settings_of({"data": "digits"}))
    asked = load_images(settings_of({"data": "digits", "normalize": "0.5/0.25"}))
    (x, _), (y, _) = (next(iter(images.plain_batches("test", 5))) for images in (plain, asked))
    torch.testing.assert_close(y * 0.25 + 0.5, x * plain.std[0] + plain.mean[0])
    with pytest.raises(DataError, match="normalize has 3 channels, images of digits have 1"):
        load_images(settings_of({"data": "digits", "normalize": "imagenet"}))


# ---- the published files ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(PUBLISHED is None, reason="PUBLISHED_CIFAR10 names no folder")
@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.9173), (32, 0.9263), (44, 0.9310), (56, 0.9339)])
def test_published_files_have_their_published_accuracy(depth: int, accuracy: float) -> None:
    folder = Path(PUBLISHED or "")
    model = build(f"resnet{depth}-padding")
    load_weights_(model, folder / "pretrained-cifar10" / f"resnet{depth}.safetensors")
    images = load(f"cifar10:{folder / 'cifar10-raw'}")
    found, _ = evaluate(model, scaled_by(images, IMAGENET).plain_batches("test", 500), torch.contiguous_format)
    assert round(found, 4) == accuracy
