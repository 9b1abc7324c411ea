"""autowidth shrink: a trained network made smaller, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from autowidth.checkpoint import RUN
from autowidth.cli.display import console_for, short
from autowidth.cli.door import UsageError, door
from autowidth.cli.options import given, option, settings_options
from autowidth.lab.policies import TargetError
from autowidth.lab.prepare import free_folder
from autowidth.lab.saved import table_of
from autowidth.lab.settings import Settings, settings_of
from autowidth.lab.shrinking import Shrunk, shrink
from autowidth.policy import Budget
from autowidth.review.untrained import reviews_for

EXAMPLES = """[bold]Examples[/bold]

as far as held-out accuracy stays within half a point:
  autowidth shrink my_net:Net --weights best.pt --data folder:photos
a run, which knows its network, its weights and its data:
  autowidth shrink runs/resnet20-digits-0 --macs 0.7
to 70 % of the MACs of a published network:
  autowidth shrink resnet20-padding --weights resnet20.safetensors --macs 0.7 \\
    --data cifar10:cifar-10 --normalize imagenet
"""

OF_A_RUN = ("weights", "normalize", "width", "pool")
"""Settings that a run brings with it."""


@settings_options(
    "weights", "data", "seed", "normalize", "size", "augment", "pool", "limit", "width", "device", "threads"
)
def command(
    what: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="folder of a run, or a model as for train")],
    macs: Annotated[float | None, typer.Option(help="end at this share of the MACs")] = None,
    params: Annotated[float | None, typer.Option(help="end at this share of the parameters instead")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="without a target: points of held-out accuracy that may be lost")
    ] = 0.5,
    reviews: Annotated[
        int | None, typer.Option(min=1, help="steps to a target; not given: one for every tenth that goes, at least 3")
    ] = None,
    holdout: Annotated[float, typer.Option(help="share of the training images on which that is measured")] = 0.1,
    out: Annotated[
        Path | None, option("out", help="folder of the result; default runs/MODEL-DATA-shrunk or the next free name")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="last line of stdout is one JSON object")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    **options: Any,
) -> None:
    """Make a trained network smaller, without training it."""
    with door(debug=debug):
        settings = _settings(what, given(options) | {"holdout": holdout}, out)
        policy = _budget(macs, params)
        console = console_for(stderr=as_json)
        with _display(console, (reviews or reviews_for(policy)) if policy else None) as display:
            result = shrink(
                settings, policy=policy, reviews=reviews, tolerance=tolerance / 100, report=display.show,
                pulse=display.pulse,
            )  # fmt: skip
        console.print(_closing(result), soft_wrap=True, highlight=False, markup=False)
        if as_json:
            typer.echo(json.dumps(result.as_json(), allow_nan=False))


def _settings(what: str, options: dict[str, Any], out: Path | None) -> Settings:
    """The settings of a run where the text names a folder with one, else of a model. Raises UsageError."""
    if (Path(what) / RUN).is_file():
        if fixed := [name for name in OF_A_RUN if name in options]:
            raise UsageError(f"--{fixed[0]} cannot be given for the run {what}, which brings its own: leave it out")
        name = f"{Path(what).resolve().name}-shrunk"
        return settings_of({**table_of(what), **options, "out": out or free_folder(name)})
    if Path(what).is_dir():
        raise UsageError(f"{what} is a folder without {RUN}: name the folder of a run, or a model")
    for name in ("weights", "data"):
        if name not in options:
            raise UsageError(f"--{name} is missing: {what} is a model, so say its --weights and its --data")
    return settings_of({"model": what, "out": out or free_folder(f"{what}-{options['data']}-shrunk"), **options})


def _budget(macs: float | None, params: float | None) -> Budget | None:
    """The budget that the options name, None for none. Raises TargetError, UsageError and BudgetError."""
    if macs is not None and params is not None:
        raise TargetError("--macs and --params each choose where to end: keep one of them")
    for name, value in (("macs", macs), ("params", params)):
        if value is not None and 1 <= value <= 100:
            raise UsageError(f"--{name} {value:g} is not below the network that is brought: give a share below 1")
    given: dict[str, Any] = {"macs": macs} if macs is not None else {"params": params}
    return None if macs is None and params is None else Budget(**given)


# ---- what is shown ---------------------------------------------------------------------------------------------------


class _Lines:
    """A line for the start and for every review, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, state: Shrunk) -> None:
        """Prints where the network stands."""
        self.console.print(_standing(state), soft_wrap=True, highlight=False, markup=False)
        self.console.file.flush()

    def pulse(self) -> None:
        """Nothing."""


class _Screen(_Lines):
    """The same above a live bar, which moves with every batch that a review looks at; for a terminal."""

    def __init__(self, console: Console, reviews: int | None) -> None:
        super().__init__(console)
        self.bar = Progress(
            SpinnerColumn(), TextColumn("reviews"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[batches]} batches looked at"), console=console, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=reviews, batches=0)
        self.batches = 0

    def __enter__(self) -> _Screen:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, state: Shrunk) -> None:
        """Prints where the network stands, and moves the bar."""
        super().show(state)
        self.bar.update(self.task, completed=state.reviews)

    def pulse(self) -> None:
        """One batch more."""
        self.batches += 1
        self.bar.update(self.task, batches=self.batches)


def _display(console: Console, reviews: int | None) -> _Lines:
    """What shows the work: a live bar where the console is a terminal, else lines."""
    return _Screen(console, reviews) if console.is_terminal else _Lines(console)


def _standing(state: Shrunk) -> str:
    """Where the network stands, in a line."""
    what = f"review {state.reviews}" if state.reviews else f"{state.model} on {state.data}"
    return (
        f"{what}: held-out accuracy {state.accuracy:.2%} of {state.images:,} images, {short(state.macs)} MACs "
        f"({state.macs / state.macs_start:.1%}), {short(state.params)} parameters, {state.seconds:.1f} s"
    )


def _closing(result: Shrunk) -> str:
    """The result for people."""
    r = result
    return (
        f"held-out accuracy {r.accuracy:.2%} ({r.accuracy_start:.2%} before) with {r.macs / r.macs_start:.1%} of the "
        f"MACs and {r.params / r.params_start:.1%} of the parameters, after {r.reviews} reviews, without training\n"
        f"written to {r.out}: model.safetensors, run.json, history.jsonl"
    )
