"""Attributes of modules that say how many channels their weights have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from autowidth.surgery.journal import Journal
from autowidth.surgery.refusals import SurgeryError


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of the module itself, those behind its parametrizations included."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    if is_parametrized(module):
        hidden = module.parametrizations
        assert isinstance(hidden, nn.Module)
        yield from hidden.parameters()
        yield from hidden.buffers()


def has_attributes(module: nn.Module) -> bool:
    """Whether the module has attributes to keep right."""
    return isinstance(module, tuple(ATTRIBUTES))


def attributes(module: nn.Module, journal: Journal) -> dict[str, object]:
    """The attributes that the module must have for the shape that its weight has now."""
    shape = _weight_shape(module, journal)
    if shape is None:
        return {}
    return next(rule for kind, rule in ATTRIBUTES.items() if isinstance(module, kind))(module, shape)


def _weight_shape(module: nn.Module, journal: Journal) -> tuple[int, ...] | None:
    """The shape of the weight that the module works with; None where it has none of its own."""
    if is_parametrized(module, "weight"):
        return _computed_shape(module, journal)
    own = {**module._parameters, **module._buffers}
    # weight_orig and weight_v: `torch.nn.utils.prune` and the old weight and spectral norms, computed in a pre-hook.
    names = ("weight", "weight_orig", "weight_v", "running_mean")
    return next((tuple(t.shape) for name in names if (t := own.get(name)) is not None), None)


def _computed_shape(module: nn.Module, journal: Journal) -> tuple[int, ...]:
    """The shape of a weight that parametrizations compute.

    They are in eval mode meanwhile, for in training the spectral norm changes its buffers whenever one looks.
    """
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.Module)
    training = [part for part in parametrizations.modules() if part.training]
    back = partial(_set_training, training, True)
    journal.call(partial(_set_training, training, False), undo=back)
    try:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return tuple(weight.shape)
    finally:
        back()


def _set_training(modules: Sequence[nn.Module], training: bool) -> None:
    for module in modules:
        module.training = training


def _scaled(module: nn.Module, parts: int, old: int, new: int) -> int:
    """The number of conv or norm groups after the width went from `old` to `new`. Raises SurgeryError for a part."""
    if parts == 1:
        return 1
    if parts * new % old:
        raise SurgeryError(f"{module} cannot have {new} channels: only whole groups of {old // parts} may come or go")
    return parts * new // old


def _conv_attributes(conv: Any, shape: tuple[int, ...]) -> dict[str, object]:
    lead, other = ("in_channels", "out_channels") if conv.transposed else ("out_channels", "in_channels")
    groups = _scaled(conv, conv.groups, getattr(conv, lead), shape[0])
    return {lead: shape[0], other: shape[1] * groups, "groups": groups}


def _group_norm_attributes(norm: Any, shape: tuple[int, ...]) -> dict[str, object]:
    groups = _scaled(norm, norm.num_groups, norm.num_channels, shape[0])
    return {"num_channels": shape[0], "num_groups": groups}


ATTRIBUTES: dict[type[nn.Module], Callable[[Any, tuple[int, ...]], dict[str, object]]] = {
    _ConvNd: _conv_attributes,
    nn.Linear: lambda _, shape: {"out_features": shape[0], "in_features": shape[1]},
    _NormBase: lambda _, shape: {"num_features": shape[0]},
    nn.GroupNorm: _group_norm_attributes,
    nn.LayerNorm: lambda _, shape: {"normalized_shape": shape},
    nn.RMSNorm: lambda _, shape: {"normalized_shape": shape},
    nn.PReLU: lambda _, shape: {"num_parameters": shape[0]},
}
"""Module type -> from the module (old attributes) and the shape of its weight to the attributes it must have."""
