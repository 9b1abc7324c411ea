"""The widths of a network for people: widths.json, from which a network can be built by hand or by `apply_widths_`."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from autowidth.channels import ChannelGroup, ChannelMap, IndexMap
from autowidth.cost import macs_cost, params_cost
from autowidth.errors import AutoWidthError
from autowidth.reading import ReadError, read_bytes, strict_json
from autowidth.surgery import apply_
from autowidth.trace import Inputs, trace

FORMAT = 1
"""Version of widths.json. A reader refuses a file of a newer version."""

WIDTHS = "widths.json"

LARGEST = 2**24
"""Bytes of a file of widths that are read at most."""


class WidthsError(AutoWidthError, ValueError):
    """Widths that cannot be read, or that are of another network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWidths:
    """A convolution or linear layer by its name in the model: how many channels it reads and writes, now and before."""

    kind: str
    reads: int
    writes: int
    reads_start: int
    writes_start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """The widths of a network: by layer, by channel group, and what it costs. MACs are those of its weights, a sample.

    groups: channel group -> width; groups_start: the same before; members: the layers that write the group.
    """

    model: str
    layers: dict[str, LayerWidths]
    groups: dict[str, int]
    groups_start: dict[str, int]
    members: dict[str, tuple[str, ...]]
    macs: int
    macs_start: int
    params: int
    params_start: int

    def text(self) -> str:
        """What stands in widths.json: JSON with a line for every number, group and layer."""
        groups = {
            name: {"width": width, "width_start": self.groups_start[name], "layers": list(self.members[name])}
            for name, width in self.groups.items()
        }
        layers = {
            name: {
                "kind": layer.kind, "in": layer.reads, "out": layer.writes, "in_start": layer.reads_start,
                "out_start": layer.writes_start,
            }
            for name, layer in self.layers.items()
        }  # fmt: skip
        record = {
            "format": FORMAT, "model": self.model, "macs": self.macs, "macs_start": self.macs_start,
            "params": self.params, "params_start": self.params_start, "groups": groups, "layers": layers,
        }  # fmt: skip
        return _readable(record)


def widths_of(
    model: nn.Module, channel_map: ChannelMap, *, start: Mapping[str, int] | None = None, name: str | None = None
) -> Widths:
    """The widths of a network by its channel map; `start` are those it had before (a history's `widths_start`).

    Raises WidthsError where `start` names other channel groups.
    """
    now, before = channel_map.widths, dict(start if start is not None else channel_map.widths)
    if before.keys() != now.keys():
        odd = min(before.keys() ^ now.keys())
        raise WidthsError(f"the starting widths and the channel map differ in {odd!r}: give those of the same network")
    old = channel_map.resized({group: IndexMap.between(width, before[group]) for group, width in now.items()})
    parameters = [parameter for parameter, _ in model.named_parameters()]
    macs, params = macs_cost(channel_map), params_cost(channel_map, parameters)
    return Widths(
        model=name or type(model).__name__,
        layers=_layers(model, channel_map, old),
        groups=now,
        groups_start=before,
        members={group.name: _writers(group) for group in channel_map.groups},
        macs=round(macs.at(now)), macs_start=round(macs.at(before)),
        params=round(params.at(now)), params_start=round(params.at(before)),
    )  # fmt: skip


def write_widths(path: str | os.PathLike[str], widths: Widths) -> None:
    """Writes widths.json in one go; `path` is the file, or a folder that gets one."""
    file = _file(path)
    staged = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        staged.write_text(widths.text())
        os.replace(staged, file)
    finally:
        staged.unlink(missing_ok=True)


def read_widths(path: str | os.PathLike[str]) -> Widths:
    """The widths in a file, or in widths.json of a folder. Raises WidthsError where there are none, or damaged ones."""
    file = _file(path)
    try:
        record = strict_json(read_bytes(file, limit=LARGEST), str(file))
    except ReadError as error:
        raise WidthsError(f"{error}: name a widths.json, or the folder of one") from error
    try:
        version = int(record["format"])
        found = _widths(record) if version <= FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WidthsError(f"{file} is damaged ({type(error).__name__}: {error}): write it again") from error
    if found is None:
        raise WidthsError(f"{file} has format {version}, this version reads up to {FORMAT}: install a newer autowidth")
    return found


def apply_widths_(
    model: nn.Module, widths: Widths | Mapping[str, int] | str | os.PathLike[str], *, example_inputs: Inputs
) -> ChannelMap:
    """Gives a model these widths, and returns its channel map; its weights are no trained ones of these widths.

    widths: what `read_widths` returns, a file or folder for it, or channel group -> width; groups that are not named
    keep theirs. Where channels leave, the last ones do; where some come, they are fresh: for a trained network with its
    weights use `from_run` or `load_`. Starting from widths other than the file's starting ones is fine.

    Raises WidthsError where the model has no such channel group or a width is below 1, TraceError where it does not run
    on the example inputs. The model is then unchanged.
    """
    found = read_widths(widths) if isinstance(widths, str | os.PathLike) else widths
    wanted = found.groups if isinstance(found, Widths) else dict(found)
    channel_map = trace(model, example_inputs)
    if missing := [name for name in wanted if name not in channel_map.widths]:
        some = ", ".join(channel_map.widths) or "none"
        raise WidthsError(
            f"{type(model).__name__} has no channel group {missing[0]!r}: its groups are {some}; build the model as it "
            "was built for these widths"
        )
    if bad := [name for name, width in wanted.items() if type(width) is not int or width < 1]:
        raise WidthsError(f"the width of {bad[0]!r} is {wanted[bad[0]]!r}, allowed are whole numbers from 1")
    plan = {
        name: IndexMap.between(channel_map.widths[name], width)
        for name, width in wanted.items()
        if channel_map.widths[name] != width
    }
    return apply_(model, channel_map, plan) if plan else channel_map


# ---- its parts -------------------------------------------------------------------------------------------------------


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path) / WIDTHS if Path(path).is_dir() else Path(path)


def _layer(parameter: str) -> str:
    """The module that a parameter belongs to."""
    return parameter.rpartition(".")[0]


def _writers(group: ChannelGroup) -> tuple[str, ...]:
    """The layers that write a channel group."""
    return tuple(dict.fromkeys(_layer(place.axis.name) for place in group.with_role("write")))


def _layers(model: nn.Module, now: ChannelMap, before: ChannelMap) -> dict[str, LayerWidths]:
    """Every layer whose weight is in use, in the order in which the network meets it."""
    modules = dict(model.named_modules())
    found = {}
    for weight in dict.fromkeys(use.name for use in now.uses):
        module = modules.get(_layer(weight))
        if len(now.shapes[weight]) < 2 or module is None:
            continue
        (reads, writes), (reads_start, writes_start) = (
            _io(module, now.shapes[weight]),
            _io(module, before.shapes[weight]),
        )
        found[_layer(weight)] = LayerWidths(
            kind=type(module).__name__, reads=reads, writes=writes, reads_start=reads_start, writes_start=writes_start
        )
    return found


def _io(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """(Channels read, channels written) by a layer with a weight of this shape."""
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):
        return shape[0], shape[1] * groups
    depthwise = shape[1] == 1 and groups > 1
    return shape[0] if depthwise else shape[1] * groups, shape[0]


def _widths(record: Mapping[str, Any]) -> Widths:
    """The widths of a record; raises KeyError, TypeError, ValueError or AttributeError where it is none."""
    layers = {
        name: LayerWidths(
            kind=str(layer["kind"]), reads=int(layer["in"]), writes=int(layer["out"]),
            reads_start=int(layer["in_start"]), writes_start=int(layer["out_start"]),
        )
        for name, layer in record["layers"].items()
    }  # fmt: skip
    groups = record["groups"]
    return Widths(
        model=str(record["model"]), layers=layers,
        groups={name: int(group["width"]) for name, group in groups.items()},
        groups_start={name: int(group["width_start"]) for name, group in groups.items()},
        members={name: tuple(map(str, group["layers"])) for name, group in groups.items()},
        macs=int(record["macs"]), macs_start=int(record["macs_start"]),
        params=int(record["params"]), params_start=int(record["params_start"]),
    )  # fmt: skip


def _readable(record: Mapping[str, Any]) -> str:
    """The record as JSON, a line for every number, group and layer."""
    lines = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            rows = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items())
            lines.append(f"  {json.dumps(name)}: {{\n{rows}\n  }}")
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
