"""How much worse a network is than another one, told without test images: on held-out pictures, or on made ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth.lab.data import DataError, ImageSet
from autowidth.lab.data.splits import generator_of, set_apart

TURN, ZOOM, SHIFT = 8.0, 0.1, 0.06
"""How far a training picture is varied for a judgement: degrees, share of its size, share of a side."""

MOST = 5000
"""Training pictures that pictures to be judged by are made of."""

APART = 0.2
"""Of the training pictures, the share of every class that attempts from brought weights do not train on, at most MOST:
they judge. By pictures that it was trained on last an attempt seems .65 points better than it is (docs/log/014)."""

JUDGING_STREAM = 3
"""What is drawn from the seed of a run for that."""

NATS_PER_POINT = 0.11
"""What a point of accuracy is held to be worth in loss, where it is guessed how far an attempt may go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a network makes of pictures, one by one: whether it is right (N,) bool, and its loss (N,), nats."""

    right: Tensor
    losses: Tensor

    @property
    def accuracy(self) -> float:
        """The share of pictures that are classified rightly."""
        return self.right.double().mean().item()

    @property
    def loss(self) -> float:
        """The mean cross-entropy in nats."""
        return self.losses.double().mean().item()


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What one network has more than another on the same pictures: share right, and loss in nats, with standard errors.

    The errors are those of a mean of differences picture by picture; 0 where there are fewer than two.
    """

    accuracy: float
    accuracy_error: float
    loss: float
    loss_error: float
    pictures: int


def difference(now: Seen, before: Seen) -> Difference:
    """How `now` stands beside `before`, which looked at the same pictures."""
    accuracy, accuracy_error = _mean_and_error(now.right.double() - before.right.double())
    loss, loss_error = _mean_and_error(now.losses.double() - before.losses.double())
    return Difference(
        accuracy=accuracy, accuracy_error=accuracy_error, loss=loss, loss_error=loss_error, pictures=len(now.right)
    )


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of the values (N,) and its standard error."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return values.mean().item(), error


def seen(network: nn.Module, pictures: Iterable[tuple[Tensor, Tensor]]) -> Seen:
    """What the network, in evaluation mode and float32, makes of pictures (B, C, H, W) with labels (B,)."""
    training = network.training
    network.eval()
    right, losses = [], []
    with torch.no_grad():
        for x, y in pictures:
            scores = network(x).float()
            right.append(scores.argmax(1) == y)
            losses.append(F.cross_entropy(scores, y, reduction="none"))
    network.train(training)
    return Seen(right=torch.cat(right).cpu(), losses=torch.cat(losses).cpu())


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a network is as good as another one, within what is tolerated, and why, in words."""

    holds: bool
    words: str


class Judge:
    """Says whether a network is worse than another by more than so many points of accuracy, or nats of loss.

    Where images are held out, they tell. Else it is pictures that neither network has seen, made of training images,
    which both know too well to be asked about them as they are: the mean of two of one class, and one that is a little
    turned, zoomed and shifted. Test images are never looked at. What this tells, and what it does not:
    docs/decisions/014.

    images: what it looks at; points, nats: what may be lost; source: in words, which of the training images these are.
    """

    def __init__(
        self, images: ImageSet, *, points: float | None, nats: float | None, at_once: int = 500,
        source: str = "training images",
    ) -> None:  # fmt: skip
        self.images, self.points, self.nats, self.at_once = images, points or 0.0, nats, at_once
        self.is_held_out = images.held_out is not None
        self.source = "held-out images" if self.is_held_out else f"pictures made of {source}"

    def seen(self, network: nn.Module) -> Seen:
        """What the network makes of the pictures of a judgement, the same ones at every call."""
        return seen(network, self.images.plain_batches("held_out", self.at_once) if self.is_held_out else self._made())

    def _made(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Mixtures and variations of training images, at most MOST of each, with their labels, in turns."""
        train, source = self.images.train, torch.Generator().manual_seed(0)
        half, (first, second) = -(-self.at_once // 2), pairs(train.labels.cpu(), min(len(train), MOST), source)
        order = torch.cat([torch.cat(both) for both in zip(first.split(half), second.split(half), strict=True)])
        for x, y in self.images.plain_batches("train", 2 * half).taken(order):
            one, other = x.chunk(2)
            yield (one + other) / 2, y[: len(one)]
            yield varied(one, source), y[: len(one)]

    @property
    def allowed(self) -> float:
        """The nats that may be lost: as asked for, or what the points are held to be worth."""
        return self.nats if self.nats is not None else self.points * NATS_PER_POINT

    def verdict(self, now: Seen, before: Seen) -> Verdict:
        """Whether `now` is no worse than `before` by more than is tolerated."""
        found = difference(now, before)
        what = f"{found.pictures:,} {self.source}"
        if self.nats is not None:
            return Verdict(
                holds=found.loss <= self.nats,
                words=f"loss {found.loss:+.4f} ± {found.loss_error:.4f} nats on {what}, {self.nats:+.3g} tolerated",
            )
        return Verdict(
            holds=100 * found.accuracy >= -self.points - 1e-9,
            words=f"{100 * found.accuracy:+.2f} ± {100 * found.accuracy_error:.2f} points on {what}, "
            f"{-self.points:.2f} tolerated",
        )


def parted(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """The set in two, to train on and to judge by, each with all test images; twice itself where that cannot be."""
    train = images.train
    source = generator_of(seed, JUDGING_STREAM)
    try:
        rest, own = set_apart(train.labels.cpu(), min(APART, MOST / len(train)), source)
    except DataError:
        return images, images
    device = train.labels.device
    rest, own = rest.to(device), own.to(device)
    return replace(images, train=train.take(rest)), replace(images, train=train.take(own))


def pairs(labels: Tensor, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` positions of labels (N,) by chance, and for each another one of its class; itself where it is alone.

    Both int64 of shape (count,), no more than N; `source` decides.
    """
    members, sizes = labels.argsort(stable=True), labels.bincount()
    begins, places = sizes.cumsum(0) - sizes, torch.empty_like(labels)
    places[members] = torch.arange(len(labels)) - begins[labels[members]]
    first = torch.randperm(len(labels), generator=source)[:count]
    own, size = labels[first], sizes[labels[first]]
    steps = 1 + (torch.rand(len(first), generator=source) * (size - 1)).long()
    return first, members[begins[own] + (places[first] + steps) % size]


def varied(images: Tensor, source: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each turned, zoomed and shifted a little, mirrored at the edges; `source` decides how."""

    def chance(reach: float) -> Tensor:
        return reach * (2 * torch.rand(len(images), generator=source) - 1)

    angle, scale = chance(math.pi * TURN / 180), 1 + chance(ZOOM)
    across, down = chance(2 * SHIFT), chance(2 * SHIFT)  # the grid goes from -1 to 1
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), across], 1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1).to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
