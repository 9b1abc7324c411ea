"""A published CIFAR ResNet as a starting network: its weights in our module, and its removal to a given shape.

Weights: `resnet20.safetensors` as converted from Y. Idelbayev's pytorch_resnet_cifar10 (BSD 2-clause). Its shortcuts
of option A pad a quarter of the new width in front and behind; ours pad behind. `channel_order` says which published
channel each of our channels is, so that the function is the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autowidth.channels import IndexMap
from autowidth.errors import AutoWidthError
from autowidth.lab.data import ImageSet
from autowidth.lab.models import build
from autowidth.policy import Decision, Limits, Situation, Start, Unit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What pixels (0 to 1) were normalised by when the published weights were trained."""

WIDTHS = (16, 32, 64)


class PublishedError(AutoWidthError, ValueError):
    """A file that does not hold the weights of a published CIFAR ResNet."""


def published_resnet(file: Path, depth: int = 20) -> nn.Module:
    """Our ResNet with padding shortcuts and the weights in the file, in evaluation mode; same scores as published.

    Raises PublishedError where names or shapes of the file are not those of this depth.
    """
    network = build(f"resnet{depth}-padding", num_classes=10, in_channels=3)
    wanted = network.state_dict()
    found = {name: _ordered(tensor, theirs) for name, theirs, tensor in _renamed(load_file(file))}
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, tensor)
        elif name not in found or found[name].shape != tensor.shape:
            got = "nothing" if name not in found else f"{tuple(found[name].shape)}"
            raise PublishedError(f"{file} has {got} for {name}, a ResNet-{depth} needs {tuple(tensor.shape)}")
    if extra := found.keys() - wanted.keys():
        raise PublishedError(f"{file} has {sorted(extra)[0]}, which a ResNet-{depth} does not: name another depth")
    network.load_state_dict(found)
    return network.eval()


def _renamed(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """(Our name, published name, tensor) of everything in the file."""
    for theirs, tensor in tensors.items():
        name = re.sub(r"^conv1\.", "stem.conv.", theirs)
        name = re.sub(r"^bn1\.", "stem.norm.", name)
        name = re.sub(r"^linear\.", "head.linear.", name)
        name = re.sub(r"^layer(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.", name)
        for number, ours in (("1", "first"), ("2", "second")):
            name = name.replace(f".conv{number}.", f".{ours}.conv.").replace(f".bn{number}.", f".{ours}.norm.")
        yield name, theirs, tensor


def channel_order(stage: int) -> Tensor:
    """Which published channel of the stream of this stage (0, 1, 2) each of ours is: (16 * 2 ** stage,)."""
    order = torch.arange(WIDTHS[0])
    for width in WIDTHS[1 : stage + 1]:
        quarter = width // 4
        order = torch.cat([order + quarter, torch.arange(quarter), torch.arange(width - quarter, width)])
    return order


def _ordered(tensor: Tensor, theirs: str) -> Tensor:
    """The tensor of this published name with the channels of streams in our order, on both axes."""
    if tensor.dim() == 0:
        return tensor
    block = re.match(r"layer(\d)\.(\d+)\.(conv|bn)(\d)", theirs)
    if theirs.startswith("linear"):
        return tensor[:, channel_order(2)] if tensor.dim() == 2 else tensor
    if block is None:  # the stem: the stream of the first stage is in order
        return tensor
    stage, number, kind, half = int(block[1]) - 1, int(block[2]), block[3], block[4]
    if half == "2":
        return tensor[channel_order(stage)]
    if kind == "conv":
        return tensor[:, channel_order(stage if number else max(stage - 1, 0))]
    return tensor


def as_published(images: ImageSet) -> ImageSet:
    """The same images, normalised as the published weights need it."""
    return replace(images, mean=MEAN, std=STD)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToShape:
    """Removes the filters of least worth down to these widths, by channel group, after the first step; then nothing."""

    widths: Mapping[str, int]
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
        """The first step."""
        return (1,)

    def decide(self, situation: Situation) -> Decision:
        """The removals that lead to the shape."""
        plan = {}
        for report in situation.groups:
            gone = report.judged[: report.width - self.widths[report.name]]
            if gone:
                plan[report.name] = IndexMap.removing(gone, report.width)
        return Decision(plan=plan)
