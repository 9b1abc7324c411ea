"""Several processes that train one network together: what they add up, compare, and tell each other.

Every exchange begins with a header of a few numbers, added up over all ranks. It says whether a rank has failed, and
whether all are at the same place: so a rank that fails tells the others, which stop for the same reason instead of
waiting. Headers and sums that lie on the CPU travel by gloo, in a process group of our own; sums on an accelerator by
the process group that trains, once a header has shown that all ranks are there.
"""

from __future__ import annotations

import datetime
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autowidth.errors import AutoWidthError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

ARRIVE = 120.0
"""Seconds within which all ranks must attach; less where the process group waits less."""

CALL = 3.0
"""Seconds that survivors give each other to answer, once a rank is lost."""

CHUNK = 1 << 24
"""Elements that travel together."""

CLOSE = 1e-4
"""Relative difference between ranks above which their weights are no rounding apart."""


class RanksError(AutoWidthError, RuntimeError):
    """Processes that do not train one network together as they should."""


class RanksDifferError(RanksError, ValueError):
    """Ranks that were given different arguments, or whose networks have drifted apart."""


class RankStoppedError(RanksError):
    """Another rank has failed and has said why."""


class LostRankError(RanksError, ConnectionError):
    """Another rank is gone, or has not answered in time."""


class Ranks:
    """The ranks that train one network; this one stands for a process that trains alone, and exchanges nothing.

    rank, count: the number of this process, and how many there are. exchanged: bytes that this rank has put into
    exchanges so far, headers included; how often they travel depends on the backend (a ring takes each about twice).
    exchanges: how often ranks have waited for each other.
    """

    rank = 0
    count = 1
    exchanged = 0
    exchanges = 0

    def totals(self, *numbers: float) -> tuple[float, ...]:
        """The sums over all ranks, of at most four numbers, in double precision."""
        return numbers

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Adds up tensors over all ranks, in place; every rank has the same shapes in the same order."""

    def of_first(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What these tensors hold on the first rank."""
        return tensors

    def made_by_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes; the others do not make it."""
        return make()

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        return [value]

    def agree(self, digest: int) -> bool:
        """Whether all ranks have the same digest, a number of 32 bits."""
        return True

    def check_same(self, facts: Mapping[str, str], remedy: str) -> None:
        """Raises RanksDifferError on every rank where one of the facts is not the same on all."""

    def check_close(self, model: nn.Module) -> None:
        """Raises RanksDifferError on every rank where the weights of the model are not the same on all."""

    def together(self, what: str) -> AbstractContextManager[None]:
        """A block that all ranks leave together: where one fails in it, the others raise RankStoppedError."""
        return nullcontext()


ALONE = Ranks()
"""A process that trains alone."""


class Several(Ranks):
    """Ranks that talk to each other.

    Raises, in every method, LostRankError where a rank is gone, RankStoppedError where one has failed, RanksDifferError
    where they are not at the same place.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        members = dist.get_process_group_ranks(group)
        self.rank, self.count = dist.get_rank(group), len(members)
        self.exchanged = self.exchanges = 0
        self._group, self._members, self._first = group, members, members[0]
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a restart by torchrun
        name = f"autowidth/{start}/{zlib.crc32(repr(members).encode())}"
        _ENGINES[name] += 1
        self._store = _store(f"{name}/{_ENGINES[name]}")
        self._calls = self._turn = 0
        self._timeout = _timeout_of(group)
        self._arrive()
        self._what = "a training step"
        self._control = dist.new_group(members, backend="gloo", timeout=self._timeout, use_local_synchronization=True)

    def totals(self, *numbers: float) -> tuple[float, ...]:
        return self._header("totals", numbers)[: len(numbers)]

    def add_(self, tensors: Sequence[Tensor]) -> None:
        self._header("add", (len(tensors), sum(t.numel() for t in tensors)))
        for part in _parts(tensors, dtype=_wide):
            flat = torch.cat([tensor.detach().reshape(-1).to(_wide(tensor)) for tensor in part])
            self._travel(flat, dist.all_reduce)
            for tensor, sums in zip(part, flat.split([t.numel() for t in part]), strict=True):
                tensor.copy_(sums.view(tensor.shape))

    def of_first(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        self._header("first", (len(tensors), sum(t.numel() for t in tensors)))
        found: dict[int, Tensor] = {}
        for part in _parts(tensors, dtype=lambda tensor: tensor.dtype):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in part])
            self._travel(flat, partial(dist.broadcast, src=self._first))
            for tensor, content in zip(part, flat.split([t.numel() for t in part]), strict=True):
                found[id(tensor)] = content.view(tensor.shape)
        return [found[id(tensor)] for tensor in tensors]

    def made_by_first(self, make: Callable[[], T]) -> T:
        made = [make() if self.rank == 0 else None]
        self._header("made")
        self._talk(lambda: dist.broadcast_object_list(made, self._first, group=self._control))
        return made[0]  # type: ignore[return-value]

    def gathered(self, value: T) -> list[T]:
        self._header("gathered")
        values: list[Any] = [None] * self.count
        self._talk(lambda: dist.all_gather_object(values, value, group=self._control))
        return values

    def agree(self, digest: int) -> bool:
        parts = (float(digest % 2**16), float(digest // 2**16))  # their squares are exact in double precision
        sums = self.totals(*parts, *(half * half for half in parts))
        return sums == tuple(self.count * number for number in (*parts, *(half * half for half in parts)))

    def check_same(self, facts: Mapping[str, str], remedy: str) -> None:
        theirs = self.made_by_first(lambda: dict(facts))
        wrong = next((name for name in theirs if facts.get(name) != theirs[name]), None)
        self._same(None if wrong is None else f"{wrong} {_brief(facts.get(wrong, 'nothing'), theirs[wrong])}", remedy)

    def check_close(self, model: nn.Module) -> None:
        shared = {name: p for name, p in model.named_parameters() if not getattr(p, "_ddp_ignored", False)}
        names, ours = list(shared), torch.stack([_fingerprint(p.detach()) for p in shared.values()]).cpu()
        (theirs,) = self.of_first([ours])
        far = ((ours - theirs).abs() > CLOSE * theirs[:, 1:] + 1e-12).any(1) | ~torch.isfinite(ours).all(1)
        far &= torch.isfinite(theirs).all(1)  # weights that are not finite on all ranks are the probe's to refuse
        wrong = names[int(far.nonzero()[0])] if far.any() else None
        self._same(
            None if wrong is None else f"other weights in {wrong!r}",
            "train it with DistributedDataParallel, or average gradients over all ranks at every step",
        )

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        before, self._what = self._what, what
        try:
            yield
        except RanksError:  # all know, or nobody can be told
            raise
        except BaseException as error:
            with suppress(RanksError):
                self._header("failed", failure=f"{type(error).__name__}: {error}".rstrip(": "))
            raise
        else:
            self._header("done")
        finally:
            self._what = before

    # ---- what it rests on

    def _header(self, act: str, numbers: Sequence[float] = (), *, failure: str | None = None) -> tuple[float, ...]:
        """The sums of the numbers. All ranks come here for the same act, or have failed."""
        self._turn += 1
        tag = float(self._turn * len(_ACTS) + _ACTS.index(act))
        header = torch.zeros(7, dtype=torch.float64)
        header[:3] = torch.tensor([failure is not None, tag, tag * tag])
        header[3 : 3 + len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        self._travel(header, self._add_up)
        failed, tags, squares, *sums = header.tolist()
        if failed:
            reasons: list[Any] = [None] * self.count
            self._talk(lambda: dist.all_gather_object(reasons, failure, group=self._control))
            rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
            raise RankStoppedError(f"rank {rank} of {self.count} stopped {self._what}, and so do all: {reason}")
        if tags != self.count * tag or squares != self.count * tag * tag:
            raise RanksDifferError(
                f"the {self.count} ranks are at different places of {self._what}: call the engine equally often, and "
                "at the same place of the program, on every rank"
            )
        return tuple(sums)

    def _add_up(self, numbers: Tensor, group: dist.ProcessGroup) -> None:
        """Adds up a few numbers over all ranks, in place, by recursive doubling.

        That takes log2 N messages after each other, where gloo's own ring takes 2 (N - 1). In every step both sides
        form the same sum, so that all ranks end with the same bits. Ranks above the largest power of two are doubled
        by one below it.
        """
        most, theirs = 1 << (self.count.bit_length() - 1), torch.empty_like(numbers)
        double = self.rank + most if self.rank < most else self.rank - most
        if self.rank >= most:
            dist.send(numbers, self._members[double], group=group)
            dist.recv(numbers, self._members[double], group=group)
            return
        if double < self.count:
            dist.recv(theirs, self._members[double], group=group)
            numbers += theirs
        for bit in range(most.bit_length() - 1):
            partner = self._members[self.rank ^ (1 << bit)]
            sent = dist.isend(numbers, partner, group=group)
            dist.recv(theirs, partner, group=group)
            sent.wait()  # type: ignore[union-attr]
            numbers += theirs
        if double < self.count:
            dist.send(numbers, self._members[double], group=group)

    def _same(self, difference: str | None, remedy: str) -> None:
        """Raises RanksDifferError on every rank where one of them found a difference."""
        (different,) = self.totals(difference is not None)
        if different:
            found = self.gathered(difference)
            rank = next(rank for rank, text in enumerate(found) if text is not None)
            raise RanksDifferError(
                f"{self._what} needs the same on all {self.count} ranks: rank {rank} has {found[rank]}; {remedy}"
            )

    def _travel(self, flat: Tensor, act: Callable[..., object]) -> None:
        """One tensor, in place, by a collective of the group that can carry it."""
        self.exchanged += flat.nbytes
        group = self._control if flat.device.type == "cpu" else self._group
        self.exchanges += 1
        self._talk(lambda: act(flat, group=group))

    def _talk(self, act: Callable[[], object]) -> None:
        """Raises LostRankError where a rank does not answer."""
        try:
            act()
        except RuntimeError as error:  # whatever a backend raises
            seconds = self._timeout.total_seconds()
            raise LostRankError(
                f"{self._gone()} did not come to {self._what} within {seconds:g} s, or has ended: look for the first "
                "error among the ranks, and start all of them again from the last checkpoint"
            ) from error

    # ---- who is there

    def _arrive(self) -> None:
        """Waits until all ranks have attached. Raises LostRankError where some do not come."""
        self._what = "attaching the engine"
        seconds = min(ARRIVE, self._timeout.total_seconds())
        if missing := self._missing(seconds):
            raise LostRankError(
                f"only {self.count - len(missing)} of {self.count} ranks attached an engine within {seconds:g} s, "
                f"{_listed(missing)} did not: attach it on every rank, with the same arguments; a process that trains "
                "on its own passes process_group=, a group of itself alone"
            )

    def _gone(self) -> str:
        """The ranks that do not answer, for people."""
        try:
            return _listed(self._missing(CALL)) or "a rank"
        except RuntimeError:  # the store went with its rank
            return "a rank"

    def _missing(self, seconds: float) -> list[int]:
        """The ranks that do not answer a call within these seconds. Raises RuntimeError where the store is gone."""
        self._calls += 1
        keys = [f"{self._calls}/{rank}" for rank in range(self.count)]
        self._store.set(keys[self.rank], "here")
        until = time.monotonic() + seconds
        while not self._store.check(keys):
            if time.monotonic() > until:
                return [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            time.sleep(0.05)
        return []


_ENGINES: Counter[str] = Counter()
"""How many engines each set of ranks has had: every one calls its ranks under a name of its own."""

_ACTS = ("totals", "add", "first", "made", "gathered", "failed", "done")


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """The ranks of a process group; of all processes where none is given and torch.distributed is up; else alone.

    Raises LostRankError where not all of them come.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    group = dist.group.WORLD if group is None else group
    if group is None or dist.get_rank(group) < 0 or dist.get_world_size(group) == 1:
        return ALONE
    return Several(group)


def _store(name: str) -> Store:
    """A corner of the store through which all processes found each other."""
    from torch._C._distributed_c10d import PrefixStore  # here: not every build of torch has it

    return PrefixStore(name, dist.distributed_c10d._get_default_store())


def _timeout_of(group: dist.ProcessGroup) -> datetime.timedelta:
    """How long a collective of this group waits."""
    for device in ("cpu", "cuda"):
        with suppress(RuntimeError, AttributeError):
            found: datetime.timedelta = group._get_backend(torch.device(device)).options._timeout
            return found
    return dist.default_pg_timeout


def _wide(tensor: Tensor) -> torch.dtype:
    """The type in which a tensor is added up: at least single precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _parts(tensors: Sequence[Tensor], dtype: Callable[[Tensor], torch.dtype]) -> Iterator[list[Tensor]]:
    """The tensors in lists of one device, one type and about `CHUNK` elements, each tensor once."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        kinds.setdefault((tensor.device, dtype(tensor)), []).append(tensor)
    for alike in kinds.values():
        part: list[Tensor] = []
        for tensor in alike:
            if part and sum(t.numel() for t in part) + tensor.numel() > CHUNK:
                yield part
                part = []
            part.append(tensor)
        yield part


def _fingerprint(tensor: Tensor) -> Tensor:
    """Two numbers (2,) in double precision: a projection that moves with every element, and the norm."""
    flat = tensor.reshape(-1).double()
    along = torch.cos(torch.arange(flat.numel(), dtype=torch.float64, device=flat.device))
    return torch.stack([flat @ along, flat.norm()])


def _brief(ours: str, theirs: str) -> str:
    """Two texts for people, from a little before where they part."""
    start = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    start = 0 if max(len(ours), len(theirs)) <= 80 else max(0, start - 30)
    mine, first = (("... " if start else "") + text[start : start + 80] for text in (ours, theirs))
    return f"{mine} where rank 0 has {first}"


def _listed(ranks: Sequence[int]) -> str:
    """Ranks for people, the first few of many."""
    names = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {names}" if ranks else ""
