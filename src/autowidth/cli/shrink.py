"""autowidth shrink: a trained network made smaller, without training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from autowidth.cli.display import console_for, short
from autowidth.cli.door import UsageError, door
from autowidth.cli.options import option
from autowidth.lab.policies import TargetError
from autowidth.lab.settings import settings_of
from autowidth.lab.shrinking import Shrunk, shrink
from autowidth.policy import Budget

EXAMPLES = """[bold]Examples[/bold]

as far as held-out accuracy stays within half a point:
  autowidth shrink my_net:Net --weights best.pt --data folder:photos
to 70 % of the MACs of a published network:
  autowidth shrink resnet20-padding --weights resnet20.safetensors --macs 0.7 \\
    --data cifar10:cifar-10 --normalize imagenet
"""


def command(
    model: Annotated[str, typer.Argument(help="a built-in model, or module:callable that returns an nn.Module")],
    weights: Annotated[Path, option("weights", "--weights")],
    data: Annotated[str, option("data", "--data")],
    normalize: Annotated[str | None, option("normalize", "--normalize")] = None,
    macs: Annotated[float | None, typer.Option(help="end at this share of the MACs")] = None,
    params: Annotated[float | None, typer.Option(help="end at this share of the parameters instead")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="without a target: points of held-out accuracy that may be lost")
    ] = 0.5,
    reviews: Annotated[int, typer.Option(min=1, help="steps to a target")] = 3,
    holdout: Annotated[float, typer.Option(help="share of the training images on which that is measured")] = 0.1,
    width: Annotated[float | None, option("width", "--width")] = None,
    size: Annotated[int | None, option("size", "--size")] = None,
    pool: Annotated[int | None, option("pool", "--pool")] = None,
    seed: Annotated[int | None, option("seed", "--seed")] = None,
    device: Annotated[str | None, option("device", "--device")] = None,
    threads: Annotated[int | None, option("threads", "--threads")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the result; default runs/MODEL-DATA-shrunk")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="last line of stdout is one JSON object")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Make a trained network smaller, without training it."""
    options = {
        "normalize": normalize, "width": width, "size": size, "pool": pool, "seed": seed, "device": device,
        "threads": threads, "weights": weights, "data": data, "holdout": holdout,
    }  # fmt: skip
    with door(debug=debug):
        given = {name: value for name, value in options.items() if value is not None}
        settings = settings_of({"model": model, "out": out or _default_folder(model, data), **given})
        console = console_for(stderr=as_json)
        result = shrink(
            settings, policy=_budget(macs, params), reviews=reviews, tolerance=tolerance / 100,
            report=lambda state: _show(console, state),
        )  # fmt: skip
        console.print(_closing(result), soft_wrap=True, highlight=False, markup=False)
        if as_json:
            typer.echo(json.dumps(result.as_json(), allow_nan=False))


def _budget(macs: float | None, params: float | None) -> Budget | None:
    """The budget that the options name, None for none. Raises TargetError, UsageError and BudgetError."""
    if macs is not None and params is not None:
        raise TargetError("--macs and --params each choose where to end: keep one of them")
    for name, value in (("macs", macs), ("params", params)):
        if value is not None and 1 <= value <= 100:
            raise UsageError(f"--{name} {value:g} is not below the network that is brought: give a share below 1")
    given: dict[str, Any] = {"macs": macs} if macs is not None else {"params": params}
    return None if macs is None and params is None else Budget(**given)


def _default_folder(model: str, data: str) -> Path:
    return Path("runs") / re.sub(r"[^\w.-]+", "-", f"{model}-{data}-shrunk").strip("-.")


def _show(console: Console, state: Shrunk) -> None:
    """A line for the start and for every review."""
    what = f"review {state.reviews}" if state.reviews else f"{state.model} on {state.data}"
    line = (
        f"{what}: held-out accuracy {state.accuracy:.2%} of {state.images:,} images, {short(state.macs)} MACs "
        f"({state.macs / state.macs_start:.1%}), {short(state.params)} parameters, {state.seconds:.1f} s"
    )
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _closing(result: Shrunk) -> str:
    """The result for people."""
    r = result
    return (
        f"held-out accuracy {r.accuracy:.2%} ({r.accuracy_start:.2%} before) with {r.macs / r.macs_start:.1%} of the "
        f"MACs and {r.params / r.params_start:.1%} of the parameters, after {r.reviews} reviews, without training\n"
        f"written to {r.out}: model.safetensors, run.json, history.jsonl"
    )
