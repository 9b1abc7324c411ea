"""Comparisons: methods x models x seeds x budgets under one recipe; accuracy, MACs, time, widths."""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from autowidth.history import PARTS
from autowidth.lab.bench import BenchError, Outcome, Record, Suite, Unit, nameless
from autowidth.lab.methods import METHODS, Finish, Task, UnknownMethodError, dense_macs
from autowidth.lab.models import spec
from autowidth.lab.plots import accuracy_plot, kinds_of
from autowidth.lab.prepare import load_images
from autowidth.lab.settings import Settings, settings_of
from autowidth.lab.suites.registry import suite
from autowidth.lab.tables import markdown, spread

OF_OURS = ("policy", "effort")
"""Settings that only our methods heed."""

CHOICES = 5000
"""Further training images on which choices are made, where test images must not be looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What all methods of a comparison have in common.

    data: the kind of data that must be given, with its default; limit: training images, None for all; train: further
    settings of the run.
    """

    data: str | None
    kind: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    epochs: int
    limit: int | None
    train: Mapping[str, Any] = field(default_factory=dict)


EVERY = tuple(METHODS)

RECIPES: Mapping[str, Recipe] = {
    "digits": Recipe(
        data="digits",
        kind="digits",
        models=("resnet8",),
        methods=("dense", "uniform", "autowidth", "autowidth-no-insertion", "l1", "bn-scale", "random"),
        epochs=20,
        limit=None,
        train={"batch_size": 64},
    ),
    "mini": Recipe(
        data=None,
        kind="cifar10",
        models=("resnet20",),
        methods=EVERY,
        epochs=16,
        limit=20_000,
        train={
            "batch_size": 128, "pool": 2, "channels_last": True, "lr": 0.6,
            "policy": {"name": "budget", "limits": {"multiple": 4}},
        },
    ),
    "cifar10": Recipe(
        data=None,
        kind="cifar10",
        models=("vgg16", "resnet56-padding", "densenet40", "googlenet", "mobilenetv2"),
        methods=("dense", "uniform", "autowidth", "l1", "bn-scale", "torch-pruning-magnitude-network"),
        epochs=60,
        limit=None,
        train={
            "batch_size": 512, "channels_last": True, "bf16": True, "lr": 0.4, "label_smoothing": 0.1, "device": "auto",
        },
    ),
}  # fmt: skip
"""The comparisons by name."""


def comparison(
    name: str,
    *,
    data: str | None = None,
    models: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    epochs: int | None = None,
    methods: Sequence[str] = (),
    budgets: Sequence[float] = (0.25,),
    starts: Sequence[float] = (1.0,),
    choose: bool = False,
) -> Suite:
    """The suite `name` of `RECIPES`: a unit for every method, model, seed, budget and start.

    budgets: shares of the MACs of the network with the factor one on its widths; starts: factors on the widths of the
    starting network; choose: measure accuracy on training images that are held out, never on test images. Raises
    BenchError, UnknownMethodError, UnknownModelError, SettingsError.
    """
    recipe = RECIPES[name]
    data = data or recipe.data
    if data is None or data.partition(":")[0] != recipe.kind:
        raise BenchError(f"the suite {name} measures on {recipe.kind}: pass --data {recipe.kind}:PATH, got {data!r}")
    for model in models:
        if ":" not in model:
            spec(model)
    _check_methods(methods)
    units = [
        _unit(name, recipe, data, method, model, seed, budget, start, epochs or recipe.epochs, choose)
        for seed in seeds
        for model in models or recipe.models
        for budget in budgets
        for start in starts
        for method in methods or recipe.methods
    ]
    apart = frozenset({"model", "seed", "method", "macs", "start", "epochs"})
    return Suite(name=name, units=tuple(units), run=measure, table=table, apart=apart, draw=accuracy_plot)


for _name in RECIPES:
    suite(_name)(partial(comparison, _name))


def _check_methods(methods: Sequence[str]) -> None:
    for method in methods:
        if method not in METHODS:
            close = difflib.get_close_matches(method, METHODS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UnknownMethodError(f"no method is named {method!r}; allowed are {', '.join(METHODS)}{hint}")


def _unit(
    suite: str, recipe: Recipe, data: str, method: str, model: str, seed: int, macs: float, start: float,
    epochs: int, choose: bool,
) -> Unit:  # fmt: skip
    limit = recipe.limit
    given: dict[str, Any] = {
        "model": model, "data": data, "width": start, "epochs": epochs, "seed": seed, "threads": 1, "looks": 1,
        **recipe.train,
    }  # fmt: skip
    if choose:
        given |= {"limit": limit and limit + CHOICES, "holdout": CHOICES / (limit + CHOICES) if limit else 0.1}
    elif limit:
        given["limit"] = limit
    dumped = settings_of(given).model_dump(mode="json", exclude={"data", "model", "seed", "out", "width", "epochs"})
    of_ours = {key: dumped.pop(key) for key in OF_OURS}
    settings: dict[str, Any] = {
        "data": data, "model": model, "seed": seed, "method": method, "macs": macs, "start": start, "epochs": epochs,
        "training": dumped,
    }  # fmt: skip
    if method.startswith("autowidth"):
        settings |= of_ours
    command = (
        f"autowidth bench {suite} --data {nameless(data)} --models {model} --seeds {seed} --methods {method} "
        f"--budgets {macs:g} --starts {start:g} --epochs {epochs}" + (" --choose" if choose else "")
    )
    longer = "" if epochs == recipe.epochs else f"-epochs{epochs}"
    name = f"{method}-{model}-seed{seed}-macs{macs:g}-start{start:g}{longer}"
    return Unit(name=name, settings=settings, command=command)


def measure(settings: Mapping[str, Any]) -> Outcome:
    """Runs one method on one model from one seed: the work of one unit. A record for the run, and for its control."""
    named = {key: settings[key] for key in ("data", "model", "seed", "epochs", *OF_OURS) if key in settings}
    training = Settings.model_validate({**settings["training"], **named, "width": settings["start"]})
    task = Task(settings=training, macs=settings["macs"], images=load_images(training))
    finishes = METHODS[settings["method"]](task)
    whole = dense_macs(task)
    about = {"model": training.model, "seed": training.seed, "start": training.width, "budget": settings["macs"]}
    records = [_record(finish, whole) | about for finish in finishes]
    return Outcome(records=records, raw=[{"method": finish.method, "reviews": _reviews(finish)} for finish in finishes])


def _record(finish: Finish, whole: float) -> Record:
    result = finish.result
    spent = {part: sum(event.seconds.get(part, 0.0) for event in result.history) for part in PARTS}
    return {
        "method": finish.method, "policy": finish.policy, "data": result.data, "part": result.part,
        "epochs": result.epochs, "accuracy": result.accuracy, "loss": result.loss, "macs": result.macs,
        "macs_dense": round(whole), "params": result.params, "seconds": round(result.seconds, 2),
        "cpu_seconds": round(result.cpu_seconds, 2), "review_seconds": round(result.review_seconds, 2),
        **{f"{part}_seconds": round(seconds, 2) for part, seconds in spent.items()},
        "removed": result.removed, "inserted": result.inserted, "inserted_alive": result.inserted_alive,
        "device": result.device, "widths": list(result.widths.values()),
    }  # fmt: skip


def _reviews(finish: Finish) -> list[dict[str, Any]]:
    """What each review of a run decided, for those who want to look behind the record."""
    return [
        {
            "step": event.step, "loss": event.loss, "measured": event.measured, "predicted": event.predicted,
            "price": event.price, "macs": event.macs, "widths": list(event.widths.values()),
            "spearman": event.fidelity.spearman if event.fidelity else None, "coefficients": list(event.coefficients),
            "notes": list(event.notes), "seconds": event.seconds,
        }
        for event in finish.result.history
    ]  # fmt: skip


# ---- tables ----------------------------------------------------------------------------------------------------------


HEADINGS = ("method", "policy", "start", "accuracy %", "MACs %", "parameters", "seconds", "reviews %", "seeds")
"""What `_row` says of a method."""


def table(records: Sequence[Record]) -> str:
    """The records as Markdown: a table per data set, model, budget and epochs; a row per method, policy and start."""
    text = [
        "# Methods compared under one recipe\n",
        "Accuracy after the final epoch, mean over seeds and standard deviation between them. MACs against the dense "
        "network. Seconds are processor time of one thread for the whole way to the finished network, reviews and "
        "fine-tuning included; reviews are their share of the wall time.\n",
    ]
    for (data, part, model, budget, epochs), mine in kinds_of(records, "data", "part", "model", "budget").items():
        text.append(
            f"## {model} on {data}, {budget:.0%} of the MACs, {epochs} epochs\n\n"
            f"Accuracy on the {part.replace('_', ' ')} images.\n"
        )
        rows = [_group(mine, row) for row in dict.fromkeys((r["method"], r["policy"], r["start"]) for r in mine)]
        rows.sort(key=lambda rows: -statistics.mean(r["accuracy"] for r in rows))
        text.append(markdown(HEADINGS, [_row(row) for row in rows]))
        text += _review_table([row for row in rows if row[0]["method"].startswith("autowidth")])
        text.append("")
    return "\n".join(text)


def _group(records: Sequence[Record], row: tuple[str, str, float]) -> list[Record]:
    return [r for r in records if (r["method"], r["policy"], r["start"]) == row]


def _row(records: Sequence[Record]) -> list[str]:
    return [
        *_named(records[0]),
        spread([100 * r["accuracy"] for r in records]),
        f"{statistics.mean(100 * r['macs'] / r['macs_dense'] for r in records):.1f}",
        f"{statistics.mean(r['params'] for r in records):,.0f}",
        f"{statistics.mean(r['cpu_seconds'] for r in records):.0f}",
        f"{statistics.mean(100 * r['review_seconds'] / r['seconds'] for r in records):.1f}",
        ", ".join(str(r["seed"]) for r in sorted(records, key=lambda r: r["seed"])),
    ]


def _named(record: Record) -> list[str]:
    """What tells one row from another: method, policy, start."""
    return [record["method"], record["policy"], f"{record['start']:g}x"]


def _review_table(rows: Sequence[Sequence[Record]]) -> list[str]:
    """What the reviews of our rows spend their time on, in percent of the wall time of the run."""
    if not rows:
        return []
    spent = [*(f"{part}_seconds" for part in PARTS), "review_seconds"]
    shares = [
        [f"{statistics.mean(100 * r[key] / r['seconds'] for r in row):.1f}" for key in spent] for row in rows
    ]  # fmt: skip
    return [
        "\nWhat our reviews take, in percent of the wall time of the run:\n",
        markdown(
            ("method", "policy", "start", *PARTS, "together"),
            [_named(row[0]) + share for row, share in zip(rows, shares, strict=True)],
        ),
    ]
