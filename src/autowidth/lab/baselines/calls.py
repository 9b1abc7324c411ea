"""Every convolution and linear call of a forward pass: its weight, what came in, what went out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from autowidth.channels import Place
from autowidth.review.statistics import effective_weights

MIXING = frozenset({
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
})  # fmt: skip
"""The calls that read channels and write channels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a weight, by the parameter's name; channels lie in dim `dim` (negative) of `source` and `out`.

    source: what was read, a tensor of its own in the graph, so that its gradient is that of this call alone;
    out: what was written; unpooled: the maps (N, C, H, W) that the source was pooled or flattened from, if it was.
    """

    weight: str
    dim: int
    source: Tensor
    out: Tensor
    unpooled: Tensor | None

    def read(self) -> Tensor:
        """What was read, (N, channels, ...)."""
        return self.source.movedim(self.dim, 1)

    def maps(self, place: Place) -> Tensor:
        """The maps of a group's channels as this call read them, (N, width, rows, columns).

        Before global pooling or flattening, where that was the last thing that happened to them. Maps that are no
        images count as one row.
        """
        index = torch.tensor(place.index, device=self.source.device)
        length, copies = self.source.size(self.dim), place.copies
        if self.unpooled is not None and length == copies * self.unpooled.size(1):
            channel = index // copies
            if bool((channel == channel[:, :1]).all()):
                return self.unpooled[:, channel[:, 0]]
        taken = self.read()[:, index]
        if copies == 1 and taken.dim() == 5:
            return taken[:, :, 0]
        return taken.flatten(2).unsqueeze(2)


def watched(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[Call]]:
    """What `run`, which calls the model, returns, and all convolution and linear calls of the model's parameters."""
    with parametrize.cached():
        names = {id(weight): name for name, weight in effective_weights(model).items()}
        with _Watch(names) as watch:
            result = run()
    return result, watch.calls


class _Watch(TorchFunctionMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.calls: list[Call] = []
        self.came_from: dict[int, tuple[Tensor, Tensor]] = {}  # holds the results too, so that ids stay theirs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = {**dict(zip(("input", "weight"), args, strict=False)), **kwargs}
        if func not in MIXING or id(named["weight"]) not in self.names:
            out = func(*args, **kwargs)
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor) and out is not args[0]:
                self.came_from[id(out)] = (out, args[0])
            return out
        came_in, weight = named["input"], named["weight"]
        source = came_in.view_as(came_in)
        out = func(source, weight, *args[2:], **{k: v for k, v in kwargs.items() if k not in ("input", "weight")})
        dim = -1 if func is F.linear else 1 - weight.dim()
        self.calls.append(
            Call(weight=self.names[id(weight)], dim=dim, source=source, out=out, unpooled=self._unpooled(came_in, dim))
        )
        return out.clone()  # what follows may write in place

    def _unpooled(self, tensor: Tensor, dim: int) -> Tensor | None:
        """The last images behind a tensor that has a single value per channel and sample."""
        if tensor.numel() != tensor.size(0) * tensor.size(dim):
            return None
        found = tensor
        while found.dim() != 4 or found.shape[2:].numel() == 1:
            if id(found) not in self.came_from:
                return None
            found = self.came_from[id(found)][1]
        return found if found.size(0) == tensor.size(0) else None
