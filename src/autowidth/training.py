"""A training as it stands, saved and taken up again bit for bit; the last few saves are kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autowidth.channels import ChannelMap
from autowidth.checkpoint import HISTORY, MODEL, CheckpointError, read_run, read_tensors
from autowidth.checkpoint.folder import RUN, read, read_bytes_of, remove
from autowidth.checkpoint.saving import write_run
from autowidth.checkpoint.tensors import plain, read_tensor_file, tensor_file
from autowidth.engine_state import StateError
from autowidth.history import History
from autowidth.loaders import load_loader_state, loader_state
from autowidth.plain_data import PlainDataError, in_strides, put_together, strides_of, taken_apart
from autowidth.randomness import load_random_state, random_state
from autowidth.reading import ReadError, strict_json

SCHEMA = 1
"""Version of what is kept beside the network. A newer one is refused."""

STATE, TENSORS = "training.json", "training.safetensors"

LIMIT, VALUES = 1 << 28, 5_000_000
"""Bytes that training.json may have, and values in it."""

_NUMBERED = re.compile(r"\d{6,9}")
"""The names of the folders that are written here, one for each save."""

_FILES = (RUN, MODEL, HISTORY, STATE, TENSORS)

_OURS = re.compile(rf"\.?({'|'.join(map(re.escape, _FILES))})(\.[0-9a-f]{{16}})?")


class Trained(Protocol):
    """What is saved: an engine, and all that it resizes. `AutoWidth` is one."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def optimizers(self) -> tuple[Optimizer, ...]: ...
    @property
    def followers(self) -> tuple[nn.Module, ...]: ...
    @property
    def channel_map(self) -> ChannelMap: ...
    @property
    def history(self) -> History: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], *, differing: Collection[str] = ()) -> None: ...


Parts = Mapping[str, Any]
"""Name -> what has a state of its own: `state_dict` and `load_state_dict`, a torch.Generator, or a DataLoader."""


def save_training(
    path: str | os.PathLike[str],
    engine: Trained,
    *,
    parts: Parts | None = None,
    extra: Mapping[str, object] | None = None,
    keep: int = 2,
) -> Path:
    """Writes the training as it stands to a new folder below `path`, and returns that folder.

    It holds everything that the future depends on: the widths and the content of the engine's model, optimizers and
    followers, the engine itself with its history, the global random state of Python, numpy and torch on every device,
    and the state of `parts`: schedule, gradient scaler, loaders (see `Resumable`), generators. `extra` are JSON values,
    such as the epoch, which `resume_` gives back. Gradients are not kept: save between two optimizer steps. The folder
    is a run too, which `load_` reads.

    The last `keep` folders stay; older ones go once the new one is whole, so that a crash, or a disk that refuses, at
    any moment leaves one that can be gone on with. Raises PlainDataError for a state that cannot be kept without
    pickle, CheckpointError, and WriteError, an OSError, where the disk refuses.
    """
    folder = Path(path)
    whole = saved_trainings(folder)
    target = folder / f"{1 + max((int(one.name) for one in whole), default=0):06}"
    files = _files(engine, parts or {})
    try:
        write_run(
            target, engine.model, history=engine.history, channel_map=engine.channel_map, extra=extra,
            fields={"training": SCHEMA}, files=files,
        )  # fmt: skip
    except BaseException:
        with contextlib.suppress(OSError):
            target.rmdir()
        raise
    with contextlib.suppress(OSError, CheckpointError):  # the new one is there: what cannot go now goes next time
        for old in whole[: len(whole) + 1 - max(keep, 1)]:
            remove(old)
        _clear(folder, int(target.name))
    return target


def saved_trainings(path: str | os.PathLike[str]) -> list[Path]:
    """The folders below `path` that a training can be taken up from, the oldest first; none where there is no such."""
    folder = Path(path)
    names = sorted(filter(_NUMBERED.fullmatch, os.listdir(folder)), key=int) if folder.is_dir() else []
    return [folder / name for name in names if _is_whole(folder / name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where a training was taken up: the folder, and what was given to `save_training` as `extra`."""

    folder: Path
    extra: dict[str, Any]


def resume_(
    path: str | os.PathLike[str],
    engine: Trained,
    *,
    parts: Parts | None = None,
    differing: Collection[str] = (),
) -> Resumed:
    """Takes a training up where it was saved last: the next step is the one that would have followed, bit for bit.

    `path` is what was given to `save_training`, or one of the folders below it. Model, optimizers, followers, engine
    and `parts` are built as they were at the start of the training, in the same order and under the same names; shapes
    are made those of the save. What an engine is made with and differs is refused unless `differing` names it (see
    `AutoWidth.load_state_dict`). The random state is put back last. A save that is found damaged is passed over for the
    one before it, with a warning.

    Raises CheckpointError where there is nothing to take up, or it is damaged or too new; StateError where it does not
    fit what was built. Where only the content of an optimizer or a part turns out not to fit, the model has the shapes
    of the save already: build everything anew.
    """
    found = read_training(path)
    state, parts = found.state, parts or {}
    _check_model(found.model, engine)
    _check_kinds(state, engine, parts)
    engine.load_state_dict(state["engine"], differing=differing)
    with _fitting("the model"):
        _load_module(engine.model, {**state["model"], "content": found.model})
    for number, (follower, content) in enumerate(zip(engine.followers, state["followers"], strict=True), 1):
        with _fitting(f"follower {number}"):
            _load_module(follower, content)
    for number, (optimizer, content) in enumerate(zip(engine.optimizers, state["optimizers"], strict=True), 1):
        with _fitting(f"optimizer {number}"):
            optimizer.load_state_dict(content["content"])
    for name, part in parts.items():
        with _fitting(f"the part {name!r}"):
            _load_part(part, state["parts"][name])
    with _fitting("the random state"):
        load_random_state(state["random"])
    return Resumed(folder=found.folder, extra=found.extra)


# ---- what goes in ----------------------------------------------------------------------------------------------------


def _files(engine: Trained, parts: Parts) -> dict[str, Any]:
    """The files beside those of the run. Raises PlainDataError."""
    own = engine.state_dict()
    del own["history"]  # the run has it
    model = _module_state(engine.model)
    del model["content"]  # and this
    state = {
        "engine": own,
        "model": model,
        "followers": [_module_state(follower) for follower in engine.followers],
        "optimizers": [{"kind": type(o).__name__, "content": o.state_dict()} for o in engine.optimizers],
        "parts": {name: _part_state(name, part) for name, part in parts.items()},
        "random": random_state(),
    }
    tree, tensors = taken_apart(state, name="training")
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False)
    return {STATE: text.encode(), TENSORS: tensor_file(plain(tensors))}


def _module_state(module: nn.Module) -> dict[str, Any]:
    """The content of a module: its state dict, buffers that are not in it, and strides that are not the usual ones."""
    content = dict(module.state_dict())
    shown = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    strides = {name: found for name, tensor in shown.items() if (found := strides_of(tensor)) is not None}
    hidden = {name: buffer for name, buffer in module.named_buffers() if name not in content}
    return {"content": content, "hidden": hidden, "strides": strides}


def _part_state(name: str, part: Any) -> dict[str, Any]:
    """The state of a part. Raises StateError where it has none."""
    if isinstance(part, torch.Generator):
        return {"generator": part.get_state()}
    found = loader_state(part)
    if found is None:
        raise StateError(
            f"the part {name!r} is a {type(part).__name__} without a state_dict: leave it out, or wrap a loader in "
            "autowidth.Resumable"
        )
    return found


def _load_part(part: Any, state: dict[str, Any]) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state["generator"])
    else:
        load_loader_state(part, state)


def _is_whole(folder: Path) -> bool:
    """Whether a training can be taken up from this folder, by what its record says."""
    try:
        return "training" in read(folder).fields
    except CheckpointError:
        return False


def _clear(folder: Path, newest: int) -> None:
    """Removes what saves and removals that were cut short left in folders older than the newest: our own files only."""
    for name in filter(_NUMBERED.fullmatch, os.listdir(folder)):
        place = folder / name
        if int(name) < newest and not (place / RUN).exists():
            for file in place.iterdir():
                if _OURS.fullmatch(file.name):
                    file.unlink()
            with contextlib.suppress(OSError):  # somebody else's file is there
                place.rmdir()


# ---- what comes out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What one folder holds: the state, with tensors, the content of the model, and what was given as `extra`."""

    folder: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    extra: dict[str, Any]


def read_training(path: str | os.PathLike[str]) -> Saved:
    """The newest save at `path` that is whole. Raises CheckpointError."""
    folder = Path(path)
    candidates = [folder] if (folder / RUN).exists() else saved_trainings(folder)[::-1]
    if not candidates:
        raise CheckpointError(f"no training can be taken up at {folder}: nothing was saved there yet; begin anew")
    for candidate in candidates[:-1]:
        try:
            return _read(candidate)
        except CheckpointError as error:
            warnings.warn(f"{error}; going on from the save before it", stacklevel=3)
    return _read(candidates[-1])


def _read(folder: Path) -> Saved:
    """What a folder holds. Raises CheckpointError."""
    record = read(folder)
    schema = record.fields.get("training")
    if type(schema) is not int:
        raise CheckpointError(
            f"{folder} holds a run, but no training that can be taken up: name a folder of a training"
        )
    if schema > SCHEMA:
        raise CheckpointError(
            f"the training in {folder} has format {schema}, this version reads up to {SCHEMA}: use a newer autowidth"
        )
    run = read_run(folder)
    try:
        tree = strict_json(read_bytes_of(record, STATE, limit=LIMIT), str(folder / STATE), most=VALUES)
        state = put_together(tree, read_tensor_file(record, TENSORS))
        history = run.history()
        state["engine"]["history"] = [] if history is None else [line.decode() for line in history.lines()]
        if missing := {"engine", "model", "followers", "optimizers", "parts", "random"} - state.keys():
            raise KeyError(min(missing))
    except (ReadError, PlainDataError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE} is damaged ({error}): take up another save") from error
    return Saved(folder=folder, state=state, model=read_tensors(run), extra=run.extra)


def _check_kinds(state: Mapping[str, Any], engine: Trained, parts: Parts) -> None:
    """Raises StateError where other optimizers, followers or parts were saved than are there."""
    kinds = [found["kind"] for found in state["optimizers"]]
    if kinds != [type(optimizer).__name__ for optimizer in engine.optimizers]:
        raise StateError(f"the training was saved with the optimizers {kinds}: attach the engine to the same, in order")
    for number, (found, optimizer) in enumerate(zip(state["optimizers"], engine.optimizers, strict=True), 1):
        saved = [len(group["params"]) for group in found["content"]["param_groups"]]
        own = [len(group["params"]) for group in optimizer.param_groups]
        if saved != own:
            raise StateError(
                f"optimizer {number} had groups of {saved} parameters, here they are {own}: build it alike"
            )
    if len(state["followers"]) != len(engine.followers):
        raise StateError(
            f"the training was saved with {len(state['followers'])} followers, the engine has {len(engine.followers)}: "
            "attach it with the same"
        )
    if other := sorted(state["parts"].keys() ^ parts.keys()):
        where = "in the save" if other[0] in state["parts"] else "in parts="
        raise StateError(f"the part {other[0]!r} is only {where}: give the same names to save_training and resume_")


def _check_model(content: Mapping[str, Tensor], engine: Trained) -> None:
    """Raises StateError where the model has other tensors than were saved, whatever their shapes."""
    if other := sorted(content.keys() ^ engine.model.state_dict().keys()):
        where = "in the save" if other[0] in content else f"in this {type(engine.model).__name__}"
        raise StateError(f"the tensor {other[0]!r} is only {where}: build the model as it was built for the training")


def _load_module(module: nn.Module, state: dict[str, Any]) -> None:
    """Gives a module the content that was saved, strictly, in the memory format that it had."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in own.items():
        laid = in_strides(tensor.detach(), state["strides"].get(name))
        if laid.stride() != tensor.stride():
            tensor.data = laid
    versioned = OrderedDict(state["content"])
    versioned._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    module.load_state_dict(versioned, strict=True)
    with torch.no_grad():
        for name, content in state["hidden"].items():
            own[name].copy_(content)


@contextlib.contextmanager
def _fitting(what: str) -> Iterator[None]:
    """Says of an error that `what` does not take its state."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise StateError(f"what was saved does not fit {what}: {error}; build it as it was") from error
