"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

from typing import Any

import torch

from autowidth.lab.data.augment import Augmentation
from autowidth.lab.data.errors import packages_for
from autowidth.lab.data.sources import Source, numbered, reader
from autowidth.lab.data.splits import Split


@reader("digits", form="digits", own_size=True)
def read_digits(_: str) -> Source:
    """1797 images of 1 x 8 x 8 in float32, moved by up to one pixel with black beyond the border, never flipped."""
    with packages_for("the set digits"):
        from sklearn.datasets import load_digits  # here: scikit-learn takes a second to import

    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # grey levels are 0 to 16
    everything = Split(images=images, labels=torch.from_numpy(bunch.target).long())
    augmentation = Augmentation(padding=1, edge="zero")
    return Source(name="digits", classes=numbered(10), train=everything, test=None, augmentation=augmentation)
