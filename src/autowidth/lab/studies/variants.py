"""What a decision rests on: runs that differ in a few settings, on held-out images, as one table per decision.

    python -m autowidth.lab.studies.variants 009 --data cifar10:PATH --seeds 0-1

Each row of `VARIANTS` is a label, what was predicted of it, and what is set otherwise than in the recipe of `autowidth
bench mini`. Accuracy and loss are those of 20,000 training images that are set apart, never of test images. docs/log
tells what these and other runs gave, and which of its rows need code that is no longer there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from autowidth.lab.bench import BenchError, Outcome, Record, Suite, Unit, bench, logged, nameless
from autowidth.lab.methods import METHODS, Finish, Task, dense_macs, ours
from autowidth.lab.prepare import load_images
from autowidth.lab.settings import Settings, settings_of
from autowidth.lab.suites.compare import RECIPES
from autowidth.lab.tables import markdown, spread
from autowidth.policy import POLICIES, Limits, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row: a method of the comparison, and settings that are other than the recipe's.

    label: unique within a decision; predicted: what was expected of it, empty for a control; settings: as in a
    configuration file of `autowidth train`, the options of a policy without their tables under its name (`budget` or
    `auto`); macs: the target, as a share of the dense MACs; start: the factor on the widths at the start.
    """

    label: str
    predicted: str = ""
    method: str = "autowidth"
    model: str = "resnet20"
    settings: Mapping[str, Any] = field(default_factory=dict)
    macs: float = 0.25
    start: float = 1.0


def _budget(label: str, predicted: str = "", **options: Any) -> Variant:
    """Our run under a budget with these options of it."""
    return Variant(label=label, predicted=predicted, settings={"budget": options})


def _auto(label: str, predicted: str = "", *, start: float = 1.0, model: str = "resnet20", **options: Any) -> Variant:
    """Our run without a target, with these options of `Auto`."""
    return Variant(
        label=label, predicted=predicted, method="autowidth-auto", model=model, start=start, settings={"auto": options}
    )


def _gentle(variant: Variant) -> Variant:
    """The row as it was measured at first: peak learning rate 0.1, reviews until half of the run, no newborns."""
    table = {"begin": 0.06, "end": 0.5, "offer": 0.0, "multiple": 1, **variant.settings.get("budget", {})}
    settings = {**variant.settings, "lr": 0.1, "budget": table}
    return Variant(
        label=variant.label, predicted=variant.predicted, method=variant.method, model=variant.model, settings=settings
    )


PARTS: Mapping[str, type[Any]] = {"schedule": Schedule, "limits": Limits}
"""The tables of a policy that hold the options of its parts."""

UNIFORM = Variant(label="uniform width, from scratch", method="uniform")
DENSE = Variant(label="dense", method="dense")

VARIANTS: Mapping[str, tuple[Variant, ...]] = {
    "002": tuple(
        _gentle(variant)
        for variant in (
            UNIFORM,
            _budget("bare worth per MAC", "late layers are stripped", trial_share=0.0),
            _budget("prior g = 2", "2 points better than bare worth", trial_share=0.0, diminishing=2.0),
            _budget("prior g = 4", "a stronger prior hurts", trial_share=0.0, diminishing=4.0),
        )
    ),
    "004": (
        _budget("co-channels reconstruct what is removed"),
        Variant(label="plain removal", predicted="worse", method="autowidth-no-compensation"),
    ),
    "008": tuple(
        _gentle(variant)
        for variant in (
            UNIFORM,
            _budget("interactions", "as good as with the prior"),
            _budget("interactions and prior g = 2", diminishing=2.0),
            _budget("interactions, reviews from 20 to 75 %", "later is better", begin=0.2, end=0.75),
            _budget("interactions, 5 % offered to newborns", "insertion costs nothing", offer=0.05),
            _budget("interactions, 6 reviews", "cheaper, as good", count=6),
            Variant(label="VGG-8, uniform width", method="uniform", model="vgg8"),
            Variant(label="VGG-8, interactions", model="vgg8"),
        )
    ),
    "009": (
        *(
            Variant(label=f"{name}, peak learning rate {lr:g}", method=method, settings={"lr": lr})
            for name, method in (("dense", "dense"), ("uniform width", "uniform"))
            for lr in (0.1, 0.3, 0.6, 1.0)
        ),
        _budget("reviews from 3 to 35 % of the run", begin=0.03, end=0.35, multiple=1, offer=0.0),
        _budget("reviews from 6 to 50 %", end=0.5, multiple=1, offer=0.0),
        Variant(
            label="from 6 to 50 %, own-layer part alone, no trials of slices", predicted="interactions do not matter",
            method="autowidth-own", settings={"budget": {"end": 0.5, "multiple": 1, "offer": 0.0, "trial_share": 0.0}},
        ),
        Variant(
            label="from 6 to 50 %, next-layer part alone, prior g = 2, 12 reviews", method="autowidth-next",
            settings={
                "budget": {"end": 0.5, "multiple": 1, "offer": 0.0, "trial_share": 0.0, "diminishing": 2.0, "count": 12}
            },
        ),
        _budget("from 6 to 50 %, 5 % offered to newborns", "does no harm", end=0.5, multiple=1),
        _budget("from 6 to 70 %", "late surgery hurts", multiple=1, offer=0.0),
        _budget("multiples of 4", "as accurate, faster", offer=0.0),
        _budget("multiples of 8", multiple=8, offer=0.0),
        _auto("Auto from 0.5x, .01 nats per parameter", start=0.5, multiple=4, nats_per_parameter=0.01),
        _auto("Auto from 1x, .01 nats per parameter", "within 15 % of 0.5x", multiple=4, nats_per_parameter=0.01),
        Variant(label="a budget of 60 %, reviews to 50 %", settings={"budget": {"end": 0.5}}, macs=0.6),
    ),
    "010": (
        DENSE,
        UNIFORM,
        _budget("multiples of 4, the recipe of the comparison"),
        _budget("multiples of 4, reviews from 3 to 20 %", "0.7 of the time", begin=0.03, end=0.2),
        _budget("multiples of 8", "0.75 of the time, .3 points behind multiples of 4", multiple=8),
        _budget("multiples of 8, reviews from 6 to 35 %", "0.7 of the time, as accurate", multiple=8, end=0.35),
        _budget("multiples of 8, reviews from 3 to 20 %", "0.65 of the time", multiple=8, begin=0.03, end=0.2),
        _budget("multiples of 4, editing to 85 % of the run", "late is better", end=0.85),
        Variant(label="60 %, editing from 6 to 50 %", macs=0.6, settings={"budget": {"end": 0.5}}),
        Variant(
            label="60 %, from 6 to 90 %", predicted="a mild cut wants to be late", macs=0.6,
            settings={"budget": {"end": 0.9}},
        ),
        Variant(
            label="60 %, from 30 to 90 %", predicted="worths are better known", macs=0.6,
            settings={"budget": {"begin": 0.3, "end": 0.9}},
        ),
        _auto("Auto, editing to 90 %", end=0.9),
        Variant(label="VGG-8 at 0.5x, uniform", method="uniform", model="vgg8"),
        *(
            Variant(label=f"VGG-8 from 0.5x, {label}", predicted=said, model="vgg8", start=0.5, settings={"budget": o})
            for label, said, o in (
                ("5 % offered", "", {}),
                ("to 40 %", "more time for newborns helps", {"end": 0.4}),
                ("10 % offered", "helps", {"offer": 0.1}),
                ("single channels, to 40 %", "", {"multiple": 1, "end": 0.4}),
            )
        ),
        Variant(label="soft filter pruning", method="soft"),
        Variant(label="soft filter pruning, peak learning rate 0.1", method="soft", settings={"lr": 0.1}),
    ),
    "011": (
        DENSE,
        *(_auto(f"Auto from {start:g}x", "within 15 % of each other", start=start) for start in (0.5, 1.0, 2.0)),
        *(
            _auto(f"Auto, VGG-8 from {start:g}x", "within 15 % of each other", start=start, model="vgg8")
            for start in (0.5, 1.0, 2.0)
        ),
        _auto("Auto, nothing is ever in doubt", doubt=-1.0),
        _auto("Auto, 0.01 nats per parameter", "a larger network is better", nats_per_parameter=0.01),
        _auto("Auto, 12 % offered to newborns", "a network that shrinks slowly bears more stirring", offer=0.12),
        _auto("Auto, to 85 %, 0.0085 nats per parameter", "late is better", end=0.85, nats_per_parameter=0.0085),
        Variant(label="from 0.5x, 5 % offered", start=0.5),
        Variant(
            label="from 0.5x, newborns worth half as much", predicted="fewer newborns", start=0.5,
            settings={"budget": {"newborn": 0.5}},
        ),
    ),
}  # fmt: skip
"""The rows of every decision whose evidence today's code can make again."""


# ---- units -----------------------------------------------------------------------------------------------------------


def variants(
    decision: str, data: str, *, seeds: Sequence[int] = (0,), rows: Sequence[str] = (), epochs: int | None = None
) -> Suite:
    """The suite of a decision: a unit for each of its rows (of those whose label holds one of `rows`) and each seed.

    Raises BenchError for a decision or a row that is not there, and for data that have no recipe.
    """
    if decision not in VARIANTS:
        raise BenchError(f"decision {decision!r} has no variants; there are some of {', '.join(VARIANTS)}")
    chosen = [v for v in VARIANTS[decision] if not rows or any(row in v.label for row in rows)]
    if not chosen:
        labels = "; ".join(v.label for v in VARIANTS[decision])
        raise BenchError(f"no row of decision {decision} is named {' or '.join(rows)}; its rows are: {labels}")
    units = tuple(unit_of(decision, variant, data, seed, epochs) for variant in chosen for seed in seeds)
    order = [variant.label for variant in VARIANTS[decision]]
    apart = frozenset({"label", "method", "model", "macs", "start", "seed", "training"})
    return Suite(
        name=f"variants-{decision}", units=units, run=measure, table=partial(table, decision, order), apart=apart
    )


def unit_of(decision: str, variant: Variant, data: str, seed: int, epochs: int | None = None) -> Unit:
    """A row from one seed as a unit; its name changes with its settings, so that no old result passes for it."""
    training = training_of(variant, data, seed, epochs).model_dump(mode="json", exclude={"data", "out"})
    settings = {
        "data": data, "label": variant.label, "predicted": variant.predicted, "method": variant.method,
        "model": variant.model, "macs": variant.macs, "start": variant.start, "seed": seed, "training": training,
    }  # fmt: skip
    decisive = [variant.label, variant.method, variant.macs, training | {"seed": 0}]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
    command = (
        f"python -m autowidth.lab.studies.variants {decision} --data {nameless(data)} --rows '{variant.label}' "
        f"--seeds {seed}"
    )
    name = f"{re.sub('[^a-z0-9]+', '-', variant.label.lower()).strip('-')}-{digest}-seed{seed}"
    return Unit(name=name, settings=settings, command=command)


def training_of(variant: Variant, data: str, seed: int, epochs: int | None = None) -> Settings:
    """The settings of a run: the recipe of the comparison, held-out images, and what the row says otherwise.

    Raises BenchError for data without a recipe, SettingsError for a setting that is not there.
    """
    kind = data.partition(":")[0]
    recipe = next((r for r in (RECIPES["mini"], RECIPES["digits"]) if r.kind == kind), None)
    if recipe is None:
        raise BenchError(f"variants are measured on cifar10 or digits: pass --data cifar10:PATH, got {data!r}")
    choice = {"limit": 2 * recipe.limit, "holdout": 0.5} if recipe.limit else {"holdout": 0.3}
    given: dict[str, Any] = {
        "data": data, "model": variant.model, "width": variant.start, "seed": seed, "threads": 1, "looks": 1,
        "epochs": epochs or recipe.epochs, **recipe.train, **choice,
    }  # fmt: skip
    own = {name: value for name, value in variant.settings.items() if name not in POLICIES}
    return settings_of({**given, **own, "policy": _policy(variant, recipe.train.get("policy", {}))})


def _policy(variant: Variant, usual: Mapping[str, Any]) -> dict[str, Any]:
    """The policy of a row as a table: that of the recipe with the row's options, or another one with its own."""
    name = next((name for name in variant.settings if name in POLICIES), "budget")
    table: dict[str, Any] = {"name": name, "schedule": {}, "limits": {}}
    if usual.get("name") == name:
        table["limits"] = dict(usual.get("limits", {}))
    for option, value in variant.settings.get(name, {}).items():
        part = next((p for p, kind in PARTS.items() if option in {f.name for f in fields(kind)}), None)
        (table if part is None else table[part])[option] = value
    return table


def measure(settings: Mapping[str, Any]) -> Outcome:
    """Runs one row from one seed: the work of one unit."""
    training = Settings.model_validate({**settings["training"], "data": settings["data"]})
    task = Task(settings=training, macs=settings["macs"], images=load_images(training))
    method = partial(ours, name="autowidth") if settings["method"] == "autowidth" else METHODS[settings["method"]]
    finish = method(task)[0]
    return Outcome(records=[_record(settings, finish, dense_macs(task))], raw=[])


def _record(settings: Mapping[str, Any], finish: Finish, whole: float) -> Record:
    result = finish.result
    about = {key: settings[key] for key in ("label", "predicted", "method", "model", "start", "seed")}
    return about | {
        "part": result.part, "epochs": result.epochs, "accuracy": result.accuracy, "loss": result.loss,
        "macs": result.macs, "macs_dense": round(whole), "params": result.params, "inserted": result.inserted,
        "inserted_alive": result.inserted_alive, "cpu_seconds": round(result.cpu_seconds, 2),
        "widths": list(result.widths.values()),
    }  # fmt: skip


# ---- table -----------------------------------------------------------------------------------------------------------


def table(decision: str, order: Sequence[str], records: Sequence[Record]) -> str:
    """The records as Markdown, a row per label in the order of the decision; labels that are gone come last."""
    lines = [
        f"# Variants of decision {decision}\n",
        "Accuracy and loss (nats) on training images that are held out, mean over seeds and standard deviation between "
        "them; processor seconds of one thread.\n",
        f"Command: `python -m autowidth.lab.studies.variants {decision} --data cifar10:PATH --seeds 0-1`\n",
    ]
    found = list(dict.fromkeys(r["label"] for r in records))
    labels = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    rows = [_row([r for r in records if r["label"] == label]) for label in labels]
    headings = ("run", "predicted", "accuracy %", "loss", "MACs %", "seconds", "seeds")
    return "\n".join([*lines, markdown(headings, rows), ""])


def _row(records: Sequence[Record]) -> list[str]:
    mean = statistics.mean
    return [
        records[0]["label"],
        records[0]["predicted"],
        spread([100 * r["accuracy"] for r in records]),
        spread([r["loss"] for r in records], digits=3),
        f"{mean(100 * r['macs'] / r['macs_dense'] for r in records):.1f}",
        f"{mean(r['cpu_seconds'] for r in records):.0f}",
        ", ".join(str(r["seed"]) for r in sorted(records, key=lambda r: r["seed"])),
    ]


# ---- command ---------------------------------------------------------------------------------------------------------


def _seeds(text: str) -> tuple[int, ...]:
    """`0,2` or `0-2`."""
    first, dash, last = text.partition("-")
    return tuple(range(int(first), int(last) + 1)) if dash else tuple(map(int, text.split(",")))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m autowidth.lab.studies.variants", description=__doc__.split("\n")[0]
    )
    parser.add_argument("decision", choices=list(VARIANTS))
    parser.add_argument("--data", required=True, help="cifar10:PATH, or digits")
    parser.add_argument("--seeds", type=_seeds, default=(0,), help="as in 0,1 or 0-2")
    parser.add_argument("--rows", nargs="*", default=(), help="only rows whose label holds one of these texts")
    parser.add_argument("--out", type=Path, default=Path("results"), help="the folder that holds variants-DECISION/")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one CPU thread each")
    parser.add_argument("--epochs", type=int, help="epochs of a run; not given: those of the recipe")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    suite = variants(asked.decision, asked.data, seeds=asked.seeds, rows=asked.rows, epochs=asked.epochs)
    bench(suite, asked.out, processes=asked.processes, report=logged)


if __name__ == "__main__":
    main()
