"""What a record says of layers: as wide and as dear as the network itself at any widths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from autowidth.channels import IndexMap
from autowidth.cost import macs_cost
from autowidth.history import History, HistoryError
from autowidth.lab.models import build
from autowidth.layers import Layer, layers_of
from autowidth.surgery import apply_
from autowidth.trace import trace


@pytest.mark.parametrize("name", ["resnet8", "densenet40", "mobilenetv2"])
def test_layers_are_as_wide_and_as_dear_as_the_resized_network(name: str) -> None:
    network = build(name, in_channels=3, width=0.25)
    channel_map = trace(network, torch.zeros(2, 3, 32, 32))
    layers = layers_of(channel_map)
    start = channel_map.widths
    plan = {
        group.name: IndexMap.removing({0}, group.width) if n % 2 else IndexMap.identity(group.width).inserting(3)
        for n, group in enumerate(channel_map.groups)
    }
    after = apply_(network, channel_map, plan)
    modules = dict(network.named_modules())
    for layer in layers:
        weight = modules[layer.name].weight
        assert isinstance(weight, nn.Parameter)
        assert layer.width(start, start) == layer.shape[0]
        assert layer.width(start, after.widths) == weight.shape[0]
        assert layer.length(1, start, after.widths) == weight.shape[1]
    assert sum(layer.macs_at(start, start) for layer in layers) == pytest.approx(macs_cost(channel_map).at(start))
    expected = macs_cost(after).at(after.widths)
    assert sum(layer.macs_at(start, after.widths) for layer in layers) == pytest.approx(expected)
    assert [layer.name for layer in layers if layer.frozen] == [layer.name for layer in layers if not layer.groups]
    assert layers[-1].frozen == "model output"


def test_a_transposed_convolution_has_its_filters_on_the_other_dim() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ConvTranspose2d(5, 7, 2, stride=2), nn.Conv2d(7, 2, 1))
    layers = layers_of(trace(network, torch.zeros(1, 3, 4, 4)))
    assert [(layer.out, layer.shape[layer.out], layer.groups) for layer in layers] == [
        (0, 5, ("0",)), (1, 7, ("1",)), (0, 2, ()),
    ]  # fmt: skip


def test_a_history_keeps_the_layers(tmp_path: Path) -> None:
    channel_map = trace(build("resnet8", in_channels=1), torch.zeros(1, 1, 8, 8))
    history = History(channel_map.widths, path=tmp_path / "h", layers=layers_of(channel_map))
    assert History.read(tmp_path / "h").layers == history.layers != ()


@pytest.mark.parametrize(
    "layers", [3, [3], [{"name": "a"}], [Layer(name="a", shape=(3,), macs=1, axes={0: {"gone": 1}}).as_json()]]
)
def test_damaged_layers_are_refused_in_a_sentence(tmp_path: Path, layers: object) -> None:
    path = tmp_path / "h"
    path.write_text(json.dumps({"schema": 4, "widths_start": {"g": 3}, "layers": layers}) + "\n")
    with pytest.raises(HistoryError, match="line 1: "):
        History.read(path)
