"""Costs from the channel map equal what is counted on the real network, before and after resizes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autowidth.channels import IndexMap
from autowidth.cost import Cost, count_macs, macs_cost, params_cost
from autowidth.engine import resize_
from autowidth.lab import models
from autowidth.trace import trace
from nets import NETS, Inputs, conv, example

LAB = {"resnet20": 0.25, "resnet20-padding": 0.25, "vgg8": 0.125, "densenet40": 0.25, "mobilenetv2": 0.1}
SMALL = ("resnet8", "resnet8-padding", "vgg8")
RESIZABLE = [name for name, net in NETS.items() if net.groups and name != "Auxiliary"]


def lab(name: str, width: float, pixels: int = 8) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.build(name, width=width), torch.zeros(2, 3, pixels, pixels)


def costs(model: nn.Module, inputs: Inputs) -> tuple[Cost, Cost, Mapping[str, int]]:
    channel_map = trace(model, inputs)
    names = [name for name, _ in model.named_parameters()]
    return macs_cost(channel_map), params_cost(channel_map, names), channel_map.widths


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def narrowed(model: nn.Module, name: str, width: int, inputs: Inputs) -> nn.Module:
    """A copy of the model with the first channel of one group removed."""
    scratch = copy.deepcopy(model)
    resize_(scratch, {name: IndexMap.removing([0], width)}, example_inputs=inputs)
    return scratch


# ---- the whole network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_costs_of_nets_equal_what_is_counted(name: str) -> None:
    model, inputs, net = example(name)
    macs, parameters, widths = costs(model, inputs)
    if name != "Auxiliary":  # its side head works in training only, what is counted is evaluation
        assert macs.at(widths) == count_macs(model, inputs) - net.unused
    assert parameters.at(widths) == params(model)


@pytest.mark.parametrize("name", LAB)
def test_costs_of_lab_models_equal_what_is_counted(name: str) -> None:
    model, x = lab(name, LAB[name])
    macs, parameters, widths = costs(model, x)
    assert macs.at(widths) == count_macs(model, x)
    assert parameters.at(widths) == params(model)


@pytest.mark.slow
def test_costs_of_googlenet_equal_what_is_counted() -> None:
    model, x = lab("googlenet", 0.125)
    macs, _, widths = costs(model, x)
    assert macs.at(widths) == count_macs(model, x)


def test_one_layer_by_hand() -> None:
    model = nn.Sequential(conv(3, 4, bias=False), nn.ReLU(), conv(4, 5, stride=2, bias=False))
    x = torch.zeros(7, 3, 8, 6)
    macs, parameters, widths = costs(model, x)
    assert widths == {"0": 4}
    assert macs.at({"0": 4}) == count_macs(model, x) == 8 * 6 * 9 * 3 * 4 + 4 * 3 * 9 * 4 * 5
    assert macs.of_channel({"0": 4}).tolist() == [8 * 6 * 9 * 3 + 4 * 3 * 9 * 5]
    assert parameters.at({"0": 10}) == 9 * 3 * 10 + 9 * 10 * 5


# ---- one channel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESIZABLE)
def test_the_cost_of_a_channel_is_what_its_removal_saves(name: str) -> None:
    model, inputs, net = example(name)
    check_channels(model, inputs, all_macs=not net.elsewhere)


@pytest.mark.parametrize("name", SMALL)
def test_the_cost_of_a_channel_in_lab_models_is_what_its_removal_saves(name: str) -> None:
    check_channels(*lab(name, 0.25 if "resnet" in name else 0.0625))


def check_channels(model: nn.Module, inputs: Inputs, *, all_macs: bool = True) -> None:
    macs, parameters, widths = costs(model, inputs)
    before = count_macs(model, inputs), params(model)
    for group, of_macs, of_params in zip(
        macs.names, macs.of_channel(widths), parameters.of_channel(widths), strict=True
    ):
        if widths[group] > 1:
            scratch = narrowed(model, group, widths[group], inputs)
            assert not all_macs or before[0] - count_macs(scratch, inputs) == of_macs, group
            assert before[1] - params(scratch) == of_params, group


@pytest.mark.parametrize("name", [*RESIZABLE, *SMALL])
def test_costs_at_other_widths_equal_those_of_the_resized_network(name: str) -> None:
    model, inputs = example(name)[:2] if name in NETS else lab(name, 0.125)
    macs, parameters, widths = costs(model, inputs)
    unused, elsewhere = (NETS[name].unused, NETS[name].elsewhere) if name in NETS else (0, "")
    plan = {
        n: IndexMap.removing([0] if w > 2 and i % 2 else [], w).inserting(i % 3 + (not i % 2))
        for i, (n, w) in enumerate(widths.items())
    }
    resize_(model, plan, example_inputs=inputs)
    now = {n: m.width for n, m in plan.items()}
    again = costs(model, inputs)[0]
    assert again.names == macs.names
    assert parameters.at(now) == params(model)
    if not elsewhere:
        assert macs.at(now) == count_macs(model, inputs) - unused
        assert again.at(now) == macs.at(now)


@given(st.lists(st.integers(2, 50), min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_of_channel_is_an_exact_difference(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = tuple("abcd")
    cost = Cost(
        names,
        rng.integers(1, 9, 6).astype(float),
        rng.integers(0, 5, (6, 2)).astype(float),
        rng.integers(0, 3, (6, 2, 4)).astype(float),
    )
    widths = dict(zip(names, sizes, strict=True))
    for name, saved in zip(names, cost.of_channel(widths), strict=True):
        assert saved == cost.at(widths) - cost.at({**widths, name: widths[name] - 1})
    assert cost.at(cost.vector(widths)) == cost.at(widths)


# ---- counting --------------------------------------------------------------------------------------------------------


def test_counting_does_not_depend_on_the_batch_and_leaves_the_modes_alone() -> None:
    model, x, _ = example("Dropout")
    assert isinstance(x, Tensor)
    model.train()
    model.get_submodule("drop").eval()
    modes = [m.training for m in model.modules()]
    assert count_macs(model, x) == count_macs(model, x[:1]) == count_macs(model, (x,)) == count_macs(model, {"x": x})
    assert [m.training for m in model.modules()] == modes


def test_modes_come_back_after_a_failure() -> None:
    model = example("Plain").model.train()
    with pytest.raises(RuntimeError):
        count_macs(model, torch.zeros(1, 4, 8, 8))
    assert model.training


class Tokens(nn.Module):
    """Passes a view of a parameter to a module, as networks with a class token do."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.fixed, self.head = nn.Parameter(torch.ones(1, 5)), nn.Parameter(torch.ones(())), conv(3, 4)
        self.mix = nn.Linear(5, 2)
        self.fixed.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).mean() + self.mix(self.token.expand(2, -1))


def test_a_view_of_a_parameter_may_be_passed_to_a_module() -> None:
    model = Tokens()
    assert count_macs(model, torch.zeros(2, 3, 8, 8)) == 64 * 27 * 4 + 5 * 2
    assert [p.requires_grad for p in (model.token, model.fixed)] == [True, False]


def test_inputs_of_no_known_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="is a int: pass a tensor, a tuple or a mapping"):
        count_macs(example("Plain").model, 3)


def test_a_layer_used_twice_costs_twice() -> None:
    model, x, _ = example("CalledTwice")
    channel_map = trace(model, x)
    uses = [use.macs_per_weight for use in channel_map.uses if use.name == "body.weight"]
    assert uses == [64.0, 64.0]
    assert macs_cost(channel_map).at({"stem": 4}) == 64 * 9 * (3 * 4 + 2 * 4 * 4) + 4 * 3
