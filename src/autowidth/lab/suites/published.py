"""Published CIFAR ResNets made smaller: without training, and fine-tuned for equal epochs, by every method."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autowidth.cost import count_macs
from autowidth.lab.bench import BenchError, Outcome, Record, Suite, Unit, nameless
from autowidth.lab.data import ImageSet
from autowidth.lab.fine_tuning import AT_ONCE, LIMITS
from autowidth.lab.loop_parts import EVALUATED, at_once, evaluate
from autowidth.lab.methods import UnknownMethodError
from autowidth.lab.prepare import build_network, find_device, load_images
from autowidth.lab.published_table import published_plot, published_table
from autowidth.lab.removing import METHODS, Removal, with_precise_norms
from autowidth.lab.settings import Settings, settings_of
from autowidth.lab.suites.registry import suite
from autowidth.lab.tuning import TUNED, Tuning

NO_TRAINING, FINE_TUNED = "no-training", "fine-tuned"

HELD_OUT = 5000
"""Training images on which choices are made; accuracy is that on all test images."""

TRAINING = 8192
"""Training images of the table without training: those that norm statistics are of, and the scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One of the tables: its methods, what it runs where nobody says otherwise, and how its networks are trained.

    limit: training images with those that are held out, None for all.
    """

    methods: Mapping[str, Callable[[Any], Any]]
    models: tuple[str, ...]
    targets: tuple[float, ...]
    limit: int | None
    epochs: int
    train: Mapping[str, Any] = field(default_factory=dict)


TABLES: Mapping[str, Table] = {
    NO_TRAINING: Table(
        methods=METHODS,
        models=("resnet20", "resnet32", "resnet44", "resnet56"),
        targets=(0.9, 0.8, 0.7, 0.6, 0.5),
        limit=TRAINING + HELD_OUT,
        epochs=0,
    ),
    FINE_TUNED: Table(
        methods=TUNED,
        models=("resnet20",),
        targets=(0.5, 0.3),
        limit=None,
        epochs=20,
        train={"batch_size": 128, "lr": 0.05, "schedule": "cosine", "channels_last": True},
    ),
}  # fmt: skip
"""The tables by name."""


@suite("published")
def published(
    *,
    data: str | None = None,
    weights: str | None = None,
    tables: Sequence[str] = tuple(TABLES),
    models: Sequence[str] = (),
    methods: Sequence[str] = (),
    budgets: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    epochs: int | None = None,
    limit: int | None = None,
    device: str = "cpu",
) -> Suite:
    """A unit for every table, model, method, target and seed.

    data: lossless CIFAR-10; weights: the folder with `resnet20.safetensors` and its like; budgets: shares of the MACs;
    limit: training images, of which as large a share is held out as otherwise. Raises BenchError for data or weights
    that are not given and for a table that is not there, UnknownMethodError, SettingsError.
    """
    if data is None or data.partition(":")[0] != "cifar10":
        raise BenchError(f"the suite published measures on cifar10: pass --data cifar10:PATH, got {data!r}")
    if weights is None:
        raise BenchError("the suite published starts from published weights: pass --weights FOLDER")
    if missing := [name for name in tables if name not in TABLES]:
        raise BenchError(f"no table is named {missing[0]!r}; allowed are {', '.join(TABLES)}")
    _check_methods(methods, tables)
    place = weights if weights.startswith("folder:") else f"folder:{weights}"
    units = [
        _unit(name, TABLES[name], data, place, model, method, target, seed, epochs, limit, device)
        for name in tables
        for model in models or TABLES[name].models
        for target in budgets or TABLES[name].targets
        for seed in seeds
        for method in methods or TABLES[name].methods
        if method in TABLES[name].methods
    ]
    apart = frozenset({"table", "model", "seed", "method", "target", "training"})
    return Suite(
        name="published", units=tuple(units), run=measure, table=published_table, apart=apart, draw=published_plot
    )


def _check_methods(methods: Sequence[str], tables: Sequence[str]) -> None:
    """Raises UnknownMethodError for a method that none of the tables has."""
    known = list(dict.fromkeys(method for name in tables for method in TABLES[name].methods))
    for method in methods:
        if method not in known:
            close = difflib.get_close_matches(method, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UnknownMethodError(f"no method is named {method!r}; allowed are {', '.join(known)}{hint}")


def _unit(
    name: str, table: Table, data: str, weights: str, model: str, method: str, target: float, seed: int,
    epochs: int | None, limit: int | None, device: str,
) -> Unit:  # fmt: skip
    size = table.limit if limit is None else limit
    share = HELD_OUT / table.limit if table.limit else 0.1
    training = {
        "normalize": "imagenet", "holdout": round(share, 6), "limit": size, "threads": 1, "looks": 1, "device": device,
        **table.train,
    }  # fmt: skip
    if table.epochs:
        training["epochs"] = epochs or table.epochs
    settings = {
        "table": name, "data": data, "weights": weights, "model": model, "method": method, "target": target,
        "seed": seed, "training": training,
    }  # fmt: skip
    command = (
        f"autowidth bench published --data {nameless(data)} --weights PATH --tables {name} --models {model} "
        f"--methods {method} --budgets {target:g} --seeds {seed} --device {device}"
        + (f" --epochs {training['epochs']}" if table.epochs else "")
        + (f" --limit {limit}" if limit else "")
    )
    of_epochs = f"-epochs{training['epochs']}" if table.epochs else ""
    title = f"{name}-{model}-{method}-macs{target:g}-seed{seed}{of_epochs}" + (f"-limit{limit}" if limit else "")
    return Unit(name=title, settings=settings, command=command)


# ---- one unit --------------------------------------------------------------------------------------------------------


def settings_for(settings: Mapping[str, Any]) -> Settings:
    """The settings of a unit's network and images: the published network with its weights."""
    folder = Path(settings["weights"].removeprefix("folder:")).expanduser()
    return settings_of({
        "model": f"{settings['model']}-padding", "weights": folder / f"{settings['model']}.safetensors",
        "data": settings["data"], "seed": settings["seed"], **settings["training"],
        "policy": {"name": "budget", "macs": settings["target"], "schedule": dict(AT_ONCE), "limits": dict(LIMITS)},
    })  # fmt: skip


def as_trained(images: ImageSet) -> ImageSet:
    """The same images, varied as those that the published weights were trained on: black beyond the border.

    Norm statistics depend on it: of mirrored borders they cost the untouched ResNet-20 2.8 points (docs/log/013).
    """
    return replace(images, augmentation=replace(images.augmentation, edge="zero"))


def measure(settings: Mapping[str, Any]) -> Outcome:
    """The work of one unit: one method on one network, to one target, from one seed."""
    training = settings_for(settings)
    images = as_trained(load_images(training)).to(find_device(training.device))
    torch.manual_seed(training.seed)
    network = build_network(training, images).to(images.train.labels.device).eval()
    run = _untrained if settings["table"] == NO_TRAINING else _tuned
    found = run(settings, training, network, images)
    about = {key: settings[key] for key in ("table", "model", "method", "target", "seed")}
    return Outcome(records=[about | found], raw=[])


def _untrained(settings: Mapping[str, Any], training: Settings, network: nn.Module, images: ImageSet) -> Record:
    """The method's network as it leaves it, and with the norm statistics that all get."""
    task = Removal(network=network, images=images, macs=settings["target"], seed=training.seed)
    began, worked = time.perf_counter(), time.process_time()
    left = METHODS[settings["method"]](task)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    normed = with_precise_norms(left, images, training.seed)
    return {
        "epochs": 0, "accuracy": _accuracy(normed, images, "test"),
        "accuracy_held_out": _accuracy(normed, images, "held_out"), "accuracy_as_left": _accuracy(left, images, "test"),
        "macs": count_macs(left, task.example()), "macs_dense": count_macs(network, task.example()),
        "params": sum(p.numel() for p in left.parameters()), "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2), "images": len(images.train), "device": str(images.train.labels.device),
    }  # fmt: skip


def _tuned(settings: Mapping[str, Any], training: Settings, network: nn.Module, images: ImageSet) -> Record:
    """The method's run."""
    dense = count_macs(network, torch.zeros(2, *images.image_shape, device=images.train.labels.device))
    task = Tuning(settings=training, images=images, network=network, macs=settings["target"])
    result = TUNED[settings["method"]](task)
    return {
        "epochs": training.epochs, "accuracy": _accuracy(result.network, images, "test"),
        "accuracy_held_out": result.accuracy, "macs": result.macs, "macs_dense": dense, "params": result.params,
        "seconds": round(result.seconds, 2), "cpu_seconds": round(result.cpu_seconds, 2),
        "review_seconds": round(result.review_seconds, 2), "inserted": result.inserted, "images": len(images.train),
        "device": result.device, "widths": list(result.widths.values()),
    }  # fmt: skip


def _accuracy(network: nn.Module, images: ImageSet, part: Any) -> float:
    """The share of images of this part that are classified rightly."""
    return evaluate(network.eval(), images.plain_batches(part, at_once(images, EVALUATED)), torch.contiguous_format)[0]
