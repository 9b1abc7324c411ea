"""How long tracing and surgery take, beside Torch-Pruning's graph and a training step, in one process.

    make speed

Alternates what it compares, one torch thread, and prints the median and the range of every figure.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tests.zoo.torchvision_schemas import import_torchvision
from torch import nn

from autowidth.channels import IndexMap
from autowidth.surgery import apply_
from autowidth.trace import trace

REPEATS = 7


def alternated(acts: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Runs all acts in turn, `repeats` times after one warm-up. Returns seconds: median, least, most."""
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(repeats + 1):
        for name, act in acts.items():
            start = time.perf_counter()
            act()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(taken), "least": min(taken), "most": max(taken)}
        for name, taken in seconds.items()
    }


def tracing(build: Callable[[], nn.Module], repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """Seconds to trace at 224 x 224, with and without rehearsal, and to build Torch-Pruning's dependency graph."""
    import torch_pruning

    model, x = build().eval(), torch.randn(1, 3, 224, 224)
    graph = torch_pruning.DependencyGraph
    return alternated(
        {
            "trace": lambda: trace(model, x),
            "trace without rehearsal": lambda: trace(model, x, rehearse=False),
            "Torch-Pruning DependencyGraph": lambda: graph().build_dependency(model, example_inputs=x),
        },
        repeats,
    )


def surgery(build: Callable[[], nn.Module], batch: int = 32, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Seconds of one training step with AdamW, and of resizing every channel group with its state.

    A resize removes a tenth of every group and inserts as many, so that the network can be resized again and again.
    """
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    channel_map = trace(model, x[:1])

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    def resize() -> None:
        nonlocal channel_map
        gone = {group.name: max(group.width // 10, 1) for group in channel_map.groups}
        plan = {
            group.name: IndexMap.removing(range(gone[group.name]), group.width).inserting(gone[group.name])
            for group in channel_map.groups
        }
        channel_map = apply_(model, channel_map, plan, optimizers=[optimizer])

    return alternated({"training step": step, "resize of every group": resize}, repeats)


def growth(depths: tuple[int, ...] = (10, 20, 40, 80), repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """Seconds to trace chains of convolution, norm and ReLU of growing depth."""

    def chain(depth: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
        for _ in range(depth):
            layers += [nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
        return nn.Sequential(*layers)

    x = torch.randn(1, 3, 16, 16)
    models = {depth: chain(depth) for depth in depths}
    acts = {f"{depth} layers": lambda model=model: trace(model, x) for depth, model in models.items()}
    return alternated(acts, repeats)


def main() -> None:
    """Measures everything and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("results/speed.json"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    models = import_torchvision().models
    found: dict[str, Any] = {
        "command": "make speed",
        "torch": torch.__version__.split("+")[0],
        "machine": f"{platform.machine()}, one thread",
    }
    for name in ("resnet50", "densenet121"):
        found[f"tracing {name} at 224"] = tracing(getattr(models, name))
    found["surgery on resnet50, AdamW, batch 32"] = surgery(models.resnet50)
    found["growth"] = growth()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
