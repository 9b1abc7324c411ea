"""Pure functions of pixels: scaling, statistics, pooling, crops, flips."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from autowidth.lab.data.errors import DataError

Edge: TypeAlias = Literal["reflect", "zero"]
"""What a crop sees beyond the border: the image mirrored at its outermost pixels, or black."""

_CHUNK = 4096  # images that are turned into floats at once: bounds the memory, not the result


def unit(images: Tensor) -> Tensor:
    """The pixels as float32 from 0 to 1: (N, C, H, W) in uint8 or float32 -> the same shape."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def scale(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixel - mean) / std in float32: (N, C, H, W) in uint8 or float32, mean and std (C,) -> (N, C, H, W)."""
    return (unit(images) - mean[:, None, None]) / std[:, None, None]


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel's pixels (0 to 1), images (N, C, H, W).

    A channel that never changes gets the standard deviation 1, so that dividing by it does no harm.
    """
    count = images.numel() // images.shape[1]
    total = torch.zeros(2, images.shape[1], dtype=torch.float64, device=images.device)
    for chunk in torch.split(images, _CHUNK):
        pixels = unit(chunk).double()
        total += torch.stack([pixels.sum((0, 2, 3)), pixels.square().sum((0, 2, 3))])
    return mean_and_std(*(total / count))


def mean_and_std(mean: Tensor, square: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel from the means of its values and of their squares, (C,) each."""
    variance = square - mean.square()
    std = torch.where(variance > 1e-12, variance, torch.ones_like(variance)).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def pooled(images: Tensor, factor: int) -> Tensor:
    """Averages of factor x factor pixels, rounded in uint8: (N, C, H, W) -> (N, C, H / factor, W / factor).

    Raises DataError where `factor` is no positive divisor of H and W.
    """
    height, width = images.shape[2:]
    if factor < 1 or height % factor or width % factor:
        raise DataError(f"cannot pool images of {height} x {width} by {factor}: give a common divisor of both sides")
    if factor == 1:
        return images
    return torch.cat([_averages(chunk, factor) for chunk in torch.split(images, _CHUNK)])


def _averages(images: Tensor, factor: int) -> Tensor:
    n, c, height, width = images.shape
    mean = images.reshape(n, c, height // factor, factor, width // factor, factor).float().mean((3, 5))
    return mean.round().to(images.dtype) if images.dtype == torch.uint8 else mean


def crop(images: Tensor, down: Tensor, right: Tensor, *, edge: Edge) -> Tensor:
    """Each image seen through a window of its own extent that is moved `down` and `right` by whole pixels.

    Images (N, C, H, W), down and right (N,) int64 -> (N, C, H, W). This is the crop at a random place of a padded
    image, without the padded copy. With the edge "reflect" no window may leave its image by more than H-1 or W-1.
    """
    rows, inside_rows = _window(down, images.shape[2], edge)
    columns, inside_columns = _window(right, images.shape[3], edge)
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
    seen = images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
    if edge == "reflect":
        return seen
    return seen * (inside_rows[:, None, :, None] & inside_columns[:, None, None, :])


def _window(offset: Tensor, length: int, edge: Edge) -> tuple[Tensor, Tensor]:
    """Positions seen by each window and whether they lie inside: offset (N,) -> two of (N, length)."""
    position = offset[:, None] + torch.arange(length, device=offset.device)
    inside = (position >= 0) & (position < length)
    if edge == "reflect":
        return (length - 1) - ((length - 1) - position.abs()).abs(), inside
    return position.clamp(0, length - 1), inside


def flip(images: Tensor, which: Tensor) -> Tensor:
    """The images (N, C, H, W), mirrored left to right where `which` (N,) is true."""
    return torch.where(which[:, None, None, None], images.flip(3), images)
