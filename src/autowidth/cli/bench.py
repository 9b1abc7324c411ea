"""autowidth bench: a suite of measurements, or what is left of it, and its tables."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from autowidth.cli.door import UsageError, door
from autowidth.lab import suites
from autowidth.lab.bench import Spread, Standing, bench
from autowidth.lab.submitting import Where, options_of, submitted

EXAMPLES = """[bold]Examples[/bold]

importance measures against true ablation on the digits, two networks:
  autowidth bench fidelity
on CIFAR-10, three networks, three seeds:
  autowidth bench fidelity --data cifar10:cifar --seeds 0-2
a quick look:
  autowidth bench fidelity --models resnet8 --epochs 2 --out look
methods and controls under one recipe:
  autowidth bench digits
  autowidth bench mini --data cifar10:cifar --seeds 0-2 --budgets 0.25
the same for choices, on training images that are held out:
  autowidth bench mini --data cifar10:cifar --methods autowidth --choose
units on the machines of a Slurm cluster, forty at a time:
  autowidth bench mini --data cifar10:/shared/cifar --seeds 0-9
    --processes 40 --submit slurm --submit-with slurm_partition=cpu

[bold]Suites[/bold]

fidelity: how well ours and the published importance measures predict,
at 10, 30, 60 and 100 % of a training run, what a filter is worth,
measured by taking filters away on images that nobody has seen.

digits, mini, cifar10: accuracy, MACs, parameters and seconds of ours,
its ablations, controls, published methods, Torch-Pruning and GroMo,
after the same number of epochs; a minute or two, about two minutes a
run on one core, and a GPU.

published: published CIFAR ResNets made smaller, without training and
fine-tuned, by ours, published measures, Torch-Pruning, neuron merging;
a minute or two a unit without training. On a GPU, or in parts:
  autowidth bench published --data cifar10:cifar --weights pretrained \\
    --tables no-training --models resnet20 --budgets 0.7,0.5 --device cuda

A unit (one network, one seed, one method) is one JSON file. A suite that was broken
off, at any point, goes on with the same command.
"""


Submit = Annotated[
    Where | None, typer.Option(help="hand units to slurm, or to local jobs, by submitit (extra `submit`)")
]
SubmitWith = Annotated[str | None, typer.Option(help="options of the jobs, as in timeout_min=600,slurm_partition=gpu")]
Starts = Annotated[
    str | None, typer.Option(help="of a comparison: factors on the starting widths, as in 0.5,1,2; default 1")
]
Choose = Annotated[
    bool, typer.Option("--choose", help="of a comparison: measure on held-out training images, not on the test")
]
Processes = Annotated[int, typer.Option(help="units at a time, one CPU thread each")]
Weights = Annotated[str | None, typer.Option(help="of published: the folder with resnet20.safetensors and its like")]
Tables = Annotated[str | None, typer.Option(help="of published: no-training, fine-tuned; default both")]
Limit = Annotated[int | None, typer.Option(min=1, help="of published: keep this many training images")]
Device = Annotated[str | None, typer.Option(help="of published: cpu, cuda or cuda:N; default cpu")]


def command(
    suite: Annotated[str, typer.Argument(help=f"what to measure: {', '.join(suites.SUITES)}")],
    out: Annotated[Path, typer.Option(help="folder of the results; what is there is not run again")] = Path("results"),
    data: Annotated[str | None, typer.Option(help="digits or cifar10:PATH; default digits")] = None,
    weights: Weights = None,
    tables: Tables = None,
    models: Annotated[
        str | None, typer.Option(help="networks, as in resnet20,vgg8; default: what the suite has for these data")
    ] = None,
    seeds: Annotated[str, typer.Option(help="as in 0,1,2 or 0-2")] = "0",
    epochs: Annotated[int | None, typer.Option(help="epochs of a training run; default: the suite's own")] = None,
    methods: Annotated[
        str | None, typer.Option(help="of a comparison, as in dense,uniform,autowidth,l1; default: the suite's own")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="of a comparison: shares of the MACs, as in 0.25,0.5; default 0.25")
    ] = None,
    starts: Starts = None,
    choose: Choose = False,
    limit: Limit = None,
    device: Device = None,
    processes: Processes = 2,
    submit: Submit = None,
    submit_with: SubmitWith = None,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Run a suite of measurements, or what is left of it, and print its tables."""
    with door(debug=debug, interrupted="finished units are kept, the same command goes on"):
        asked = {
            "data": data, "models": _words(models), "epochs": epochs, "methods": _words(methods),
            "budgets": read_shares("budgets", budgets), "starts": read_shares("starts", starts), "choose": choose,
            "weights": weights, "tables": _words(tables), "limit": limit, "device": device,
        }  # fmt: skip
        given = {name: value for name, value in asked.items() if value}
        wanted = suites.find_suite(suite, seeds=read_seeds(seeds), **given)
        spread = _spread(submit, submit_with, processes)
        records = bench(wanted, out, processes=processes, report=_show_standing, spread=spread)
        typer.echo(wanted.table(records))
        typer.echo(f"written to {out / wanted.name}.json and {out / wanted.name}.md")


def _spread(submit: Where | None, options: str | None, at_once: int) -> Spread | None:
    """What runs the units, None for processes of this machine. Raises UsageError and BenchError."""
    if submit is None and options:
        raise UsageError("--submit-with says how jobs are submitted: give --submit slurm or local, too")
    return None if submit is None else submitted(submit, at_once=at_once, options=options_of(options))


def read_seeds(text: str) -> tuple[int, ...]:
    """The seeds in a text such as 0,3,5 or 0-2, each once. Raises UsageError."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + 1000:
            raise UsageError(f"--seeds {text!r} names no seeds: give numbers, such as 0,1,2 or 0-2")
        seeds |= dict.fromkeys(range(first, last + 1))
    return tuple(seeds)


def _words(text: str | None) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(filter(None, (word.strip() for word in (text or "").split(","))))


def read_shares(name: str, text: str | None) -> tuple[float, ...]:
    """The positive numbers in a text such as 0.25,0.5; none where there is no text. Raises UsageError."""
    try:
        shares = tuple(float(word) for word in _words(text))
    except ValueError:
        shares = (-1.0,)
    if any(not 0 < share < math.inf for share in shares):
        raise UsageError(f"--{name} {text!r}: give numbers above 0, such as 0.25,0.5")
    return shares


def _show_standing(standing: Standing) -> None:
    how = "was there" if standing.seconds is None else f"took {standing.seconds:.0f} s"
    typer.echo(f"{standing.unit} {how}, {standing.done} of {standing.total} done", err=True)
