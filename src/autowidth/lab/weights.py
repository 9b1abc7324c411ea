"""Weights that people bring: files and runs are read without running what is in them, and fitted to a network."""

from __future__ import annotations

import logging
import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autowidth.checkpoint import MODEL, RUN, CheckpointError, load_, read_run, read_tensors
from autowidth.checkpoint.tensors import UNREADABLE
from autowidth.errors import AutoWidthError
from autowidth.lab.foreign_names import in_our_names
from autowidth.lab.heads import load_but_head_
from autowidth.trace import Inputs

_log = logging.getLogger(__name__)

PICKLED = (".pt", ".pth", ".bin", ".th", ".ckpt", ".tar")
"""Endings of files that torch.save writes."""

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema")
"""Under what training scripts save a state dict beside other things; the first one that is there is taken."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and classes around a network put in front of all of its names."""

LISTED = 8
"""Tensors of each kind that an error lists; the others are counted."""


class WeightsError(AutoWidthError, ValueError):
    """Weights that cannot be read, hold code, or do not fit the network."""


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU, of a safetensors file, a file of torch.save, or the folder of a run.

    Nothing in a file is ever run: a pickle with more than tensors and plain containers in it is refused. The state
    dict may lie under one of `WRAPPERS`, and all of its names may begin with `PREFIXES`, which are left out.
    Raises WeightsError where there is nothing to read, and CheckpointError for a damaged run.
    """
    file = Path(path)
    if (folder := run_folder(file)) is not None:
        return read_tensors(read_run(folder))
    if file.is_dir():
        raise WeightsError(f"weights {file}: a folder without {RUN}; name a file, or the folder of a run")
    if not file.is_file():
        raise WeightsError(f"weights {file}: there is no such file")
    if not file.stat().st_size:
        raise WeightsError(f"weights {file}: the file is empty; copy or download it again")
    if file.suffix != ".safetensors" and file.suffix not in PICKLED:
        allowed = ", ".join((".safetensors", *PICKLED))
        raise WeightsError(f"weights {file}: what is in it cannot be told from its name; allowed endings are {allowed}")
    state = _read_safetensors(file) if file.suffix == ".safetensors" else _state_in(_read_pickled(file), file)
    return without_prefixes(state)


def run_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder of the run that a path names, itself or by its model.safetensors; None for any other path."""
    named = Path(path)
    folder = named.parent if named.name == MODEL else named
    return folder if (folder / RUN).is_file() else None


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without what stands in front of all names; the counter of an averaged model is left out."""
    found = dict(state)
    if any(name.startswith("module.") for name in found):
        found.pop("n_averaged", None)
    while prefix := next((p for p in PREFIXES if found and all(name.startswith(p) for name in found)), None):
        found = {name[len(prefix) :]: tensor for name, tensor in found.items()}
    return found


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except UNREADABLE as error:
        raise WeightsError(
            f"weights {file}: not a whole safetensors file ({error}); copy or download it again"
        ) from error


def _read_pickled(file: Path) -> Any:
    """What torch.save wrote, tensors and plain containers only. Raises WeightsError for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of files of older versions
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what half a file, or anything else, makes of the reader of pickles
        if isinstance(error, pickle.UnpicklingError) and _holds_objects(file, str(error)):
            raise WeightsError(
                f"weights {file}: it holds Python objects beside tensors, which would run code when read, so it was "
                "not read; save the network's state_dict() alone, best as .safetensors"
            ) from error
        if "TorchScript" in str(error):
            raise WeightsError(
                f"weights {file}: a TorchScript archive, which is a program; save the network's state_dict()"
            ) from error
        raise WeightsError(
            f"weights {file}: not a whole file of torch.save ({_first_line(error)}); copy or download it again"
        ) from error


def _holds_objects(file: Path, refusal: str) -> bool:
    """Whether a pickle that torch does not read as weights is whole, and so one that holds more than those."""
    if "GLOBAL" in refusal or zipfile.is_zipfile(file):
        return True
    with file.open("rb") as content:
        try:
            return len(list(pickletools.genops(content))) > 0  # parsed to its end, never run
        except Exception:  # what half a pickle makes of the parser: ValueError, struct.error, IndexError
            return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _state_in(content: Any, file: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds, itself or under one of `WRAPPERS`. Raises WeightsError where none is."""
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            return _state_in(content[name], file)
    if isinstance(content, Mapping):
        state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if state:
            return state
        raise WeightsError(
            f"weights {file}: no tensors in it, but {_listed(map(str, content)) or 'nothing'}; looked for a state "
            f"dict, alone or under {', '.join(WRAPPERS)}"
        )
    raise WeightsError(f"weights {file}: a {type(content).__name__} in it; save the network's state_dict()")


# ---- fitting ---------------------------------------------------------------------------------------------------------


def load_weights_(
    network: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Inputs | None = None,
    new_head: bool = False,
) -> tuple[str, ...]:
    """Gives the network the weights at `path`; returns the names of tensors of its head that stay fresh.

    A file fits where it holds every tensor of the network, by the same name and of the same shape, and no other; files
    of other people are understood for some built-in networks (`lab/foreign_names.py`). Of the folder of a run the
    network takes over the widths as well, for which it is traced with the example inputs. With `new_head` a head for
    another number of classes stays as it is, and a warning says so.

    Raises WeightsError, which lists all that does not fit, and CheckpointError for a run of another network. The
    network is then unchanged.
    """
    if (folder := run_folder(path)) is not None:
        return _load_run_(network, folder, example_inputs, new_head=new_head)
    state = in_our_names(network, read_weights(path))
    live = without_prefixes(network.state_dict())
    state |= {name: value for name, value in live.items() if _is_counter(name) and name not in state}
    misfits = _Misfits(live, state)
    head = misfits.head() if new_head else ()
    if misfits.any_but(head):
        raise WeightsError(
            f"weights {path} do not fit {type(network).__name__}: {misfits.described(new_head=new_head)}"
        )
    if new_head and not head:
        _log.warning("new_head has no effect: the head in %s fits, and its weights were taken", path)
    for name in head:
        rows = f"{len(state[name])} classes in the file, {len(live[name])} here"
        _log.warning("%s stays fresh: %s", name, rows)
    with torch.no_grad():
        for name, tensor in live.items():
            if name not in head:
                tensor.copy_(state[name])
    return head


def _load_run_(network: nn.Module, folder: Path, example_inputs: Inputs | None, *, new_head: bool) -> tuple[str, ...]:
    """Gives the network widths and weights of a run."""
    if example_inputs is None:
        raise WeightsError(f"weights {folder} are a run, whose widths a network takes over: pass example_inputs")
    try:
        if not new_head:
            load_(network, folder, example_inputs=example_inputs)
            return ()
        head = load_but_head_(network, folder, example_inputs)
    except CheckpointError as error:
        raise WeightsError(str(error)) from error
    _tell_head(head, folder)
    return head


def _tell_head(head: tuple[str, ...], path: str | os.PathLike[str]) -> None:
    """Warns of a head that stays fresh, or of one that did not have to."""
    if head:
        _log.warning("%s stay fresh: the weights in %s are for another number of classes", ", ".join(head), path)
    else:
        _log.warning("new_head has no effect: the head in %s fits, and its weights were taken", path)


def _is_counter(name: str) -> bool:
    """Whether a tensor only counts batches, which some files leave out."""
    return name.endswith("num_batches_tracked")


class _Misfits:
    """What of a file (`state`) and a network (`live`) does not fit each other."""

    def __init__(self, live: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        self.live, self.state = live, state
        self.missing = [name for name in live if name not in state]
        self.unexpected = [name for name in state if name not in live]
        self.shapes = [name for name in live if name in state and live[name].shape != state[name].shape]

    def head(self) -> tuple[str, ...]:
        """The tensors of a head for another number of classes: all that differ, and in the same first length only."""
        lengths = {(len(self.live[n]), len(self.state[n])) if self.live[n].dim() else (0, 0) for n in self.shapes}
        alike = all(self.live[n].shape[1:] == self.state[n].shape[1:] for n in self.shapes)
        layers = {name.rpartition(".")[0] for name in self.shapes}
        norms = any(f"{layer}.running_mean" in self.live for layer in layers)
        return tuple(self.shapes) if alike and len(lengths) == 1 and not norms else ()

    def any_but(self, names: tuple[str, ...]) -> bool:
        """Whether anything but the shapes of these tensors does not fit."""
        return bool(self.missing or self.unexpected or set(self.shapes) - set(names))

    def described(self, *, new_head: bool) -> str:
        """Everything that does not fit, and the remedy."""
        shapes = [
            f"{name} is {tuple(self.state[name].shape)} in the file and {tuple(self.live[name].shape)} in the network"
            for name in self.shapes
        ]
        parts = [
            f"{len(found)} {what}: {_listed(found)}"
            for found, what in (
                (self.missing, "missing in the file"),
                (self.unexpected, "in the file only"),
                (shapes, "of another shape"),
            )
            if found
        ]
        only_head = self.head() and not (self.missing or self.unexpected or new_head)
        other_head = "--new-head (new_head=True) keeps a fresh head for another number of classes"
        remedy = other_head if only_head else "name the network, depth and width that the file is of"
        return f"{'; '.join(parts)}. The remedy: {remedy}"


def _listed(names: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return ", ".join(known[:LISTED]) + more
