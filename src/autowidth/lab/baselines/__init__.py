"""The published criteria that ours is compared with: one file each, and one row here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import (
    bn_scale,
    entropy,
    fpgm,
    hrank,
    linear_dependency,
    magnitude_l1,
    magnitude_l2,
    obd,
    obd_kron,
    random_worth,
    taylor,
)
from autowidth.probe import Loss


class Worth(Protocol):
    """A criterion: group name -> (width,) float tensor, larger = keep.

    The caller sets evaluation mode and settles the norms. `batches` are pairs of inputs and target, `loss_fn` is a
    mean over samples, as for the probe. Neither the model nor its gradients are changed.
    """

    def __call__(
        self,
        model: nn.Module,
        channel_map: ChannelMap,
        batches: Sequence[tuple[Any, Any]],
        loss_fn: Loss,
        *,
        generator: torch.Generator,
    ) -> dict[str, Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A criterion and its unit: "nats" where it predicts a change of the loss, None where it only ranks."""

    worth: Worth
    unit: Literal["nats"] | None = None


CRITERIA: Mapping[str, Criterion] = {
    "l1": Criterion(worth=magnitude_l1.worth),
    "l2": Criterion(worth=magnitude_l2.worth),
    "bn-scale": Criterion(worth=bn_scale.worth),
    "fpgm": Criterion(worth=fpgm.worth),
    "taylor": Criterion(worth=taylor.worth),
    "taylor-gate": Criterion(worth=taylor.worth_of_gates, unit="nats"),
    "obd": Criterion(worth=obd.worth, unit="nats"),
    "obd-kron": Criterion(worth=obd_kron.worth, unit="nats"),
    "entropy": Criterion(worth=entropy.worth),
    "hrank": Criterion(worth=hrank.worth),
    "linear-dependency": Criterion(worth=linear_dependency.worth),
    "random": Criterion(worth=random_worth.worth),
}
"""The criteria by name."""
