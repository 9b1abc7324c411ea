"""What is measured is measured: networks in turns, layers by their names, widths that are really rounded."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autowidth.lab.measuring import FINAL, FULL, START, measure_run
from autowidth.lab.models import build
from autowidth.lab.result import Result
from autowidth.measure import MeasureError, layer_macs, rounded_copy, time_layers, time_side_by_side
from autowidth.trace import trace
from small_run import small_run
from test_cli import called

IMAGE = torch.zeros(2, 1, 8, 8)


class Waiting(nn.Module):
    """Takes so many milliseconds a call, and notes who was called."""

    def __init__(self, milliseconds: float, calls: list[float]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.milliseconds, self.calls = milliseconds, calls

    def __deepcopy__(self, memo: Any) -> Waiting:
        return self  # so that the notes stay the same

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.milliseconds)
        time.sleep(self.milliseconds / 1000)
        return self.layer(x)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return small_run(tmp_path_factory.mktemp("runs") / "run")


def test_networks_are_timed_in_turns_and_their_times_are_right() -> None:
    calls: list[float] = []
    networks = {"slow": Waiting(30, calls), "quick": Waiting(21, calls)}
    slow, quick = time_side_by_side(networks, torch.zeros(1, 4), batches=(3,), rounds=4)
    assert calls[4:] == [30, 21, 21, 30, 30, 21, 21, 30]  # after two calls each that prepare
    for found, wanted in ((slow, 30), (quick, 21)):
        assert wanted <= found.fastest <= found.quartiles[0] <= found.median <= found.quartiles[1]
        assert found.fastest < wanted + 30 and found.processor < found.median  # who sleeps does not work
        assert found.per_second == pytest.approx(3000 / found.median)
    assert (slow.network, slow.runtime, slow.batch) == ("slow", "eager", 3)


def test_threads_are_as_before_and_mistakes_are_said() -> None:
    before = torch.get_num_threads()
    time_side_by_side({"one": nn.Linear(4, 4)}, torch.zeros(1, 4), batches=(1,), rounds=1, threads=2)
    assert torch.get_num_threads() == before
    for given, message in (
        ({"networks": {}}, "0 networks"),
        ({"batches": (0,)}, r"batches \[0\]"),
        ({"rounds": 0}, "0 rounds"),
    ):
        with pytest.raises(MeasureError, match=message):
            time_side_by_side(**{"networks": {"one": nn.Linear(4, 4)}, "example": torch.zeros(1, 4), **given})  # type: ignore[arg-type]
    with pytest.raises(MeasureError, match="no layers that could be timed"):
        time_layers({"one": nn.Linear(4, 4)}, torch.zeros(1, 4), runtime="compiled")


def test_layers_are_timed_under_their_names() -> None:
    calls: list[float] = []
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4), Waiting(20, calls))
    found = time_layers({"net": body}, IMAGE, runtime="eager", batch=2, rounds=3)
    assert [layer.layer for layer in found.layers] == ["0", "3", "4.layer"]
    assert all(0 < layer.milliseconds["net"] < 15 for layer in found.layers)
    assert found.rest["net"] > 19  # the waiting is no layer
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in body.modules())


@pytest.mark.parametrize(("multiple", "up"), [(8, False), (16, True), (3, False)])
def test_widths_are_really_rounded(run: Result, multiple: int, up: bool) -> None:
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    made, found = rounded_copy(run.network, run.channel_map, multiple, up=up)
    for name, width in found.widths.items():
        assert width % multiple == 0
        assert (
            0 <= width - run.widths[name] < multiple
            if up
            else abs(width - run.widths[name]) <= max(multiple / 2, multiple - 1)
        )
    assert trace(made, IMAGE).widths == found.widths
    made(IMAGE)
    assert all(torch.equal(value, before[name]) for name, value in run.network.state_dict().items())
    if up:  # what is added has no effect yet
        torch.testing.assert_close(made.eval()(IMAGE), run.network.eval()(IMAGE))


def test_what_must_be_resized_by_whole_groups_keeps_its_width() -> None:
    network = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=3), nn.Conv2d(12, 4, 1)).eval()
    channel_map = trace(network, IMAGE)
    made, found = rounded_copy(network, channel_map, 8)
    made(IMAGE)
    assert {k: v.shape for k, v in made.state_dict().items() if k in found.shapes} == {
        k: torch.Size(v) for k, v in found.shapes.items() if k in made.state_dict()
    }


def test_macs_of_layers_are_those_of_the_network() -> None:
    channel_map = trace(build("resnet8", in_channels=1), IMAGE)
    macs = layer_macs(channel_map)
    assert macs["stem.conv"] == 8 * 8 * 9 * 16 and macs["head.linear"] == 640


def test_the_command_measures_a_run(
    run: Result, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rounds", "2", "--batch", "1,4", "--round", "8", "--threads", "1"]
    assert called("measure", run.out or "", *options, "--json", monkeypatch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    names = [START, FINAL, "rounded to 8"]
    assert [(t["runtime"], t["batch"], t["network"]) for t in found["timings"]] == [
        (runtime, batch, name) for runtime in ("eager", "onnx") for batch in (1, 4) for name in names
    ]
    assert (found["macs"][START], found["macs"][FINAL]) == (run.macs_start, run.macs)
    assert found["threads"] == 1 and found["layers_in"] == "onnx" and found["layers_batch"] == 4
    layers = {layer["layer"]: layer for layer in found["layers"]}
    convolutions = {name for name, m in run.network.named_modules() if isinstance(m, nn.Conv2d)}
    assert layers.keys() >= convolutions  # every layer is found again in what ONNX Runtime made of it
    assert sum(layer["macs"] for layer in layers.values()) <= run.macs
    for layer in layers.values():
        promised = layer["start"] * layer["macs"] / layer["macs_start"]
        assert layer["excess"] == pytest.approx(layer["final"] - promised)
    assert list(found["latency_ms"]) == names and min(found["latency_ms"].values()) > 0
    assert called("measure", run.out or "", *options, "--runtime", "eager", monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert "rounded to 8" in text and "--latency-ms that would be met" in text
    assert FULL.split()[0] in text  # headings wrap


MISTAKES = [
    (["--runtime", "eager,fast"], "'fast' is none of eager, compiled, onnx"),
    (["--batch", "1,many"], "give numbers of images"),
    (["--batch", "0"], "give numbers of images"),
]


def test_mistakes_get_one_sentence(
    run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in [*[([run.out or "", *a], m) for a, m in MISTAKES], ([str(tmp_path)], "no run at")]:
        assert called("measure", *arguments, monkeypatch=monkeypatch) == 2
        told = capsys.readouterr()
        assert (told.out, told.err.count("\n")) == ("", 1) and message in told.err


@pytest.mark.slow
def test_a_compiled_network_is_timed_too(run: Result) -> None:
    found = measure_run(Path(run.out or ""), runtimes=("compiled",), batches=(2,), rounds=2, threads=1)
    assert [(t.network, t.runtime) for t in found.timings] == [(START, "compiled"), (FINAL, "compiled")]
    assert found.layers_in == "eager"
