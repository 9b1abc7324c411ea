"""A run of several processes, as torchrun starts them: who trains on what, who speaks, who writes."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autowidth.errors import AutoWidthError
from autowidth.lab.data import Batches
from autowidth.lab.loop_parts import evaluate
from autowidth.lab.prepare import find_device
from autowidth.lab.resuming import unfinished_at
from autowidth.lab.settings import Settings
from autowidth.ranks import LostRankError, Ranks
from autowidth.signals import StopAsked


class ProcessesError(AutoWidthError, ValueError):
    """Processes that cannot train together as they were started."""


# ---- the processes ---------------------------------------------------------------------------------------------------


@contextmanager
def joined(settings: Settings) -> Iterator[Settings]:
    """While it lasts, the processes that torchrun started know each other; yields the settings of this one.

    One process per accelerator where there are some (NCCL), else on the CPU (gloo). Only the first one writes. Started
    otherwise than by torchrun, a process is alone. Raises ProcessesError, and LostRankError where not all come.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield settings
        return
    device = find_device(settings.device)
    if device.type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise ProcessesError(
                f"torchrun started more processes here than the {there} CUDA devices of this machine: give "
                f"--nproc-per-node {there}, or --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    _check_batch(settings.batch_size, count)
    timeout = timedelta(seconds=settings.rank_timeout)
    with _lost_ranks(settings.out):
        _start_group("nccl" if device.type == "cuda" else "gloo", timeout)
    try:
        yield settings.model_copy(update={"device": str(device), **({} if is_first() else {"out": None})})
    finally:
        dist.destroy_process_group()


def _start_group(backend: str, timeout: timedelta) -> None:
    """Starts the process group, under a name of its own for every start by torchrun.

    The store outlives a restart, and with it the addresses of processes that are gone, for which gloo would wait.
    """
    from torch._C._distributed_c10d import PrefixStore  # here: not every build of torch has it
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(iter(rendezvous("env://", timeout=timeout)))
    own = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=timeout)


def _check_batch(size: int, count: int) -> None:
    if size % count:
        raise ProcessesError(
            f"a batch of {size} images cannot be divided among {count} processes: the batch size is that of all of "
            f"them together, so give a multiple of {count}, such as --batch-size {-(-size // count) * count}"
        )


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def left_by_a_restart(out: Path | None) -> Path | None:
    """The folder of a run that torchrun started again and that had saved a training; else None."""
    if out is None or not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        return None
    found = unfinished_at(out)
    return out if found is not None and not found.finished else None


def _here() -> tuple[int, int]:
    """The number of this process, and how many train together."""
    up = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if up else (0, 1)


@contextmanager
def _lost_ranks(out: Path | None) -> Iterator[None]:
    """Turns what torch says where another process is gone into a sentence."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, AutoWidthError) or not any(name in text for name in ("gloo", "NCCL", "store", "socket")):
            raise
        raise LostRankError(
            "another process of this run has ended, or has not answered in time: look for the first error among the "
            "processes, then start all of them again" + (f" with --resume {out}" if out is not None else "")
        ) from error


# ---- the parts of a loop ---------------------------------------------------------------------------------------------


def shared(batches: Batches) -> Batches:
    """The batches, of which every process is given its part."""
    batches.part = _here()
    return batches


def wrapped(network: nn.Module) -> nn.Module:
    """What to call in place of the network, so that gradients are averaged over all processes; alone, the network."""
    if _here()[1] == 1:
        return network
    device = next(network.parameters()).device
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


class Steps:
    """What the processes tell each other in every step: losses, and signals, on which they leave together."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.count = _here()[1]
        self.told = self.agreed = StopAsked()

    def listen(self, asked: StopAsked) -> StopAsked:
        """What the loop looks at in place of a signal to this process: one that all processes know of."""
        self.told = asked
        self.agreed = asked if self.count == 1 else StopAsked()
        return self.agreed

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Around what talks to the others. Raises LostRankError."""
        if self.count == 1:
            yield
            return
        with _lost_ranks(self.out):
            yield

    def mean(self, loss: Tensor, ranks: Ranks) -> Tensor:
        """The mean over all processes of the loss of a step, a scalar; not finite where one of them is not."""
        if self.count == 1:
            return loss.detach()
        heard = self.told.signal
        total, ints, terms = ranks.totals(float(loss.detach()), heard == signal.SIGINT, heard == signal.SIGTERM)
        if ints or terms:
            self.agreed.signal = signal.SIGINT if ints else signal.SIGTERM
        return torch.tensor(total / self.count, device=loss.device, dtype=loss.dtype)


def evaluated(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], memory_format: torch.memory_format, ranks: Ranks
) -> tuple[float, float]:
    """(Share of images that are classified rightly, mean cross-entropy in nats); every process looks at some batches.

    Buffers, which batch norms of each process move by what they saw, are then those of the first one, which saves them.
    """
    if ranks.count == 1:
        return evaluate(network, batches, memory_format)
    buffers = list(network.buffers())
    for buffer, content in zip(buffers, ranks.of_first(buffers), strict=True):
        buffer.copy_(content)
    counts: list[int] = []

    def mine() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in itertools.islice(batches, ranks.rank, None, ranks.count):
            counts.append(len(labels))
            yield images, labels

    right, loss = evaluate(network, mine(), memory_format)
    count = sum(counts)
    right, loss, everyone = ranks.totals(right * count, loss * count, count)
    return right / everyone, loss / everyone
