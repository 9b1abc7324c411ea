"""A small run whose widths have changed, and a small network that is trained, for the tests that use one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autowidth.lab.data import ImageSet
from autowidth.lab.loop import train
from autowidth.lab.models import build
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


def trained_on(digits: ImageSet, *, width: float, epochs: int) -> nn.Module:
    """A ResNet-8 of this share of its width that tells digits apart, in training mode."""
    torch.manual_seed(0)
    network = build("resnet8", in_channels=1, width=width)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for _ in range(epochs):
        for x, y in digits.training_batches(64, seed=0):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    return network
