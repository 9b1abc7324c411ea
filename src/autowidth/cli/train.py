"""autowidth train: one run, from the options to its result."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from autowidth.cli.display import Silence, closing, console_for, display_for, groups_table
from autowidth.cli.door import door
from autowidth.cli.logs import Logs, logs_for
from autowidth.cli.recording import Recorder
from autowidth.lab.loop import train
from autowidth.lab.policies import from_options
from autowidth.lab.result import Progress
from autowidth.lab.resuming import settings_to_resume
from autowidth.lab.settings import Settings, settings_from
from autowidth.lab.torchrun import is_first, joined, left_by_a_restart
from autowidth.policy import POLICIES

EXAMPLES = """[bold]Examples[/bold]

digits, ResNet-20, as wide as the digits need, about a minute:
  autowidth train
the same, ending at half of the MACs:
  autowidth train --macs 0.5
the same run without reviews, for comparison:
  autowidth train --no-edit --out runs/plain
start narrow, and let filters be inserted:
  autowidth train --width 0.5 --macs 1
a network of yours on pictures of yours:
  autowidth train --model my_net:Net --data folder:photos
a trained network, made smaller and trained on:
  autowidth train --model my_net:Net --weights best.pt --data folder:photos --macs 0.5 --lr 0.01
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
  policy = {name = "budget", macs = 0.4, limits = {multiple = 8}}
  effort = {audit_filters = 20}
While it trains, [bold]autowidth report[/bold] draws the page of the run;
at its end every run has one, report.html.
What is in neither may be in the environment: AUTOWIDTH_EPOCHS=30.
"""


def option(setting: str, *names: str) -> Any:
    """An option that fills this setting; its help and its default are the setting's."""
    field = Settings.model_fields[setting]
    default = "" if field.default is None else f"; default {field.default}"
    return typer.Option(*names, help=f"{field.description}{default}")


Model = Annotated[str | None, option("model", "--model")]
Data = Annotated[str | None, option("data", "--data")]
Weights = Annotated[Path | None, option("weights", "--weights")]
NewHead = Annotated[bool, typer.Option("--new-head", help=Settings.model_fields["new_head"].description)]
Normalize = Annotated[str | None, option("normalize", "--normalize")]
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
    bool, typer.Option("--auto", help="as wide as the data justify; this is what happens without any target")
]
Policy = Annotated[
    str | None,
    typer.Option(help=f"any policy by name, its settings from the configuration: {', '.join(POLICIES)}"),
]
Epochs = Annotated[int | None, option("epochs", "--epochs")]
BatchSize = Annotated[int | None, option("batch_size", "--batch-size")]
Rate = Annotated[float | None, option("lr", "--lr")]
Seed = Annotated[int | None, option("seed", "--seed")]
Width = Annotated[float | None, option("width", "--width")]
Out = Annotated[Path | None, typer.Option(help="folder that the run is written to; default runs/MODEL-DATA-SEED")]
Resume = Annotated[
    Path | None,
    typer.Option(help="go on with the run in this folder, which knows its settings; with --epochs, for longer"),
]
SaveEvery = Annotated[float | None, option("save_every", "--save-every")]
Keep = Annotated[int | None, option("keep", "--keep")]
Rescue = Annotated[Path | None, option("rescue", "--rescue")]
Config = Annotated[Path | None, typer.Option(help="file of settings, TOML or JSON; options overrule it")]
Device = Annotated[str | None, option("device", "--device")]
Threads = Annotated[int | None, option("threads", "--threads")]
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


def command(
    model: Model = None, data: Data = None, macs: Macs = None, params: Params = None, latency: Latency = None,
    latency_ms: LatencyMs = None, price: Price = None, auto: Auto = False, policy: Policy = None, epochs: Epochs = None,
    batch_size: BatchSize = None, lr: Rate = None, seed: Seed = None, width: Width = None, out: Out = None,
    weights: Weights = None, new_head: NewHead = False, normalize: Normalize = None, resume: Resume = None,
    save_every: SaveEvery = None, keep: Keep = None, rescue: Rescue = None, config: Config = None,
    device: Device = None, threads: Threads = None, no_edit: NoEdit = False, tensorboard: TensorBoard = None,
    mlflow: Mlflow = None, as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Train a network, and come out with the right number of filters in every layer."""
    bounds = {"macs": macs, "params": params, "latency": latency, "latency_ms": latency_ms}
    options = {
        "model": model, "data": data, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed,
        "width": width, "out": out, "device": device, "threads": threads, "weights": weights, "normalize": normalize,
        "new_head": new_head or None, "save_every": save_every, "keep": keep, "rescue": rescue,
    }  # fmt: skip
    with door(debug=debug):
        given = {name: value for name, value in options.items() if value is not None}
        given |= from_options(bounds, price=price, auto=auto, edit=not no_edit, named=policy)
        settings = settings_from(given, config=config)
        if resume is None and settings.out is None:
            settings = settings.model_copy(update={"out": default_folder(settings)})
        resume = resume or left_by_a_restart(settings.out)
        if resume is not None:
            settings = settings_to_resume(resume, settings)
        _run(settings, resume, tensorboard, mlflow, as_json=as_json, quiet=quiet)


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
            train(mine, resume=resume)
            return
        out = mine.out or default_folder(mine)
        display, recorder = display_for(console, mine, quiet=quiet), Recorder(out, mine, resume=resume)
        with logs_for(mine, out, tensorboard=tensorboard, mlflow=mlflow) as logs, recorder:
            viewers = (recorder, display, logs)
            with display:
                result = train(mine, report=partial(_shown, viewers), watch=recorder.watch, resume=resume)
            unwritten = recorder.finish(Path(result.out or out))
    if not quiet:
        console.print(groups_table(result))
    console.print(closing(result, written=recorder.written), soft_wrap=True, highlight=False)
    if unwritten is not None:
        console.print(unwritten, soft_wrap=True, highlight=False, markup=False)
    if as_json:
        typer.echo(json.dumps(result.as_json(), allow_nan=False))


def default_folder(settings: Settings) -> Path:
    """runs/MODEL-DATA-SEED, in characters that every file system takes."""
    name = f"{settings.model}-{settings.data}-{settings.seed}"
    return Path("runs") / re.sub(r"[^\w.-]+", "-", name).strip("-.")
