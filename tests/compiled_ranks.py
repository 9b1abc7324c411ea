"""A rank of two: a compiled model in DistributedDataParallel with an averaged copy, run by test_compiled_ranks.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autowidth.engine import AutoWidth
from autowidth.policy import Budget, Schedule
from autowidth.review.effort import Effort

STEPS = 12


class Net(nn.Module):
    """Two convolutions, no norm: what a rank computes depends on its own samples by the gradient alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))
        return out


def main(way: str, out: Path) -> None:
    """Trains, and writes what has become of it: widths, weights of model and copy, steps that ran compiled."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ran = 0

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            nonlocal ran
            ran += 1
            return graph.forward(*args)

        return run

    net = Net()
    images, labels = torch.randn(STEPS, 16, 1, 8, 8), torch.randint(4, (STEPS, 16))
    alone = way == "alone"
    if not alone:
        dist.init_process_group("gloo")
    share = slice(None) if alone else slice(dist.get_rank(), None, 2)
    given: Any = {
        "alone": lambda: net,
        "compiled around": lambda: torch.compile(DistributedDataParallel(net), backend=backend),
        "compiled inside": lambda: DistributedDataParallel(torch.compile(net, backend=backend)),
    }[way]()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    probe = [(x[share], y[share]) for x, y in zip(images[:4], labels[:4], strict=True)]
    engine = AutoWidth(
        given, optimizer, example_inputs=images[0][:2], probe=probe, loss_fn=F.cross_entropy, followers=[average],
        policy=Budget(macs=0.4, schedule=Schedule(count=STEPS - 2, begin=0.1, end=1.0)), total_steps=STEPS,
        effort=Effort(probe_samples=32, audit_samples=32, audit_filters=2),
    )  # fmt: skip
    for x, y in zip(images, labels, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(given(x[share]), y[share]).backward()
        optimizer.step()
        average.update_parameters(net)
        engine.step()
    weights = [p.detach().flatten().tolist() for m in (net, average.module) for p in m.parameters()]
    said = {
        "ran": ran, "surgeries": sum(bool(event.maps) for event in engine.history),
        "widths": [event.widths for event in engine.history], "weights": [w for row in weights for w in row],
    }  # fmt: skip
    rank = 0 if alone else dist.get_rank()
    (out / f"{rank}.json").write_text(json.dumps(said))
    if not alone:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
