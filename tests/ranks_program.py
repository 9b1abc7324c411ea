"""What each process of a test with several ranks runs: `python -m tests.ranks_program OUT CASE ...`, as torchrun would.

Every case trains a small network on made-up images, or tries to; what came out of it is one file per case and rank.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from autowidth import Auto, AutoWidth, Budget, Effort, IndexMap, Limits, Schedule, resize_
from autowidth.errors import AutoWidthError

STEPS, BATCH, LOOKED_AT = 14, 32, 16
EFFORT = Effort(probe_samples=128, audit_samples=64, audit_filters=4)
EXAMPLE = torch.zeros(2, 1, 8, 8)
TIMEOUT = datetime.timedelta(seconds=float(os.environ.get("RANKS_TIMEOUT", "60")))

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Two convolutions in a row beside a residual stream, with norms that know no batch."""

    def __init__(self, width: int = 8, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)  # the norm behind would make noise of its gradient
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.GroupNorm(width, width)
        self.inside = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.second(F.relu(self.inside(self.first(x))))
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


def command_net(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """A network for the command, with norms that know no batch."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 12, 3, bias=False), nn.GroupNorm(12, 12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, num_classes),
    )  # fmt: skip


def images(count: int, seed: int) -> Batch:
    """So many images of four kinds of waves under noise, and their kinds."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([torch.sin(rows), torch.sin(columns), torch.sin(rows + columns), torch.cos(rows - columns)])
    return waves[y].unsqueeze(1) + 0.5 * torch.randn(count, 1, 8, 8, generator=generator), y


def network(seed: int = 0, width: int = 8) -> Net:
    """The network with weights from the seed; its batch norm is frozen, with statistics that are no accident."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(width)
        net.inside.running_mean.normal_(0, 0.1)
        net.inside.running_var.uniform_(0.5, 1.5)
    return net


def training(net: nn.Module) -> None:
    """Training mode, apart from the frozen norm."""
    net.train()
    getattr(net, "module", net).inside.eval()


def probe(rank: int, count: int) -> list[Batch]:
    """The shard of a rank: every count-th of the batches that one rank alone looks at."""
    x, y = images(20 * LOOKED_AT, seed=9)
    return list(zip(x.split(LOOKED_AT), y.split(LOOKED_AT), strict=True))[rank::count]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to use the engine with several ranks.

    sgd: else AdamW. shards: each rank looks at its own data, else all at the same. inner: the engine gets the model
    inside of the wrapper. late: the wrapper is built behind the engine. anew: after every event that resized. ema:
    an averaged copy of what is wrapped follows. parts: backward passes before each step, the first ones without
    synchronization. settings: of the wrapper. hook: gradients are added up by a comm hook. reconstruct: as for the
    engine; least squares make a hundred times more of what rounding leaves.
    """

    sgd: bool = True
    shards: bool = True
    inner: bool = False
    late: bool = False
    anew: bool = False
    ema: bool = False
    parts: int = 1
    hook: bool = False
    reconstruct: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


WAYS = {
    "shards": Way(),
    "without reconstruction": Way(reconstruct=False),
    "adamw without reconstruction": Way(reconstruct=False, sgd=False),
    "same probe": Way(shards=False, sgd=False),
    "adamw": Way(sgd=False),
    "inner, wrapper kept": Way(inner=True),
    "inner, wrapped later": Way(inner=True, late=True, sgd=False),
    "wrapped anew": Way(inner=True, anew=True),
    "wrapper given, wrapped anew": Way(anew=True, sgd=False),
    "find unused": Way(inner=True, settings={"find_unused_parameters": True}),
    "static graph": Way(settings={"static_graph": True}),
    "views and hook": Way(hook=True, settings={"gradient_as_bucket_view": True, "bucket_cap_mb": 1}),
    "accumulated": Way(parts=2, settings={"gradient_as_bucket_view": True}),
    "averaged": Way(ema=True, sgd=False),
}
"""Ways that end as one rank with all the data does."""


def steps_of(way: Way, rank: int, count: int) -> Iterator[list[Batch]]:
    """For each step the parts of this rank's batch."""
    for step in range(STEPS):
        x, y = images(BATCH, seed=100 + step)
        mine = x[rank::count], y[rank::count]
        yield list(zip(mine[0].chunk(way.parts), mine[1].chunk(way.parts), strict=True))


def optimizer_of(way: Way, net: nn.Module) -> Optimizer:
    used = [p for name, p in net.named_parameters() if "unused" not in name]
    return torch.optim.SGD(used, lr=0.1, momentum=0.9) if way.sgd else torch.optim.AdamW(used, lr=3e-3)


def policy() -> Budget:
    return Budget(macs=0.5, schedule=Schedule(count=4, begin=0.1, end=0.9), limits=Limits(offer=0.05))


def attached(net: nn.Module, optimizer: Optimizer, rank: int, count: int, **more: Any) -> AutoWidth:
    arguments: dict[str, Any] = {
        "example_inputs": EXAMPLE, "probe": probe(rank, count), "loss_fn": F.cross_entropy, "policy": policy(),
        "total_steps": STEPS, "effort": EFFORT, "seed": 3,
    }  # fmt: skip
    return AutoWidth(net, optimizer, **(arguments | more))


def wrapped(net: nn.Module, way: Way) -> DistributedDataParallel:
    if not way.settings.get("find_unused_parameters"):
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["unused.weight", "unused.bias"])
    wrapper = DistributedDataParallel(net, **way.settings)
    if way.hook:
        wrapper.register_comm_hook(None, allreduce_hook)
    return wrapper


def train(way: Way, rank: int, count: int) -> dict[str, Any]:
    """Trains in this way. With one rank: without a wrapper, on all of the data."""
    net = network(seed=0 if rank == 0 else 5)  # DDP gives everybody the weights of rank 0
    alone = count == 1
    wrapper = None if alone or way.late else wrapped(net, way)
    optimizer = optimizer_of(way, net)
    model = net if wrapper is None else wrapper
    average = [AveragedModel(model, use_buffers=True)] if way.ema else []
    given = net if way.inner or alone else wrapper
    share = (rank, count) if way.shards else (0, 1)
    engine = attached(given, optimizer, *share, followers=average, reconstruct=way.reconstruct)
    model = wrapped(net, way) if way.late and not alone else model
    called: list[int] = []
    model.register_forward_hook(lambda *_: called.append(1))
    net.head.weight.register_hook(lambda gradient: called.append(2))
    for number, parts in enumerate(steps_of(way, rank, count), 1):
        training(model)
        for place, (x, y) in enumerate(parts, 1):
            quiet = model.no_sync() if place < len(parts) and not alone else contextlib.nullcontext()
            with quiet:
                (F.cross_entropy(model(x), y) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for follower in average:
            follower.update_parameters(model)
        event = engine.step()
        assert alone or called.count(1) == called.count(2) == number * len(parts), "a hook was lost"
        if event is not None and event.maps and way.anew and not alone:
            model = wrapped(net, way)
            model.register_forward_hook(lambda *_: called.append(1))
    return found(engine, [follower.module for follower in average])


def found(engine: AutoWidth, followers: list[nn.Module]) -> dict[str, Any]:
    """What came out of a run, in what torch saves without pickling code."""
    state = {name: t.clone() for name, t in engine.model.state_dict().items()}
    averaged = {
        f"average.{n}.{name.removeprefix('module.')}": t.clone()
        for n, body in enumerate(followers)
        for name, t in body.state_dict().items()
    }
    return {
        "plans": [{group: (list(m.source), m.size) for group, m in event.maps.items()} for event in engine.history],
        "losses": [(event.loss, event.measured) for event in engine.history],
        "widths": engine.widths,
        "weights": {
            name: t for name, t in (state | averaged).items() if "num_batches" not in name and "unused" not in name
        },
        "exchanged": engine.ranks.exchanged,
    }


# ---- what is refused -------------------------------------------------------------------------------------------------


def _plain(rank: int, count: int, **more: Any) -> AutoWidth:
    net = network()
    return attached(wrapped(net, Way()), optimizer_of(Way(), net), rank, count, **more)


def _not_wrapped(rank: int, count: int) -> None:
    """Nobody adds up gradients: the networks drift apart."""
    net = network()
    optimizer = optimizer_of(Way(), net)
    engine = attached(net, optimizer, rank, count)
    for parts in steps_of(Way(), rank, count):
        training(net)
        F.cross_entropy(net(parts[0][0]), parts[0][1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.step()


def _other_widths(rank: int, count: int) -> None:
    net = network(width=8 - rank)
    attached(net, optimizer_of(Way(), net), rank, count)


def _other_probe_diverged(rank: int, count: int) -> None:
    """One rank's loss is not a number in the middle of a review; both stop, nothing has changed, both go on."""
    net = network()
    bad = [False]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = F.cross_entropy(model(batch[0]), batch[1])
        return value * float("nan") if bad[0] else value

    wrapper = wrapped(net, Way())
    engine = attached(wrapper, optimizer_of(Way(), net), rank, count, loss_fn=None, loss=loss)
    before = copy.deepcopy(net.state_dict())
    training(wrapper)
    bad[0] = rank == 1
    message = ""
    try:
        engine.review()
    except AutoWidthError as error:
        message = f"{type(error).__name__}: {error}"
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    bad[0] = False
    engine.review()
    (x, y) = images(8, rank)
    F.cross_entropy(wrapper(x), y).backward()
    raise AutoWidthError(message)


def _with_hook(kind: str) -> Callable[[int, int], object]:
    def run(rank: int, count: int) -> object:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        net = network()
        wrapper = wrapped(net, Way())
        if kind == "powerSGD":
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1)
            wrapper.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return attached(wrapper, optimizer_of(Way(), net), rank, count)

    return run


def _joined(rank: int, count: int) -> None:
    net = network()
    wrapper = wrapped(net, Way())
    engine = attached(wrapper, optimizer_of(Way(), net), rank, count)
    with wrapper.join():
        training(wrapper)
        F.cross_entropy(wrapper(EXAMPLE), torch.zeros(2, dtype=torch.int64)).backward()
        engine.review()


def _no_probe_here(rank: int, count: int) -> object:
    return _plain(rank, count, probe=probe(0, 1) if rank == 0 else [])


def _apart(rank: int, count: int) -> None:
    """The ranks review at different steps."""
    engine = _plain(rank, count)
    engine.steps = rank
    engine.review()


REFUSED: dict[str, tuple[Callable[[int, int], object], tuple[str, ...]]] = {
    "other seeds": (lambda r, n: _plain(r, n, seed=r), ("seed", "rank 1", "0", "same arguments")),
    "other total_steps": (lambda r, n: _plain(r, n, total_steps=STEPS + r), ("total_steps", "15", "14")),
    "other policy": (lambda r, n: _plain(r, n, policy=Auto() if r else policy()), ("policy", "Auto", "Budget")),
    "other widths": (_other_widths, ("network of shapes",)),
    "no probe on one rank": (_no_probe_here, ("no data",)),
    "not wrapped": (_not_wrapped, ("other weights", "DistributedDataParallel")),
    "at different steps": (_apart, ("step", "same place of the program")),
    "a probe that diverges": (_other_probe_diverged, ("DivergedProbeError", "diverged")),
    "powerSGD": (_with_hook("powerSGD"), ("PowerSGD",)),
    "join": (_joined, ("join()", "equally many batches")),
}
"""Ways that are refused on every rank, and words of the sentence."""


def refused(name: str, rank: int, count: int) -> dict[str, Any]:
    try:
        REFUSED[name][0](rank, count)
    except AutoWidthError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


# ---- ranks that are lost ---------------------------------------------------------------------------------------------


def lost(name: str, rank: int, count: int) -> dict[str, Any]:
    """Rank 1 does not attach; ends without a word between two reviews; or stands still in front of one."""
    try:
        if name == "attached on one rank" and rank == 1:
            wrapped(network(), Way())
            dist.distributed_c10d._get_default_store().wait(["over"], TIMEOUT * 3)
            return {"error": None}
        engine = _plain(rank, count)
        if name == "killed" and rank == 1:
            os.kill(os.getpid(), 9)
        if name == "stands still" and rank == 1:
            dist.distributed_c10d._get_default_store().wait(["over"], TIMEOUT * 3)
            return {"error": None}
        engine.review()
    except AutoWidthError as error:
        if rank == 0 and name != "killed":
            dist.distributed_c10d._get_default_store().set("over", "yes")
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


LOST = {
    "attached on one rank": ("LostRankError", "only 1 of 2 ranks attached", "rank 1"),
    "killed": ("LostRankError", "rank 1", "last checkpoint"),
    "stands still": ("LostRankError", "rank 1", "within 4 s"),
}
"""What is said where rank 1 is lost."""


# ---- norm statistics -------------------------------------------------------------------------------------------------


def norms(kind: type[nn.Module], rank: int, count: int) -> dict[str, Any]:
    """Reviews of a network with batch norms in training mode: their precise statistics are those of all ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net: nn.Module = Net(batch_norm=True)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if kind is nn.SyncBatchNorm else net
    share = (rank, count) if count == 2 else (0, 1)  # 128 samples are no multiple of three: all have the same probe
    engine = attached(net, optimizer_of(Way(), net), *share)
    net.train()
    for _ in range(3):
        engine.steps += 4
        engine.review()
    return found(engine, [])


def by_hand(rank: int, count: int) -> dict[str, Any]:
    """A resize without an engine, with another random state on every rank; then a step."""
    torch.manual_seed(rank)
    net = network()
    wrapper = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = optimizer_of(Way(), net)
    plan = {"stem": IndexMap((0, 1, -1, 3, 4, -1, 6, 7), 8)}
    resize_(wrapper, plan, example_inputs=EXAMPLE, optimizer=optimizer)
    training(wrapper)
    for seed in range(2):
        x, y = images(8, seed=10 * seed + rank)
        F.cross_entropy(wrapper(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": {name: t.clone() for name, t in net.state_dict().items() if "unused" not in name}}


def run(name: str, rank: int, count: int) -> dict[str, Any]:
    if name in ("batch norm", "sync batch norm"):
        return norms(nn.SyncBatchNorm if name.startswith("sync") else nn.BatchNorm2d, rank, count)
    if name == "by hand":
        return by_hand(rank, count)
    if name in LOST:
        return lost(name, rank, count)
    return refused(name, rank, count) if name in REFUSED else train(WAYS[name], rank, count)


def main() -> None:
    torch.set_num_threads(1)
    out, *names = sys.argv[1:]
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, count = dist.get_rank(), dist.get_world_size()
    for name in names:
        torch.save(run(name, rank, count), Path(out) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
