"""autowidth measure: what a run has won in time on this machine, and which layers keep it back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.markup import escape
from rich.table import Table

from autowidth.cli.display import console_for, short
from autowidth.cli.door import UsageError, door
from autowidth.lab.measuring import FINAL, FULL, START, Measured, measure_run
from autowidth.measure import ROUNDS, Runtime

EXAMPLES = """[bold]Examples[/bold]

the starting and the final network, batches of 1 and 32, in PyTorch and ONNX Runtime:
  autowidth measure runs/my-run
what widths in multiples of eight would give (really resized and timed):
  autowidth measure runs/my-run --round 8
compiled, too; it takes a minute:
  autowidth measure runs/my-run --runtime eager,compiled,onnx --threads 1
end the next run at a latency that this one has:
  autowidth train --latency-ms 0.9
or let it choose widths that the hardware likes, in a configuration file:
  policy = {name = "budget", macs = 0.5, limits = {multiple = 8}}
"""

SHOWN = 8
"""Layers that the table lists."""


def command(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    runtime: Annotated[
        str | None,
        typer.Option(help="of eager, compiled, onnx, with commas; default eager, and onnx where it is installed"),
    ] = None,
    batch: Annotated[str, typer.Option(help="images at once, with commas")] = "1,32",
    multiple: Annotated[
        int | None, typer.Option("--round", min=2, help="time the final network with widths rounded to multiples, too")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default as many as torch takes")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="how often each network is timed, in turns")] = ROUNDS,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Time the starting and the final network of a run side by side, on this machine's CPU."""
    with door(debug=debug):
        found = measure_run(
            run, runtimes=None if runtime is None else _runtimes(runtime), batches=_batches(batch), multiple=multiple,
            threads=threads, rounds=rounds,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(found.as_json(), allow_nan=False))
            return
        console = console_for(stderr=False)
        console.print(_opening(found), soft_wrap=True, highlight=False, markup=False)
        for table in (_timings(found), _layers(found)):
            console.print(table)
        for line in _closing(found):
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def _runtimes(text: str) -> tuple[Runtime, ...]:
    """The runtimes in a text. Raises UsageError."""
    known: dict[str, Runtime] = {name: name for name in get_args(Runtime)}
    if wrong := [name for name in text.split(",") if name not in known]:
        raise UsageError(f"--runtime {text}: {wrong[0]!r} is none of {', '.join(known)}")
    return tuple(known[name] for name in text.split(","))


def _batches(text: str) -> tuple[int, ...]:
    """The numbers in a text. Raises UsageError."""
    try:
        found = tuple(map(int, text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"--batch {text}: give numbers of images, such as 1,32")
    return found


def _opening(found: Measured) -> str:
    tools = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    busy = f"; load {found.load:.1f}: other programs ran meanwhile" if found.load > 0.5 else ""
    return (
        f"{found.model} of {found.run}: from {short(found.macs[START])} to {short(found.macs[FINAL])} MACs\n"
        f"{found.processor}, {found.threads} threads, {tools}{busy}"
    )


def _timings(found: Measured) -> Table:
    """A row for every network, batch and runtime; ratios are to the starting network, by wall and by processor time."""
    table = Table("runtime", title="Milliseconds of a forward pass", title_justify="left", box=None)
    for heading in (
        "batch",
        "network",
        "median",
        "quartiles",
        "processor",
        "images/s",
        "times faster",
        "by processor",
        "by MACs",
    ):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for t in found.timings:
        table.add_row(
            t.runtime, str(t.batch), t.network, f"{t.median:.3f}", f"{t.quartiles[0]:.3f}-{t.quartiles[1]:.3f}",
            f"{t.processor:.3f}", f"{t.per_second:,.0f}", *(f"{ratio:.2f}" for ratio in found.speedup(t)),
            f"{found.macs[START] / found.macs[t.network]:.2f}",
        )  # fmt: skip
    return table


def _layers(found: Measured) -> Table:
    """The layers that take more than their MACs promise."""
    title = f"Layers that take most beyond what their MACs promise ({found.layers_in}, batch {found.layers_batch}, ms)"
    table = Table("layer", title=title, title_justify="left", box=None)
    for heading in ("reads", "writes", "MACs", "start", "final", "beyond", FULL, ""):
        table.add_column(heading, justify="right")
    for layer in found.layers[:SHOWN]:
        table.add_row(
            escape(layer.layer), f"{layer.reads_start} > {layer.reads}", f"{layer.writes_start} > {layer.writes}",
            f"{layer.macs / max(layer.macs_start, 1):.0%}", f"{layer.start:.3f}", f"{layer.final:.3f}",
            f"{layer.excess:+.3f}", f"{layer.filled:.3f}", "unkind" if layer.unkind else "",
        )  # fmt: skip
    rest = [f"{found.rest[name]:.3f}" for name in (START, FINAL, FULL)]
    table.add_row("all that is no layer", "", "", "", rest[0], rest[1], "", rest[2], "")
    return table


def _closing(found: Measured) -> Iterator[str]:
    """What follows from it."""
    if unkind := [layer.layer for layer in found.layers if layer.unkind]:
        yield (
            f"unkind to the hardware: {len(unkind)} of {len(found.layers)} layers would take no longer with all widths "
            f"raised to the next multiple of 16 ({', '.join(unkind[:3])}{', ...' if len(unkind) > 3 else ''}); see "
            "--round, and limits = {multiple = 8} for the next run"
        )
    met = ", ".join(f"{ms:.3g} ({name})" for name, ms in found.latency_ms.items())
    yield f"--latency-ms that would be met (one image, eager PyTorch, {found.threads} threads): {met}"
