"""The policy of a run among its settings: one table, `policy = {name = "budget", macs = 0.5}`, for every policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, field_serializer

from autowidth.errors import AutoWidthError
from autowidth.policy import POLICIES, Auto, Budget, Decision, Limits, Never, Policy, Schedule, Situation, Start, Unit

DEFAULT = "auto"
"""The policy where none is named."""

PARTS = ("schedule", "limits")
"""The fields of a policy that say how it gets there and what reviews may do; all others say where a run ends."""


class TargetError(AutoWidthError, ValueError):
    """Targets that exclude each other, or a policy that nobody knows."""


def _name_of(value: Any) -> str:
    """The name of the policy that a table, or a policy itself, stands for."""
    if isinstance(value, Mapping):
        return str(value.get("name", DEFAULT))
    return next((name for name, kind in POLICIES.items() if isinstance(value, kind)), str(value))


def _without_name(value: Any) -> Any:
    return {key: item for key, item in value.items() if key != "name"} if isinstance(value, Mapping) else value


if TYPE_CHECKING:
    AnyPolicy = Any
else:
    _KINDS = tuple(Annotated[kind, BeforeValidator(_without_name), Tag(name)] for name, kind in POLICIES.items())
    AnyPolicy = Annotated[Union[_KINDS], Discriminator(_name_of)]  # noqa: UP007
    """A policy of any kind; out of a table, by its `name`."""


class PolicySettings(BaseModel):
    """The part of the settings that decides on the widths."""

    policy: AnyPolicy = Field(
        default_factory=lambda: POLICIES[DEFAULT](),
        description=f"a table: the name of a policy ({', '.join(POLICIES)}) and its fields; default {DEFAULT}",
    )

    @field_serializer("policy")
    def _as_table(self, policy: Any) -> dict[str, Any]:
        return {"name": _name_of(policy), **asdict(policy)}


def field_names() -> list[str]:
    """All settings of all policies, behind a dot, those of their parts behind two."""
    names = {"policy.name": None}
    for kind in POLICIES.values():
        example = kind()
        for own in fields(kind):
            part = getattr(example, own.name)
            inner = [f".{f.name}" for f in fields(part)] if own.name in PARTS else [""]
            names |= dict.fromkeys(f"policy.{own.name}{end}" for end in inner)
    return list(names)


# ---- from several sources --------------------------------------------------------------------------------------------


def left_by(above: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of the settings in a table where a source that stands above it names the policy.

    The policy named above holds, whole: of the table's policy only the parts stay that say when reviews take place and
    what they may do. Without a policy above, all of the table is left.
    """
    chosen, found = above.get("policy"), table.get("policy")
    if not isinstance(chosen, Mapping) or "name" not in chosen or not isinstance(found, Mapping):
        return dict(table)
    known = {own.name for own in fields(POLICIES[chosen["name"]])} if chosen["name"] in POLICIES else set()
    return {**table, "policy": {name: found[name] for name in PARTS if name in found and name in known}}


def from_options(
    bounds: Mapping[str, float | None], *, price: float | None, auto: bool, edit: bool, named: str | None
) -> dict[str, Any]:
    """The settings that options stand for: a policy by name, bounds of a budget, nats for all MACs, or none at all.

    Raises TargetError where they exclude each other, and for a name that is no policy.
    """
    given = {name: value for name, value in bounds.items() if value is not None}
    asked: dict[str, dict[str, Any]] = {
        f"--policy {named}": {"name": named} if named else {},
        "--macs, --params or --latency": {"name": "budget", **given} if given else {},
        "--price": {} if price is None else {"name": "price", "nats_per_model": price},
        "--auto": {"name": "auto"} if auto else {},
        "--no-edit": {} if edit else {"name": "never"},
    }
    chosen = {option: table for option, table in asked.items() if table}
    if named is not None and named not in POLICIES:
        raise TargetError(f"--policy {named}: no policy has this name; allowed are {', '.join(POLICIES)}")
    if len(chosen) > 1:
        raise TargetError(f"{' and '.join(chosen)} each choose where the run ends: keep one of them")
    return {"policy": next(iter(chosen.values()))} if chosen else {}


# ---- for a run -------------------------------------------------------------------------------------------------------


def budget_of(settings: PolicySettings, *, macs: float, **limits: Any) -> Budget:
    """The settings' budget, or the default one, with this share of the starting MACs as its target."""
    budget = settings.policy if isinstance(settings.policy, Budget) else Budget()
    return replace(
        budget, macs=macs, params=None, latency=None, latency_ms=None, limits=replace(budget.limits, **limits)
    )  # fmt: skip


def auto_of(settings: PolicySettings) -> Auto:
    """The settings' policy without a target, or the default one."""
    return settings.policy if isinstance(settings.policy, Auto) else Auto()


def reviewed(policy: Policy) -> bool:
    """Whether reviews take place at all."""
    return not isinstance(policy, Never)


def shrinks_first(policy: Policy) -> bool:
    """Whether a budget is met before the first step."""
    return isinstance(policy, Budget) and not policy.schedule.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Watching:
    """Reviews, and with it audits and refits, on the usual schedule, and decides nothing."""

    schedule: Schedule = field(default_factory=Schedule)
    limits: Limits = field(default_factory=Limits)

    @property
    def unit(self) -> Unit:
        return "macs"

    @property
    def aim(self) -> str:
        return "watched, and resized by nobody"

    def check(self, start: Start) -> None:
        """Accepts everything."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """The steps of the schedule."""
        return self.schedule.reviews(total_steps)

    def decide(self, situation: Situation) -> Decision:
        """An empty plan."""
        return Decision(plan={})
