"""The policy of a run among its settings: all that the laboratory and the command know of policies by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from pydantic import BaseModel, Field, model_validator

from autowidth.errors import AutoWidthError
from autowidth.policy import BOUNDS, Auto, Budget, Never, Policy, Price

TABLES: Mapping[str, type[Budget] | type[Price] | type[Auto]] = {"auto": Auto, "budget": Budget, "price": Price}
"""The settings that are tables of a policy, of which a run has at most one."""

TARGETS = (*BOUNDS, "nats_per_model", "nats_per_parameter")
"""The fields of these tables that say where a run ends; all others say how it gets there."""

UNITS = {"macs": "MACs", "params": "parameters", "latency": "latency", "latency_ms": "ms per image"}
"""What a budget bounds, for people."""


class TargetError(AutoWidthError, ValueError):
    """Targets that exclude each other."""


class PolicySettings(BaseModel):
    """The part of the settings that decides on the widths."""

    edit: bool = Field(True, description="review and resize; without it the run is plain training")
    budget: Budget | None = Field(None, description="the policy that ends at a given cost")
    auto: Auto | None = Field(None, description="the policy that needs no target; what there is without any")
    price: Price | None = Field(None, description="the policy that ends where a MAC earns what it costs")

    @model_validator(mode="after")
    def _one_policy(self) -> PolicySettings:
        given = [name for name in ("budget", "price", "auto") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: keep one of them")
        return self

    @property
    def policy(self) -> Policy:
        """What decides on the widths by these settings."""
        return (self.budget or self.price or self.auto or Auto()) if self.edit else Never()


def field_names() -> list[str]:
    """All settings that decide on the widths, those of tables behind a dot."""
    flat = [name for name in PolicySettings.model_fields if name not in TABLES]
    return flat + [f"{table}.{field.name}" for table, policy in TABLES.items() for field in fields(policy)]


# ---- from several sources --------------------------------------------------------------------------------------------


def left_by(above: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of the settings in a table where a source that stands above it chooses the policy.

    The policy chosen above holds, whole: the targets of the table's policy are gone, its other fields stay and belong
    to the policy from above. Without a policy above, all of the table is left.
    """
    chosen = [name for name in TABLES if above.get(name) is not None]
    if len(chosen) != 1:  # none, or too many, which the validation will refuse
        return dict(table)
    (kind,) = chosen
    left = {name: value for name, value in table.items() if name not in TABLES and name != "edit"}
    found = next((name for name in TABLES if isinstance(table.get(name), Mapping)), None)
    if found is None or not isinstance(above[kind], Mapping):
        return left
    targets = TARGETS if found != kind or any(name in TARGETS for name in above[kind]) else ()
    return left | {kind: {name: value for name, value in table[found].items() if name not in targets}}


def from_options(
    bounds: Mapping[str, float | None], *, price: float | None, auto: bool, edit: bool | None
) -> dict[str, Any]:
    """The settings that options stand for: bounds of a budget, nats for all MACs, no target. Raises TargetError."""
    given = {name: value for name, value in bounds.items() if value is not None}
    if auto and (given or price is not None):
        raise TargetError(
            "--auto finds the target itself: leave out --macs, --params, --latency and --price, or --auto"
        )
    options = {
        "budget": given or None,
        "price": None if price is None else {"nats_per_model": price},
        "auto": {} if auto else None,
        "edit": edit,
    }
    return {name: value for name, value in options.items() if value is not None}


# ---- for a run -------------------------------------------------------------------------------------------------------


def budget_of(settings: PolicySettings, *, macs: float, **changes: Any) -> Budget:
    """The settings' budget, or the default one, with this share of the starting MACs as its target."""
    return replace(settings.budget or Budget(), macs=macs, **changes)


def auto_of(settings: PolicySettings) -> Auto:
    """The settings' policy without a target, or the default one."""
    return settings.auto or Auto()


def reviewed(settings: PolicySettings) -> bool:
    """Whether reviews take place by these settings."""
    return settings.edit


def informed(policy: Policy, *, samples: int) -> Policy:
    """The policy, with the number of samples that it trains on where it asks for that and nobody has given it."""
    return replace(policy, samples=samples) if isinstance(policy, Auto) and policy.samples is None else policy


def described(policy: Policy) -> str:
    """Where a policy leads, for people."""
    if isinstance(policy, Budget):
        unit = UNITS[policy.what]
        return f"to {policy.target:g} {unit}" if policy.absolute else f"to {policy.target:.0%} of the {unit}"
    if isinstance(policy, Auto):
        return "to the width that the data justify"
    return f"at {policy.nats_per_model:g} nats for all MACs" if isinstance(policy, Price) else "without reviews"
