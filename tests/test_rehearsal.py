"""Rehearsal freezes what would have failed, and nothing else; parameters that do not train keep their widths."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap, IndexMap, ResizePlan
from autowidth.surgery import apply_
from autowidth.trace import keep_frozen_parameters, trace
from nets import NETS, Inputs, conv, example, run

# ---- rehearsal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.before is not None])
def test_what_rehearsal_freezes_would_have_failed(name: str) -> None:
    model, inputs, net = example(name)
    loose = trace(model, inputs, rehearse=False)
    failed = set(loose.widths) - set(net.groups)
    assert failed
    for group in failed:
        width = loose.widths[group]
        acts = [IndexMap.identity(width).inserting(n) for n in (1, 3)]
        acts += [IndexMap.removing([0], width)] if width > 1 else []
        assert not all(survives(model, inputs, loose, {group: act}) for act in acts), group


def survives(model: nn.Module, inputs: Inputs, channel_map: ChannelMap, plan: ResizePlan) -> bool:
    """Whether the network runs after the plan and its channels are where the plan puts them."""
    scratch = copy.deepcopy(model)
    resized = apply_(scratch, channel_map, plan)
    try:
        run(scratch, inputs)
    except (RuntimeError, ValueError):
        return False
    return resized.groups == trace(scratch, inputs, rehearse=False).groups


class Twins(nn.Module):
    """Two layers whose widths the code compares."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.fc = conv(3, 4), conv(3, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).mean((2, 3)), self.right(x).mean((2, 3))
        if left.size(1) != right.size(1):
            raise RuntimeError("the twins differ")
        out: Tensor = self.fc(torch.cat([left, right], 1))
        return out


def test_groups_that_survive_together_only_are_frozen() -> None:
    channel_map = trace(Twins(), torch.randn(2, 3, 8, 8))
    assert channel_map.groups == ()
    reasons = {f.reason for f in channel_map.frozen if f.axis.name == "left.weight" and f.axis.dim == 0}
    assert any("the twins differ (test_rehearsal.py:" in reason for reason in reasons), reasons


def test_a_group_that_fails_takes_no_other_with_it() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList([conv(3 if i == 0 else 4, 4) for i in range(6)])
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.body):
                x = layer(x).relu()
                if i == 3:
                    x = x.view(-1, 4, 8, 8)
            out: Tensor = self.fc(x.mean((2, 3)))
            return out

    widths = trace(Mixed(), torch.randn(2, 3, 8, 8)).widths
    assert widths == {f"body.{i}": 4 for i in (0, 1, 2, 4, 5)}


# ---- parameters that do not train ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("still", "kept"),
    [
        (["conv1.weight"], {"conv1"}),
        (["norm1.bias"], {"conv1"}),
        (["conv2.weight"], {"conv1", "conv2"}),  # reads the one and writes the other
        (["fc.bias"], set()),
        ([], set()),
    ],
)
def test_groups_keep_their_widths_where_parameters_do_not_train(still: list[str], kept: set[str]) -> None:
    model, x, _ = example("Plain")
    before = trace(model, x)
    for name in still:
        model.get_parameter(name).requires_grad_(False)
    after = keep_frozen_parameters(before, model)
    assert set(before.widths) - set(after.widths) == kept
    new = [f for f in after.frozen if f not in before.frozen]
    assert {f.axis for f in new} == {axis for name in kept for axis in before.group(name).axes}
    assert {f.reason for f in new} <= {"its parameters do not train (requires_grad=False)"}
    if kept:
        assert len(new) > 0
    else:
        assert after == before
    frozen = {name: model.get_parameter(name).detach().clone() for name in still}
    if after.groups:
        resize = {g.name: IndexMap.removing([0], g.width).inserting(2) for g in after.groups}
        apply_(model, after, resize)
        run(model, x)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


def test_groups_with_buffers_that_never_train_are_resized() -> None:
    model, x, _ = example("Blur")
    channel_map = trace(model, x)
    assert any(axis.name in dict(model.named_buffers()) for group in channel_map.groups for axis in group.axes)
    assert keep_frozen_parameters(channel_map, model) is channel_map
