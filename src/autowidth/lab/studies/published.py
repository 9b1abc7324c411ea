"""A published CIFAR ResNet as a starting network: its weights in our module, and its removal to a given shape.

Weights: `resnet20.safetensors` as converted from Y. Idelbayev's pytorch_resnet_cifar10 (BSD 2-clause). Its shortcuts
of option A pad a quarter of the new width in front and behind; ours pad behind (`lab/foreign_names.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from autowidth.channels import IndexMap
from autowidth.lab.data import ImageSet
from autowidth.lab.models import build
from autowidth.lab.scaling import IMAGENET
from autowidth.lab.weights import load_weights_
from autowidth.policy import Decision, Limits, Schedule, Situation, Start, Unit

MEAN, STD = IMAGENET.mean, IMAGENET.std
"""What pixels (0 to 1) were normalised by when the published weights were trained."""


def published_resnet(file: Path, depth: int = 20) -> nn.Module:
    """Our ResNet with padding shortcuts and the weights in the file, in evaluation mode; same scores as published.

    Raises WeightsError where names or shapes of the file are not those of this depth.
    """
    network = build(f"resnet{depth}-padding", num_classes=10, in_channels=3)
    load_weights_(network, file)
    return network.eval()


def as_published(images: ImageSet) -> ImageSet:
    """The same images, normalised as the published weights need it."""
    return replace(images, mean=MEAN, std=STD)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToShape:
    """Removes the filters of least worth down to these widths, by channel group; then nothing.

    At the reviews of the schedule, each of which narrows a group by one factor; as it stands, after the first step.
    """

    widths: Mapping[str, int]
    schedule: Schedule = field(default_factory=lambda: Schedule(count=1, begin=0.0, end=1.0))
    limits: Limits = field(default_factory=lambda: Limits(grace=0, trial_share=0.0, offer=0.0))

    @property
    def unit(self) -> Unit:
        return "macs"

    @property
    def aim(self) -> str:
        return "to a given shape"

    def check(self, start: Start) -> None:
        """Raises ValueError for a group that is not there, or a width above the start."""
        for name, width in self.widths.items():
            if name not in start.widths or not 1 <= width <= start.widths[name]:
                raise ValueError(f"width {width} of {name}: allowed are 1 to {start.widths.get(name, 0)}")

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """The steps of the schedule."""
        return self.schedule.reviews(total_steps)

    def decide(self, situation: Situation) -> Decision:
        """The removals that lead to the shape, or as near to it as there are reviews to come."""
        standing, plan = self.schedule.standing(situation), {}
        left = standing.count - standing.number + 1
        for report in situation.groups:
            width = round(report.width * (self.widths[report.name] / report.width) ** (1 / left))
            gone = report.judged[: report.width - width]
            if gone:
                plan[report.name] = IndexMap.removing(gone, report.width)
        return Decision(plan=plan)
