"""How much worse a network is than another one, told without test images: on held-out or on varied training images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth.lab.data import Batches, ImageSet

TURN, ZOOM, SHIFT = 8.0, 0.1, 0.06
"""How far a training picture is varied for a judgement: degrees, share of its size, share of a side."""

MOST = 5000
"""Pictures that are looked at."""

NATS_PER_POINT = 0.11
"""What a point of accuracy is held to be worth in loss on varied training pictures (docs/decisions/014)."""

BY_HEART, FLAWLESS = 0.12, 80.0
"""Training error below which a network is held to know pictures by heart, so that what it loses on them says less; and
how often a mistake in a hundred is counted, so that one which makes next to no mistakes must go on making none."""


CHANCE = 0.1
"""Points that a difference on training images may owe to chance, at most: a picture or two."""


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
class Evidence:
    """What a network makes of the pictures of a judgement: as they are, and varied (None for held-out ones)."""

    plain: Seen
    varied: Seen | None

    @property
    def loss(self) -> float:
        """The loss that a guess of how small it may become goes by, nats."""
        return (self.varied or self.plain).loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a network is as good as another one, within what is tolerated, and why, in words."""

    holds: bool
    words: str


class Judge:
    """Says whether a network is worse than another by more than so many points of accuracy, or nats of loss.

    Where images are held out, they tell. Else training images do, twice: as they are, where accuracy may fall by the
    points that are tolerated and a picture or two, by more where the other network knows many of them by heart, by less
    where it hardly errs; and each a little turned, zoomed and shifted, where the loss may rise by what these points are
    held to be worth. Test images are never looked at. Both rules and their numbers: docs/decisions/014.
    """

    def __init__(self, images: ImageSet, *, points: float | None, nats: float | None, at_once: int = 500) -> None:
        self.images, self.points, self.nats, self.at_once = images, points or 0.0, nats, at_once
        self.is_held_out = images.held_out is not None

    def seen(self, network: nn.Module) -> Evidence:
        """What the network makes of the pictures of a judgement, the same ones at every call."""
        if self.is_held_out:
            return Evidence(plain=seen(network, self.images.plain_batches("held_out", self.at_once)), varied=None)
        source = torch.Generator().manual_seed(self.at_once)
        moved = ((varied(x, source), y) for x, y in self._training())
        return Evidence(plain=seen(network, self._training()), varied=seen(network, moved))

    def _training(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Training images in an order of its own, at most MOST of them, without augmentation."""
        pictures = Batches(
            self.images.train, batch_size=self.at_once, mean=self.images.mean, std=self.images.std, seed=0
        )
        return itertools.islice(pictures.at(0), -(-MOST // self.at_once))

    @property
    def allowed(self) -> float:
        """The nats that may be lost: as asked for, or what the points are held to be worth."""
        return self.nats if self.nats is not None else self.points * NATS_PER_POINT

    def verdict(self, now: Evidence, before: Evidence) -> Verdict:
        """Whether `now` is no worse than `before` by more than is tolerated."""
        plain = difference(now.plain, before.plain)
        if now.varied is None or before.varied is None:
            return self._on_loss(plain, "held-out") if self.nats is not None else self._on_accuracy(plain, self.points)
        loss = self._on_loss(difference(now.varied, before.varied), "varied training")
        if self.nats is not None:
            return loss
        error = max(1 - before.plain.accuracy, 1e-9)
        factor = min(max(1.0, BY_HEART / error), FLAWLESS * error)
        accuracy = self._on_accuracy(plain, self.points * factor + min(100 * plain.accuracy_error, CHANCE))
        return Verdict(holds=loss.holds and accuracy.holds, words=f"{accuracy.words}; {loss.words}")

    def _on_accuracy(self, found: Difference, points: float) -> Verdict:
        what = "held-out" if self.is_held_out else "training"
        return Verdict(
            holds=100 * found.accuracy >= -points - 1e-9,
            words=f"{100 * found.accuracy:+.2f} ± {100 * found.accuracy_error:.2f} points on {found.pictures:,} {what} "
            f"images, {-points:.2f} tolerated",
        )

    def _on_loss(self, found: Difference, what: str) -> Verdict:
        return Verdict(
            holds=found.loss <= self.allowed,
            words=f"loss {found.loss:+.4f} ± {found.loss_error:.4f} nats on {found.pictures:,} {what} images, "
            f"{self.allowed:+.3g} tolerated",
        )


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
