"""The command line: train, inspect, bench."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from autowidth.channels import ChannelGroup, ChannelMap
from autowidth.checkpoint import CheckpointError
from autowidth.cost import count_macs, macs_cost, params_cost
from autowidth.engine import ForeignOptimizerError, NothingToResizeError
from autowidth.errors import AutoWidthError
from autowidth.history import Event, HistoryError
from autowidth.lab import bench as benches
from autowidth.lab import suites
from autowidth.lab.data import DataError, UnknownDataError
from autowidth.lab.loop import train as run
from autowidth.lab.methods import UnknownMethodError
from autowidth.lab.models import UnknownModelError, resolve, spec
from autowidth.lab.peers import PeerError, UnfitModelError
from autowidth.lab.policies import described, from_options
from autowidth.lab.prepare import ModelError
from autowidth.lab.result import Progress as Standing
from autowidth.lab.result import Result
from autowidth.lab.settings import Settings, settings_from
from autowidth.policy import BudgetError
from autowidth.probe import ProbeError
from autowidth.trace import TraceError, trace


class UsageError(ValueError):
    """An argument that has not the form it should have."""


MISTAKES = (
    UsageError,
    AutoWidthError,
    suites.UnknownSuiteError,
    UnknownMethodError,
    PeerError,
    UnfitModelError,
    benches.BenchError,
    benches.UnitError,
    FloatingPointError,
    UnknownModelError,
    UnknownDataError,
    DataError,
    BudgetError,
    NothingToResizeError,
    ForeignOptimizerError,
    ProbeError,
    TraceError,
    CheckpointError,
    HistoryError,
    OSError,
)
"""What a user can mend. Everything else is a bug, and shows its traceback."""

app = typer.Typer(
    name="autowidth",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console entry: runs the command that the arguments name."""
    # `module:callable` names code in the folder that the user stands in, as `python -m` would.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    app()


@app.callback()
def about() -> None:
    """Train a CNN once and come out with the right number of filters in every layer.

    Start with [bold]autowidth train[/bold]: it needs no arguments, no download and no GPU.
    """


@contextmanager
def door(*, debug: bool, interrupted: str = "nothing was written") -> Iterator[None]:
    """Turns a user's mistake into one sentence on stderr and exit code 2; with `debug`, lets the traceback out.

    `interrupted` says what is left where the user breaks off.
    """
    try:
        yield
    except KeyboardInterrupt:
        _fail(f"interrupted; {interrupted}", 130)
    except BrokenPipeError:  # whoever read the output has gone, as in `| head`; typer ends quietly
        raise
    except MISTAKES as error:
        if debug:
            traceback.print_exc()
        _fail(str(error) or type(error).__name__, 2)


def _fail(sentence: str, code: int) -> None:
    typer.echo(f"autowidth: {' '.join(sentence.split())}", err=True)
    raise typer.Exit(code)


# ---- train -----------------------------------------------------------------------------------------------------------


def _option(setting: str, *names: str) -> Any:
    """An option that fills this setting; its help and its default are the setting's."""
    field = Settings.model_fields[setting]
    default = "" if field.default is None else f"; default {field.default}"
    return typer.Option(*names, help=f"{field.description}{default}")


TRAIN_EXAMPLES = """[bold]Examples[/bold]

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
settings out of a file, the result for a program:
  autowidth train --config run.toml --seed 1 --json

A configuration file, TOML or JSON, holds the same names, and a table
for the policy and one for the reviews:
  epochs = 30
  budget = {macs = 0.4, count = 8}
  effort = {audit_filters = 20}
"""


@app.command(epilog=TRAIN_EXAMPLES)
def train(
    model: Annotated[str | None, _option("model", "--model")] = None,
    data: Annotated[str | None, _option("data", "--data")] = None,
    macs: Annotated[
        float | None,
        typer.Option(help="end at this cost: a share of the starting MACs, or above 100 MACs per image"),
    ] = None,
    params: Annotated[float | None, typer.Option(help="end at this cost, in parameters instead of MACs")] = None,
    latency: Annotated[
        float | None, typer.Option(help="end at this share of the time that a forward pass of one image takes here")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="the same in milliseconds")] = None,
    price: Annotated[
        float | None, typer.Option(help="end where a MAC earns what it costs: nats for all starting MACs")
    ] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="as wide as the data justify; this is what happens without any target")
    ] = False,
    epochs: Annotated[int | None, _option("epochs", "--epochs")] = None,
    batch_size: Annotated[int | None, _option("batch_size", "--batch-size")] = None,
    lr: Annotated[float | None, _option("lr", "--lr")] = None,
    seed: Annotated[int | None, _option("seed", "--seed")] = None,
    width: Annotated[float | None, _option("width", "--width")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder that the run is written to; default runs/MODEL-DATA-SEED")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="file of settings, TOML or JSON; options overrule it")] = None,
    device: Annotated[str | None, _option("device", "--device")] = None,
    threads: Annotated[int | None, _option("threads", "--threads")] = None,
    no_edit: Annotated[bool, typer.Option("--no-edit", help="plain training: no reviews, no resizing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="last line of stdout is one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress and no table, only the result")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Train a network, and come out with the right number of filters in every layer."""
    bounds = {"macs": macs, "params": params, "latency": latency, "latency_ms": latency_ms}
    options = {
        "model": model, "data": data, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed,
        "width": width, "out": out, "device": device, "threads": threads,
    }  # fmt: skip
    console = _console(stderr=as_json)
    with door(debug=debug):
        given = {name: value for name, value in options.items() if value is not None}
        given |= from_options(bounds, price=price, auto=auto, edit=False if no_edit else None)
        settings = settings_from(given, config=config)
        if settings.out is None:
            settings = settings.model_copy(update={"out": default_folder(settings)})
        display = _display(console, settings, quiet=quiet)
        with display:
            result = run(settings, report=display.show)
        if not quiet:
            console.print(_groups_table(result))
        console.print(_closing(result), soft_wrap=True, highlight=False)
        if as_json:
            typer.echo(json.dumps(result.as_json(), allow_nan=False))


def default_folder(settings: Settings) -> Path:
    """runs/MODEL-DATA-SEED, in characters that every file system takes."""
    name = f"{settings.model}-{settings.data}-{settings.seed}"
    return Path("runs") / re.sub(r"[^\w.-]+", "-", name).strip("-.")


def _console(*, stderr: bool) -> Console:
    """A console that does not fold tables where nobody reads along in a terminal."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=int(os.environ.get("COLUMNS", 120)))


class _Silence:
    """Shows nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, progress: Standing) -> None:
        """Nothing."""


class _Lines(_Silence):
    """One line per epoch and per review, for logs and pipes."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self.console = console
        self.settings = settings

    def show(self, progress: Standing) -> None:
        """Prints a line if an epoch or a review is over."""
        if (line := self._line(progress)) is not None:
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)
            self.console.file.flush()

    def _line(self, p: Standing) -> str | None:
        if p.moment == "start":
            return _opening(self.settings, p)
        if p.moment == "review" and p.event is not None:
            return f"  {_told(p.event, p.reviews)}; widths {_widths(p.widths)}"
        if p.moment == "epoch":
            return (
                f"epoch {p.epoch:>{len(str(p.epochs))}}/{p.epochs}  loss {p.loss:.4f}  accuracy {p.accuracy:7.2%}  "
                f"MACs {p.macs / p.macs_start:6.1%}  parameters {p.params / p.params_start:6.1%}  {p.seconds:.1f} s"
            )
        return None


class _Screen(_Silence):
    """A live display for a terminal: bar, figures, widths, the last review."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self.settings = settings
        self.bar = Progress(
            TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.task = self.bar.add_task("epoch", total=settings.epochs)
        self.live = Live(console=console, refresh_per_second=8)

    def __enter__(self) -> None:
        self.live.__enter__()

    def __exit__(self, *error: object) -> None:
        self.live.__exit__(None, None, None)

    def show(self, progress: Standing) -> None:
        """Draws where the run stands."""
        p = progress
        self.bar.update(self.task, completed=p.epochs * p.step // p.total_steps)
        figures = Table.grid(padding=(0, 3))
        figures.add_row("loss", "accuracy", "MACs", "parameters", "reviews", style="dim")
        figures.add_row(
            "" if p.loss is None else f"{p.loss:.4f}",
            "" if p.accuracy is None else f"{p.accuracy:.2%}",
            f"{_short(p.macs)} ({p.macs / p.macs_start:.1%})",
            f"{_short(p.params)} ({p.params / p.params_start:.1%})",
            str(p.reviews),
        )
        last = _told(p.event, p.reviews) if p.event else "no review yet" if self.settings.edit else "no reviews"
        widths = Text(f"widths {_widths(p.widths)}")
        self.live.update(Group(Text(_opening(self.settings, p)), self.bar, figures, widths, Text(last)))


def _display(console: Console, settings: Settings, *, quiet: bool) -> _Silence:
    if quiet:
        return _Silence()
    return _Screen(console, settings) if console.is_terminal else _Lines(console, settings)


def _opening(settings: Settings, p: Standing) -> str:
    """What is trained in a line, and on what images in another."""
    aim = described(settings.policy)
    start = f"{_short(p.macs_start)} MACs, {_short(p.params_start)} parameters"
    run = f"{settings.model} on {settings.data}, seed {settings.seed}: from {start}, {aim}, in {p.epochs} epochs"
    return f"{run}\n{p.data}"


def _told(event: Event, number: int) -> str:
    """A review in one line."""
    moved = f"-{sum(event.removed.values())} +{sum(event.inserted.values())} filters"
    parts = [f"review {number} at step {event.step}: {moved}"]
    if event.announced is not None and event.measured is not None:
        parts.append(f"loss {event.measured:+.4f} nats (announced {event.announced:+.4f})")
    if event.fidelity is not None and event.fidelity.spearman is not None:
        parts.append(f"audit agreed {event.fidelity.spearman:.2f}")
    return ", ".join(parts)


def _widths(widths: Mapping[str, int]) -> str:
    return " ".join(map(str, widths.values()))


def _groups_table(result: Result) -> Table:
    """Every channel group: its widths, what one channel costs, what its filters were worth at the last review."""
    events = result.history.events
    worths = events[-1].worths if events else {}
    cost = macs_cost(result.channel_map)
    marginal = dict(zip(cost.names, cost.of_channel(result.widths).tolist(), strict=True))
    table = Table("channel group", title="What became of the widths", title_justify="left", box=None)
    for heading in ("before", "after", "MACs per channel", "worth of weakest", "of strongest (nats)"):
        table.add_column(heading, justify="right")
    for name, before in result.widths_start.items():
        weakest, _, strongest = worths.get(name, (None, None, None))
        span = ["-" if w is None else f"{w:.2e}" for w in (weakest, strongest)]
        table.add_row(escape(name), str(before), str(result.widths[name]), f"{marginal[name]:,.0f}", *span)
    return table


def _closing(result: Result) -> str:
    """The result in a line, and where it lies in another."""
    r = result
    what = "accuracy" if r.part == "test" else "held-out accuracy"
    share = f"{r.review_seconds / r.seconds:.1%} of it in {r.reviews} reviews" if r.reviews else "no reviews"
    timed = f", {r.latency_ms:.3g} ms an image instead of {r.latency_ms_start:.3g}" if r.latency_ms else ""
    moved = f", {r.removed} filters removed, {r.inserted} inserted ({r.inserted_alive} alive)" if r.reviews else ""
    return (
        f"[bold]{what} {r.accuracy:.2%} with {r.macs / r.macs_start:.1%} of the MACs and "
        f"{r.params / r.params_start:.1%} of the parameters[/bold] of the starting network{timed}{moved}; "
        f"{r.seconds:.1f} s, {share}\nwritten to {escape(str(r.out))}: model.safetensors, run.json, history.jsonl"
    )


# ---- inspect ---------------------------------------------------------------------------------------------------------


INSPECT_EXAMPLES = """[bold]Examples[/bold]

a built-in network, at the input it was published for:
  autowidth inspect resnet56
a class or function of yours, in this folder:
  autowidth inspect my_net:Net --input 1,3,224,224
for a program:
  autowidth inspect vgg16 --json
"""


@app.command(epilog=INSPECT_EXAMPLES)
def inspect(
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
        book = look_at(model, dims)
        if as_json:
            typer.echo(json.dumps(book, allow_nan=False))
        else:
            _print_book(_console(stderr=False), book)


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


def look_at(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
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
    channel_map = trace(network, example)
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


def _print_book(console: Console, book: Mapping[str, Any]) -> None:
    groups = Table("channel group", title="Channel groups", title_justify="left", box=None)
    for heading in ("width", "MACs per channel", "parameters per channel"):
        groups.add_column(heading, justify="right")
    groups.add_column("lives on")
    for g in book["groups"]:
        costs = (f"{g['macs_per_channel']:,}", f"{g['params_per_channel']:,}")
        groups.add_row(escape(g["name"]), str(g["width"]), *costs, _places(g["places"]))
    frozen = Table("frozen axis", title="Frozen axes", title_justify="left", box=None)
    frozen.add_column("positions", justify="right")
    frozen.add_column("reason")
    for f in book["frozen"]:
        frozen.add_row(escape(f["axis"]), f"{f['positions']} of {f['length']}", escape(f["reason"]))
    console.print(groups if book["groups"] else "No channel group can be resized.")
    if book["frozen"]:
        console.print()
        console.print(frozen)
    for note in book["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print()
    console.print(_totals(book), soft_wrap=True, highlight=False, markup=False)


def _places(places: list[dict[str, Any]]) -> str:
    """Where a channel lives, in short: 'written by 1, read by 2 (64 copies), carried by 8'."""
    told = []
    verbs: tuple[tuple[str, str], ...] = (("write", "written by"), ("read", "read by"), ("carry", "carried by"))
    for role, verb in verbs:
        copies = [place["copies"] for place in places if place["role"] == role]
        if copies:
            told.append(f"{verb} {len(copies)}" + (f" ({max(copies)} copies)" if max(copies) > 1 else ""))
    return ", ".join(told)


def _totals(book: Mapping[str, Any]) -> str:
    channels = sum(g["width"] for g in book["groups"])
    rest = book["macs"] - book["macs_of_weights"]
    outside = f" ({rest:,} of them outside weights)" if rest > 0 else ""
    return (
        f"{book['model']} at input {','.join(map(str, book['input']))}: {book['macs']:,} MACs per sample{outside}, "
        f"{book['params']:,} parameters, {channels:,} channels in {len(book['groups'])} channel groups, "
        f"{len(book['frozen'])} frozen axes"
    )


# ---- bench -----------------------------------------------------------------------------------------------------------


BENCH_EXAMPLES = """[bold]Examples[/bold]

criteria against true ablation on the digits, two networks:
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

[bold]Suites[/bold]

fidelity: how well ours and the published criteria predict, at 10, 30,
60 and 100 % of a training run, what a filter is worth, measured by
taking filters away on images that nobody has seen.

digits, mini, cifar10: accuracy, MACs, parameters and seconds of ours,
its ablations, controls, published methods, Torch-Pruning and GroMo,
after the same number of epochs; a minute or two, about two minutes a
run on one core, and a GPU.

A unit (one network, one seed, one method) is one JSON file. A suite that was broken
off, at any point, goes on with the same command.
"""


@app.command(epilog=BENCH_EXAMPLES)
def bench(
    suite: Annotated[str, typer.Argument(help=f"what to measure: {', '.join(suites.SUITES)}")],
    out: Annotated[Path, typer.Option(help="folder of the results; what is there is not run again")] = Path("results"),
    data: Annotated[str | None, typer.Option(help="digits or cifar10:PATH; default digits")] = None,
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
    starts: Annotated[
        str | None, typer.Option(help="of a comparison: factors on the starting widths, as in 0.5,1,2; default 1")
    ] = None,
    choose: Annotated[
        bool, typer.Option("--choose", help="of a comparison: measure on held-out training images, not on the test")
    ] = False,
    processes: Annotated[int, typer.Option(help="units at a time, one CPU thread each")] = 2,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Run a suite of measurements, or what is left of it, and print its tables."""
    with door(debug=debug, interrupted="finished units are kept, the same command goes on"):
        asked = {
            "data": data, "models": _words(models), "epochs": epochs, "methods": _words(methods),
            "budgets": read_shares("budgets", budgets), "starts": read_shares("starts", starts), "choose": choose,
        }  # fmt: skip
        given = {name: value for name, value in asked.items() if value}
        wanted = suites.find_suite(suite, seeds=read_seeds(seeds), **given)
        records = benches.bench(wanted, out, processes=processes, report=_tell_standing)
        typer.echo(wanted.table(records))
        typer.echo(f"written to {out / wanted.name}.json and {out / wanted.name}.md")


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


def _tell_standing(standing: benches.Standing) -> None:
    how = "was there" if standing.seconds is None else f"took {standing.seconds:.0f} s"
    typer.echo(f"{standing.unit} {how}, {standing.done} of {standing.total} done", err=True)


def _short(number: float) -> str:
    """A count in three digits: 41.2 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


if __name__ == "__main__":
    main()
