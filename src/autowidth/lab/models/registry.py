"""What is known of the built-in networks, and the decorators that enter them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import nn

from autowidth.errors import AutoWidthError


class UnknownModelError(AutoWidthError, ValueError):
    """A text that names no network, neither a built-in one nor an importable one."""


class Builder(Protocol):
    """What makes a network of these sizes."""

    def __call__(self, *, num_classes: int, in_channels: int, width: float) -> nn.Module: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A built-in network: how it is made, the input it was published for (C, H, W), the least H and W that it takes."""

    builder: Builder
    smallest: int
    input_shape: tuple[int, int, int] = (3, 32, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Networks without an entry of their own: `find` gives the spec of a name of theirs, None for other names."""

    described: str
    find: Callable[[str], ModelSpec | None]


MODELS: dict[str, ModelSpec] = {}
"""The built-in networks by name."""

FAMILIES: list[Family] = []
"""Where a name that has no entry is looked up."""

_Made = TypeVar("_Made", bound=Builder)
_Found = TypeVar("_Found", bound=Callable[[str], ModelSpec | None])


def model(name: str, *, smallest: int, input_shape: tuple[int, int, int] = (3, 32, 32)) -> Callable[[_Made], _Made]:
    """Enters the decorated class or function under this name. Raises ValueError for a name that is taken."""
    if name in MODELS:
        raise ValueError(f"two networks are named {name!r}: give one of them another name")

    def enter(builder: _Made) -> _Made:
        MODELS[name] = ModelSpec(builder=builder, smallest=smallest, input_shape=input_shape)
        return builder

    return enter


def family(described: str) -> Callable[[_Found], _Found]:
    """Enters the decorated function, which knows the networks that are so described."""

    def enter(find: _Found) -> _Found:
        FAMILIES.append(Family(described=described, find=find))
        return find

    return enter


def close_names(name: str, known: Iterable[str]) -> str:
    """'close names: ...', or the first twenty where none is close."""
    public = [k for k in known if not k.startswith("_")]
    if close := difflib.get_close_matches(name, public, n=3):
        return f"close names: {', '.join(close)}"
    more = ", ..." if len(public) > 20 else ""
    return f"known names: {', '.join(public[:20]) or 'none'}{more}"
