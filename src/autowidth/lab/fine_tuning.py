"""What a run from given weights does unless told otherwise: removal first, a small rate that only falls, few epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autowidth.review.effort import Effort

EPOCHS = 20
"""Passes over the training images from given weights."""

RATES: Mapping[str, tuple[float, float]] = {"sgd": (0.1, 0.02), "adamw": (0.001, 0.0001)}
"""Peak learning rates by optimizer: from fresh weights, and from given ones."""

AT_ONCE: Mapping[str, Any] = {"count": 0}
"""A budget is met from given weights before the first step, while they still say what the filters are worth: the rate
of fine-tuning shakes them, and what is chosen after that is chosen worse (docs/decisions/016)."""

LOOKED_AT = Effort(probe_samples=256, audit_samples=128)
"""What each of those reviews looks at: with training behind them, a quarter of what `shrink_` looks at is as good."""

SCHEDULE: Mapping[str, Any] = {"count": 4, "begin": 0.0, "end": 0.12}
"""When the reviews of other policies take place from given weights: whatever is removed early has the rest of the run
to be made up for (docs/log/013)."""

LIMITS: Mapping[str, Any] = {"offer": 0.0}
"""What reviews may do from given weights: nothing is inserted, since few epochs teach a newborn little."""


def completed(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of settings with what depends on others of them, where it is not given: rate, schedule, policy."""
    fresh, given = RATES.get(str(table.get("optimizer", "sgd")), RATES["sgd"])
    if table.get("weights") is None:
        return {"lr": fresh, **table}
    policy = table.get("policy", {})
    return {"lr": given, "epochs": EPOCHS, "schedule": "cosine", **table, "policy": _early(policy)}


def _early(policy: Any) -> Any:
    """The table of a policy with the schedule and limits of fine-tuning where it says nothing of them."""
    if not isinstance(policy, Mapping) or policy.get("name") == "never":
        return policy
    limits = policy.get("limits", {})
    merged = {**LIMITS, **limits} if isinstance(limits, Mapping) else limits
    schedule = AT_ONCE if policy.get("name") == "budget" else SCHEDULE
    return {**policy, "schedule": policy.get("schedule", dict(schedule)), "limits": merged}
