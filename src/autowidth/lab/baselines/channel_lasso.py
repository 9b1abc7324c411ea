"""Channel selection by LASSO (He, Zhang, Sun 2017, Channel Pruning for Accelerating Very Deep Networks, 1707.06168)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lars_path_gram
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autowidth.channels import ChannelMap, ParamAxis, Place
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import empty, readers
from autowidth.lab.baselines.calls import MIXING, Call, watched
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights

_PATCHES = 10
"""Output positions that are sampled per image: the paper's number."""

_VALUES = 2**23
"""Products of features that are held at once, as numbers: bounds the memory, not the result."""


@registry.importance(name="channel-lasso", unit=None, scope="layer", source="He, Zhang, Sun 2017, arXiv 1707.06168")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The penalty at which a channel leaves the LASSO of its reader, in units of the largest, (width,) by group.

    The problem is the paper's equation 1 for one reader with all channels in: half of |Y - sum_i b_i X_i W_i'|^2 plus
    penalty times |b|_1, with every |W_i| scaled to one; the patches X are those of ten random output positions per
    image, Y is what the original weights make of them, without bias. A channel leaves at the largest penalty at which
    b_i is not zero: the paper raises the penalty until few enough channels are left. The whole path is followed from
    one LASSO (LARS), where the paper alternates LASSO and least squares several times; its last step, least squares
    for the remaining weights, is not part of a ranking.

    Left open is what to do where several layers read a channel, for which the paper samples with a filter in front of
    the first one: here each reader has its LASSO over all channels that it gets, and a channel's numbers, from 0 to 1,
    are averaged. Channels that cannot be removed (a model's input) are outside. A channel that is a combination of
    others is left out of the path and gets 0; a channel group that nothing is seen to read gets NaN.
    """
    on_axes = readers(channel_map)
    grams, norms = _products(model, on_axes, batches, generator)
    weights = effective_weights(model)
    importances = {group.name: empty(group, weights) for group in channel_map.groups}
    seen = dict.fromkeys(importances, 0)
    for axis, gram in grams.items():
        left = torch.tensor(leaving(gram.cpu().numpy(), norms[axis].cpu().numpy()), dtype=torch.float32)
        for (name, _), part in zip(on_axes[axis], left.split([len(p.index) for _, p in on_axes[axis]]), strict=True):
            importances[name] += part.to(importances[name].device)
            seen[name] += 1
    return {name: total / seen[name] if seen[name] else total * torch.nan for name, total in importances.items()}


def _products(
    model: nn.Module,
    on_axes: Mapping[ParamAxis, list[tuple[str, Place]]],
    batches: Sequence[tuple[Any, Any]],
    generator: torch.Generator,
) -> tuple[dict[ParamAxis, Tensor], dict[ParamAxis, Tensor]]:
    """For each axis that reads channels, the products of what they write (channels, channels), |W_i| (channels,)."""
    total = sum(len(inputs) for inputs, _ in batches)
    fractions = torch.rand(total, _PATCHES, generator=generator).split([len(inputs) for inputs, _ in batches])
    grams: dict[ParamAxis, Tensor] = {}
    norms: dict[ParamAxis, Tensor] = {}
    with torch.no_grad():
        for (inputs, _), where in zip(batches, fractions, strict=True):
            for reading in _readings(model, inputs):
                for axis, on_axis in on_axes.items():
                    if axis.name == reading.call.weight:
                        owner = _owners(reading, [place for _, place in on_axis])
                        grams[axis] = grams.get(axis, 0) + reading.gram(owner, where)
                        norms[axis] = reading.norms(owner)
    return grams, norms


def leaving(gram: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """The penalty at which each channel leaves, (channels,), in units of the penalty at which the last one leaves.

    `gram` (channels, channels) are the products Z_i . Z_j of what each channel adds to the output, whose sum over i is
    the output itself, `norms` (channels,) the Frobenius norms of the weights |W_i|.
    """
    scale = np.where(norms > 0, norms, 1)
    products, targets = gram / np.outer(scale, scale), gram.sum(axis=1) / scale
    found = np.zeros(len(gram))
    if not np.abs(targets).max() > 0:
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of channels that are combinations of others: they stay 0
        penalties, _, path = lars_path_gram(
            targets / np.abs(targets).max(),
            products / np.abs(targets).max(),
            n_samples=1,
            method="lasso",
            max_iter=20 * len(gram) + 100,
        )
    inside = path != 0
    entry = inside.argmax(axis=1)  # a knot is where b is still zero: the channel is inside from the next one on
    entered = inside.any(axis=1)
    found[entered] = penalties[entry[entered] - 1]
    found /= penalties[0]
    return found


class _Reading:
    """A call, with what its patches and its weight look like as matrices.

    A feature is one position of the reader's axis at one position of the kernel, channels first.
    """

    def __init__(self, call: Call, func: Any, arguments: dict[str, Any]) -> None:
        self.call = call
        self.transposed = func in _TRANSPOSED
        self.arguments = arguments
        weight: Tensor = arguments["weight"].detach().double()
        kernel = weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]
        self.weight = (kernel.transpose(1, 2) if self.transposed else kernel.permute(1, 2, 0)).flatten(0, 1)
        self.taps = kernel.size(2)

    def gram(self, owner: Tensor, fractions: Tensor) -> Tensor:
        """The products of what the channels write at sampled positions, (channels, channels), summed over these.

        `owner` (features,) is the channel of each feature, `fractions` (samples, k) from 0 to 1 say where to sample.
        """
        patches = self.patches(fractions).double()
        count = int(owner.max()) + 1
        step = max(1, _VALUES // patches.size(1))
        found = patches.new_zeros(count, count)
        for start in range(0, patches.size(1), step):
            rows = slice(start, start + step)
            both = (patches[:, rows].T @ patches) * (self.weight[rows] @ self.weight.T)
            by_channel = both.new_zeros(len(both), count).index_add_(1, owner.clamp_min(0), both * (owner >= 0))
            found.index_add_(0, owner[rows].clamp_min(0), by_channel * (owner[rows] >= 0)[:, None])
        return found

    def norms(self, owner: Tensor) -> Tensor:
        """The Frobenius norm of each channel's weights, (channels,)."""
        squares = self.weight.square().sum(1) * (owner >= 0)
        found: Tensor = squares.new_zeros(int(owner.max()) + 1).index_add_(0, owner.clamp_min(0), squares).sqrt()
        return found

    def patches(self, fractions: Tensor) -> Tensor:
        """What the layer reads for some of its outputs, (rows x positions, features)."""
        source = self.call.read()
        source = source.reshape(*source.shape[:2], -1)
        rows = len(source)
        shape = self.call.out.movedim(self.call.dim, 1).shape[2:]
        count = shape.numel()
        if count <= _PATCHES:
            outputs = torch.arange(count).expand(rows, -1)
        else:
            image = torch.arange(rows) * len(fractions) // rows  # a map cut into windows is one image still
            outputs = (fractions[image] * count).long()
        inputs, inside = self._inputs_of(outputs, shape)
        taken = source.gather(2, inputs.flatten(1)[:, None].expand(-1, source.size(1), -1).to(source.device))
        taken = taken.unflatten(2, inputs.shape[1:]) * inside[:, None].to(source.device)
        found: Tensor = taken.transpose(1, 2).flatten(2).flatten(0, 1)
        return found

    def _inputs_of(self, outputs: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The pixels that each kernel position reads for these outputs, and whether they are inside the map.

        Both (rows, positions, taps); outputs (rows, positions) are numbers of pixels in a map of this shape.
        """
        if self.call.dim == -1:
            return outputs[..., None], torch.ones_like(outputs, dtype=torch.bool)[..., None]
        kernel, extent = self.arguments["weight"].shape[2:], self.call.read().shape[2:]
        stride, dilation = (_each(self.arguments.get(key, 1), len(kernel)) for key in ("stride", "dilation"))
        padding = self.arguments.get("padding", 0)
        if isinstance(padding, str):
            padding = [d * (k - 1) // 2 if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        padding = _each(padding, len(kernel))
        pixel = torch.zeros(*outputs.shape, 1, dtype=torch.long)
        inside = torch.ones_like(pixel, dtype=torch.bool)
        for d, at in enumerate(torch.unravel_index(outputs, shape)):
            tap = torch.arange(kernel[d]) * dilation[d]
            if self.transposed:
                reached = at[..., None] + padding[d] - tap
                here, fits = reached // stride[d], reached % stride[d] == 0
            else:
                here = at[..., None] * stride[d] - padding[d] + tap
                fits = torch.ones_like(here, dtype=torch.bool)
            fits = fits & (here >= 0) & (here < extent[d])
            pixel = (pixel[..., None] * extent[d] + here.clamp(0, extent[d] - 1)[..., None, :]).flatten(2)
            inside = (inside[..., None] & fits[..., None, :]).flatten(2)
        return pixel, inside


def _each(value: Any, count: int) -> list[int]:
    """One number per spatial dim."""
    found = [value] if isinstance(value, int) else list(value)
    return found * count if len(found) == 1 else found


def _owners(reading: _Reading, places: Sequence[Place]) -> Tensor:
    """The number of the channel that each feature belongs to, counted through all places, or -1, (features,)."""
    owner = torch.full((len(reading.weight) // reading.taps,), -1, device=reading.weight.device)
    start = 0
    for place in places:
        index = torch.tensor(place.index, device=owner.device)
        owner[index] = torch.arange(start, start + len(index), device=owner.device)[:, None].expand_as(index)
        start += len(index)
    return owner.repeat_interleave(reading.taps)


def _readings(model: nn.Module, inputs: Tensor) -> list[_Reading]:
    """All convolution and linear calls of a forward pass, with their arguments."""
    with _Arguments() as seen:
        _, calls = watched(model, lambda: model(inputs))
    return [_Reading(call, *seen.found[id(call.source)]) for call in calls]


class _Arguments(TorchFunctionMode):
    """Remembers the arguments of calls by the id of what they read; `watched` keeps these tensors alive."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[Any, dict[str, Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MIXING:
            names = _TRANSPOSED_NAMES if func in _TRANSPOSED else _NAMES
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            self.found[id(named["input"])] = func, named
        return func(*args, **kwargs)


_TRANSPOSED = frozenset({F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d})
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_NAMES = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
"""The arguments of convolutions in their order."""
