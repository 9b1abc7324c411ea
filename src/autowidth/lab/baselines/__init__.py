"""The published criteria that ours is compared with: one file each, and one row here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import (
    asymptotic,
    bn_scale,
    channel_lasso,
    entropy,
    fpgm,
    hrank,
    hrel,
    linear_dependency,
    magnitude_l1,
    magnitude_l2,
    nisp,
    obd,
    obd_kron,
    random_worth,
    slimming,
    soft,
    sparse_structure,
    taylor,
)
from autowidth.lab.baselines.training import TrainingRule
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
    "nisp": Criterion(worth=nisp.worth),
    "channel-lasso": Criterion(worth=channel_lasso.worth),
    "sparse-structure": Criterion(worth=sparse_structure.worth),
    "hrel": Criterion(worth=hrel.worth),
    "random": Criterion(worth=random_worth.worth),
}
"""The criteria by name."""


class Schedule(Protocol):
    """Makes a fresh training rule with its paper's strength, for a run of which a share of every width will be left."""

    def __call__(self, *, widths_left: float) -> TrainingRule: ...


TRAINING: Mapping[str, Schedule] = {
    "slimming": lambda *, widths_left: slimming.Slimming(),
    "sparse-structure": lambda *, widths_left: sparse_structure.SparseStructure(),
    "soft": lambda *, widths_left: soft.Soft(widths_left=widths_left),
    "asymptotic": lambda *, widths_left: soft.Soft(widths_left=widths_left, reached=asymptotic.reached),
}
"""The training rules by name."""
