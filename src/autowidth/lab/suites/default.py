"""What happens where nobody names a target, beside the same network trained whole, on images of many kinds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from autowidth.lab.attempts import train_kept
from autowidth.lab.bench import BenchError, Outcome, Record, Suite, Unit, nameless
from autowidth.lab.data import ImageSet
from autowidth.lab.data.splits import Split
from autowidth.lab.fine_tuning import EPOCHS
from autowidth.lab.prepare import load_images
from autowidth.lab.settings import Settings, settings_of
from autowidth.lab.suites.compare import RECIPES
from autowidth.lab.suites.published import as_trained
from autowidth.lab.suites.registry import suite
from autowidth.lab.tables import markdown, spread

POINTS = 0.5
"""What may be lost, as `autowidth train` has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A network on images. data: the kind that must be given, None for the digits; train: further settings.

    classes, each: the first classes that are kept, and how many training images of each; weights: the file of published
    weights that training starts from.
    """

    model: str
    about: str
    data: str | None = "cifar10"
    train: Mapping[str, Any] = field(default_factory=dict)
    classes: int | None = None
    each: int | None = None
    weights: str | None = None


MINI = {**RECIPES["mini"].train, "policy": {"name": "auto"}, "epochs": RECIPES["mini"].epochs, "limit": 20_000}
TUNING = {"normalize": "imagenet", "batch_size": 128, "channels_last": True, "epochs": 6, "limit": 20_000}

CASES: Mapping[str, Case] = {
    "digits": Case(model="resnet20", data=None, about="digits, 120 epochs", train={"epochs": 120}),
    "digits-short": Case(model="resnet20", data=None, about="digits, 16 epochs", train={"epochs": 16}),
    "photos": Case(
        model="vgg8", about="the first 144 images of 4 classes, 32 x 32, 20 epochs", classes=4, each=144,
        train={"epochs": 20, "width": 0.5},
    ),
    "cifar-2000": Case(model="resnet20", about="2,000 images, 32 x 32, 20 epochs", train={"epochs": 20, "limit": 2000}),
    "mini-resnet20": Case(model="resnet20", about="mini, 16 epochs", train=MINI),
    "mini-vgg8": Case(model="vgg8", about="mini, 16 epochs", train=MINI),
    "mini-mobilenetv2": Case(model="mobilenetv2", about="mini, 16 epochs", train={**MINI, "lr": 0.2}),
    "narrow": Case(model="resnet20", about="mini, a quarter of the widths, 16 epochs", train={**MINI, "width": 0.25}),
    "wide": Case(model="resnet20", about="mini, twice the widths, 16 epochs", train={**MINI, "width": 2.0}),
    "mini-resnet20-long": Case(model="resnet20", about="mini, 64 epochs", train={**MINI, "epochs": 64}),
    "mini-vgg8-long": Case(model="vgg8", about="mini, 64 epochs", train={**MINI, "epochs": 64}),
    "published-resnet20": Case(
        model="resnet20-padding", about=f"published weights, 20,000 images, {TUNING['epochs']} epochs", train=TUNING,
        weights="resnet20.safetensors",
    ),
    "published-resnet56": Case(
        model="resnet56-padding", about=f"published weights, 20,000 images, {TUNING['epochs']} epochs", train=TUNING,
        weights="resnet56.safetensors",
    ),
}  # fmt: skip
"""The rows by name."""


@suite("default")
def default(
    *, data: str | None = None, weights: str | None = None, tables: Sequence[str] = (), seeds: Sequence[int] = (0,),
    epochs: int | None = None,
) -> Suite:  # fmt: skip
    """A unit for every row and seed; each trains the whole network on the way, which is the row to compare with.

    tables: names out of `CASES`, all of them where none is given. data: CIFAR-10, lossless for the rows at 32 x 32, any
    for those of `mini`. weights: the folder with published weights. Raises BenchError for what is missing or unknown.
    """
    names = tables or tuple(CASES)
    if unknown := [name for name in names if name not in CASES]:
        raise BenchError(f"no row is named {unknown[0]!r}; allowed are {', '.join(CASES)}")
    for name in names:
        if CASES[name].data is not None and (data is None or data.partition(":")[0] != CASES[name].data):
            raise BenchError(f"the row {name} measures on {CASES[name].data}: pass --data cifar10:PATH, got {data!r}")
        if CASES[name].weights is not None and weights is None:
            raise BenchError(f"the row {name} starts from published weights: pass --weights FOLDER")
    units = [_unit(name, data, weights, seed, epochs) for name in names for seed in seeds]
    apart = frozenset({"setting", "seed", "data", "weights", "epochs"})
    return Suite(name="default", units=tuple(units), run=measure, table=default_table, apart=apart)


def _unit(name: str, data: str | None, weights: str | None, seed: int, epochs: int | None) -> Unit:
    case = CASES[name]
    given = data if case.data is not None else "digits"
    assert given is not None, "checked before"
    folder = None if case.weights is None else f"folder:{weights}"
    settings = {"setting": name, "data": given, "weights": folder, "seed": seed, "epochs": epochs}
    command = f"autowidth bench default --tables {name} --seeds {seed}" + (
        f" --data {nameless(given)}" if case.data is not None else ""
    ) + (" --weights PATH" if folder else "") + (f" --epochs {epochs}" if epochs else "")  # fmt: skip
    return Unit(name=f"{name}-seed{seed}" + (f"-epochs{epochs}" if epochs else ""), settings=settings, command=command)


# ---- one unit --------------------------------------------------------------------------------------------------------


def settings_for(unit: Mapping[str, Any]) -> Settings:
    """The settings of a unit's run."""
    case = CASES[unit["setting"]]
    given = {"model": case.model, "data": unit["data"], "seed": unit["seed"], "threads": 1, "looks": 1, **case.train}
    if unit["epochs"]:
        given["epochs"] = unit["epochs"]
    if case.weights is not None:
        given["weights"] = Path(unit["weights"].removeprefix("folder:")).expanduser() / case.weights
    return settings_of({**given, "keep": POINTS})


def images_for(settings: Settings, case: Case) -> ImageSet:
    """The images of a unit."""
    images = load_images(settings)
    if case.weights is not None:
        images = as_trained(images)
    if case.classes is None:
        return images

    def kept(split: Split, each: int | None) -> Split:
        found = [(split.labels == number).nonzero().flatten()[:each] for number in range(case.classes or 0)]
        places = torch.cat(found).sort().values
        return Split(images=split.images[places], labels=split.labels[places])

    held_out = None if images.held_out is None else kept(images.held_out, None)
    return replace(
        images, classes=images.classes[: case.classes], train=kept(images.train, case.each), held_out=held_out,
        test=kept(images.test, None),
    )  # fmt: skip


def measure(unit: Mapping[str, Any]) -> Outcome:
    """The work of one unit: two records, one of the whole network and one of what the default made of it."""
    case, settings = CASES[unit["setting"]], settings_for(unit)
    images = images_for(settings, case)
    result, tests = train_kept(settings, images=images), len(images.test)
    kept = result.kept
    assert kept is not None, "asked for"
    about = {"setting": unit["setting"], "model": case.model, "seed": unit["seed"]}
    dense = about | {
        "method": "dense", "accuracy": kept.accuracy, "standard_error": _error(kept.accuracy, tests),
        "macs": result.macs_start, "macs_dense": result.macs_start, "params": result.params_start,
        "epochs": settings.epochs if case.weights is None else 0, "seconds": round(kept.seconds, 2),
    }  # fmt: skip
    default = about | {
        "method": "default", "accuracy": result.accuracy, "standard_error": _error(result.accuracy, tests),
        "macs": result.macs, "macs_dense": result.macs_start, "params": result.params, "epochs": result.epochs,
        "seconds": round(result.seconds, 2), "review_seconds": round(result.review_seconds, 2),
        "difference": kept.difference, "difference_error": kept.standard_error,
        "widths": list(result.widths.values()),
    }  # fmt: skip
    return Outcome(records=[dense, default], raw=[kept.as_json()])


def _error(share: float, count: int) -> float:
    """The standard error of a share of so many images that are classified rightly."""
    return math.sqrt(share * (1 - share) / count)


# ---- the table -------------------------------------------------------------------------------------------------------


def default_table(records: Sequence[Record]) -> str:
    """A row for every setting: accuracies, what was lost and what was saved, over all seeds."""
    rows = [_row(name, case, [r for r in records if r["setting"] == name]) for name, case in CASES.items()]
    headings = (
        "images, network", "seeds", "whole (%)", "default (%)", "lost, mean and worst (points)", "MACs (%)", "time",
        "reviews (%)",
    )  # fmt: skip
    return (
        f"# As small as costs at most {POINTS:g} points\n\n"
        "`autowidth train` without a target, beside the whole network of the same run; test images, mean ± standard "
        "deviation over seeds. Time is that of everything, as a multiple of the whole network's training; reviews are "
        "a share of it.\n\n" + markdown(headings, [row for row in rows if row]) + "\n"
    )


def _row(name: str, case: Case, records: Sequence[Record]) -> list[str]:
    dense = {r["seed"]: r for r in records if r["method"] == "dense"}
    ours = {r["seed"]: r for r in records if r["method"] == "default"}
    if not ours:
        return []
    lost = [100 * (dense[seed]["accuracy"] - r["accuracy"]) for seed, r in ours.items()]
    times = [r["seconds"] / dense[seed]["seconds"] for seed, r in ours.items() if dense[seed]["epochs"]]
    return [
        f"{case.about}, {case.model}", str(len(ours)),
        spread([100 * r["accuracy"] for r in dense.values()]), spread([100 * r["accuracy"] for r in ours.values()]),
        f"{statistics.mean(lost):+.2f}, {max(lost):+.2f}",
        spread([100 * r["macs"] / r["macs_dense"] for r in ours.values()], digits=0),
        f"{statistics.mean(times):.2f}" if times else f"{case.train.get('epochs', EPOCHS)} epochs",
        spread([100 * r["review_seconds"] / r["seconds"] for r in ours.values()], digits=1),
    ]  # fmt: skip
