"""A small run whose widths have changed, for the tests that use one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autowidth.lab.loop import train
from autowidth.lab.result import Result
from autowidth.lab.settings import settings_of


def small_run(out: Path, **changes: Any) -> Result:
    """ResNet-8 of half the width, some digits, one review down to half of the MACs; written to `out`."""
    budget = {"name": "budget", "macs": 0.5, "schedule": {"count": 1, "begin": 0.5, "end": 0.8}}
    table = {
        "model": "resnet8", "width": 0.5, "limit": 256, "epochs": 4, "batch_size": 32, "device": "cpu", "threads": 1,
        "policy": budget, "effort": {"probe_samples": 64, "audit_samples": 64, "audit_filters": 4}, "out": out,
    }  # fmt: skip
    return train(settings_of({**table, **changes}))
