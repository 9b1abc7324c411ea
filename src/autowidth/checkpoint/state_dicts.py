"""State dicts with other widths, as other tools leave them: a model takes their shapes, or hears what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.checkpoint.errors import CheckpointError
from autowidth.checkpoint.fitting import Shown, misfits, plan_for
from autowidth.checkpoint.saving import take_over_
from autowidth.trace import Inputs, trace

LISTED = 8
"""Tensors of each kind that an error lists; the others are counted."""

WHAT, REMEDY = "the state dict", "build the model as the network was built before its widths were changed"


def load_state_dict_(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    example_inputs: Inputs,
    widths: Mapping[str, int] | None = None,
) -> ChannelMap:
    """Gives a model the widths and the content of a state dict that has other widths; returns its channel map.

    For what another tool has made of a network of the same class: the model is built as that network was at first,
    traced with `example_inputs`, resized to the widths that the shapes show, and loaded strictly. Parameters stay the
    same objects. Where shapes leave a choice, because one layer writes two channel groups that nothing else tells
    apart, `widths` (channel group name -> width) decides.

    Raises CheckpointError with everything that does not fit: names, dtypes, shapes that no widths give. Raises
    TraceError where the model does not run on the example inputs. The model is then unchanged.
    """
    state = dict(state_dict)
    _refuse(model, _unlike(model, state))
    channel_map = trace(model, example_inputs)
    shown = Shown(
        what=WHAT, where="in it", shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        widths=widths or {}, decide="pass widths={name: width}",
        remedy=REMEDY,
    )  # fmt: skip
    for name in shown.widths:
        channel_map.group(name)  # raises for one that is none
    _refuse(model, {"with shapes that no widths give": _described(misfits(shown, channel_map), state, channel_map)})
    return take_over_(model, channel_map, plan_for(shown, channel_map), state, what=WHAT)


def _unlike(model: nn.Module, state: Mapping[str, object]) -> dict[str, list[str]]:
    """What is wrong -> the tensors with which it is, as far as it can be told without a trace."""
    live = model.state_dict(keep_vars=True)
    both = [name for name in live if name in state]
    usable = [name for name in both if isinstance(state[name], Tensor) and isinstance(live[name], Tensor)]
    there = {name: tensor for name in usable if isinstance(tensor := state[name], Tensor)}
    dense = [name for name in usable if not there[name].is_meta and there[name].layout is torch.strided]
    return {
        "missing in it": [name for name in live if name not in state],
        "only in it": [name for name in state if name not in live],
        "that are no dense tensors with content": [name for name in both if name not in dense],
        "of another dtype": [
            f"{name} is {there[name].dtype} in it and {live[name].dtype} in the model"
            for name in dense
            if there[name].dtype != live[name].dtype
        ],
        "of another number of dims": [
            f"{name} is {tuple(there[name].shape)} in it and {tuple(live[name].shape)} in the model"
            for name in dense
            if there[name].dim() != live[name].dim()
        ],
        "that differ, but are tied in the model": _torn(live, {name: there[name] for name in dense}),
    }


def _torn(live: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> list[str]:
    """Tensors that are one in the model, and not equal in the state dict."""
    owners: dict[int, str] = {}
    pairs = [(owners.setdefault(id(live[name]), name), name) for name in there]
    return [f"{first} and {name}" for first, name in pairs if not torch.equal(there[first], there[name])]


def _described(names: Iterable[str], state: Mapping[str, Tensor], channel_map: ChannelMap) -> list[str]:
    """Name, shape there, shape here, and why the latter cannot change."""
    reasons = {frozen.axis.name: frozen.reason for frozen in channel_map.frozen}
    return [
        f"{name} is {tuple(state[name].shape)} in it and {channel_map.shapes[name]} in the model"
        + (f" (frozen there: {reasons[name]})" if name in reasons else "")
        for name in names
    ]


def _refuse(model: nn.Module, found: Mapping[str, list[str]]) -> None:
    """Raises CheckpointError if anything was found."""
    parts = [f"{len(names)} {what}: {_listed(names)}" for what, names in found.items() if names]
    if parts:
        raise CheckpointError(f"{WHAT} does not fit {type(model).__name__}: {'; '.join(parts)}. The remedy: {REMEDY}")


def _listed(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
