"""What a run needs before it trains: device, images, network, folder; what cannot be is refused in a sentence."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from autowidth.checkpoint import HISTORY, MODEL, RUN
from autowidth.errors import AutoWidthError
from autowidth.lab.data import ImageSet, load, resizable
from autowidth.lab.keeping import TRAINING
from autowidth.lab.models import MODELS, UnknownModelError, resolve, spec
from autowidth.lab.scaling import scaled_by
from autowidth.lab.settings import Settings
from autowidth.lab.weights import load_weights_


class DeviceError(AutoWidthError, ValueError):
    """A device that this machine does not have."""


class ModelError(AutoWidthError, ValueError):
    """A model that cannot be built, or that does not fit the images."""


class FolderError(AutoWidthError, ValueError):
    """A folder that a run cannot be written to."""


def load_images(settings: Settings, *, extent: tuple[int, int] | None = None) -> ImageSet:
    """The image set that the settings name, scaled and varied as they say.

    `extent` (H, W) is what images of any size are resized to where the settings name no size. Raises as
    `autowidth.lab.data.load` does.
    """
    size = settings.size or (extent if extent and resizable(settings.data) else None)
    images = load(
        settings.data, holdout=settings.holdout, limit=settings.limit, pool=settings.pool, size=size,
        skip_corrupt=settings.skip_corrupt, stream_above=settings.stream_above, workers=settings.workers,
    )  # fmt: skip
    return scaled_by(images.augmented(settings.augment), settings.normalize)


def build_network(settings: Settings, images: ImageSet) -> nn.Module:
    """The starting network for these images, on the CPU: with the weights that the settings name, or fresh ones.

    Raises as `built` does, and WeightsError for weights that cannot be read or do not fit.
    """
    network = built(settings.model, images.image_shape, len(images.classes), width=settings.width, of=images.name)
    if settings.weights is not None:
        example = torch.zeros(2, *images.image_shape)
        load_weights_(network, settings.weights, example_inputs=example, new_head=settings.new_head)
    return network


def built(
    name: str, shape: tuple[int, int, int], classes: int, *, width: float = 1.0, of: str = "this data"
) -> nn.Module:
    """The network of this name for images of a shape (C, H, W), fresh weights out of the global generator, on the CPU.

    Raises UnknownModelError for a name that leads nowhere, ModelError where the network cannot be built or does not
    give one score per class; `of` names the images there.
    """
    channels, height, breadth = shape
    if ":" not in name and min(height, breadth) < (least := spec(name).smallest):
        fitting = ", ".join(k for k, s in MODELS.items() if s.smallest <= min(height, breadth)) or "none built in"
        raise ModelError(
            f"{name} needs images of at least {least} x {least}, those of {of} are {height} x {breadth}; "
            f"models that take them: {fitting}"
        )
    try:
        network = resolve(name, num_classes=classes, in_channels=channels, width=width)
    except UnknownModelError:
        raise
    except Exception as error:  # it is the user's code that runs here
        raise ModelError(f"cannot build the model {name}: {type(error).__name__}: {error}") from error
    _check_scores(name, network, torch.zeros(2, *shape), classes)
    return network


def _check_scores(name: str, network: nn.Module, example: Tensor, classes: int) -> None:
    """Raises ModelError where the network does not turn images into one score per class."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            scores = network(example)
    except Exception as error:  # it is the user's code that runs here
        raise ModelError(
            f"{name} does not run on images of shape {tuple(example.shape)}: {type(error).__name__}: {error}"
        ) from error
    network.train(training)
    got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if got != (len(example), classes):
        raise ModelError(
            f"{name} returns {got} for images of shape {tuple(example.shape)}, expected a tensor of shape "
            f"{(len(example), classes)}: one score per class"
        )


def find_device(text: str) -> torch.device:
    """The device of this name; `auto` is cuda where there is one. Raises DeviceError."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {text!r} is not known here; allowed are auto, cpu, cuda and cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} CUDA device{'' if count == 1 else 's'}"
        raise DeviceError(f"device {text!r} is not there: torch {torch.__version__} sees {found}; use cpu or auto")
    return device


RUNS = Path("runs")
"""Where runs are written that name no folder."""


def free_folder(name: str, *, wanted: Callable[[Path], bool] = lambda _: False) -> Path:
    """A folder for a run of this name, in characters that every file system takes; where there is one, the next free.

    runs/NAME, runs/NAME-2, runs/NAME-3 and so on: a run that names no folder replaces no other. One of them that is
    `wanted` is taken although it is there.
    """
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    names = (plain if number == 1 else f"{plain}-{number}" for number in itertools.count(1))
    return next(RUNS / free for free in names if not (RUNS / free).exists() or wanted(RUNS / free))


def check_folder(out: Path) -> None:
    """Raises FolderError where a run cannot be written to `out`, or where something that is no run lies there.

    Leaves nothing behind, not even the folder.
    """
    if out.exists() and not out.is_dir():
        raise FolderError(f"cannot write a run to {out}: it is a file; name a folder")
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        names = [] if missing else os.listdir(out)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise FolderError(f"cannot write a run to {out}: {error.strerror}; name a folder you may write to") from error
    finally:
        for folder in missing:
            if folder.is_dir():
                folder.rmdir()
    # Files with such names are a run, or what a run left whose saving was cut short.
    if names and not any(file in name for name in names for file in (RUN, MODEL, HISTORY, TRAINING)):
        raise FolderError(
            f"{out} is not empty and holds no {RUN}, so it is no folder of a run: name a new or an empty folder"
        )
