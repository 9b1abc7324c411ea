"""What a review of several ranks exchanges, measured with real processes, and what that takes among many.

    python -m autowidth.lab.studies.exchanges                    ranks 1, 2, 4 on this machine, and a calculation
    python -m autowidth.lab.studies.exchanges --ranks 1,2 --models resnet20 --out exchanges.json

The bytes of a review follow from the widths (`bytes_of`), and are measured beside it. What they take among 1,024 ranks
is calculated from published bandwidths: a ring all-reduce moves 2 (N - 1) / N of its bytes through every link, in
2 (N - 1) messages (Patarasuk and Yuan 2009); a header takes log2 N messages.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from tabulate import tabulate
from torch.nn.parallel import DistributedDataParallel

from autowidth.channels import ChannelMap
from autowidth.engine import AutoWidth
from autowidth.lab.models import build
from autowidth.policy import Budget, Limits, Schedule
from autowidth.review.effort import Effort
from autowidth.review.reconstruct import co_channel_positions
from autowidth.trace import trace

REVIEWS = 3
"""Reviews that are measured; the first one also warms up, and is left out of times."""

EFFORT = Effort(probe_samples=512, audit_samples=256, audit_filters=4)
"""What all ranks look at together."""

LINKS = {
    "NDR InfiniBand, 400 Gbit/s a GPU": (50e9, 2e-6),
    "25 Gbit/s Ethernet": (3.1e9, 25e-6),
    "10 Gbit/s Ethernet": (1.25e9, 25e-6),
}
"""Links by name: bytes per second one way, by their data sheets, and seconds of one message, as measured by others
(about 2 microseconds between InfiniBand hosts, 25 through the kernel's TCP)."""

LARGE = 4
"""Exchanges of a review that carry more than a header: moments, sums of the profits, norm statistics, weights."""

SIDE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A review, mean of all but the first: of one rank, the slowest.

    bytes: what the rank puts into exchanges; predicted: how much of it are sums, by `bytes_of`; exchanges: how often
    ranks wait for each other; seconds, cpu_seconds: wall time, and time of the rank's processor; step: wall time of
    a training step.
    """

    model: str
    ranks: int
    bytes: float
    predicted: float
    exchanges: float
    seconds: float
    cpu_seconds: float
    step: float


def bytes_of(channel_map: ChannelMap) -> int:
    """Bytes of the sums of one review: the moments of every reader, and four numbers of every channel."""
    axes = {place.axis for group in channel_map.groups for place in group.with_role("read")}
    moments = sum(c * (c + 1) for c in (len(co_channel_positions(channel_map, axis)) for axis in axes))
    return 4 * (moments + 4 * sum(channel_map.widths.values()))


def seconds_at(size: float, exchanges: float, ranks: int, *, bandwidth: float, message: float) -> float:
    """Seconds that so many bytes, in so many exchanges, take among ranks in a ring."""
    headers, sums = exchanges * math.ceil(math.log2(ranks)), LARGE * 2 * (ranks - 1)
    return 2 * (ranks - 1) / ranks * size / bandwidth + (headers + sums) * message


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(model: str, ranks: int) -> Measured:
    """Trains a fresh network on noise in so many processes of this machine, with a review now and then."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(  # type: ignore[attr-defined,no-untyped-call]
            _rank, args=(ranks, model, folder), nprocs=ranks, start_method="spawn"
        )
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    slowest = max(found, key=lambda one: float(one["seconds"]))
    return Measured(model=model, ranks=ranks, **slowest)


def _rank(rank: int, ranks: int, model: str, folder: str) -> None:
    """The work of one process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    network = build(model)
    wrapper = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(2048 // ranks, 3, SIDE, SIDE, generator=generator)
    kinds = torch.randint(0, 10, (len(images),), generator=generator)
    batch = 64 // ranks
    probe = list(zip(images.split(batch), kinds.split(batch), strict=True))
    engine = AutoWidth(
        wrapper, optimizer, example_inputs=images[:2], probe=probe,
        loss_fn=F.cross_entropy, total_steps=2 * REVIEWS, effort=EFFORT,
        policy=Budget(macs=0.7, schedule=Schedule(count=REVIEWS, begin=0.0, end=1.0), limits=Limits(max_move=0.1)),
    )  # fmt: skip
    rows, steps = [], []
    for number in range(REVIEWS):
        wrapper.train()
        began = time.perf_counter()
        F.cross_entropy(wrapper(images[:batch]), kinds[:batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - began)
        dist.barrier()
        predicted = bytes_of(engine.channel_map)
        before = engine.ranks.exchanged, engine.ranks.exchanges, time.perf_counter(), time.process_time()
        engine.steps = 2 * number
        engine.review()
        after = engine.ranks.exchanged, engine.ranks.exchanges, time.perf_counter(), time.process_time()
        rows.append([*(b - a for a, b in zip(before, after, strict=True)), predicted])
    size, exchanges, seconds, cpu, predicted = (sum(column) / (REVIEWS - 1) for column in zip(*rows[1:], strict=True))
    found = {"bytes": size, "predicted": predicted if ranks > 1 else 0, "exchanges": exchanges, "seconds": seconds,
             "cpu_seconds": cpu, "step": min(steps)}  # fmt: skip
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# ---- telling ---------------------------------------------------------------------------------------------------------


def measured_table(rows: Sequence[Measured]) -> str:
    """The measurements for people."""
    table: str = tabulate(
        [
            (row.model, row.ranks, f"{row.bytes / 2**20:.2f}", f"{row.predicted / 2**20:.2f}", f"{row.exchanges:.0f}",
             f"{row.seconds:.2f}", f"{row.cpu_seconds:.2f}", f"{row.step:.2f}")
            for row in rows
        ],
        headers=("network", "ranks", "MiB a rank", "of it sums", "exchanges", "s a review", "cpu s", "s a step"),
        tablefmt="github",
    )  # fmt: skip
    return table


def calculated_table(models: Sequence[str], exchanges: float, ranks: int) -> str:
    """What one review takes among many ranks, beside its forward passes."""
    rows = []
    for name in models:
        network = build(name)
        channel_map = trace(network, torch.zeros(2, 3, SIDE, SIDE))
        weights = 4 * sum(p.numel() for p in network.parameters())
        size = bytes_of(channel_map) + weights
        times = [
            f"{seconds_at(size, exchanges, ranks, bandwidth=bandwidth, message=message):.2g}"
            for bandwidth, message in LINKS.values()
        ]
        rows.append((name, f"{bytes_of(channel_map) / 2**20:.1f}", f"{weights / 2**20:.1f}", *times))
    headers = ("network", "MiB of sums", "MiB of weights", *(f"s, {link}" for link in LINKS))
    table: str = tabulate(rows, headers=headers, tablefmt="github")
    return table


def main() -> str:
    """Measures and calculates as the options say; returns what to print."""
    parser = argparse.ArgumentParser(description="What a review of several ranks exchanges.")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of processes to start here")
    parser.add_argument("--models", default="resnet20", help="networks to measure")
    parser.add_argument("--calculated", default="resnet20,vgg16", help="networks of the calculation")
    parser.add_argument("--many", type=int, default=1024, help="ranks of the calculation")
    parser.add_argument("--out", type=Path, help="file for the measurements, as JSON")
    asked = parser.parse_args()
    models = asked.models.split(",")
    rows = [measure(model, int(ranks)) for model in models for ranks in asked.ranks.split(",")]
    if asked.out:
        asked.out.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
    exchanges = max(row.exchanges for row in rows)
    calculated = calculated_table(asked.calculated.split(","), exchanges, asked.many)
    return (
        f"{measured_table(rows)}\n\nOne review among {asked.many} ranks, {exchanges:.0f} exchanges, calculated:\n\n"
        f"{calculated}\n"
    )


if __name__ == "__main__":
    import sys

    sys.stdout.write(main())
