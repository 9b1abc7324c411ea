"""How pixels are scaled where a network brings its own scaling: by name, or by mean and deviation of each channel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BeforeValidator

from autowidth.lab.data import DataError, ImageSet


@dataclass(frozen=True, slots=True)
class Scaling:
    """Pixels, 0 to 1, enter a network as (pixel - mean) / std, each channel by its own.

    Raises ValueError for numbers that are not finite, deviations that are not above 0, or not as many as means.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        fits = len(self.mean) == len(self.std) > 0 and all(map(math.isfinite, (*self.mean, *self.std)))
        if not fits or not min(self.std) > 0:
            raise ValueError(f"means {self.mean} and deviations {self.std}: need as many of both, deviations above 0")


IMAGENET = Scaling((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

SCALINGS: dict[str, Scaling] = {"imagenet": IMAGENET}
"""Scalings by name."""


def scaling_of(value: Any) -> Any:
    """The scaling that a name, a text of numbers (means, then deviations), a pair or a table stands for.

    Returns what is none of these as it is, and raises ValueError for a text that says nothing.
    """
    if isinstance(value, Mapping) and value.keys() == {"mean", "std"}:
        value = (value["mean"], value["std"])
    if isinstance(value, str):
        if value in SCALINGS:
            return SCALINGS[value]
        value = _halves(value)
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, list | tuple) for part in value):
        return Scaling(tuple(map(float, value[0])), tuple(map(float, value[1])))
    return value


def _halves(text: str) -> tuple[list[float], list[float]]:
    """The numbers in a text, their first half and their second. Raises ValueError."""
    try:
        numbers = [float(part) for part in text.replace("/", " ").replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not numbers or len(numbers) % 2:
        raise ValueError(
            f"{text!r} is neither {' nor '.join(SCALINGS)} nor means and deviations, such as "
            "'0.485 0.456 0.406 / 0.229 0.224 0.225'"
        )
    return numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]


AnyScaling = Annotated[Scaling, BeforeValidator(scaling_of)]
"""A scaling among settings, in any of the forms that `scaling_of` reads."""


def scaled_by(images: ImageSet, scaling: Scaling | None) -> ImageSet:
    """The same images, scaled so; as they are where no scaling is given. Raises DataError for other channels."""
    if scaling is None:
        return images
    channels = images.image_shape[0]
    if len(scaling.mean) != channels:
        raise DataError(
            f"normalize has {len(scaling.mean)} channels, images of {images.name} have {channels}: "
            f"give {channels} means and {channels} deviations"
        )
    return replace(images, mean=scaling.mean, std=scaling.std)
