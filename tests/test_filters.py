"""The study of which filters stay: its units, a measure turned round, its table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from autowidth.lab.baselines import IMPORTANCES
from autowidth.lab.models import build
from autowidth.lab.studies.filters import CHOICES, filters, table
from autowidth.lab.studies.shape_settings import SETTINGS, space_of, uniform_shape
from autowidth.lab.studies.shapes import cut, task_of
from autowidth.review.batches import of_pairs
from autowidth.trace import trace

X = torch.zeros(2, 1, 8, 8)


def record(choice: str, accuracy: float, *, reconstruct: bool = True, seed: int = 0) -> dict[str, Any]:
    """A record of the study."""
    early = [{"step": 0, "loss": 1 - accuracy}, {"step": 10, "loss": 0.25}]
    return {"choice": choice, "reconstruct": reconstruct, "seed": seed, "accuracy": accuracy, "early": early}


def test_every_choice_is_a_unit_with_and_without_reconstruction_and_all_are_of_one_shape() -> None:
    suite = filters("cifar10:somewhere", "resnet20.safetensors", seeds=(0, 1))
    names = {unit.name for unit in suite.units}
    assert len(names) == len(suite.units) == 2 * 2 * len(CHOICES)
    (widths,) = {tuple(unit.settings["widths"]) for unit in suite.units}
    assert widths == uniform_shape("resnet20-published") and space_of("resnet20-published").share(widths) <= 0.5
    assert all("somewhere" not in unit.command for unit in suite.units)
    assert suite.units[0].settings["train"] == SETTINGS["resnet20-published"].train


def test_the_measure_that_is_turned_round_ranks_the_other_way() -> None:
    network = build("resnet8", num_classes=10, in_channels=1)
    channel_map = trace(network, X)
    turned = CHOICES["l1, the greatest leave"]
    assert turned is not None
    asked: Any = (network, channel_map, [], of_pairs(F.cross_entropy))
    there = IMPORTANCES["l1"].importance(*asked, generator=torch.Generator())
    back = turned(*asked, generator=torch.Generator())
    assert there.keys() == back.keys() == channel_map.widths.keys()
    assert all(torch.equal(there[name], -back[name]) for name in there)


def test_a_choice_cuts_to_the_widths_that_are_asked_for() -> None:
    """The weights that stay are those that were there, unless readers are reconstructed, and large ones if so asked."""
    task, inner = task_of("resnet8-digits", "digits", 0), "stages.0.0.second.conv.weight"

    def weights(choice: str, *, reconstruct: bool) -> torch.Tensor:
        torch.manual_seed(0)
        network = build("resnet8", num_classes=10, in_channels=1).eval()
        widths = {name: width // 2 for name, width in trace(network, X).widths.items()}
        cut(network, widths, task, importance=CHOICES[choice], reconstruct=reconstruct)
        assert trace(network, X).widths == widths
        return network.get_parameter(inner).detach()

    torch.manual_seed(0)
    before = build("resnet8", num_classes=10, in_channels=1).get_parameter(inner)
    large, small = (weights(choice, reconstruct=False) for choice in ("l1", "l1, the greatest leave"))
    assert torch.isin(large, before).all() and torch.isin(small, before).all()
    assert large.abs().mean() > small.abs().mean()
    assert not torch.isin(weights("l1", reconstruct=True), before).all()


def test_the_table_puts_the_best_end_first_and_seeds_together() -> None:
    text = table([record("l1", 0.8, seed=0), record("l1", 0.9, seed=1), record("worth", 0.7, reconstruct=False)])
    first, second = [line for line in text.splitlines() if line.startswith("| l1") or line.startswith("| worth")]
    assert [cell.strip() for cell in first.split("|")[1:-1]] == ["l1", "yes", "0.150", "0.250", "85.00 ± 7.07 (2)"]
    assert [cell.strip() for cell in second.split("|")[1:-1]] == ["worth", "no", "0.300", "0.250", "70.00"]
