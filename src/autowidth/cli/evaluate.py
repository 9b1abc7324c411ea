"""autowidth eval: accuracy and cost of a saved run, or of a network with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from autowidth.checkpoint import RUN
from autowidth.cli.display import console_for, short
from autowidth.cli.door import UsageError, door
from autowidth.cli.options import option
from autowidth.lab.evaluating import Evaluation, evaluate_model, evaluate_run
from autowidth.lab.settings import settings_of

EXAMPLES = """[bold]Examples[/bold]

a saved run, on the data that it was trained for:
  autowidth eval runs/resnet20-digits-0
a network of yours with its weights, on pictures of yours:
  autowidth eval my_net:Net --weights best.pt --data folder:photos
a published CIFAR ResNet:
  autowidth eval resnet20-padding --weights resnet20.safetensors --data cifar10:cifar-10 --normalize imagenet
"""

FIXED = ("weights", "normalize", "width", "size", "pool")
"""Settings that a run brings with it."""


def command(
    what: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="folder of a run, or a model as for train")],
    weights: Annotated[Path | None, option("weights", "--weights")] = None,
    data: Annotated[str | None, option("data", "--data")] = None,
    normalize: Annotated[str | None, option("normalize", "--normalize")] = None,
    width: Annotated[float | None, option("width", "--width")] = None,
    size: Annotated[int | None, option("size", "--size")] = None,
    pool: Annotated[int | None, option("pool", "--pool")] = None,
    device: Annotated[str | None, option("device", "--device")] = None,
    threads: Annotated[int | None, option("threads", "--threads")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Measure accuracy and loss on test images, and count MACs and parameters."""
    options = {
        "weights": weights, "data": data, "normalize": normalize, "width": width, "size": size, "pool": pool,
        "device": device, "threads": threads,
    }  # fmt: skip
    with door(debug=debug):
        found = _found(what, {name: value for name, value in options.items() if value is not None})
        if as_json:
            typer.echo(json.dumps(found.as_json(), allow_nan=False))
        else:
            console_for(stderr=False).print(_line(found), soft_wrap=True, highlight=False, markup=False)


def _found(what: str, options: dict[str, Any]) -> Evaluation:
    """What is measured: of a run where the text names a folder with one, else of a model."""
    if (Path(what) / RUN).is_file():
        if fixed := [name for name in FIXED if name in options]:
            raise UsageError(f"--{fixed[0]} cannot be given for the run {what}, which brings its own: leave it out")
        return evaluate_run(Path(what), **options)
    if Path(what).is_dir():
        raise UsageError(f"{what} is a folder without {RUN}: name the folder of a run, or a model")
    if "weights" not in options and ":" not in what:
        raise UsageError(f"{what} has fresh weights, of which nothing can be measured: give --weights FILE")
    return evaluate_model(settings_of({"model": what, **options}))


def _line(found: Evaluation) -> str:
    """The result for people."""
    return (
        f"{found.model} on {found.data}: accuracy {found.accuracy:.2%}, loss {found.loss:.4f} on {found.images:,} "
        f"{found.part} images, {short(found.macs)} MACs, {short(found.params)} parameters, {found.seconds:.1f} s"
    )
