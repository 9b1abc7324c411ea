"""Shapes, weights and history in safetensors + JSON; a fresh model takes the shapes of the file."""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autowidth.channels import ChannelMap, IndexMap, ParamAxis, ResizePlan
from autowidth.errors import AutoWidthError
from autowidth.history import History
from autowidth.surgery import apply_
from autowidth.trace import Inputs, trace

SCHEMA = 1
"""Version of run.json. A reader refuses a run of a newer version."""

MODEL = "model.safetensors"
RUN = "run.json"
HISTORY = "history.jsonl"

_NEAR = 1e-6
"""Numbers closer than this are the same where widths are solved for in float64; true ones are whole."""


class CheckpointError(AutoWidthError, ValueError):
    """A run that cannot be written, is missing, damaged or too new, or belongs to another network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What run.json says about a saved run."""

    folder: Path
    torch_version: str
    """The version of torch that wrote the run."""
    shapes: dict[str, tuple[int, ...]]
    """Name in the model's state dict -> shape."""
    widths: dict[str, int] | None
    """Channel group name -> width, or None where the run was saved without a channel map."""
    extra: dict[str, Any]
    """What the caller gave to `save`."""
    tied: dict[str, str]
    """Name of a tensor that is not in the file -> name of the one that it is tied to."""
    events: int | None
    """How many events of the history belong to this run, or None where it was saved without a history."""
    token: str
    """Names the files that were written together."""

    def file(self, name: str) -> Path:
        """Where the content of this run's file `name` lies: still under its staged name if a save was cut short."""
        staged = _staged(self.folder, name, self.token)
        return staged if staged.exists() else self.folder / name

    def history(self) -> History | None:
        """The history up to the moment of the save, or None where the run was saved without one.

        Events that a file in use has gained since are left out. Raises CheckpointError where it is missing or short,
        HistoryError where it is damaged.
        """
        if self.events is None:
            return None
        path = self.file(HISTORY)
        if not path.is_file():
            raise CheckpointError(f"run {self.folder} was saved with a history, but has no {HISTORY}: copy it there")
        whole = History.read(path)
        if len(whole) < self.events:
            raise CheckpointError(f"{path} holds {len(whole)} events, but the run was saved after {self.events}")
        history = History(whole.widths_start)
        for event in whole.events[: self.events]:
            history.append(event)
        return history


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    history: History | None = None,
    channel_map: ChannelMap | None = None,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Writes a run to the folder `path`: model.safetensors, run.json, and history.jsonl if a history is given.

    A run that is there already is replaced; other files of the folder stay. A crash at any moment leaves the old run
    or the new one readable by `load_` and `read_run`, whole. Of several processes let only one save.
    `extra` goes into run.json: JSON values only. Tied tensors are written once.

    Raises CheckpointError for a state that is no plain tensor, a channel map of another moment, an `extra` that JSON
    does not give back, or a path that is a file: the old run is then untouched. Raises OSError where the disk refuses:
    the old run or the new one is then there, as after a crash.
    """
    folder, token = Path(path), secrets.token_hex(8)
    tensors, tied = _tensors(model)
    record = _record(token, tensors, tied) | {
        "events": None if history is None else len(history),
        "widths": None if channel_map is None else _checked_widths(channel_map, model),
        "extra": _checked_extra(extra or {}),
    }
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot save a run to {folder}: it is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    try:
        _stage(folder, record, tensors, history)
        os.replace(_staged(folder, RUN, token), folder / RUN)  # from here on the new run is the run
    except BaseException:
        _settle(folder)
        raise
    _sync(folder)
    for name in (MODEL,) if history is None else (MODEL, HISTORY):
        os.replace(_staged(folder, name, token), folder / name)
    _sync(folder)
    _sync(folder.absolute().parent)


def load_(model: nn.Module, path: str | os.PathLike[str], *, example_inputs: Inputs) -> ChannelMap:
    """Gives a fresh model of the run's class the widths and the content of the run; returns its channel map.

    The model is traced with `example_inputs`, each channel group is resized to the width that the shapes in the file
    show, and the file is loaded strictly: the outputs are those of the saved model, bit for bit. Parameters stay the
    same objects; build or rebuild an optimizer that already holds state.

    Raises CheckpointError where the run is missing, damaged, too new or of another network, TraceError where the model
    does not run on the example inputs. The model is then unchanged.
    """
    run = read_run(path)
    state = read_tensors(run)
    _check_names(run, model, state)
    channel_map = trace(model, example_inputs)
    widths = _solve(run, channel_map)
    plan = {
        group.name: _map_between(group.width, widths[group.name])
        for group in channel_map.groups
        if widths[group.name] != group.width
    }
    _check_shapes(run, channel_map, plan)
    try:
        _take_over(copy.deepcopy(model), channel_map, plan, state)  # what fails, fails on a copy
    except Exception as error:
        raise CheckpointError(f"run {run.folder} does not fit {type(model).__name__}: {error}") from error
    return _take_over(model, channel_map, plan, state)


def read_run(path: str | os.PathLike[str]) -> Run:
    """What run.json says about the run in the folder `path`.

    Raises CheckpointError where it is missing, damaged or too new.
    """
    folder = Path(path)
    try:
        record = json.loads((folder / RUN).read_bytes())
        schema = record["schema"]
        run = _run(folder, record) if schema <= SCHEMA else None
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"has no {RUN}" if folder.is_dir() else "is no folder"
        raise CheckpointError(f"no run at {folder}: it {what}; name a folder that save() has written") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / RUN} is damaged ({type(error).__name__}: {error}): restore it, or save the run again"
        ) from error
    if run is None:
        raise CheckpointError(
            f"{folder / RUN} has format {schema}, this version reads up to {SCHEMA}: install a newer autowidth"
        )
    return run


def _run(folder: Path, record: dict[str, Any]) -> Run:
    """The run of this record; raises KeyError, TypeError, ValueError or AttributeError where it is none."""
    if not re.fullmatch("[0-9a-f]{16}", record["token"]):  # it becomes part of a file name
        raise ValueError(f"its token is {record['token']!r}, allowed are 16 hex digits")
    return Run(
        folder=folder,
        torch_version=record["torch"],
        shapes={name: tuple(map(int, shape)) for name, shape in record["shapes"].items()},
        widths=None if record["widths"] is None else {group: int(w) for group, w in record["widths"].items()},
        extra=dict(record["extra"]),
        tied=dict(record["tied"]),
        events=None if record["events"] is None else int(record["events"]),
        token=record["token"],
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def _staged(folder: Path, name: str, token: str) -> Path:
    """Where a file lies until its save is complete."""
    return folder / f".{name}.{token}"


_STAGED = re.compile(rf"\.(?P<name>{'|'.join(map(re.escape, (RUN, MODEL, HISTORY)))})\.(?P<token>[0-9a-f]{{16}})")
"""The names that only `save` gives: whatever else lies in the folder is the user's."""

_UNFINISHED = re.compile(rf"\.\.{re.escape(HISTORY)}\.[0-9a-f]{{16}}\.\d+")
"""A staged history that a crash cut short while it was written (see History.write)."""


def _stage(folder: Path, record: dict[str, object], tensors: dict[str, Tensor], history: History | None) -> None:
    """Writes all files of a run under their staged names, and has the disk confirm them."""
    token = str(record["token"])
    run, weights = _staged(folder, RUN, token), _staged(folder, MODEL, token)
    run.write_text(json.dumps(record, indent=1, allow_nan=False))
    try:
        save_file(tensors, weights, metadata={"format": "pt", "token": token})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"cannot write {folder / MODEL}: {error}") from error
    shutil.copymode(run, weights)  # safetensors lets nobody but the owner read its files
    if history is not None:
        history.write(_staged(folder, HISTORY, token))
    for path in (run, weights):
        _sync(path)
    _sync(folder)


def _settle(folder: Path) -> None:
    """Completes a save that was cut short after its run.json was in place, and removes what others left behind."""
    try:
        token = read_run(folder).token
    except CheckpointError:
        token = None
    for staged in list(folder.iterdir()):
        match = _STAGED.fullmatch(staged.name)
        if match and token is not None and match["token"] == token:
            os.replace(staged, folder / match["name"])
        elif (match or _UNFINISHED.fullmatch(staged.name)) and staged.is_file():
            staged.unlink()


def _sync(path: Path) -> None:
    """Has the disk confirm a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- what goes in ----------------------------------------------------------------------------------------------------


def _record(token: str, tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, object]:
    """The part of run.json that the tensors decide."""
    shapes = {name: list(tensors[tied.get(name, name)].shape) for name in (*tensors, *tied)}
    return {"schema": SCHEMA, "token": token, "torch": str(torch.__version__), "tied": tied, "shapes": shapes}


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(Name -> contiguous tensor with memory of its own, alias -> name). Raises CheckpointError."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    used: set[int] = set()
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
            raise CheckpointError(
                f"{name!r} of {type(model).__name__} is {_told(value)}, and only dense tensors with content can be "
                "saved: keep other state in extra="
            )
        owner = first.setdefault(id(value), name)
        if owner != name:
            tied[name] = owner
            continue
        plain = value.detach().cpu().contiguous()
        # The format refuses tensors whose memory overlaps.
        is_part = plain.untyped_storage().nbytes() != plain.numel() * plain.element_size()
        tensors[name] = plain.clone() if is_part or plain.data_ptr() in used else plain
        used.add(plain.data_ptr())
    return tensors, tied


def _told(value: object) -> str:
    """What kind of thing stands in a state dict."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dim()} dims ({value.layout}, on {value.device})"
    return f"a {type(value).__name__}"


def _checked_widths(channel_map: ChannelMap, model: nn.Module) -> dict[str, int]:
    """The widths of the map. Raises CheckpointError where the model has other shapes."""
    for name, shape in _shapes(model).items():
        if channel_map.shapes.get(name, shape) != shape:
            raise CheckpointError(
                f"{name!r} has shape {shape}, but the channel map was made for {channel_map.shapes[name]}: "
                "save with the map that the last resize returned, or trace again"
            )
    return channel_map.widths


def _checked_extra(extra: Mapping[str, object]) -> dict[str, object]:
    """The same as a dict. Raises CheckpointError for what JSON does not give back as it was."""
    for key, value in extra.items():
        try:
            exact = isinstance(key, str) and json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            exact = False
        if not exact:
            raise CheckpointError(
                f"extra[{key!r}] cannot be kept in JSON: allowed are None, bool, int, finite float, str, lists, and "
                f"dicts with str keys, got {type(value).__name__}"
            )
    return dict(extra)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}


# ---- what comes out --------------------------------------------------------------------------------------------------


def read_tensors(run: Run) -> dict[str, Tensor]:
    """Name -> tensor, tied names included. Raises CheckpointError where the file is missing or damaged."""
    path = run.file(MODEL)
    if not path.is_file():
        raise CheckpointError(f"run {run.folder} has no {MODEL}: copy it there, or name another run")
    try:
        with safe_open(path, framework="pt") as file:
            token = (file.metadata() or {}).get("token")
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: not a whole safetensors file ({error})") from error
    if token != run.token or run.shapes.keys() != state.keys() | run.tied.keys():
        raise CheckpointError(
            f"{path} does not belong to the {RUN} beside it: restore the files of one and the same run"
        )
    return state | {alias: state[name] for alias, name in run.tied.items()}


def _check_names(run: Run, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where names, number of dims, dtypes or ties of model and file differ."""
    kind = type(model).__name__
    live = model.state_dict(keep_vars=True)
    for names, has, lacks in (
        (state.keys() - live.keys(), "the run", kind),
        (live.keys() - state.keys(), kind, "the run"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise CheckpointError(
                f"run {run.folder} is of another network: {has} has {len(names)} tensors that {lacks} lacks "
                f"({some}); build the model as it was built for the run"
            )
    owners: dict[int, str] = {}
    for name, tensor in live.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != state[name].dim():
            raise CheckpointError(
                f"run {run.folder} is of another network: {name!r} has {state[name].dim()} dims in the file, and in "
                f"{kind} it is {_told(tensor)}; build the model as it was built for the run"
            )
        if tensor.dtype != state[name].dtype:
            raise CheckpointError(
                f"{name!r} is {state[name].dtype} in run {run.folder} and {tensor.dtype} in {kind}: "
                f"convert the model first, .to({state[name].dtype})"
            )
        owner = owners.setdefault(id(tensor), name)
        if state[owner] is not state[name] and not torch.equal(state[owner], state[name]):
            raise CheckpointError(
                f"{owner!r} and {name!r} are tied in {kind}, but have different content in run {run.folder}: "
                "build the model as it was built for the run"
            )


def _solve(run: Run, channel_map: ChannelMap) -> dict[str, int]:
    """Channel group name -> the width that the file's shapes show.

    Every axis with channels is one equation: its length is a fixed part plus, over the groups on it, copies x width.
    Where the shapes alone leave a choice (one layer writes two groups that nothing else tells apart), the widths in
    run.json decide. Raises CheckpointError where no widths fit, or several and run.json does not say which.
    """
    groups = channel_map.groups
    if not groups:
        return {}
    axes, matrix, lengths = _equations(run, channel_map)
    hint = run.widths or {}
    known = np.array([hint.get(group.name, group.width) for group in groups], dtype=np.float64)
    change = np.linalg.lstsq(matrix, lengths - matrix @ known, rcond=None)[0]
    exact = known + change
    widths = np.rint(exact)
    _check_sums(run, channel_map, axes, matrix @ exact - lengths)
    # A row of the projector on the null space is zero where the shapes leave the group no choice.
    has_choice = (np.abs(np.eye(len(groups)) - np.linalg.pinv(matrix) @ matrix) > _NEAR).any(axis=1)
    for group, is_open, moved in zip(groups, has_choice, change, strict=True):
        if is_open and abs(moved) > _NEAR:
            raise CheckpointError(
                f"the shapes in run {run.folder} leave the width of {group.name!r} open: save with channel_map="
            )
    _check_sums(run, channel_map, axes, matrix @ widths - lengths)
    _check_sums(run, channel_map, axes, matrix @ (widths < 1))
    return {group.name: int(width) for group, width in zip(groups, widths, strict=True)}


def _check_sums(run: Run, channel_map: ChannelMap, axes: list[ParamAxis], errors: np.ndarray) -> None:
    """Raises CheckpointError for the first axis whose error is not zero. `errors` (axes)."""
    for axis, error in zip(axes, errors, strict=True):
        if abs(error) > _NEAR:
            raise _foreign(run, axis.name, channel_map)


def _equations(run: Run, channel_map: ChannelMap) -> tuple[list[ParamAxis], np.ndarray, np.ndarray]:
    """(Axes, matrix of copies (axes, groups), lengths in the file minus the fixed part (axes)), of axes in the file."""
    rows: dict[ParamAxis, np.ndarray] = {}
    for column, group in enumerate(channel_map.groups):
        for place in group.places:
            if place.axis.name in run.shapes:
                rows.setdefault(place.axis, np.zeros(len(channel_map.groups)))[column] += place.copies
    axes = list(rows)
    matrix = np.array([rows[axis] for axis in axes]).reshape(len(axes), len(channel_map.groups))
    now = np.array([channel_map.shapes[axis.name][axis.dim] for axis in axes], dtype=np.float64)
    there = np.array([run.shapes[axis.name][axis.dim] for axis in axes], dtype=np.float64)
    return axes, matrix, there - now + matrix @ np.array(list(channel_map.widths.values()), dtype=np.float64)


def _check_shapes(run: Run, channel_map: ChannelMap, plan: ResizePlan) -> None:
    """Raises CheckpointError where the plan does not give the file's shapes, or resizes what the file does not hold."""
    for group in map(channel_map.group, plan):
        for axis in group.axes:
            if axis.name not in run.shapes:
                raise CheckpointError(
                    f"channel group {group.name!r} has another width in run {run.folder}, which does not hold the "
                    f"content of {axis.name!r}: register that buffer as persistent and save again"
                )
    for name, shape in channel_map.resized(plan).shapes.items():
        if run.shapes.get(name, shape) != shape:
            raise _foreign(run, name, channel_map)


def _take_over(body: nn.Module, channel_map: ChannelMap, plan: ResizePlan, state: Mapping[str, Tensor]) -> ChannelMap:
    """Resizes `body` and loads the state strictly; returns the channel map of the result."""
    # All fresh content is overwritten; a generator of its own keeps the global random state as it was.
    resized = apply_(body, channel_map, plan, generator=torch.Generator()) if plan else channel_map
    body.load_state_dict(_versioned(state, body), strict=True)
    return resized


def _versioned(state: Mapping[str, Tensor], body: nn.Module) -> OrderedDict[str, Tensor]:
    """The state with the versions of the modules of `body`, which some classes ask for when they load."""
    versioned = OrderedDict(state)
    versioned._metadata = getattr(body.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    return versioned


def _foreign(run: Run, name: str, channel_map: ChannelMap) -> CheckpointError:
    reasons = dict.fromkeys(frozen.reason for frozen in channel_map.frozen if frozen.axis.name == name)
    why = f" (frozen there: {', '.join(reasons)})" if reasons else ""
    return CheckpointError(
        f"run {run.folder} is of another network: {name!r} has shape {run.shapes[name]} in the file and "
        f"{channel_map.shapes[name]} in the model, and no widths of the channel groups make them meet{why}; "
        "build the model as it was built for the run"
    )


def _map_between(width: int, target: int) -> IndexMap:
    """Keeps the first channels, or inserts behind the last: all content comes from the file anyway."""
    if target < width:
        return IndexMap.removing(range(target, width), width)
    return IndexMap.identity(width).inserting(target - width)
