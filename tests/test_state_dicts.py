"""State dicts whose widths another tool has changed: a fresh network takes them over, or lists what does not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from autowidth import load_state_dict_
from autowidth.checkpoint import CheckpointError
from autowidth.checkpoint.fitting import Shown, misfits
from autowidth.lab.models import build
from test_checkpoint import ACTS, INPUT, NETS, Plain, Tied, assert_untouched, everything, fresh, outputs, resized
from test_checkpoint import woven as woven_map

PICTURES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def pruned(network: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    """The network after Torch-Pruning has taken this share of the filters, by its ranking of the whole network."""
    network = copy.deepcopy(network).eval()
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        network, example, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=ratio,
        global_pruning=True, max_pruning_ratio=0.8, ignored_layers=[last],
    )  # fmt: skip
    pruner.step()
    return network


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "densenet22", "mobilenetv2"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of the other tool
def test_a_network_that_torch_pruning_has_made_smaller(name: str) -> None:
    torch.manual_seed(0)
    theirs = pruned(build(name), PICTURES, 0.4)
    torch.manual_seed(1)
    ours = build(name).eval()
    dense = sum(p.numel() for p in ours.parameters())
    channel_map = load_state_dict_(ours, theirs.state_dict(), example_inputs=PICTURES)
    assert sum(p.numel() for p in ours.parameters()) < 0.9 * dense
    assert len(set(channel_map.widths.values())) > 2
    with torch.no_grad():
        assert torch.equal(ours(PICTURES), theirs(PICTURES))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("make", NETS)
def test_a_fresh_network_takes_the_shapes_of_a_state_dict(make: Callable[[], nn.Module], act: str) -> None:
    theirs, their_map = resized(make, ACTS[act])
    ours = fresh(make, seed=4)
    objects = {name: id(p) for name, p in ours.named_parameters()}
    known = {"widths": their_map.widths} if make.__name__ == "Split" else {}
    channel_map = load_state_dict_(ours, theirs.state_dict(), example_inputs=INPUT, **known)
    assert channel_map.widths == their_map.widths
    assert torch.equal(outputs(ours), outputs(theirs))
    assert {name: id(p) for name, p in ours.named_parameters()} == objects


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The state dict of a network of other widths with these tensors in it, or without them."""
    state = fresh(lambda: Plain(9, 4)).state_dict() | {name.replace("__", "."): t for name, t in tensors.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


MISFITS: dict[str, tuple[dict[str, Tensor], str]] = {
    "missing and more": (
        changed(head__bias=None, a__1__bias=None, other=torch.ones(1)),
        r"2 missing in it: a\.1\.bias, head\.bias; 1 only in it: other\. The remedy: build",
    ),
    "two shapes": (
        changed(a__0__weight=torch.ones(9, 3, 5, 3), head__weight=torch.ones(7, 4)),
        r"2 with shapes that no widths give: a\.0\.weight is \(9, 3, 5, 3\) in it and \(6, 3, 3, 3\) in the model.*"
        r"head\.weight is \(7, 4\) in it",
    ),
    "one length among many": (
        changed(a__1__running_var=torch.ones(8)),
        r"1 with shapes that no widths give: a\.1\.running_var is \(8,\) in it and \(6,\) in the model",
    ),
    "dtype": (changed(head__bias=torch.ones(4).half()), r"1 of another dtype: head\.bias is torch\.float16 in it"),
    "dims": (changed(head__bias=torch.ones(4, 1)), r"1 of another number of dims: head\.bias is \(4, 1\) in it"),
    "no tensor": (changed(head__bias=[1.0]), r"1 that are no dense tensors with content: head\.bias"),
    "on meta": (changed(head__bias=torch.ones(4, device="meta")), r"no dense tensors with content: head\.bias"),
    "no channels": (
        {n: t[:0] if n.startswith("a.1") and t.dim() else t for n, t in changed(a__0__weight=torch.ones(0, 3, 3, 3),
         b__0__weight=torch.ones(4, 0, 3, 3)).items()},
        r"'a\.0\.weight' has shape \(0, 3, 3, 3\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_listed_and_nothing_is_changed(case: str) -> None:
    state, message = MISFITS[case]
    model = fresh(Plain)
    before = everything(model)
    with pytest.raises(CheckpointError, match=message):
        load_state_dict_(model, state, example_inputs=INPUT)
    assert_untouched(model, before)


def test_tensors_that_are_one_in_the_model_must_be_equal() -> None:
    state = fresh(Tied).state_dict()
    state["twin.weight"] = state["twin.weight"] + 1
    with pytest.raises(CheckpointError, match=r"tied in the model: head\.weight and twin\.weight"):
        load_state_dict_(fresh(Tied), state, example_inputs=INPUT)


def test_the_worst_equation_goes_first() -> None:
    here = woven_map(p=4, q=4, r=4, s=4)
    shapes = {**here.shapes, "a": (11,)}
    assert misfits(Shown(what="it", shapes=here.shapes), here) == []
    assert len(misfits(Shown(what="it", shapes=shapes), here)) == 1
