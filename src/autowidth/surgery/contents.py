"""Contents of tensors: what stands at each position after the edits, and how fresh positions are filled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from autowidth.surgery.edits import Edit, Edits, Fill

_BLOCK = 1 << 22
"""Elements above which no further copy of a tensor is made: it may be most of the network."""

# ---- selecting positions ---------------------------------------------------------------------------------------------


def select(tensor: Tensor, dim: int, positions: np.ndarray) -> Tensor:
    """A copy of the tensor with these positions of one dim."""
    return tensor.index_select(dim, _index(positions, tensor))


def take(tensor: Tensor, choices: Sequence[tuple[int, np.ndarray]]) -> Tensor:
    """A copy of the tensor with these positions of these dims, which rise; of a large one without copies in between."""
    dims = [dim for dim, _ in choices]
    adjacent = len(dims) > 1 and dims == list(range(dims[0], dims[0] + len(dims)))
    if tensor.numel() <= _BLOCK or not adjacent:
        for dim, positions in choices:
            tensor = select(tensor, dim, positions)
        return tensor
    grid = np.ix_(*(positions for _, positions in choices))
    where = [_index(positions, tensor) for positions in grid]
    return tensor[(slice(None),) * dims[0] + tuple(where)]


def _index(positions: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.as_tensor(positions, dtype=torch.int64).to(tensor.device)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in a floating dtype of at least single precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# ---- after the edits -------------------------------------------------------------------------------------------------


def resized_content(tensor: Tensor, edits: Edits, fills: Sequence[Fill], generator: torch.Generator | None) -> Tensor:
    """The tensor after the edits, fresh positions filled axis by axis; where two axes are fresh, zero wins."""
    old = tensor.detach()
    new = gathered(old, edits, fills)
    for edit, fill in sorted(zip(edits, fills, strict=True), key=lambda pair: pair[1] == "zero"):
        if not edit.fresh.size or fill == "mean":
            continue
        fresh = _index(edit.fresh, new)
        if fill == "normal":
            shape = [*new.shape[: edit.dim], edit.fresh.size, *new.shape[edit.dim + 1 :]]
            new.index_copy_(edit.dim, fresh, (_draw(shape, new, generator) * _spread(old, edits)).to(new.dtype))
        else:
            new.index_fill_(edit.dim, fresh, 1.0 if fill == "one" else 0.0)
    return formatted(new, tensor)


def resized_shape(tensor: Tensor, edits: Edits) -> Tensor:
    """An empty tensor of the shape after the edits."""
    shape = list(tensor.shape)
    for edit in edits:
        shape[edit.dim] = len(edit.source)
    return formatted(tensor.detach().new_empty(shape), tensor)


def gathered(tensor: Tensor, edits: Edits, fills: Sequence[Fill] = ()) -> Tensor:
    """The tensor after the edits. With the fill "mean" fresh positions hold the mean of the survivors of their axis.

    With other fills they hold anything, for the caller to overwrite. Where no position of an axis survives, the mean is
    that of the old ones. Position 0 leaves, one is fresh:

    >>> edit = Edit(0, np.array([1, -1, 2]), "carry")
    >>> gathered(torch.tensor([9.0, 2.0, 4.0]), (edit,), ["mean"]).tolist()
    [2.0, 3.0, 4.0]
    """
    if "mean" not in fills:
        return take(tensor, [(edit.dim, np.maximum(edit.source, 0)) for edit in edits])
    for edit, fill in zip(edits, fills, strict=True):  # axis by axis: a mean takes a copy of the survivors
        moved = select(tensor, edit.dim, np.maximum(edit.source, 0))
        if fill == "mean" and edit.fresh.size:
            mean = _mean_of_survivors(tensor, edit)
            repeated = mean.expand([edit.fresh.size if d == edit.dim else n for d, n in enumerate(mean.shape)])
            moved.index_copy_(edit.dim, _index(edit.fresh, tensor), repeated.contiguous())
        tensor = moved
    return tensor


def _mean_of_survivors(tensor: Tensor, edit: Edit) -> Tensor:
    """The mean over the axis (which remains with size 1) of the positions that survive, of all if none does."""
    siblings = edit.kept if edit.kept.size else np.arange(tensor.shape[edit.dim])
    return _wide(select(tensor, edit.dim, siblings)).mean(edit.dim, keepdim=True).to(tensor.dtype)


def with_fresh_of(tensor: Tensor, donor: Tensor, edits: Edits) -> Tensor:
    """The gathered tensor, which is changed, with the donor's content wherever a position is fresh."""
    for edit in edits:
        if edit.fresh.size:
            content = select(donor, edit.dim, edit.fresh).to(tensor)
            tensor.index_copy_(edit.dim, _index(edit.fresh, tensor), content)
    return tensor


def _draw(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers, drawn where the generator lives and moved: the same on every device."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if like.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    home = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=home, dtype=dtype).to(like.device)


def _spread(old: Tensor, edits: Edits) -> Tensor:
    """The standard deviation of the surviving elements, of all old ones if none survives; a scalar tensor.

    A large tensor is looked at block by block: the variance of the whole is the mean over blocks, weighted by their
    numbers of elements, of (variance of the block + squared distance of its mean from the mean of the whole).
    """
    lead, *others = edits
    if not all(edit.kept.size for edit in edits):
        return _wide(old).std(correction=0)
    blocks = np.array_split(lead.kept, min(lead.kept.size, 1 + old.numel() // _BLOCK))
    counts, means, variances = [], [], []
    for block in blocks:
        survivors = select(old, lead.dim, block)
        for edit in others:
            survivors = select(survivors, edit.dim, edit.kept)
        if len(blocks) == 1:
            return _wide(survivors).std(correction=0)
        variance, mean = torch.var_mean(_wide(survivors), correction=0)
        counts.append(survivors.numel())
        means.append(mean)
        variances.append(variance)
    mean, variance = torch.stack(means), torch.stack(variances)
    weights = torch.tensor(counts).to(mean) / sum(counts)
    return (weights * (variance + (mean - (weights * mean).sum()).square())).sum().sqrt()


# ---- memory formats --------------------------------------------------------------------------------------------------


def formatted(new: Tensor, old: Tensor) -> Tensor:
    """The new tensor in the memory format of the old one."""
    shape = old.shape
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if old.is_contiguous() and old.stride() == torch.empty(shape, device="meta").stride():
        return new.contiguous()
    wanted = formats.get(old.dim())
    # Strides, not is_contiguous(): the latter holds for both formats where the kernel is 1 x 1 or one channel is read.
    if wanted is None or old.stride() != torch.empty(shape, device="meta", memory_format=wanted).stride():
        return new.contiguous()
    return torch.empty(new.shape, dtype=new.dtype, device=new.device, memory_format=wanted).copy_(new)


def strided(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor with these strides; contiguous where elements would overlap (an expanded tensor)."""
    if any(step == 0 and n > 1 for step, n in zip(stride, tensor.shape, strict=True)):
        return tensor.contiguous()
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


# ---- which fill for which parameter ----------------------------------------------------------------------------------

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NORM_FILLS: dict[str, Fill] = {"weight": "one", "bias": "zero", "running_mean": "zero", "running_var": "mean"}


def fills_of(model: nn.Module, name: str, tensor: Tensor, edits: Edits) -> tuple[Fill, ...]:
    """How the fresh positions of a parameter or buffer are filled, one entry per edit."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    return tuple(_fill(owner, leaf, tensor, edit) for edit in edits)


def _fill(owner: nn.Module, leaf: str, tensor: Tensor, edit: Edit) -> Fill:
    if edit.role == "read":
        return "zero"
    if isinstance(owner, _NORMS):
        return _NORM_FILLS.get(leaf, "mean")
    if leaf in owner._buffers:  # fixed by the user: a blur kernel that is the same in all channels stays the same
        return "mean"
    if isinstance(owner, (_ConvNd, nn.Linear)) and leaf in ("weight", "bias"):
        return "zero" if leaf == "bias" else "normal"
    # One number per channel: layer scale, PReLU slopes, the magnitudes of a weight norm.
    return "mean" if tensor.numel() == tensor.shape[edit.dim] else "normal"
