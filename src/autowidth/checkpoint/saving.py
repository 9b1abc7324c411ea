"""Save a run, and give a fresh model of its class the widths and the content of the file."""

from __future__ import annotations

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap, ResizePlan
from autowidth.checkpoint.errors import CheckpointError
from autowidth.checkpoint.fitting import Shown, plan_for
from autowidth.checkpoint.folder import Content, Record, read, write
from autowidth.checkpoint.run import HISTORY, Run, fields_of, run_of
from autowidth.checkpoint.tensors import read_tensor_file, tensor_file, tensors_of, told
from autowidth.history import History
from autowidth.surgery import apply_
from autowidth.trace import Inputs, trace
from autowidth.unwrapping import inner_model

MODEL = "model.safetensors"


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
    does not give back, or a path that is a file: the old run is then untouched. Raises WriteError, which is an OSError,
    where the disk refuses: the old run or the new one is then there, as after a crash.
    """
    write_run(path, inner_model(model), history=history, channel_map=channel_map, extra=extra)


def write_run(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    history: History | None = None,
    channel_map: ChannelMap | None = None,
    extra: Mapping[str, object] | None = None,
    fields: Mapping[str, object] | None = None,
    files: Mapping[str, Content] | None = None,
) -> Record:
    """What `save` does, with more `files` beside model and history, and more `fields` in run.json, in the same act.

    `load_` and `read_run` read what they know of it. Raises as `save` and `folder.write` do.
    """
    tensors, tied = tensors_of(model)
    known = fields_of(tensors, tied) | {
        "events": None if history is None else len(history),
        "widths": None if channel_map is None else _checked_widths(channel_map, model),
        "extra": _checked_extra(extra or {}),
    }
    contents: dict[str, Content] = {**(files or {}), MODEL: tensor_file(tensors)}
    if history is not None:
        contents[HISTORY] = b"".join(history.lines())
    return write(Path(path), fields={**(fields or {}), **known}, files=contents, growing=(HISTORY,))


def load_(model: nn.Module, path: str | os.PathLike[str], *, example_inputs: Inputs) -> ChannelMap:
    """Gives a fresh model of the run's class the widths and the content of the run; returns its channel map.

    The model is traced with `example_inputs`, each channel group is resized to the width that the shapes in the file
    show, and the file is loaded strictly: the outputs are those of the saved model, bit for bit. Parameters stay the
    same objects; build or rebuild an optimizer that already holds state.

    Raises CheckpointError where the run is missing, damaged, too new or of another network, TraceError where the model
    does not run on the example inputs. The model is then unchanged.
    """
    run, model = read_run(path), inner_model(model)
    _check_names(run, model)
    state = read_tensors(run)
    _check_contents(run, model, state)
    channel_map = trace(model, example_inputs)
    plan = plan_for(Shown(what=f"run {run.folder}", shapes=run.shapes, widths=run.widths or {}), channel_map)
    return take_over_(model, channel_map, plan, state, what=f"run {run.folder}")


def read_run(path: str | os.PathLike[str]) -> Run:
    """What run.json says about the run in the folder `path`.

    Raises CheckpointError where it is missing, damaged or too new.
    """
    return run_of(read(Path(path)))


def read_tensors(run: Run) -> dict[str, Tensor]:
    """Name -> tensor, tied names included. Raises CheckpointError where the file is missing or damaged."""
    shapes = {name: shape for name, shape in run.shapes.items() if name not in run.tied}
    state = read_tensor_file(run.record, MODEL, shapes=shapes)
    return state | {alias: state[name] for alias, name in run.tied.items()}


# ---- what goes in ----------------------------------------------------------------------------------------------------


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
        except (TypeError, ValueError, RecursionError):
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


def _check_names(run: Run, model: nn.Module) -> None:
    """Raises CheckpointError where names or numbers of dims of the model and of the run differ."""
    kind = type(model).__name__
    live = model.state_dict(keep_vars=True)
    for names, has, lacks in (
        (run.shapes.keys() - live.keys(), "the run", kind),
        (live.keys() - run.shapes.keys(), kind, "the run"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise CheckpointError(
                f"run {run.folder} is of another network: {has} has {len(names)} tensors that {lacks} lacks "
                f"({some}); build the model as it was built for the run"
            )
    for name, tensor in live.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != len(run.shapes[name]):
            raise CheckpointError(
                f"run {run.folder} is of another network: {name!r} has {len(run.shapes[name])} dims in the file, and "
                f"in {kind} it is {told(tensor)}; build the model as it was built for the run"
            )


def _check_contents(run: Run, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where dtypes or ties of model and file differ."""
    kind = type(model).__name__
    owners: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
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


def take_over_(
    model: nn.Module, channel_map: ChannelMap, plan: ResizePlan, state: Mapping[str, Tensor], *, what: str
) -> ChannelMap:
    """Resizes the model by the plan and loads the state strictly; returns the channel map of the result.

    Raises CheckpointError where that fails; the model is then unchanged.
    """
    trial = copy.deepcopy(model)
    try:
        _take_over(trial, channel_map, plan, state)  # what fails, fails on a copy
    except Exception as error:
        raise CheckpointError(f"{what} does not fit {type(model).__name__}: {error}") from error
    for tensor in (*trial.parameters(), *trial.buffers()):
        tensor.data = tensor.data.new_empty(
            0
        )  # hooks and modules refer to each other, so that it would stay for a while
    return _take_over(model, channel_map, plan, state)


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
