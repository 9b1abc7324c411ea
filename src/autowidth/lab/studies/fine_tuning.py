"""How a trained network is best made smaller and trained on: learning rate, when reviews take place, newborns; a table.

    python -m autowidth.lab.studies.fine_tuning --data cifar10:PATH --weights FOLDER --epochs 6 --limit 22222

Each row of `LAYOUTS` is a label, what was predicted of it, and what is set otherwise than by the defaults of
fine-tuning. Accuracy is that of training images that are held out, never of test images: the published network knows
them by heart, so that rows can be compared with each other and with nothing else.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from autowidth.lab.bench import Outcome, Record, Suite, Unit, bench, logged, nameless
from autowidth.lab.fine_tuning import SCHEDULE
from autowidth.lab.prepare import build_network, find_device, load_images
from autowidth.lab.settings import Settings
from autowidth.lab.suites.published import FINE_TUNED, TABLES, as_trained, settings_for
from autowidth.lab.tables import markdown
from autowidth.lab.tuning import TUNED, Tuning


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One row. schedule, limits: of the policy, where they are other than those of fine-tuning; train: of the run."""

    label: str
    predicted: str = ""
    method: str = "autowidth"
    train: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)


LAYOUTS: tuple[Layout, ...] = (
    Layout(label="dense", method="dense"),
    Layout(label="as by default, rate 0.05"),
    Layout(label="rate 0.02", predicted="loses half a point in few epochs", train={"lr": 0.02}),
    Layout(label="rate 0.01", predicted="loses a point in few epochs", train={"lr": 0.01}),
    Layout(label="4 reviews to 12 %", predicted="worse", schedule=SCHEDULE),
    Layout(label="one review at the first step", predicted="worse", schedule={"count": 1, "begin": 0.0, "end": 0.01}),
    Layout(label="8 reviews to 12 %", predicted="no better", schedule={**SCHEDULE, "count": 8}),
    Layout(label="4 reviews to 30 %", predicted="no worse", schedule={**SCHEDULE, "end": 0.3}),
    Layout(label="8 reviews from 6 to 70 %", predicted="worse", schedule={"count": 8, "begin": 0.06, "end": 0.7}),
    Layout(label="5 % offered to newborns", predicted="worse", schedule=SCHEDULE, limits={"offer": 0.05}),
    Layout(label="a warm-up of 20 %", predicted="worse", train={"schedule": "one-cycle"}),
    Layout(label="Torch-Pruning at the start", method="torch-pruning-magnitude-layer"),
)
"""The rows."""


def layouts(
    data: str, weights: str, *, model: str = "resnet20", macs: float = 0.5, seeds: Sequence[int] = (0,),
    rows: Sequence[str] = (), epochs: int = 6, limit: int | None = None, device: str = "cpu",
) -> Suite:  # fmt: skip
    """A unit for each row (of those whose label holds one of `rows`) and each seed."""
    chosen = [row for row in LAYOUTS if not rows or any(text in row.label for text in rows)]
    common = {"data": data, "weights": f"folder:{weights}", "model": model, "target": macs}
    recipe = {
        "normalize": "imagenet", "holdout": 0.1, "limit": limit, "threads": 1, "looks": 1, "device": device,
        **TABLES[FINE_TUNED].train, "epochs": epochs,
    }  # fmt: skip
    units = [_unit(row, seed, common, recipe) for row in chosen for seed in seeds]
    told = partial(table, [row.label for row in LAYOUTS])
    apart = frozenset({"label", "method", "predicted", "seed", "training", "schedule", "limits", "target", "model"})
    return Suite(name="fine-tuning", units=tuple(units), run=measure, table=told, apart=apart)


def _unit(row: Layout, seed: int, common: Mapping[str, Any], recipe: Mapping[str, Any]) -> Unit:
    """A row from one seed as a unit."""
    settings = {
        **common, "label": row.label, "method": row.method, "predicted": row.predicted, "seed": seed,
        "training": {**recipe, **row.train}, "schedule": dict(row.schedule), "limits": dict(row.limits),
    }  # fmt: skip
    command = (
        f"python -m autowidth.lab.studies.fine_tuning --data {nameless(common['data'])} --weights PATH --seeds {seed} "
        f"--rows '{row.label}' --epochs {recipe['epochs']}"
    )
    words = "-".join("".join(c if c.isalnum() else " " for c in row.label).split())
    name = f"{words}-{common['model']}-macs{common['target']:g}-epochs{recipe['epochs']}-seed{seed}"
    return Unit(name=name, settings=settings, command=command)


def settings_of_row(settings: Mapping[str, Any]) -> Settings:
    """The settings of a unit's run."""
    found = settings_for(settings)
    table = found.model_dump()
    table["policy"]["schedule"] |= settings["schedule"]
    table["policy"]["limits"] |= settings["limits"]
    return Settings.model_validate(table)


def measure(settings: Mapping[str, Any]) -> Outcome:
    """One row from one seed: the work of one unit."""
    training = settings_of_row(settings)
    images = as_trained(load_images(training)).to(find_device(training.device))
    network = build_network(training, images).to(images.train.labels.device)
    task = Tuning(settings=training, images=images, network=network, macs=settings["target"])
    result = TUNED[settings["method"]](task)
    about = {key: settings[key] for key in ("label", "predicted", "method", "model", "target", "seed")}
    found = {
        "part": result.part, "epochs": result.epochs, "accuracy": result.accuracy, "loss": result.loss,
        "accuracy_start": result.accuracy_start, "macs": result.macs, "inserted": result.inserted,
        "inserted_alive": result.inserted_alive, "cpu_seconds": round(result.cpu_seconds, 2),
        "review_seconds": round(result.review_seconds, 2), "seconds": round(result.seconds, 2),
    }  # fmt: skip
    return Outcome(records=[about | found], raw=[])


def table(order: Sequence[str], records: Sequence[Record]) -> str:
    """The records as Markdown, a row per label."""
    rows = []
    for label in sorted({r["label"] for r in records}, key=order.index):
        mine = [r for r in records if r["label"] == label]
        rows.append([
            label, mine[0]["predicted"], f"{statistics.mean(100 * r['accuracy'] for r in mine):.2f}",
            f"{statistics.mean(r['loss'] for r in mine):.4f}",
            f"{statistics.mean(100 * r['review_seconds'] / r['seconds'] for r in mine):.1f}",
            f"{statistics.mean(r['cpu_seconds'] for r in mine):.0f}", ", ".join(str(r["seed"]) for r in mine),
        ])  # fmt: skip
    headings = ("run", "predicted", "held-out accuracy %", "loss", "reviews %", "processor seconds", "seeds")
    return f"# How a trained network is trained on\n\n{markdown(headings, rows)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m autowidth.lab.studies.fine_tuning", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", required=True, help="cifar10:PATH")
    parser.add_argument("--weights", required=True, help="the folder with resnet20.safetensors and its like")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--macs", type=float, default=0.5, help="the target, a share of the MACs")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=(0,), help="as in 0,1")
    parser.add_argument("--rows", nargs="*", default=(), help="only rows whose label holds one of these texts")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--limit", type=int, help="training images, a tenth of which is held out; not given: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("results"), help="the folder that holds fine-tuning/")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    suite = layouts(
        asked.data, asked.weights, model=asked.model, macs=asked.macs, seeds=asked.seeds, rows=asked.rows,
        epochs=asked.epochs, limit=asked.limit, device=asked.device,
    )  # fmt: skip
    bench(suite, asked.out, processes=1, report=logged)


if __name__ == "__main__":
    main()
