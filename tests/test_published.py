"""A published ResNet: the same scores in our module as in its own, and a removal that ends at the shape asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from autowidth.cost import macs_cost
from autowidth.lab.data import load
from autowidth.lab.foreign_names import channel_order
from autowidth.lab.loop import Method, train
from autowidth.lab.models import build
from autowidth.lab.settings import settings_from
from autowidth.lab.studies.published import MEAN, ToShape, as_published, published_resnet
from autowidth.lab.studies.shape_settings import is_ours
from autowidth.lab.weights import WeightsError
from autowidth.policy import Costs, GroupReport, Schedule, Situation
from autowidth.trace import trace


class Block(nn.Module):
    """A block as published: the shortcut pads a quarter of the new width in front and behind."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.quarter = outputs // 4 if inputs != outputs else 0

    def forward(self, x: Tensor) -> Tensor:
        side = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.quarter, self.quarter)) if self.quarter else x
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + side)


class Published(nn.Module):
    """The network as published, of any depth 6n + 2."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        for number, (inputs, outputs, stride) in enumerate(widths, 1):
            rest = [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{number}", nn.Sequential(Block(inputs, outputs, stride), *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def theirs(depth: int) -> nn.Module:
    """A published network with random weights, no two channels alike."""
    torch.manual_seed(0)
    network = Published((depth - 2) // 6)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return network.eval()


def saved(network: nn.Module, file: Path) -> Path:
    save_file({k: v.contiguous() for k, v in network.state_dict().items() if "num_batches" not in k}, file)
    return file


@pytest.mark.parametrize("depth", [14, 20])
def test_our_module_gives_the_published_scores(tmp_path: Path, depth: int) -> None:
    network = theirs(depth)
    ours = published_resnet(saved(network, tmp_path / "weights.safetensors"), depth)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), network(x), rtol=1e-4, atol=1e-4)


def test_the_order_is_a_permutation_that_keeps_the_older_stream_in_front() -> None:
    for stage, width in enumerate((16, 32, 64)):
        assert sorted(channel_order(stage).tolist()) == list(range(width))
    assert channel_order(1)[:16].tolist() == list(range(8, 24))
    assert channel_order(2)[:32].tolist() == [16 + c for c in channel_order(1).tolist()]


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    file = saved(theirs(20), tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"30 missing in the file: stages\.0\.3\.first\.conv\.weight, .*and 22 more"):
        published_resnet(file, 26)
    with pytest.raises(WeightsError, match=r"30 in the file only: stages\.0\.2\.first\.norm\.bias, .*and 22 more"):
        published_resnet(file, 14)


def test_the_filters_of_least_worth_leave() -> None:
    worths = {"a": (3.0, 1.0, 2.0, 0.5), "b": (1.0, 2.0)}
    groups = tuple(GroupReport(name=n, width_start=len(w), worth=w, grace=(False,) * len(w)) for n, w in worths.items())
    network = build("resnet8", in_channels=1)
    costs = Costs(macs=macs_cost(trace(network, torch.zeros(2, 1, 8, 8))))
    situation = Situation(step=1, total_steps=9, groups=groups, costs=costs)
    plan = ToShape(widths={"a": 2, "b": 2}).decide(situation).plan
    assert {name: index_map.removed for name, index_map in plan.items()} == {"a": (1, 3)}


def test_removal_ends_at_the_shape() -> None:
    settings = settings_from({"model": "resnet8", "data": "digits", "epochs": 1, "threads": 1})
    first = train(settings_from({**settings.model_dump(), "policy": {"name": "never"}}))
    widths = {name: max(width // 2 - number, 2) for number, (name, width) in enumerate(first.widths.items())}
    found = train(settings, method=Method(policy=ToShape(widths=widths)), network=first.network)
    assert found.widths == widths and found.reviews == 1 and found.inserted == 0
    (event,) = found.history
    assert {name: len(index_map.removed) for name, index_map in event.maps.items()} == {
        name: width - widths[name] for name, width in found.widths_start.items()
    }


def test_a_shape_is_reached_in_as_many_reviews_as_the_schedule_has() -> None:
    settings = settings_from({"model": "resnet8", "data": "digits", "epochs": 1, "threads": 1})
    schedule = Schedule(count=3, begin=0.0, end=1.0)
    network = build("resnet8", in_channels=1)
    whole = trace(network, torch.zeros(2, 1, 8, 8)).widths
    widths = {name: max(width // 4, 2) for name, width in whole.items()}
    found = train(settings, method=Method(policy=ToShape(widths=widths, schedule=schedule)), network=network)
    assert found.widths == widths and found.reviews == 3
    first, second, last = (event.widths for event in found.history)
    assert all(whole[n] > first[n] > second[n] > last[n] for n in widths)


def test_widths_that_are_not_there_are_refused_before_training() -> None:
    settings = settings_from({"model": "resnet8", "data": "digits", "epochs": 1, "threads": 1})
    for widths in ({"stem.conv": 99}, {"nowhere": 1}, {"stem.conv": 0}):
        with pytest.raises(ValueError, match="allowed are 1 to"):
            train(settings, method=Method(policy=ToShape(widths=widths)))


def test_images_are_normalised_as_published() -> None:
    images = load("digits")
    assert as_published(images).mean == MEAN and as_published(images).train is images.train


def test_ours_is_the_default_run_at_the_budget_of_the_setting() -> None:
    assert is_ours("resnet20-mini", "autowidth-seed0-macs0.25-start1")
    assert is_ours("resnet20-published", "autowidth-seed2-macs0.5-start1")
    for run in (
        "autowidth-seed0-macs0.5-start1",
        "autowidth-own-seed0-macs0.25-start1",
        "autowidth-seed0-macs0.25-start0.5",
        "",
    ):
        assert not is_ours("resnet20-mini", run)
