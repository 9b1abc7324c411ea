"""Nested plain data, taken apart into JSON and tensors by name, and put together again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autowidth.errors import AutoWidthError

LARGEST = 2**63 - 1
"""Integers in JSON that every reader takes; larger ones are written as texts."""


class PlainDataError(AutoWidthError, TypeError):
    """A state that holds something else than tensors, numbers, texts, lists, tuples and dicts of them."""


def taken_apart(tree: object, *, name: str) -> tuple[Any, dict[str, Tensor]]:
    """(What JSON can hold of the tree, name -> tensor). `name` is where the tree stands, for people and for tensors.

    What JSON does not know becomes an object with one key that begins with `$`: `$tensor`, its name, with `strides`
    where the tensor is not contiguous; `$tuple`; `$items`, a dict whose keys are not all texts; `$number`, one that is
    not finite or too large. A tensor that stands in several places is kept once. Raises PlainDataError, which says
    where, for anything else.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, tuple[str, Tensor]] = {}  # with the tensor: an id is free again once its owner is gone

    def apart(value: object, where: str) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            value = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value.item()
        if isinstance(value, Tensor):
            return _tensor(value, where, tensors, names)
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int | float):
            return _number(value)
        if isinstance(value, list | tuple):
            items = [apart(item, f"{where}.{number}") for number, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: apart(item, f"{where}.{key}") for key, item in value.items()}
            return {"$items": [[apart(key, where), apart(item, f"{where}.{key}")] for key, item in value.items()]}
        raise PlainDataError(
            f"{where} is a {type(value).__name__}, which cannot be kept without pickle: allowed are tensors, numbers, "
            "texts, lists, tuples and dicts of them"
        )

    return apart(tree, name), tensors


def put_together(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that was taken apart. Raises PlainDataError where it is damaged or a tensor is missing."""
    if isinstance(tree, list):
        return [put_together(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if marks := [key for key in tree if key.startswith("$")]:
        try:
            return _MARKS[marks[0]](tree, tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PlainDataError(f"the state is damaged: {marks[0]} ({type(error).__name__}: {error})") from error
    return {key: put_together(item, tensors) for key, item in tree.items()}


def strides_of(tensor: Tensor) -> list[int] | None:
    """The strides of a tensor whose elements lie dense in another order than that of its dims, else None."""
    strides = list(tensor.stride())
    usual = list(torch.empty(tensor.shape, device="meta").stride())
    return strides if strides != usual and strides == _dense(tensor.shape, strides) else None


def in_strides(tensor: Tensor, strides: list[int] | None) -> Tensor:
    """The tensor with these strides, or contiguous; itself where it has them."""
    usual = torch.empty(tensor.shape, device="meta").stride()
    wanted = usual if strides is None else tuple(strides)
    if tensor.stride() == wanted:
        return tensor
    return torch.empty_strided(tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _tensor(
    value: Tensor, where: str, tensors: dict[str, Tensor], names: dict[int, tuple[str, Tensor]]
) -> dict[str, Any]:
    """The mark of a tensor, which is entered among the tensors."""
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise PlainDataError(
            f"{where} is a tensor of layout {value.layout} on {value.device}: only dense ones are kept"
        )
    if id(value) not in names:
        names[id(value)] = (where, value)
        tensors[where] = value.detach()
    strides = strides_of(value)
    return {"$tensor": names[id(value)][0]} | ({} if strides is None else {"strides": strides})


def _number(value: float) -> Any:
    fits = math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST
    return value if fits else {"$number": repr(value)}


def _read_tensor(tree: dict[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors[tree["$tensor"]]
    strides = tree.get("strides")
    if strides is not None and strides != _dense(tensor.shape, strides):
        raise ValueError("strides that leave gaps")
    return in_strides(tensor, strides).clone()  # out of the pages of a file that may be removed


def _dense(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The strides of a dense tensor of this shape, its dims in the order that these strides give them."""
    found, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda d: (strides[d], shape[d])):
        found[dim], step = step, step * shape[dim]
    return found


def _read_number(tree: dict[str, Any], tensors: Mapping[str, Tensor]) -> float:
    text = tree["$number"]
    return int(text) if text.lstrip("-").isdigit() else float(text)


_MARKS: dict[str, Callable[[dict[str, Any], Mapping[str, Tensor]], Any]] = {
    "$tensor": _read_tensor,
    "$number": _read_number,
    "$tuple": lambda tree, tensors: tuple(put_together(item, tensors) for item in tree["$tuple"]),
    "$items": lambda tree, tensors: {
        put_together(key, tensors): put_together(item, tensors) for key, item in tree["$items"]
    },
}
