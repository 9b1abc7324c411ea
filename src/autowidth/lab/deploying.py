"""A run as a file that runs elsewhere: ONNX or a torch.export program, with what its images must be like."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from autowidth.errors import AutoWidthError
from autowidth.export import (
    ONNX_PACKAGES,
    TOLERANCE,
    Exported,
    OutputError,
    Scaled,
    check_output,
    export_onnx,
    export_program,
)
from autowidth.extras import check_extra
from autowidth.lab.data import DataError
from autowidth.lab.prepare import load_images
from autowidth.lab.saved import Opened, open_run
from autowidth.version import __version__

Where = Literal["inside", "beside"]
"""Where something lies that belongs to the network: in its file, or in FILE.json beside it."""

AT_ONCE = 16
"""Real images that a file is checked on at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """The files of a run, and why they were not checked on real images, if they were not."""

    files: tuple[Exported, ...]
    beside: tuple[str, ...]
    unchecked: str | None

    def as_json(self) -> dict[str, Any]:
        """All of it, in what JSON can hold."""
        files = [exported.as_json() for exported in self.files]
        return {"files": files, "beside": list(self.beside), "unchecked": self.unchecked}


def export_run(
    path: Path,
    *,
    onnx: Path | None = None,
    program: Path | None = None,
    normalization: Where = "inside",
    classes: Where = "inside",
    data: str | None = None,
    images: int = 64,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Deployed:
    """Writes the network of a run as an ONNX file, as a torch.export program, or both, and checks each.

    normalization: inside, the file takes pixels from 0 to 1 and scales them; beside, it takes scaled pixels, and mean
    and std lie in FILE.json. classes: their names, in the metadata of the file or in FILE.json. data: where the images
    come from that it is checked on, besides random numbers; None for the test images of the run. images: how many.

    Raises what `open_run`, `export_onnx` and `export_program` raise, and DataError for `data` that cannot be read.
    Where one of the files cannot be written, none of it is.
    """
    wanted = [file for file in (onnx, program) if file is not None]
    if not wanted:
        raise OutputError("no file is named: give --onnx FILE, --torch-export FILE, or both")
    if onnx is not None and onnx == program:
        raise OutputError(f"{onnx} cannot be an ONNX file and a program of torch.export: name two files")
    if onnx is not None:
        check_extra("onnx", ONNX_PACKAGES, what="writing an ONNX file")
    about = "beside" in (normalization, classes)
    for file in (*wanted, *(_beside(file) for file in wanted if about)):
        check_output(file, force=force)
    opened = open_run(path)
    real, unchecked = _real(opened, normalization, data, images)
    files, beside = _write(opened, onnx, program, normalization, classes, real, tolerance)
    return Deployed(files=files, beside=beside, unchecked=unchecked)


def _write(
    opened: Opened, onnx: Path | None, program: Path | None, normalization: Where, classes: Where, real: list[Tensor],
    tolerance: float,
) -> tuple[tuple[Exported, ...], tuple[str, ...]]:  # fmt: skip
    """Writes all files under names of their own, and when all are there gives them those that are wanted."""
    scaling, example = opened.scaling, torch.zeros(2, *opened.input_shape)
    network = Scaled(opened.network, scaling.mean, scaling.std) if normalization == "inside" else opened.network
    texts = _description(opened, normalization, classes, "inside")
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in texts.items()}
    given: dict[str, Any] = {"example_inputs": example, "real_inputs": real, "tolerance": tolerance, "force": True}
    given["metadata"] = metadata
    staged: dict[Path, Path] = {}
    files, beside = [], []
    try:
        if onnx is not None:
            staged[onnx] = _staged(onnx)
            files.append(export_onnx(network, staged[onnx], names=(("images",), ("scores",)), **given))
        if program is not None:
            staged[program] = _staged(program)
            files.append(export_program(network, staged[program], **given))
        for file in list(staged) if "beside" in (normalization, classes) else []:
            staged[_beside(file)] = _staged(_beside(file))
            about = _description(opened, normalization, classes, "beside")
            staged[_beside(file)].write_text(json.dumps(about, indent=1) + "\n")
            beside.append(str(_beside(file)))
        for file, now in staged.items():
            os.replace(now, file)
    finally:
        for now in staged.values():
            now.unlink(missing_ok=True)
    return tuple(replace(f, path=str(p)) for f, p in zip(files, staged, strict=False)), tuple(beside)


def _staged(file: Path) -> Path:
    """Where a file lies until all that belong together are there."""
    return file.with_name(f".{file.name}.{os.getpid()}")


def _real(opened: Opened, normalization: Where, data: str | None, images: int) -> tuple[list[Tensor], str | None]:
    """Batches of real images as the file takes them, and why there are none, if there are none.

    What the user names must be there; what the run was trained on need not.
    """
    settings = opened.settings.model_copy(
        update={"normalize": opened.scaling, "data": data or opened.settings.data, "holdout": 0.0}
    )
    try:
        found = load_images(settings)
        if found.image_shape != opened.input_shape:
            raise DataError(
                f"images of {found.name} have shape {found.image_shape}, the run takes {opened.input_shape}: name "
                "other data"
            )
    except (AutoWidthError, OSError) as error:
        if data is not None:
            raise
        return [], str(error)
    mean, std = (torch.tensor(part)[:, None, None] for part in (opened.scaling.mean, opened.scaling.std))
    batches = (x for x, _ in found.plain_batches("test", min(AT_ONCE, images)))
    some = islice(batches, -(-images // AT_ONCE))
    return [x * std + mean if normalization == "inside" else x for x in some], None


def _description(opened: Opened, normalization: Where, classes: Where, place: Where) -> dict[str, Any]:
    """What lies at this place: of everything in the file what its pixels are, beside it what is asked for there."""
    channels, height, width = opened.input_shape
    found: dict[str, Any] = {
        "pixels": "from 0 to 1" if normalization == "inside" else "(pixel from 0 to 1 - mean) / std, by channel",
        "input_shape": [channels, height, width],
        "model": opened.settings.model,
        "autowidth": __version__,
    }
    if normalization == place == "beside":
        found["normalization"] = {"mean": list(opened.scaling.mean), "std": list(opened.scaling.std)}
    if classes == place:
        found["classes"] = list(opened.classes)
    return found


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")
