"""How good a network is that is there already: a saved run, or a built-in or imported one with weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from autowidth.cost import count_macs
from autowidth.lab.data import DataError, ImageSet
from autowidth.lab.loop_parts import cpu_threads, evaluate, evaluated_at_once, threads_of
from autowidth.lab.prepare import build_network, find_device, load_images
from autowidth.lab.saved import Opened, open_run
from autowidth.lab.settings import Settings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a network is worth and costs. Accuracy is a share, loss in nats per image, MACs those of one image."""

    model: str
    data: str
    part: Literal["test"]
    images: int
    accuracy: float
    loss: float
    macs: int
    params: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """All of it, in what JSON can hold."""
        return asdict(self)


def evaluate_run(path: Path, **changes: Any) -> Evaluation:
    """How good a saved run is on test images of the data that it was trained on, or that the changes name.

    The run says what its images must be like, and images of any size are brought to it; `changes` are settings by name,
    None for those of the run. Raises as `open_run` and `load` do, DataError for images of another shape or with other
    classes.
    """
    opened = open_run(path)
    given = {name: value for name, value in changes.items() if value is not None}
    settings = opened.settings.model_copy(update={**given, "normalize": opened.scaling})
    _, height, width = opened.input_shape
    images = load_images(settings, extent=(height * settings.pool, width * settings.pool))
    _check_same(opened, images)
    return _evaluated(f"run {path}", opened.network, images, settings)


def evaluate_model(settings: Settings) -> Evaluation:
    """How good the network of the settings is, with their weights, on their test images. Raises as `train` does."""
    images = load_images(settings)
    torch.manual_seed(settings.seed)
    return _evaluated(settings.model, build_network(settings, images), images, settings)


def _check_same(opened: Opened, images: ImageSet) -> None:
    """Raises DataError where the images are not what the run is for; warns where their classes have other names."""
    if images.image_shape != opened.input_shape:
        raise DataError(
            f"run {opened.run.folder} takes images of shape {opened.input_shape}, those of {images.name} are "
            f"{images.image_shape}: name other data, or their size"
        )
    ours, theirs = opened.classes, tuple(images.classes)
    if len(ours) != len(theirs) or (ours != theirs and sorted(ours) == sorted(theirs)):
        raise DataError(
            f"run {opened.run.folder} tells {_few(ours)} apart, in this order, {images.name} has {_few(theirs)}: "
            "name data with the same classes"
        )
    if ours != theirs:
        _log.warning("the run has %s, %s has %s: taken in this order", _few(ours), images.name, _few(theirs))


def _few(classes: Sequence[str]) -> str:
    """The number of classes, and the first of them."""
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def _evaluated(name: str, network: nn.Module, images: ImageSet, settings: Settings) -> Evaluation:
    """What the network does on the test images, on the device of the settings."""
    device = find_device(settings.device)
    images, network = images.to(device), network.to(device)
    at_once = evaluated_at_once(settings, images)
    example = torch.zeros(1, *images.image_shape, device=device)
    began = time.perf_counter()
    with cpu_threads(threads_of(settings, images)):
        accuracy, loss = evaluate(network, images.plain_batches("test", at_once), torch.contiguous_format)
    return Evaluation(
        model=name, data=images.name, part="test", images=len(images.test), accuracy=accuracy, loss=loss,
        macs=count_macs(network, example), params=sum(p.numel() for p in network.parameters()),
        seconds=time.perf_counter() - began,
    )  # fmt: skip
