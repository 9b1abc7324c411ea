"""Relevance of a filter to the labels (Sarvani, Ghorai, Dubey, Basha 2022, HRel, arXiv 2202.10716)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import empty
from autowidth.lab.baselines.calls import watched
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights

_ALPHA = 1.01
"""Order of the entropy: the paper's."""

_LABEL_WIDTH = 0.1
"""Kernel width on one-hot labels: that of the authors' code; labels are alike or not at all."""

_SAMPLES = 100
"""Images per estimate: the batch size of the authors' code."""


@registry.importance(name="hrel", unit=None, scope="layer", source="Sarvani et al. 2022, arXiv 2202.10716")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The mutual information of a filter's activation map and the label, (width,) by channel group; bits.

    I(T; Y) = S(T) + S(Y) - S(T, Y), with the matrix-based Renyi entropy of order 1.01 (`entropy`) of Gaussian kernels
    over about a hundred images, averaged over such parts of the data: estimates from different numbers of images cannot
    be compared. (The authors' code takes the limit of order 1.) As in that code, a map is what the convolution writes,
    before norm and activation, and the kernel width is one per layer: that of 75 widths from 0.1 to 10 mean distances
    whose kernel of the whole layer's output is aligned best with the kernel of the labels. They choose it anew for
    every training batch and smooth over batches; here each part of the data has its own. Left open is what to do where
    several layers write a channel: here their numbers are averaged. Targets that are no whole numbers are compared as
    vectors; with targets that are not one tensor, every channel gets NaN.
    """
    weights = effective_weights(model)
    totals = {group.name: empty(group, weights).double() for group in channel_map.groups}
    counts = dict.fromkeys(totals, 0)
    for inputs, target in _parts(batches):
        with torch.no_grad():
            _, calls = watched(model, lambda x=inputs: model(x))  # type: ignore[misc]
        labels = gaussian(_distances(_vectors(target)), _LABEL_WIDTH)
        for call in calls:
            maps = call.out.movedim(call.dim, -1).reshape(len(inputs), -1, call.out.size(call.dim)).double()
            width = None
            for group in channel_map.groups:
                for place in group.with_role("write"):
                    if place.axis.name == call.weight:
                        width = width or best_width(_distances(maps.flatten(1)), labels)
                        index = torch.tensor(place.index, device=maps.device)
                        own = maps[:, :, index].movedim(2, 0).flatten(2)
                        totals[group.name] += information(gaussian(_distances(own), width), labels)
                        counts[group.name] += 1
    return {n: (total / counts[n] if counts[n] else total * torch.nan).float() for n, total in totals.items()}


def information(kernels: Tensor, labels: Tensor) -> Tensor:
    """Mutual information of each of several kernels (..., N, N) with the labels' kernel (N, N), (...), bits."""
    return entropy(kernels) + entropy(labels) - entropy(kernels * labels)


def entropy(kernels: Tensor) -> Tensor:
    """Renyi entropy log2(sum of eigenvalues^a) / (1 - a), (...), bits, of kernels (..., N, N) with diagonal 1.

    The eigenvalues are those of the kernel divided by its trace (Giraldo, Rao, Principe 2015).
    """
    eigenvalues = torch.linalg.eigvalsh(kernels / kernels.size(-1)).clamp_min(0)
    found: Tensor = eigenvalues.pow(_ALPHA).sum(-1).log2() / (1 - _ALPHA)
    return found


def gaussian(squares: Tensor, width: float) -> Tensor:
    """exp(-d^2 / width^2), as in the authors' code, of squared distances."""
    return (-squares / width**2).exp()


def best_width(squares: Tensor, labels: Tensor) -> float:
    """The kernel width for squared distances (N, N) that is aligned best with the labels' kernel (N, N).

    Alignment is the cosine between the two matrices. Where nothing differs, any width will do: 1.
    """
    mean = squares.sqrt().mean().item()
    if mean == 0:
        return 1.0
    widths = [float(w) for w in torch.linspace(0.1 * mean, 10 * mean, 75, dtype=torch.float64)]
    return max(widths, key=lambda w: F.cosine_similarity(gaussian(squares, w).flatten(), labels.flatten(), 0).item())


def _distances(rows: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs of rows, (..., N, N), of (..., N, values)."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()


def _vectors(target: Tensor) -> Tensor:
    """Labels (N,) as one-hot rows, anything else as rows of numbers, (N, values), float64."""
    if target.is_floating_point() or target.dim() > 1:
        return target.reshape(len(target), -1).double()
    return F.one_hot(target.long() - target.min()).double()


def _parts(batches: Sequence[tuple[Any, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
    """All images and targets in parts of nearly equal length, however they were cut before."""
    if not all(isinstance(target, Tensor) for _, target in batches):
        return
    inputs, targets = (torch.cat(both) for both in zip(*batches, strict=True))
    count = max(1, round(len(inputs) / _SAMPLES))
    yield from zip(inputs.tensor_split(count), targets.tensor_split(count), strict=True)
