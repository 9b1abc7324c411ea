"""What an accelerator gains: compiled step time, memory and the share of reviews, once half of the MACs are gone.

    python -m autowidth.lab.studies.accelerator --out accelerator.json
    python -m autowidth.lab.studies.accelerator --dry-run

Trains a built-in network on noise, whose times are those of pictures, under autocast; compiles it before and after the
reviews, and times whole training steps. --dry-run does all of it on a CPU in small, without inductor.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth.engine import AutoWidth
from autowidth.lab.models import build
from autowidth.policy import Budget, Schedule
from autowidth.review.effort import Effort
from autowidth.review.memory import held_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured.

    batch: samples of a step; size: side of an image; steps: of the training in which the widths change; reviews: how
    many of them; macs: the share of the MACs to end at; timed: steps that are timed of each kind, as many as a fourth
    of them before the clock is looked at; backend: of torch.compile.
    """

    model: str = "resnet56"
    batch: int = 1024
    size: int = 32
    steps: int = 2000
    reviews: int = 8
    macs: float = 0.5
    timed: int = 20
    device: str = "cuda"
    backend: str = "inductor"
    seed: int = 0


SMALL = Case(
    model="resnet8", batch=16, size=8, steps=24, reviews=3, timed=4, device="cpu",
    backend="eager",
)  # fmt: skip
"""What --dry-run measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One network as it is trained: MACs and parameters, median milliseconds of a step, what its first step took more.

    held_bytes: parameters, buffers and optimizer state; peak_bytes: the most that tensors took in a compiled step, None
    on a CPU.
    """

    macs: int
    params: int
    eager_ms: float
    compiled_ms: float
    compile_seconds: float
    held_bytes: int
    peak_bytes: int | None


def measure(case: Case) -> dict[str, Any]:
    """Everything that is measured, as plain data: the case, the machine, both networks, the reviews between them."""
    torch.manual_seed(case.seed)
    device = torch.device(case.device)
    network = build(case.model, in_channels=3).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    noise = torch.randn(case.batch, 3, case.size, case.size, device=device)
    images = noise.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (case.batch,), device=device)
    probe = [(images[:256], labels[:256])] * 8
    engine = AutoWidth(
        network, optimizer, example_inputs=images[:2], probe=probe, loss_fn=F.cross_entropy, total_steps=case.steps,
        policy=Budget(macs=case.macs, schedule=Schedule(count=case.reviews)), batch_size=case.batch, seed=case.seed,
        effort=Effort() if device.type == "cuda" else Effort(probe_samples=32, audit_samples=32),
    )  # fmt: skip
    step = _Step(network, optimizer, images, labels)
    dense = _timing(case, engine, step)
    run = _trained(case, engine, step)
    narrow = _timing(case, engine, step)
    return {
        "case": asdict(case), "machine": _machine(device), "dense": asdict(dense), "narrow": asdict(narrow), "run": run,
        "memory": [event.memory for event in engine.history],
        "speedup_compiled": dense.compiled_ms / narrow.compiled_ms, "speedup_eager": dense.eager_ms / narrow.eager_ms,
    }  # fmt: skip


class _Step:
    """A training step on one batch under bfloat16 autocast, by the network or by what was compiled of it."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
        self.network, self.optimizer, self.images, self.labels = network, optimizer, images, labels

    def __call__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.images.device.type, torch.bfloat16):
            loss = F.cross_entropy(forward(self.images), self.labels)
        loss.backward()
        self.optimizer.step()

    def seconds(self, forward: Callable[[Tensor], Tensor]) -> float:
        """Wall time of one step, until the device has done it."""
        _wait(self.images.device)
        began = time.perf_counter()
        self(forward)
        _wait(self.images.device)
        return time.perf_counter() - began


def _timing(case: Case, engine: AutoWidth, step: _Step) -> Timing:
    """The network as it is now."""
    network, device = step.network.train(), step.images.device
    eager = _median(step, network, case.timed)
    torch.compiler.reset()
    forward: Any = torch.compile(network, backend=case.backend)
    first = step.seconds(forward)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    compiled = _median(step, forward, case.timed)
    return Timing(
        macs=engine.macs, params=engine.params, eager_ms=1000 * eager, compiled_ms=1000 * compiled,
        compile_seconds=first - compiled, held_bytes=held_bytes(network, engine.optimizers),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )  # fmt: skip


def _median(step: _Step, forward: Callable[[Tensor], Tensor], count: int) -> float:
    seconds = [step.seconds(forward) for _ in range(count // 4 + count)]
    return statistics.median(seconds[count // 4 :])


def _trained(case: Case, engine: AutoWidth, step: _Step) -> dict[str, float]:
    """A run in which the widths change: its wall time, and the part of it that reviews took."""
    step.network.train()
    _wait(step.images.device)
    began = time.perf_counter()
    for _ in range(case.steps):
        step(step.network)
        engine.step()
    _wait(step.images.device)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds, "review_seconds": engine.review_seconds, "review_share": engine.review_seconds / seconds,
        "reviews": len(engine.history), "macs_share": engine.macs / engine.macs_start,
        **{f"{part}_seconds": total for part, total in engine.history.seconds_total.items()},
    }  # fmt: skip


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes JSON to the file, or says it where none is given."""
    parser = argparse.ArgumentParser(prog="python -m autowidth.lab.studies.accelerator", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="all of it on a CPU in small, without inductor")
    for name, value in asdict(Case()).items():
        parser.add_argument(f"--{name}", type=type(value), help=f"not given: {value}")
    parser.add_argument("--out", type=Path, help="file of the JSON; not given: it is logged")
    options = vars(parser.parse_args(arguments))
    out, start = options.pop("out"), SMALL if options.pop("dry_run") else Case()
    given = {name: value for name, value in options.items() if value is not None}
    case = Case(**(asdict(start) | given))
    if case.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here: give --device cpu, or --dry-run")
    text = json.dumps(measure(case), indent=1)
    if out is None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logger.info("%s", text)
    else:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
