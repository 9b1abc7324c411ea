"""Policies for tests: settings of the schedule and the limits by field name, wherever they belong."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from autowidth.policy import Auto, Budget, Price

Kind = TypeVar("Kind", Budget, Price, Auto)


def composed(policy: Kind, **settings: Any) -> Kind:
    """The policy with some settings of its schedule and its limits, by field name."""
    parts = {"schedule": policy.schedule, "limits": policy.limits}
    for name, part in parts.items():
        mine = {field.name for field in fields(part)} & settings.keys()
        parts[name] = replace(part, **{key: settings.pop(key) for key in mine})
    assert not settings, f"no setting is named {', '.join(settings)}"
    return replace(policy, **parts)
