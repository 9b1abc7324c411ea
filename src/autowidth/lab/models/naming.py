"""From a name to a built-in network."""

from __future__ import annotations

from torch import nn

from autowidth.lab.models import networks  # noqa: F401  they enter themselves
from autowidth.lab.models.registry import FAMILIES, MODELS, ModelSpec, UnknownModelError, close_names


def spec(name: str) -> ModelSpec:
    """The built-in network of this name. Raises UnknownModelError with close names."""
    if name in MODELS:
        return MODELS[name]
    for family in FAMILIES:
        if (found := family.find(name)) is not None:
            return found
    others = " and ".join([*(family.described for family in FAMILIES), "module:callable"])
    raise UnknownModelError(f"no model is named {name!r}; {close_names(name, MODELS)}; {others} will do too")


def build(name: str, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """A built-in network with fresh weights from the global generator. Raises UnknownModelError with close names."""
    return spec(name).builder(num_classes=num_classes, in_channels=in_channels, width=width)
