"""Tensor files: what of a model goes into one, and how one is read without believing what it says of itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor, nn

from autowidth.checkpoint.errors import CheckpointError
from autowidth.checkpoint.folder import RUN, Record, Sink, checked_path
from autowidth.reading import ReadError, opened, strict_json

HEADER_LIMIT = 4 << 20
"""Bytes that the header of a tensor file may have: some 40,000 tensors."""


def tensor_file(tensors: Mapping[str, Tensor]) -> Callable[[Sink], None]:
    """What `folder.write` takes to write these tensors as a safetensors file; `read_tensor_file` gives them back.

    They are dense, contiguous, and share no memory (see `plain`). While it is written, the file is in memory.
    """

    def content(sink: Sink) -> None:
        try:
            sink.write(as_bytes(dict(tensors), metadata={"format": "pt", "token": sink.token}))
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"these tensors cannot be written as safetensors: {error}") from error

    return content


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, contiguous, each with memory of its own: the format refuses memory that overlaps."""
    used: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        is_part = here.untyped_storage().nbytes() != here.numel() * here.element_size()
        own[name] = here.clone() if is_part or here.data_ptr() in used else here
        used.add(here.data_ptr())
    return own


def read_tensor_file(
    record: Record, name: str, *, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Name -> tensor, of a file of a run, checked against its checksum; on the CPU, its pages read as they are used.

    With `shapes` the file holds exactly these tensors. Raises CheckpointError where it is missing, damaged, or of
    another run.
    """
    path = checked_path(record, name)
    header = _header(path, record.folder)
    header.pop("__metadata__", None)
    if shapes is not None and {n: _shape(entry) for n, entry in header.items()} != shapes:
        raise _foreign(path)
    try:
        with safe_open(path, framework="pt") as file:
            token = (file.metadata() or {}).get("token")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UNREADABLE as error:
        raise CheckpointError(f"{path} is damaged: not a whole safetensors file ({error})") from error
    if token != record.token:
        raise _foreign(path)
    return tensors


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} does not belong to the {RUN} beside it: restore the files of one and the same run")


UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError)
"""What safetensors and torch make of a file that is none: lengths that overflow, element types that torch lacks."""


def _header(path: Path, folder: Path) -> dict[str, Any]:
    """What the file says of its tensors. Raises CheckpointError where that is no strict JSON, or very large."""
    try:
        with opened(path, limit=sys.maxsize, inside=folder) as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, HEADER_LIMIT))
        if len(text) < length:
            what = "cut short" if length <= HEADER_LIMIT else f"its header would have {length:,} bytes"
            raise ReadError(f"{path} is damaged: not a whole safetensors file ({what})")
        header = strict_json(text, f"the header of {path}")
    except ReadError as error:
        raise CheckpointError(f"{error}: restore the files of one and the same run") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged: not a whole safetensors file (its header is no JSON object)")
    return header


def _shape(entry: object) -> tuple[Any, ...] | None:
    """The shape in an entry of a header, if it is one."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    return tuple(shape) if isinstance(shape, list) and all(type(length) is int for length in shape) else None


# ---- of a model ------------------------------------------------------------------------------------------------------


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(Name -> contiguous tensor with memory of its own, alias -> name). Raises CheckpointError."""
    first: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
            raise CheckpointError(
                f"{name!r} of {type(model).__name__} is {told(value)}, and only dense tensors with content can be "
                "saved: keep other state in extra="
            )
        owner = first.setdefault(id(value), name)
        if owner == name:
            found[name] = value
        else:
            tied[name] = owner
    return plain(found), tied


def told(value: object) -> str:
    """What kind of thing stands in a state dict."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dim()} dims ({value.layout}, on {value.device})"
    return f"a {type(value).__name__}"
