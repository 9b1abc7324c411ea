"""The published criteria that ours is compared with: one file each, and one row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from autowidth.engine import Criterion
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A published criterion and its unit: "nats" where it predicts a change of the loss, None where it only ranks."""

    worth: Criterion
    unit: Literal["nats"] | None = None


CRITERIA: Mapping[str, Published] = {
    "l1": Published(worth=magnitude_l1.worth),
    "l2": Published(worth=magnitude_l2.worth),
    "bn-scale": Published(worth=bn_scale.worth),
    "fpgm": Published(worth=fpgm.worth),
    "taylor": Published(worth=taylor.worth),
    "taylor-gate": Published(worth=taylor.worth_of_gates, unit="nats"),
    "obd": Published(worth=obd.worth, unit="nats"),
    "obd-kron": Published(worth=obd_kron.worth, unit="nats"),
    "entropy": Published(worth=entropy.worth),
    "hrank": Published(worth=hrank.worth),
    "linear-dependency": Published(worth=linear_dependency.worth),
    "nisp": Published(worth=nisp.worth),
    "channel-lasso": Published(worth=channel_lasso.worth),
    "sparse-structure": Published(worth=sparse_structure.worth),
    "hrel": Published(worth=hrel.worth),
    "random": Published(worth=random_worth.worth),
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
