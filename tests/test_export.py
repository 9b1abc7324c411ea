"""Files that run elsewhere compute what the network computes, or are not written."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from autowidth.channels import IndexMap
from autowidth.checkpoint import read_run, save
from autowidth.export import (
    DifferentError,
    ExportError,
    OutputError,
    Scaled,
    compared,
    export_onnx,
    export_program,
)
from autowidth.extras import MissingExtraError
from autowidth.lab.data import digits
from autowidth.lab.models import MODELS, build, spec
from autowidth.lab.result import Result
from autowidth.lab.saved import open_run
from autowidth.surgery import apply_
from autowidth.trace import trace
from small_run import small_run
from test_cli import called, program
from zoo.subjects import SUBJECTS


class Plain(nn.Module):
    """Two convolutions with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Branching(Plain):
    """What it does depends on values, which no exporter follows."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if x.sum() > 0:
            x = 2 * x
        return self.head(x)


class Decomposing(Plain):
    """An op that torch.export keeps, and ONNX has not."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return torch.linalg.svdvals(x[:, :, None] * x[:, None])


class TwoBatches(Plain):
    """The batch is written into the code."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).view(2, 6))


class Drawing(Plain):
    """Gives something else at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)) + torch.rand_like(x[:, 0, 0, :4])


def resized(model: nn.Module, inputs: Tensor, seed: int = 0) -> nn.Module:
    """The model in evaluation mode with norms that have seen something, each group narrowed by about a third."""
    torch.manual_seed(seed)
    with torch.no_grad():
        model.train()(inputs)
    channel_map = trace(model, inputs)
    plan = {}
    for number, group in enumerate(channel_map.groups):
        width = max(1, group.width * (5 + number % 4) // 10)
        if width < group.width:
            plan[group.name] = IndexMap.removing(range(width, group.width), group.width)
    for name, index_map in plan.items():  # one by one: what must go by whole groups of a convolution stays
        try:
            channel_map = apply_(model, channel_map, {name: index_map})
        except ValueError:
            continue
    assert channel_map.widths != {name: index_map.size for name, index_map in plan.items()}
    return model.eval()


# ---- the library -----------------------------------------------------------------------------------------------------


def test_an_onnx_file_computes_what_the_resized_network_computes(tmp_path: Path) -> None:
    inputs = torch.randn(4, 3, 12, 12)
    network = resized(Plain(), inputs)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = export_onnx(
        network, tmp_path / "net.onnx", example_inputs=inputs[:1], real_inputs=[inputs, inputs[:3]],
        names=(["images"], ["scores"]), metadata={"classes": '["a", "b"]'},
    )  # fmt: skip
    assert [(check.inputs, check.samples) for check in found.checks] == [("random", 12), ("real", 7)]
    assert all(check.difference < 1e-5 and check.agreement == 1 for check in found.checks)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 4):
        (scores,) = session.run(["scores"], {"images": inputs[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), network(inputs[:count]).detach(), rtol=1e-4, atol=1e-6)
    assert session.get_modelmeta().custom_metadata_map["classes"] == '["a", "b"]'
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert found.size == (tmp_path / "net.onnx").stat().st_size
    assert not network.training and all(
        torch.equal(value, before[name]) for name, value in network.state_dict().items()
    )
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_program_computes_it_without_the_class(tmp_path: Path) -> None:
    inputs = torch.randn(4, 3, 12, 12)
    network = resized(Plain(), inputs)
    found = export_program(network, tmp_path / "net.pt2", example_inputs=inputs, metadata={"classes": "[1]"})
    texts = {"classes": ""}
    module = torch.export.load(tmp_path / "net.pt2", extra_files=texts).module()
    for count in (1, 4):
        torch.testing.assert_close(module(inputs[:count]), network(inputs[:count]))
    assert texts == {"classes": "[1]"} and found.checks[0].difference < 1e-5


@pytest.mark.parametrize(
    ("model", "export", "reason"),
    [
        (Branching(), export_onnx, r"ONNX cannot express Branching: .*\(at test_export\.py, line \d+: if x\.sum"),
        (Branching(), export_program, r"torch\.export cannot express Branching: .*if x\.sum\(\) > 0"),
        (Decomposing(), export_onnx, r"ONNX cannot express Decomposing: No ONNX function found.*_linalg_svd"),
        (TwoBatches(), export_program, r"cannot express TwoBatches: .* specialized it to be a constant \(2\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_and_nothing_is_left(
    model: nn.Module, export: type, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=reason):
        export(model, tmp_path / "net", example_inputs=torch.randn(2, 3, 12, 12))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_text("old")
    with pytest.raises(DifferentError, match=r"12 random inputs the file of Drawing differs .* allowed are 1\.0e-04"):
        export_program(Drawing(), tmp_path / "net.pt2", example_inputs=torch.randn(2, 3, 12, 12), force=True)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("net.pt2", "old")]


def test_the_difference_is_that_of_the_worst_sample_and_nan_is_infinite() -> None:
    network = nn.Identity()
    inputs = torch.tensor([[1.0, -2.0], [100.0, 50.0]])
    found = compared("real", network, lambda given: [given[0] + torch.tensor([[0.0, 0.5], [1.0, 0.0]])], [(inputs,)])
    assert found.difference == pytest.approx(0.25) and found.agreement == 1
    for wrong in (math.nan, math.inf):
        broken = compared("real", network, partial(filled, value=wrong), [(inputs,)])
        assert broken.difference == math.inf


def filled(given: tuple[Tensor, ...], *, value: float) -> list[Tensor]:
    return [torch.full_like(given[0], value)]


def test_outputs_that_cannot_be_written_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    for path, message in (
        (tmp_path / "there", "is there already"),
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "net.onnx", "there is no folder"),
    ):
        with pytest.raises(OutputError, match=message):
            export_program(Plain(), path, example_inputs=torch.randn(2, 3, 12, 12))
    with pytest.raises(ExportError, match="give a tensor"):
        export_program(Plain(), tmp_path / "new", example_inputs=torch.tensor(1.0))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("there", "old")]


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"\(onnxruntime\): pip install 'autowidth\[onnx\]'"):
        export_onnx(Plain(), tmp_path / "net.onnx", example_inputs=torch.randn(2, 3, 12, 12))
    assert list(tmp_path.iterdir()) == []


def test_scaled_networks_take_pixels() -> None:
    pixels = torch.rand(2, 3, 12, 12)
    network, mean, std = Plain().eval(), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    by_hand = torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(Scaled(network, mean, std)(pixels), network(by_hand))


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return small_run(tmp_path_factory.mktemp("runs") / "run")


def test_the_command_writes_files_that_take_pixels_and_files_that_take_scaled_ones(
    run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside, beside = tmp_path / "inside.onnx", tmp_path / "beside.pt2"
    told = program("export", run.out or "", "--onnx", str(inside))
    assert (told.returncode, told.stderr) == (0, "")
    assert "64 real images: differs from PyTorch by" in told.stdout and "the same class for 100.0%" in told.stdout
    options = ["--torch-export", str(beside), "--normalization", "beside", "--classes", "beside", "--json"]
    assert called("export", run.out or "", *options, monkeypatch=monkeypatch) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file["path"] == str(beside) and max(check["difference"] for check in file["checks"]) < 1e-5
    about = json.loads((tmp_path / "beside.pt2.json").read_text())
    assert about["classes"] == [str(number) for number in range(10)]

    opened, pixels = open_run(run.out or ""), digits().test.images[:5]
    scores = opened.network((pixels - opened.scaling.mean[0]) / opened.scaling.std[0]).detach()
    scaled = (pixels - torch.tensor(about["normalization"]["mean"])) / torch.tensor(about["normalization"]["std"])
    torch.testing.assert_close(torch.export.load(beside).module()(scaled), scores, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(inside, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(["scores"], {"images": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(theirs), scores, rtol=1e-4, atol=1e-5)
    kept = {entry.key: entry.value for entry in onnx.load(inside).metadata_props}
    assert json.loads(kept["classes"]) == about["classes"] and kept["pixels"] == "from 0 to 1"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["beside.pt2", "beside.pt2.json", "inside.onnx"]


def test_mistakes_get_one_sentence_and_leave_nothing(
    run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there, nowhere = tmp_path / "there.onnx", tmp_path / "new.pt2"
    there.write_text("old")
    gone = tmp_path / "gone"
    extra = read_run(run.out or "").extra
    extra["settings"]["model"] = "net_that_is_gone:Net"
    save(gone, run.network, channel_map=run.channel_map, extra=extra)
    for arguments, message in (
        ([run.out or "", "--onnx", str(there)], "is there already"),
        ([run.out or ""], "give --onnx FILE, --torch-export FILE, or both"),
        ([str(gone), "--torch-export", str(nowhere)], "no module is named 'net_that_is_gone'"),
        ([run.out or "", "--torch-export", str(nowhere), "--data", "folder:nowhere"], "nowhere"),
        ([run.out or "", "--onnx", str(there), "--torch-export", str(there), "--force"], "name two files"),
    ):
        assert called("export", *arguments, monkeypatch=monkeypatch) == 2
        done = capsys.readouterr()
        assert (done.out, done.err.count("\n")) == ("", 1), done.err
        assert message in done.err
    assert there.read_text() == "old" and not nowhere.exists()


# ---- every network ---------------------------------------------------------------------------------------------------

TEN = (
    "alexnet", "vgg11_bn", "resnet18", "resnext50_32x4d", "densenet121", "googlenet", "mobilenet_v2",
    "efficientnet_b0", "shufflenet_v2_x1_0", "convnext_tiny",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*MODELS, "resnet20", "resnet56"}))
def test_every_network_of_the_laboratory_is_the_same_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    inputs = torch.randn(2, *spec(name).input_shape)
    network = resized(build(name), inputs)
    found = export_onnx(network, tmp_path / "net.onnx", example_inputs=inputs)
    print(f"{name}: {found.checks[0].difference:.1e}")
    assert found.checks[0].difference < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", TEN)
def test_ten_networks_of_torchvision_are_the_same_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: pip install -c constraints.txt -e '.[zoo]'")
    pixels = 64 if name not in ("alexnet", "vgg11_bn") else 224
    inputs = torch.randn(2, 3, pixels, pixels)
    network = resized(SUBJECTS[name].build(), inputs)
    found = export_onnx(network, tmp_path / "net.onnx", example_inputs=inputs)
    print(f"{name}: {found.checks[0].difference:.1e}")
    assert found.checks[0].difference < 1e-4
