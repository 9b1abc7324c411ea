"""Which filters of a layer stay, at widths that are given: what the choice is worth at once, and in the end; a table.

    python -m autowidth.lab.studies.filters --data cifar10:PATH --weights resnet20.safetensors --out results

The published ResNet-20 is cut to one shape, by default uniform width at half of its MACs, and fine-tuned briefly, as
setting `resnet20-published` of `shapes.py` does it. Rows differ in which filters of a layer leave, and whether readers
are reconstructed from those that stay. Losses on the way and the accuracy at the end are of held-out training images;
the published weights have seen them, so that rows can be compared with each other and with nothing else.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import IMPORTANCES
from autowidth.lab.bench import Outcome, Record, Suite, Unit, bench, logged, nameless
from autowidth.lab.loop import Method
from autowidth.lab.studies.published import published_resnet
from autowidth.lab.studies.shape_settings import SETTINGS, space_of, uniform_shape
from autowidth.lab.studies.shapes import SEEDS, cut, glimpsed, task_of
from autowidth.lab.tables import markdown, spread
from autowidth.policy import Never
from autowidth.review.batches import Batches, Loss
from autowidth.review.review import Importance

SETTING = "resnet20-published"


def _reversed_l1(
    model: torch.nn.Module, channel_map: ChannelMap, batches: Batches, loss: Loss, *, generator: torch.Generator
) -> dict[str, Tensor]:
    """The filters of greatest L1 norm leave first: what nobody would do."""
    found = IMPORTANCES["l1"].importance(model, channel_map, batches, loss, generator=generator)
    return {name: -worth for name, worth in found.items()}


CHOICES: Mapping[str, Importance | None] = {
    "worth": None,
    **{name: IMPORTANCES[name].importance for name in ("l1", "bn-scale", "taylor", "random")},
    "l1, the greatest leave": _reversed_l1,
}
"""By what the filters that leave are chosen; None: by our worth."""


def filters(data: str, weights: str, *, seeds: Sequence[int] = SEEDS, epochs: int | None = None) -> Suite:
    """A unit for every choice, with and without reconstruction, and every seed."""
    units = [
        _unit(choice, reconstruct, seed, data, weights, epochs)
        for seed in seeds
        for choice in CHOICES
        for reconstruct in (True, False)
    ]
    apart = frozenset({"choice", "reconstruct", "seed"})
    return Suite(name="filters", units=tuple(units), run=measure, table=table, apart=apart)


def _unit(choice: str, reconstruct: bool, seed: int, data: str, weights: str, epochs: int | None) -> Unit:
    train = {**SETTINGS[SETTING].train, **({"epochs": epochs} if epochs else {})}
    settings = {
        "data": data, "weights": f"file:{weights}", "choice": choice, "reconstruct": reconstruct, "seed": seed,
        "train": train, "widths": list(uniform_shape(SETTING)),
    }  # fmt: skip
    command = f"python -m autowidth.lab.studies.filters --data {nameless(data)} --weights PATH --seeds {seed}"
    words = "-".join("".join(c if c.isalnum() else " " for c in choice).split())
    return Unit(
        name=f"{words}-{'reconstructed' if reconstruct else 'plain'}-seed{seed}", settings=settings, command=command
    )


def measure(settings: Mapping[str, Any]) -> Outcome:
    """Cuts by one choice and trains on: the work of one unit."""
    task = task_of(SETTING, settings["data"], settings["seed"], settings["train"]["epochs"])
    widths = dict(zip(space_of(SETTING).cost.names, settings["widths"], strict=True))
    network = published_resnet(Path(settings["weights"].partition(":")[2]))
    cut(network, widths, task, importance=CHOICES[settings["choice"]], reconstruct=settings["reconstruct"])
    result, early = glimpsed(SETTING, task, Method(policy=Never()), network)
    about = {key: settings[key] for key in ("choice", "reconstruct", "seed")}
    found = {
        "widths": list(result.widths.values()), "macs": result.macs, "accuracy": result.accuracy, "loss": result.loss,
        "early": early, "part": result.part, "epochs": result.epochs,
        "cpu_seconds": round(result.cpu_seconds, 2),
    }  # fmt: skip
    return Outcome(records=[about | found], raw=[])


def table(records: Sequence[Record]) -> str:
    """The records as Markdown, a row per choice, best at the end first."""
    kinds = list(dict.fromkeys((r["choice"], r["reconstruct"]) for r in records))
    mine = {kind: [r for r in records if (r["choice"], r["reconstruct"]) == kind] for kind in kinds}
    steps = sorted({look["step"] for r in records for look in r["early"]})
    rows = [
        [
            choice,
            "yes" if reconstruct else "no",
            *(_lost(found, step) for step in steps),
            spread([100 * r["accuracy"] for r in found], counted=True),
        ]
        for (choice, reconstruct), found in sorted(mine.items(), key=lambda of: _mean(of[1]), reverse=True)
    ]
    headings = (
        "filters stay by", "readers reconstructed", *(f"loss {step} steps after the cut" for step in steps),
        "held-out accuracy at the end %",
    )  # fmt: skip
    return f"# Which filters of a layer stay\n\n{markdown(headings, rows)}\n"


def _mean(records: Sequence[Record]) -> float:
    return statistics.mean([float(r["accuracy"]) for r in records])


def _lost(records: Sequence[Record], step: int) -> str:
    return f"{statistics.mean(look['loss'] for r in records for look in r['early'] if look['step'] == step):.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m autowidth.lab.studies.filters", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="cifar10:PATH")
    parser.add_argument("--weights", required=True, help="the file resnet20.safetensors")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=SEEDS, help="as in 0,1")
    parser.add_argument("--epochs", type=int, help="epochs of a training; not given: those of the setting")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, one CPU thread each")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    suite = filters(asked.data, asked.weights, seeds=asked.seeds, epochs=asked.epochs)
    bench(suite, asked.out, processes=asked.processes, report=logged)


if __name__ == "__main__":
    main()
