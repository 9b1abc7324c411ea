"""What the training loop is made of: learning rate, decay, probe, evaluation, threads, compiled steps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth.lab.data import Batches, ImageSet, Pictures
from autowidth.lab.prepare import ModelError
from autowidth.lab.settings import Settings

EVALUATED = 1000
"""Images that are evaluated at once, at most."""

PROBED = 256
"""Images that a review looks at together, at most."""

PIXELS, FEWEST = 2**17, 16
"""Pixels of images that a CPU works on at once, and images that it does at least. Activations of more leave its caches
and are memory that the system maps anew for every layer: ResNet-20 evaluates 390 images of 32 x 32 a second in batches
of 1,000, and 900 in batches of 128 (lab/studies/batch_sizes.py)."""

SMALL = 16
"""Images with fewer pixels on a side are worked on in one thread if nothing else is asked for: several threads gain
little on them, and on a busy machine they wait for each other most of the time."""


def one_cycle(progress: float, warmup: float) -> float:
    """Share of the peak learning rate after this share of the run: a straight rise, then half a cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def decayed_and_not(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights with decay, and norms and biases (one dim or none) without."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def probe_batches(images: ImageSet, seed: int, batch_size: int = PROBED) -> Batches:
    """Training images for reviews: not augmented, and shuffled by a generator that training does not share."""
    return Batches(
        images.train, batch_size=min(batch_size, len(images.train)), mean=images.mean, std=images.std, seed=seed + 2**32
    )


def augmented_batches(images: ImageSet, seed: int, batch_size: int = PROBED) -> Batches:
    """Training images as training sees them, for reviews of a network that does not train: as many as fit together."""
    together = min(at_once(images, PROBED), batch_size, len(images.train))
    return images.training_batches(together, seed=seed)


def evaluate(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], memory_format: torch.memory_format
) -> tuple[float, float]:
    """(Share of images that are classified rightly, mean cross-entropy in nats), in evaluation mode and float32."""
    network.eval()
    sums: list[Tensor] = []  # read at the end: a look at each would wait for the accelerator
    count = 0
    with torch.no_grad():
        for x, y in batches:
            scores = network(x.contiguous(memory_format=memory_format)).float()
            right = (scores.argmax(1) == y).sum()
            sums.append(torch.stack([right, F.cross_entropy(scores, y, reduction="sum")]).double())
            count += len(y)
    right_ones, total = sum(sums[1:], start=sums[0]).tolist() if sums else (0.0, 0.0)
    return right_ones / max(count, 1), total / max(count, 1)


def threads_of(settings: Settings, images: ImageSet) -> int | None:
    """The CPU threads to work with: those of the settings, else one where the images are small, else torch's own."""
    return settings.threads or (1 if min(images.image_shape[1:]) < SMALL else None)


class Lesson:
    """The loss of a network that learns from a teacher as well as from labels: distillation, Hinton et al. 2015.

    (1 - share) x the loss of the labels + share x WARMTH^2 x KL(teacher || network), of scores divided by WARMTH.
    """

    SHARE, WARMTH = 0.7, 2.0

    def __init__(
        self, teacher: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], *, share: float = SHARE
    ) -> None:
        self.teacher, self.loss_fn, self.share = teacher.eval(), loss_fn, share

    def __call__(self, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """A scalar, of scores (B, classes) for images (B, C, H, W) with labels (B,)."""
        with torch.no_grad():
            wanted = F.softmax(self.teacher(x).float() / self.WARMTH, 1)
        told = F.kl_div(F.log_softmax(scores.float() / self.WARMTH, 1), wanted, reduction="batchmean")
        return (1 - self.share) * self.loss_fn(scores, y) + self.share * self.WARMTH**2 * told


def at_once(images: ImageSet, most: int) -> int:
    """How many images to work on together without training: `most` of them, fewer on a CPU where they are large."""
    if images.train.labels.device.type != "cpu":
        return most
    _, height, width = images.image_shape
    return min(most, max(FEWEST, PIXELS // (height * width)))


def evaluated_at_once(settings: Settings, images: ImageSet) -> int:
    """The images to evaluate together: a batch where they are read as they are used, for large ones may not fit."""
    streams = any(isinstance(split.images, Pictures) for split in (images.train, images.test))
    return settings.batch_size if streams else at_once(images, EVALUATED)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """This many CPU threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def fitted_convolutions() -> Iterator[None]:
    """Lets cuDNN time its algorithms for every new shape, and afterwards is as it was. Without effect on a CPU.

    Between two reviews all shapes stay the same, so that what the search takes is soon won back.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def compiled(loss_of: Callable[[Tensor, Tensor], Tensor], model: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The same function, compiled for each shape when it is first called. Calls raise ModelError where it cannot be."""
    from torch._dynamo.exc import TorchDynamoException  # here: half a second to import

    quick = torch.compile(loss_of, dynamic=False)

    def called(x: Tensor, y: Tensor) -> Tensor:
        try:
            return quick(x, y)
        except TorchDynamoException as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"torch cannot compile {model} here: {reason}; train with compile = false") from error

    return called


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
