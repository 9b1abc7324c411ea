"""autowidth train: one run, from the options to its result."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from autowidth.cli.display import Silence, closing, console_for, display_for, groups_table
from autowidth.cli.door import door
from autowidth.cli.logs import Logs, logs_for
from autowidth.cli.options import NESTED, all_settings, given, merged, settings_options
from autowidth.cli.recording import Recorder
from autowidth.lab.attempts import train_kept
from autowidth.lab.loop import train
from autowidth.lab.policies import TargetError, from_options
from autowidth.lab.prepare import free_folder
from autowidth.lab.result import Progress, Result
from autowidth.lab.resuming import settings_to_resume, unfinished_at
from autowidth.lab.settings import Settings, names_a_policy, settings_from
from autowidth.lab.torchrun import is_first, joined, left_by_a_restart
from autowidth.policy import POLICIES

KEEP = 0.5
"""Points of accuracy that may be lost where no target is given."""


def listed(names: Sequence[str]) -> str:
    """Names between commas, in lines that fit a narrow terminal."""
    return "\n".join(textwrap.wrap(", ".join(names), 72, break_on_hyphens=False))


EXAMPLES = f"""[bold]Examples[/bold]

digits, ResNet-20, as small as costs nothing, about two minutes:
  autowidth train
as small as costs at most two points of accuracy:
  autowidth train --keep 2
the same, ending at half of the MACs:
  autowidth train --macs 0.5
the same run without reviews, for comparison:
  autowidth train --no-edit --out runs/plain
start narrow, and let filters be inserted:
  autowidth train --width 0.5 --macs 1
a network of yours on pictures of yours:
  autowidth train --model my_net:Net --data folder:photos
a trained network, made smaller and trained on:
  autowidth train --model my_net:Net --weights best.pt \\
    --data folder:photos --macs 0.5
a run that was broken off, and a finished one that is to go on longer:
  autowidth train --resume runs/resnet20-digits-0
  autowidth train --resume runs/resnet20-digits-0 --epochs 200
four processes on this machine, a batch of 256 images divided among them:
  torchrun --nproc-per-node 4 -m autowidth train --batch-size 256
figures and histograms for TensorBoard, or for MLflow:
  autowidth train --tensorboard
  autowidth train --mlflow http://127.0.0.1:5000
settings out of a file, the result for a program:
  autowidth train --config run.toml --seed 1 --json

A configuration file, TOML or JSON, holds the same names, and tables
for the policy and for what reviews may look at:
  epochs = 30
  policy = {{name = "budget", macs = 0.4, limits = {{multiple = 8}}}}
  effort = {{audit_filters = 20}}
While it trains, [bold]autowidth report[/bold] draws the page of the run;
at its end every run has one, report.html.
What is in neither may be in the environment: AUTOWIDTH_EPOCHS=30.

[bold]What --set takes[/bold]

--set policy.limits.multiple=8 does what the table above does. A policy
has those of these settings that it knows; docs/ and the docstrings of
Budget, Schedule, Limits and Effort say what each does.
{listed(NESTED)}
"""


Macs = Annotated[
    float | None, typer.Option(help="end at this cost: a share of the starting MACs, or above 100 MACs per image")
]
Params = Annotated[float | None, typer.Option(help="end at this cost, in parameters instead of MACs")]
Latency = Annotated[
    float | None, typer.Option(help="end at this share of the time that a forward pass of one image takes here")
]
LatencyMs = Annotated[float | None, typer.Option(help="the same in milliseconds")]
Price = Annotated[float | None, typer.Option(help="end where a MAC earns what it costs: nats for all starting MACs")]
Auto = Annotated[
    bool, typer.Option("--auto", help="as wide as the data justify, found while it trains; may cost accuracy")
]
Policy = Annotated[
    str | None,
    typer.Option(help=f"any policy by name, its settings from --set or the configuration: {', '.join(POLICIES)}"),
]
Pairs = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="a setting of the policy or of what reviews look at; see below"),
]
Resume = Annotated[
    Path | None,
    typer.Option(help="go on with the run in this folder, which knows its settings; with --epochs, for longer"),
]
Config = Annotated[Path | None, typer.Option(help="file of settings, TOML or JSON; options overrule it")]
NoEdit = Annotated[bool, typer.Option("--no-edit", help="plain training: no reviews, no resizing")]
TensorBoard = Annotated[
    str | None,
    typer.Option(metavar="[DIR]", help="write event files for TensorBoard; default tensorboard/NAME beside the run"),
]
Mlflow = Annotated[
    str | None, typer.Option(metavar="[URI]", help="log to MLflow, at this address or at that of its environment")
]
AsJson = Annotated[bool, typer.Option("--json", help="last line of stdout is one JSON object")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress and no table, only the result")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


@settings_options(*all_settings())
def command(
    macs: Macs = None, params: Params = None, latency: Latency = None, latency_ms: LatencyMs = None,
    price: Price = None, auto: Auto = False, policy: Policy = None, no_edit: NoEdit = False, pairs: Pairs = None,
    resume: Resume = None, config: Config = None, tensorboard: TensorBoard = None, mlflow: Mlflow = None,
    as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False, **options: Any,
) -> None:  # fmt: skip
    """Train a network, and come out with the right number of filters in every layer."""
    bounds = {"macs": macs, "params": params, "latency": latency, "latency_ms": latency_ms}
    with door(debug=debug):
        aim = from_options(bounds, price=price, auto=auto, edit=not no_edit, named=policy)
        asked = merged(given(options, pairs or ()), aim)
        settings = settings_from(asked, config=config)
        if resume is None and settings.out is None:
            settings = settings.model_copy(update={"out": default_folder(settings)})
        resume = resume or left_by_a_restart(settings.out)
        named = names_a_policy(asked, config=config)
        settings = promised(settings, named=named) if resume is None else settings_to_resume(resume, settings)
        _run(settings, resume, tensorboard, mlflow, as_json=as_json, quiet=quiet)


def promised(settings: Settings, *, named: bool) -> Settings:
    """The settings with what is promised where nothing else says where the run ends: as small as costs nothing.

    `named`: whether a policy is named. Raises TargetError where both are asked for.
    """
    if settings.promises and named:
        raise TargetError("--keep and a target each choose where the run ends: keep one of them")
    if settings.keep is not None and settings.keep_nats is not None:
        raise TargetError("--keep and --keep-nats each say what may be lost: keep one of them")
    if settings.promises or named:
        return settings
    return settings.model_copy(update={"keep": KEEP})


def _trained(settings: Settings, **more: Any) -> Result:
    """The result of a run: as small as costs nothing where that is promised, else as its policy has it."""
    return (train_kept if settings.promises else train)(settings, **more)


def _unheard(progress: Progress) -> None:
    """What a process does with its progress that is not the one that speaks."""


def _shown(viewers: tuple[Recorder | Silence | Logs, ...], progress: Progress) -> None:
    """Tells everybody who looks on how the run stands."""
    for viewer in viewers:
        viewer.show(progress)


def _run(
    settings: Settings, resume: Path | None, tensorboard: str | None, mlflow: str | None, *, as_json: bool, quiet: bool
) -> None:
    """Trains, shows how it goes on, prints the result; as JSON on stdout, and the rest on stderr, where asked for."""
    console = console_for(stderr=as_json)
    with joined(settings) as mine:
        if not is_first():
            _trained(mine, resume=resume, report=_unheard)
            return
        out = mine.out or default_folder(mine)
        display, recorder = display_for(console, mine, quiet=quiet), Recorder(out, mine, resume=resume)
        with logs_for(mine, out, tensorboard=tensorboard, mlflow=mlflow) as logs, recorder:
            viewers = (recorder, display, logs)
            with display:
                result = _trained(mine, report=partial(_shown, viewers), watch=recorder.watch, resume=resume)
            unwritten = recorder.finish(Path(result.out or out))
    if not quiet:
        console.print(groups_table(result))
    console.print(closing(result, written=recorder.written), soft_wrap=True, highlight=False)
    if unwritten is not None:
        console.print(unwritten, soft_wrap=True, highlight=False, markup=False)
    if as_json:
        typer.echo(json.dumps(result.as_json(), allow_nan=False))


def default_folder(settings: Settings) -> Path:
    """runs/MODEL-DATA-SEED or the next free name behind it; or one that was broken off, which is refused later."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # they must agree, and one may have begun to write
    name = f"{settings.model}-{settings.data}-{settings.seed}"
    return free_folder(name, wanted=(lambda _: True) if several else broken_off)


def broken_off(out: Path) -> bool:
    """Whether the folder holds a training that was saved and is not finished."""
    found = unfinished_at(out)
    return found is not None and not found.finished
