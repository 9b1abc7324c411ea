"""What foretells how a shape ends: rank correlations of what is known early with the accuracy of its trained network.

    python -m autowidth.lab.studies.foretelling --data cifar10:PATH --weights resnet20.safetensors --shapes results

Reads the trainings of `shapes.py`, all of shapes of equal cost, and says of every quantity how its order agrees with
that of the final accuracies (Spearman; a positive sign: more is better), with an interval of 95 % from resampled
shapes. Without `--weights` only what the records hold is compared: size, narrowest layer, distance from uniform width,
losses on the way. With the published weights, for shapes that are cut out of them, also what can be computed before
anything is trained:

    loss as cut                     the filters of least worth are gone, nothing is repaired
    loss reconstructed              readers refitted, and what norms see corrected, as our surgery does
    loss reconstructed, new norms   the same with precise norm statistics
    worth kept, l1 kept, ...        the sum of a measure over the filters that stay, those of most of it in every layer;
                                    of measures without a unit in shares of the layer's own sum, averaged over layers
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from autowidth.channels import IndexMap
from autowidth.lab.baselines import IMPORTANCES
from autowidth.lab.bench import Record
from autowidth.lab.data import ImageSet
from autowidth.lab.loop_parts import evaluate
from autowidth.lab.removing import LOSS, seen, with_precise_norms
from autowidth.lab.studies.published import published_resnet
from autowidth.lab.studies.shape_settings import SETTINGS, uniform_shape
from autowidth.lab.studies.shapes import GLIMPSED, OWN, task_of
from autowidth.lab.studies.widths import Shape, distance
from autowidth.lab.tables import markdown
from autowidth.review.profit import profits
from autowidth.review.reconstruct import Reconstruction, readers_without, reconstruction
from autowidth.review.state import named_tensors, quiet
from autowidth.review.statistics import effective_weights, probe, read_moments
from autowidth.review.untrained import PROBE
from autowidth.surgery import apply_
from autowidth.trace import trace

Array = NDArray[np.float64]

MEASURES = ("l1", "l2", "bn-scale", "fpgm", "taylor", "taylor-gate", "obd")
"""Published measures that are summed over the filters that stay."""

RESAMPLED = 2000
"""Drawings of shapes with replacement behind an interval."""


# ---- what the records hold -------------------------------------------------------------------------------------------


def trained(records: Sequence[Record], setting: str) -> list[Record]:
    """A record for every shape of the setting on held-out images, with the mean accuracy of its seeds."""
    by_shape: dict[Shape, list[Record]] = {}
    for record in records:
        if record["setting"] == setting and record["part"] == "held_out" and record["origin"] != OWN:
            by_shape.setdefault(tuple(record["widths"]), []).append(record)
    return [
        {**found[0], "accuracy": float(np.mean([r["accuracy"] for r in found])), "early": _mean_losses(found)}
        for found in by_shape.values()
    ]


def _mean_losses(records: Sequence[Record]) -> dict[int, float]:
    """The losses on the way, mean over seeds, by step."""
    looks: dict[int, list[float]] = {}
    for record in records:
        for look in record.get("early", ()):
            looks.setdefault(look["step"], []).append(look["loss"])
    return {step: float(np.mean(losses)) for step, losses in sorted(looks.items())}


def recorded(setting: str, record: Record) -> dict[str, float]:
    """What a training's record says before its end, in such a sign that more should be better."""
    widths = record["widths"]
    found = {
        "parameters": record["params"],
        "width of the narrowest layer": min(widths),
        "nearness to uniform width": -distance(widths, uniform_shape(setting)),
    }
    after = "the cut" if SETTINGS[setting].published else "the start"
    return found | {f"loss {step} steps after {after}": -loss for step, loss in record["early"].items()}


# ---- what can be computed from trained weights -----------------------------------------------------------------------


class Cutting:
    """Cuts shapes out of one trained network, by worth within layers, and says what they lose at once."""

    def __init__(self, network: nn.Module, images: ImageSet) -> None:
        self.network, self.images = network, images
        self.channel_map = trace(network, torch.zeros(2, *images.image_shape))
        batches = seen(images, PROBE, seed=0)
        with quiet(network):
            sums = probe(network, self.channel_map, batches, LOSS).sums
            worths = {name: p.sum(1).double() for name, p in profits(sums, self.channel_map).items()}
            moments = read_moments(network, self.channel_map, batches, LOSS)
            self.known: Reconstruction = reconstruction(moments, self.channel_map, effective_weights(network))
            self.measures = {"worth": worths, **{name: _measured(name, network, self) for name in MEASURES}}
        self.worths = worths

    def foretold(self, shape: Shape) -> dict[str, float]:
        """Everything that is known of a shape before training, in such a sign that more should be better."""
        widths = dict(zip(self.channel_map.widths, shape, strict=True))
        gone = {
            name: sorted(worth.argsort().tolist()[: len(worth) - widths[name]]) for name, worth in self.worths.items()
        }
        gone = {name: channels for name, channels in gone.items() if channels}
        plain, repaired = self._cut(gone, repair=False), self._cut(gone, repair=True)
        kept = {f"{name} kept": _kept(worth, widths, name == "worth") for name, worth in self.measures.items()}
        return {
            "loss as cut": -self._loss(plain),
            "loss reconstructed": -self._loss(repaired),
            "loss reconstructed, new norms": -self._loss(with_precise_norms(repaired, self.images, 0)),
            **kept,
        }

    def _cut(self, gone: Mapping[str, Sequence[int]], *, repair: bool) -> nn.Module:
        """A copy without these channels."""
        network = copy.deepcopy(self.network)
        tensors = named_tensors(network)
        if repair:
            with torch.no_grad():
                for name, content in readers_without(gone, self.channel_map, self.known, tensors).items():
                    tensors[name].copy_(content)
        sizes = self.channel_map.widths
        plan = {name: IndexMap.removing(channels, sizes[name]) for name, channels in gone.items()}
        if plan:
            apply_(network, self.channel_map, plan)
        return network.eval()

    def _loss(self, network: nn.Module) -> float:
        """Nats per image on the held-out images that trainings are looked at by."""
        batches = islice(self.images.plain_batches("held_out", GLIMPSED // 4), 4)
        return evaluate(network, batches, torch.contiguous_format)[1]


def _measured(name: str, network: nn.Module, cutting: Cutting) -> Mapping[str, torch.Tensor]:
    """A published measure of the whole network."""
    generator = torch.Generator().manual_seed(0)
    batches = seen(cutting.images, PROBE, seed=0)
    found = IMPORTANCES[name].importance(network, cutting.channel_map, batches, LOSS, generator=generator)
    return {group: worth.double() for group, worth in found.items()}


def _kept(worths: Mapping[str, torch.Tensor], widths: Mapping[str, int], in_nats: bool) -> float:
    """What stays of a measure when every layer keeps the filters that have most of it."""
    total = 0.0
    for name, worth in worths.items():
        known = worth.nan_to_num(0.0, 0.0, 0.0)
        kept = float(known.sort(descending=True).values[: widths[name]].sum())
        total += kept if in_nats else kept / max(float(known.sum()), 1e-12) / len(worths)
    return total


# ---- how the orders agree --------------------------------------------------------------------------------------------


def agreements(quantities: Sequence[Mapping[str, float]], accuracies: Sequence[float]) -> list[Record]:
    """For every quantity that all shapes have: its rank correlation with accuracy, and an interval of 95 %."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(accuracies), size=(RESAMPLED, len(accuracies)))
    truth, found = np.asarray(accuracies), list[dict[str, Any]]()
    for name in quantities[0]:
        if all(name in of for of in quantities):
            values = np.array([of[name] for of in quantities])
            low, high = np.quantile([_rank(values[d], truth[d]) for d in drawn], (0.025, 0.975))
            found.append({"quantity": name, "spearman": _rank(values, truth), "low": float(low), "high": float(high)})
    return sorted(found, key=lambda of: -of["spearman"])


def _rank(one: Array, other: Array) -> float:
    """Spearman's rank correlation, 0 where one of both is the same everywhere."""
    return 0.0 if np.ptp(one) == 0 or np.ptp(other) == 0 else float(spearmanr(one, other).statistic)


def told(setting: str, shapes: Sequence[Record], found: Sequence[Record]) -> str:
    """The agreements of a setting as Markdown."""
    accuracies = [100 * shape["accuracy"] for shape in shapes]
    rows = [[r["quantity"], f"{r['spearman']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}"] for r in found]
    return (
        f"## {setting}\n\n{len(shapes)} shapes, held-out accuracy {np.mean(accuracies):.2f} ± "
        f"{np.std(accuracies, ddof=1):.2f} %.\n\n" + markdown(("known early", "rank correlation", "95 %"), rows)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m autowidth.lab.studies.foretelling", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--shapes", type=Path, default=Path("results"), help="the folder with shapes.json")
    parser.add_argument("--data", help="cifar10:PATH, for shapes that are cut out of published weights")
    parser.add_argument("--weights", type=Path, help="the file of published weights")
    parser.add_argument("--out", type=Path, help="a file for the agreements as JSON")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records, written = json.loads((asked.shapes / "shapes.json").read_text(encoding="utf-8")), []
    for setting in dict.fromkeys(record["setting"] for record in records):
        shapes = trained(records, setting)
        quantities = [recorded(setting, shape) for shape in shapes]
        if SETTINGS[setting].published and asked.weights and asked.data:
            cutting = Cutting(published_resnet(asked.weights), task_of(setting, asked.data, seed=0).images)
            quantities = [of | cutting.foretold(tuple(s["widths"])) for of, s in zip(quantities, shapes, strict=True)]
        found = agreements(quantities, [shape["accuracy"] for shape in shapes])
        written += [{"setting": setting, "shapes": len(shapes), **of} for of in found]
        sys.stdout.write(told(setting, shapes, found) + "\n\n")
    if asked.out:
        lines = ",\n".join(json.dumps(of) for of in written)
        asked.out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
