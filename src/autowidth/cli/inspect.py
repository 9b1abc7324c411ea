"""autowidth inspect: the channel groups of a network, what their channels cost, what is frozen and why."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autowidth.channels import ChannelGroup, ChannelMap
from autowidth.cli.display import console_for
from autowidth.cli.door import UsageError, door
from autowidth.cost import count_macs, macs_cost, params_cost
from autowidth.lab.models import UnknownModelError, resolve, spec
from autowidth.lab.prepare import ModelError
from autowidth.trace import keep_frozen_parameters, trace

EXAMPLES = """[bold]Examples[/bold]

a built-in network, at the input it was published for:
  autowidth inspect resnet56
a class or function of yours, in this folder:
  autowidth inspect my_net:Net --input 1,3,224,224
for a program:
  autowidth inspect vgg16 --json
"""


def command(
    model: Annotated[str, typer.Argument(help="a built-in model, or module:callable that returns an nn.Module")],
    shape: Annotated[
        str | None,
        typer.Option("--input", help="shape of the input, batch first: 1,3,32,32; built-in models know theirs"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Show the channel groups of a network, what their channels cost, and what is frozen and why."""
    with door(debug=debug):
        dims = read_shape(shape, model)
        found = inspected(model, dims)
        if as_json:
            typer.echo(json.dumps(found, allow_nan=False))
        else:
            _print_tables(console_for(stderr=False), found)


def read_shape(text: str | None, model: str) -> tuple[int, ...]:
    """The dims in a text such as 1,3,32,32, or the built-in model's own. Raises UsageError and UnknownModelError."""
    if text is None:
        if ":" in model:
            raise UsageError(f"{model} has no input shape that is known here: give one, such as --input 1,3,224,224")
        return (1, *spec(model).input_shape)
    parts = text.split(",")
    if len(parts) < 2 or not all(re.fullmatch(r"\s*[1-9]\d{0,6}\s*", part) for part in parts):
        raise UsageError(f"--input {text!r} is no shape: give positive integers, batch first, such as 1,3,32,32")
    return tuple(map(int, parts))


def inspected(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Channel groups, totals and frozen axes of a network at this input shape, in what JSON can hold.

    Raises UnknownModelError, ModelError where the network cannot be built, TraceError where it does not run.
    """
    try:
        network = resolve(name, in_channels=shape[1])
    except UnknownModelError:
        raise
    except Exception as error:  # it is the user's code that runs here
        raise ModelError(f"cannot build the model {name}: {type(error).__name__}: {error}") from error
    example = torch.zeros(shape)
    channel_map = keep_frozen_parameters(trace(network, example), network)
    macs, params = macs_cost(channel_map), params_cost(channel_map, [n for n, _ in network.named_parameters()])
    costs = zip(macs.of_channel(channel_map.widths), params.of_channel(channel_map.widths), strict=True)
    return {
        "model": name,
        "input": list(shape),
        "macs": count_macs(network, example),
        "macs_of_weights": round(macs.at(channel_map.widths)),
        "params": sum(p.numel() for p in network.parameters()),
        "groups": [_group_record(group, m, p) for group, (m, p) in zip(channel_map.groups, costs, strict=True)],
        "frozen": _frozen_records(channel_map),
        "notes": list(channel_map.notes),
    }


def _group_record(group: ChannelGroup, macs: float, params: float) -> dict[str, Any]:
    places = [{"axis": str(place.axis), "role": place.role, "copies": place.copies} for place in group.places]
    return {
        "name": group.name,
        "width": group.width,
        "macs_per_channel": round(macs),
        "params_per_channel": round(params),
        "places": places,
    }


def _frozen_records(channel_map: ChannelMap) -> list[dict[str, Any]]:
    shapes = channel_map.shapes
    return [
        {
            "axis": str(f.axis),
            "positions": len(f.index),
            "length": shapes[f.axis.name][f.axis.dim],
            "reason": f.reason,
        }
        for f in channel_map.frozen
    ]


def _print_tables(console: Console, found: Mapping[str, Any]) -> None:
    groups = Table("channel group", title="Channel groups", title_justify="left", box=None)
    for heading in ("width", "MACs per channel", "parameters per channel"):
        groups.add_column(heading, justify="right")
    groups.add_column("lives on")
    for g in found["groups"]:
        costs = (f"{g['macs_per_channel']:,}", f"{g['params_per_channel']:,}")
        groups.add_row(escape(g["name"]), str(g["width"]), *costs, _places(g["places"]))
    console.print(groups if found["groups"] else "No channel group can be resized.")
    if found["frozen"]:
        console.print()
        console.print(_frozen_table(found["frozen"]))
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print()
    console.print(_totals(found), soft_wrap=True, highlight=False, markup=False)


EXAMPLES_SHOWN = 2
"""Axes that are named for every reason why axes are frozen; --json names all."""


def _frozen_table(frozen: Sequence[Mapping[str, Any]]) -> Table:
    """A row for every reason: how many axes are frozen by it, and the first of them."""
    table = Table("frozen because", title="Frozen axes", title_justify="left", box=None)
    table.add_column("axes", justify="right")
    table.add_column("such as")
    for reason in dict.fromkeys(f["reason"] for f in frozen):
        axes = [f["axis"] for f in frozen if f["reason"] == reason]
        table.add_row(escape(reason), str(len(axes)), escape(", ".join(axes[:EXAMPLES_SHOWN])))
    return table


def _places(places: list[dict[str, Any]]) -> str:
    """Where a channel lives, in short: 'written by 1, read by 2 (64 copies), carried by 8'."""
    parts = []
    verbs: tuple[tuple[str, str], ...] = (("write", "written by"), ("read", "read by"), ("carry", "carried by"))
    for role, verb in verbs:
        copies = [place["copies"] for place in places if place["role"] == role]
        if copies:
            parts.append(f"{verb} {len(copies)}" + (f" ({max(copies)} copies)" if max(copies) > 1 else ""))
    return ", ".join(parts)


def _totals(found: Mapping[str, Any]) -> str:
    channels = sum(g["width"] for g in found["groups"])
    rest = found["macs"] - found["macs_of_weights"]
    outside = f" ({rest:,} of them outside weights)" if rest > 0 else ""
    return (
        f"{found['model']} at input {','.join(map(str, found['input']))}: {found['macs']:,} MACs per sample{outside}, "
        f"{found['params']:,} parameters, {channels:,} channels in {len(found['groups'])} channel groups, "
        f"{len(found['frozen'])} frozen axes"
    )
