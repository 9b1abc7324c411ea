"""Everything that one surgery touches, found and checked before the first write."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from autowidth.channels import ChannelMap
from autowidth.surgery.attributes import has_attributes, own_tensors
from autowidth.surgery.edits import Edits
from autowidth.surgery.optimizers import check_optimizers, held, states
from autowidth.surgery.refusals import StaleMapError, SurgeryError
from autowidth.unwrapping import body_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Everything that one surgery touches.

    tensors: the model's parameters and buffers that are resized, by name. copies: the same of each follower.
    modules: those, of model and followers, whose attributes say how many channels there are.
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    copies: tuple[Mapping[str, Tensor], ...]
    optimizers: tuple[Optimizer, ...]
    modules: tuple[nn.Module, ...]


def checked_targets(
    model: nn.Module,
    channel_map: ChannelMap,
    edits: Mapping[str, Edits],
    optimizers: tuple[Optimizer, ...],
    followers: tuple[nn.Module, ...],
) -> Targets:
    """Finds what the edits touch. Raises SurgeryError, StaleMapError or UnsupportedOptimizerError."""
    bodies = [model, *map(body_of, followers)]
    found: list[dict[str, Tensor]] = []
    taken: set[int] = set()
    for place, body in enumerate(bodies):
        where = "the model" if place == 0 else f"follower {place - 1} ({type(followers[place - 1]).__name__})"
        tensors = _checked_tensors(body, where, channel_map, edits)
        if not taken.isdisjoint(map(id, tensors.values())):
            raise SurgeryError(
                f"{where} holds the very parameters of the model or of another follower: pass copies only"
            )
        taken.update(map(id, tensors.values()))
        found.append(tensors)
    check_optimizers(optimizers)
    for optimizer in optimizers:
        _check_state(optimizer, found[0], edits)
    modules = tuple(
        module
        for body in bodies
        for module in body.modules()
        if has_attributes(module) and any(id(tensor) in taken for tensor in own_tensors(module))
    )
    for module in modules:
        _check_parts(module, found, edits)
    return Targets(model=model, tensors=found[0], copies=tuple(found[1:]), optimizers=optimizers, modules=modules)


def _checked_tensors(
    body: nn.Module, where: str, channel_map: ChannelMap, edits: Mapping[str, Edits]
) -> dict[str, Tensor]:
    """The tensors of `body` that the edits touch, by name. Raises StaleMapError or SurgeryError."""
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in body.modules()):
        raise SurgeryError(f"{where} is wrapped in DistributedDataParallel: resize its .module, then wrap it again")
    everything: dict[str, Tensor] = {**dict(body.named_parameters()), **dict(body.named_buffers())}
    tensors = {}
    for name in edits:
        tensor = everything.get(name)
        if tensor is None:
            close = ", ".join(difflib.get_close_matches(name, everything, n=3)) or "none"
            raise StaleMapError(f"{where} has no parameter or buffer {name!r}; close names: {close}; trace it again")
        if tuple(tensor.shape) != channel_map.shapes[name]:
            raise StaleMapError(
                f"{name!r} of {where} has shape {tuple(tensor.shape)}, but the channel map was made for "
                f"{channel_map.shapes[name]}: trace the network again"
            )
        if type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
            raise SurgeryError(
                f"{name!r} of {where} is a {type(tensor.data).__name__} with layout {tensor.layout}, and only plain "
                "dense tensors can be resized: resize before it is sharded or converted"
            )
        tensors[name] = tensor
    _check_memory(everything, tensors, where)
    return tensors


def _check_memory(everything: Mapping[str, Tensor], touched: Mapping[str, Tensor], where: str) -> None:
    """Raises SurgeryError where a touched tensor has the memory of another one: resizing would untie them unseen."""
    owners: dict[int, str] = {}
    for name, tensor in everything.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.numel() == 0:
            continue
        other = owners.setdefault(tensor.data_ptr(), name)
        if other != name and not touched.keys().isdisjoint((name, other)):
            raise SurgeryError(
                f"{other!r} and {name!r} of {where} share memory but are two objects, and a resize would untie them: "
                "tie them by assigning the same nn.Parameter to both"
            )


def _check_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], edits: Mapping[str, Edits]) -> None:
    """Raises SurgeryError, StaleMapError or UnsupportedOptimizerError."""
    kind = type(optimizer).__name__
    if held(optimizer).isdisjoint(id(tensors[name]) for name in edits):
        raise SurgeryError(
            f"optimizer {kind} holds none of the {len(edits)} tensors to be resized: pass the optimizer that trains "
            "this model, built from its own parameters"
        )
    for name in edits:
        for key, state, spec in states(optimizer, tensors[name]):
            expected = list(tensors[name].shape)
            if spec.collapsed is not None:
                expected[spec.collapsed] = 1
            if list(state.shape) != expected:
                raise StaleMapError(
                    f"state {key!r} of {kind} for {name!r} has shape {tuple(state.shape)}, expected {tuple(expected)}: "
                    "rebuild the optimizer or load the state that belongs to this model"
                )


def _check_parts(module: nn.Module, found: Sequence[Mapping[str, Tensor]], edits: Mapping[str, Edits]) -> None:
    """Raises SurgeryError where a conv or norm group would be torn apart."""
    if isinstance(module, _ConvNd):
        parts, what = module.groups, "conv"
    elif isinstance(module, nn.GroupNorm):
        parts, what = module.num_groups, "norm"
    else:
        return
    if parts == 1:
        return
    own = {id(tensor) for tensor in own_tensors(module)}
    for name, axis_edits in edits.items():
        tensor = next((tensors[name] for tensors in found if id(tensors[name]) in own), None)
        for edit in () if tensor is None else axis_edits:
            assert tensor is not None
            # The bias of a transposed conv is longer or shorter than its weight's dim 0: each has blocks of its own.
            block = tensor.shape[0] // parts
            if edit.dim == 0 and not _whole_blocks(edit.source, block):
                raise SurgeryError(
                    f"the plan tears a {what} group of {module} apart along {name!r}: its {parts} groups of "
                    f"{block} channels can only be removed, inserted or moved as wholes"
                )


def _whole_blocks(source: np.ndarray, block: int) -> bool:
    """Whether each run of `block` new positions is one old run, in any order, or entirely fresh.

    >>> [_whole_blocks(np.array(source), 2) for source in ([3, 2, 0, 1, -1, -1], [1, 2, 0, 3], [0, -1])]
    [True, False, False]
    """
    if len(source) % block:
        return False
    runs = np.sort(source.reshape(-1, block), axis=1)
    fresh = (runs < 0).all(axis=1)
    whole = (runs[:, :1] % block == 0) & (runs == runs[:, :1] + np.arange(block))
    return bool((fresh | ((runs[:, 0] >= 0) & whole.all(axis=1))).all())
