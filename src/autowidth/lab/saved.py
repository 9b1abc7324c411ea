"""What a saved run says of itself, so that it can be used from its folder alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autowidth.channels import ChannelMap
from autowidth.checkpoint import Run, load_, read_run
from autowidth.checkpoint.saving import write_run
from autowidth.errors import AutoWidthError
from autowidth.lab.data import ImageSet
from autowidth.lab.data.decoding import MOST_PIXELS
from autowidth.lab.prepare import built
from autowidth.lab.result import Resized
from autowidth.lab.scaling import Scaling
from autowidth.lab.settings import Settings, renamed, settings_of
from autowidth.version import __version__
from autowidth.widths import WIDTHS, widths_of

MOST_CHANNELS = 4
"""Of the images that this laboratory reads."""


class SavedError(AutoWidthError, ValueError):
    """A run that does not say what it needs to be used."""


def description(settings: Settings, images: ImageSet) -> dict[str, Any]:
    """What a run keeps beside its weights, in JSON: model, version, classes, shape and scaling of its images."""
    return {
        "model": settings.model,
        "version": __version__,
        "classes": list(images.classes),
        "input_shape": list(images.image_shape),
        "normalization": {"mean": list(images.mean), "std": list(images.std)},
        "settings": settings.model_dump(mode="json"),
    }


def save_run(path: str | os.PathLike[str], settings: Settings, images: ImageSet, result: Resized) -> None:
    """Writes a run that `open_run` can read, and its widths for people. Raises what `autowidth.save` raises."""
    extra = description(settings, images) | {"result": result.as_json()}
    start = result.history.widths_start
    widths = widths_of(result.network, result.channel_map, start=start, name=settings.model)
    write_run(
        path, result.network, history=result.history, channel_map=result.channel_map, extra=extra,
        files={WIDTHS: widths.text().encode()},
    )  # fmt: skip


KEPT = ("model", "width", "data", "size", "pool", "augment", "skip_corrupt", "stream_above", "workers")
"""Settings of a run that hold for whatever is made of it; all others are of its training."""


def table_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings, as a table, of what starts from a run: its model, data, scaling, and its weights.

    Raises CheckpointError where it is missing or damaged, SavedError where it does not say what it is of.
    """
    run = _described(path)
    *_, scaling = _said(run)
    settings = settings_of(renamed(run.extra["settings"]))
    kept = {name: getattr(settings, name) for name in KEPT}
    return {**kept, "weights": run.folder, "normalize": scaling}


def _described(path: str | os.PathLike[str]) -> Run:
    """What the run in a folder says. Raises as `table_of` does."""
    run = read_run(Path(path))
    if missing := [name for name in ("settings", "classes", "input_shape", "normalization") if name not in run.extra]:
        raise SavedError(
            f"run {run.folder} does not say its {missing[0]}: it was saved by another program or an older version; "
            "train it again, or load it in Python with autowidth.load_"
        )
    return run


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run ready for use: its network in evaluation mode, and what its images must be like (C, H, W)."""

    run: Run
    network: nn.Module
    channel_map: ChannelMap
    settings: Settings
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    scaling: Scaling


def open_run(path: str | os.PathLike[str]) -> Opened:
    """The run in a folder, its network built anew and given the widths and weights of the file.

    Raises CheckpointError where it is missing, damaged or of another network, SavedError where it does not say what it
    is of, UnknownModelError or ModelError where its network cannot be built here.
    """
    run = _described(path)
    channels, height, width, classes, scaling = _said(run)
    settings = settings_of(renamed(run.extra["settings"]))
    network = built(settings.model, (channels, height, width), len(classes), width=settings.width)
    example = torch.zeros(2, channels, height, width)
    channel_map = load_(network, run.folder, example_inputs=example)
    return Opened(
        run=run, network=network.eval(), channel_map=channel_map, settings=settings, classes=classes,
        input_shape=(channels, height, width), scaling=scaling,
    )  # fmt: skip


def _said(run: Run) -> tuple[int, int, int, tuple[str, ...], Scaling]:
    """Channels, height, width, classes and scaling of the run's images. Raises SavedError where they cannot be."""
    extra = run.extra
    try:
        channels, height, width = map(_length, extra["input_shape"])
        classes = tuple(extra["classes"])
        scaling = Scaling(
            tuple(map(_number, extra["normalization"]["mean"])), tuple(map(_number, extra["normalization"]["std"]))
        )
        if not classes or not all(isinstance(name, str) for name in classes) or not isinstance(extra["settings"], dict):
            raise ValueError("its classes are no names, or its settings no table")
        if height * width > MOST_PIXELS or channels > MOST_CHANNELS or len(scaling.mean) != channels:
            raise ValueError(f"images of {channels} x {height} x {width} with {len(scaling.mean)} means")
    except (TypeError, ValueError, KeyError) as error:
        raise SavedError(f"run {run.folder} does not say of what images it is ({error}): train it again") from error
    return channels, height, width, classes, scaling


def _length(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"a length of {str(value)[:30]}")
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"a number that is {str(value)[:30]}")
    return float(value)  # type: ignore[arg-type]
