"""Every context in which a model is looked at: quiet, with other norm statistics, with other tensors."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from autowidth.ranks import ALONE, Ranks
from autowidth.review.batches import Loss, samples_in
from autowidth.unwrapping import uncompiled
from autowidth.wrappers import local_norms


@contextmanager
def quiet(model: nn.Module) -> Iterator[frozenset[nn.Module]]:
    """Evaluation mode, eager and without autocast; afterwards all modes and the global random state as they were.

    Yields the modules that were in training mode.
    """
    modes = {module: module.training for module in model.modules()}
    states = (random.getstate(), np.random.get_state())
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), full_precision(model), uncompiled(), local_norms(model):
            yield frozenset(module for module, training in modes.items() if training)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in modes.items():
            module.training = training


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """No autocast while it lasts, on the CPU and where the model is.

    An autocast block around it keeps casts of the weights: they would hide every ablation, and have the old shapes
    after surgery, so they are dropped before and after.
    """
    kinds = {"cpu", *(tensor.device.type for tensor in model.parameters())} - {"meta"}
    torch.clear_autocast_cache()
    try:
        with ExitStack() as stack:
            for kind in sorted(kinds):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits while it lasts, until a place where everything can be put back. Yields a check for such places.

    The check raises what the interrupt would have raised. One that no check has seen is raised at the end; a second
    one, from an impatient user, at once. Without effect outside the main thread, to which no interrupt comes.
    """
    before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(before):
        yield lambda: None
        return
    waiting: list[int] = []

    def arrived(number: int, frame: FrameType | None) -> None:
        if waiting:
            before(number, frame)
        waiting.append(number)

    def check() -> None:
        if waiting:
            waiting.clear()
            before(signal.SIGINT, None)

    signal.signal(signal.SIGINT, arrived)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
    check()


# ---- norm statistics -------------------------------------------------------------------------------------------------


@contextmanager
def precise_norms(
    model: nn.Module, batches: Iterable[Any], loss: Loss, *, among: Collection[nn.Module], ranks: Ranks = ALONE
) -> Iterator[None]:
    """While it lasts, running statistics of norms are plain averages over the batches; afterwards as they were.

    `among` are the modules that are being trained: a norm that the user keeps in evaluation mode is left alone.

    At a high learning rate running statistics lag behind the weights: the network in evaluation mode is then not the
    one that is being trained, and what it says of its filters is wrong (docs/decisions/003; "precise batch-norm
    statistics", Wu and Johnson 2021, arXiv 2105.07576).
    """
    norms = _running_norms(model, among)
    with _as_found(norms):
        estimate_norms(model, norms, batches, loss, ranks)
        yield


def precise_statistics(
    model: nn.Module, batches: Iterable[Any], loss: Loss, *, among: Collection[nn.Module], ranks: Ranks = ALONE
) -> list[tuple[Tensor, Tensor]]:
    """(buffer, plain average over the batches) for every running statistic of the norms in training.

    The norms are left as they were.
    """
    norms = _running_norms(model, among)
    with _as_found(norms):
        estimate_norms(model, norms, batches, loss, ranks)
        return [(b, b.clone()) for norm in norms for b in norm.buffers() if b is not norm.num_batches_tracked]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormShift:
    """What a trained norm holds beside what some batches show of it, before anything is removed: all (width,).

    mean, var: its running statistics. seen_mean, seen_var: plain averages over the batches.
    """

    norm: _NormBase
    mean: Tensor
    var: Tensor
    seen_mean: Tensor
    seen_var: Tensor

    def corrected(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """What the norm should hold where the same batches now show this mean and this variance (width,).

        The mean moves by as much and the variance by the same factor as on the batches, so that batches which are not
        quite what training saw, or few, do no harm to what has not changed.
        """
        factor = (var + self.norm.eps) / (self.seen_var + self.norm.eps)
        return self.mean + mean - self.seen_mean, (self.var + self.norm.eps) * factor - self.norm.eps


def norm_shifts(
    model: nn.Module, batches: Iterable[Any], loss: Loss, *, among: Collection[nn.Module], ranks: Ranks = ALONE
) -> tuple[NormShift, ...]:
    """What the norms in training hold beside what the batches show. The norms are left as they were."""
    norms = [norm for norm in _running_norms(model, among) if norm.running_mean is not None]
    held = [_mean_and_var(norm) for norm in norms]
    with _as_found(norms):
        estimate_norms(model, norms, batches, loss, ranks)
        seen = [_mean_and_var(norm) for norm in norms]
    return tuple(
        NormShift(norm=norm, mean=mean, var=var, seen_mean=now[0], seen_var=now[1])
        for norm, (mean, var), now in zip(norms, held, seen, strict=True)
    )


@contextmanager
def corrected_norms(
    model: nn.Module, batches: Iterable[Any], loss: Loss, shifts: Sequence[NormShift], *, ranks: Ranks = ALONE
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """While it lasts, norms hold what `NormShift.corrected` says; afterwards what they held.

    Yields (buffer, that content). `batches` are those that the shifts were taken from.
    """
    norms = [shift.norm for shift in shifts]
    with _as_found(norms):
        estimate_norms(model, norms, batches, loss, ranks)
        contents: list[tuple[Tensor, Tensor]] = []
        for shift in shifts:
            buffers = (shift.norm.running_mean, shift.norm.running_var)
            for buffer, content in zip(buffers, shift.corrected(*_mean_and_var(shift.norm)), strict=True):
                assert buffer is not None, "norms without running statistics have no shift"
                buffer.copy_(content)
                contents.append((buffer, content))
        yield contents


def _mean_and_var(norm: _NormBase) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None, "norms with running statistics only"
    return norm.running_mean.clone(), norm.running_var.clone()


def estimate_norms(
    model: nn.Module, norms: Sequence[_NormBase], batches: Iterable[Any], loss: Loss, ranks: Ranks = ALONE
) -> None:
    """Replaces the running statistics of these norms by plain averages over the batches, by a forward pass of each.

    Averages are over the batches of all ranks.

    Batches of one sample are left out: a norm may have no second value to compare it with. Where no other is left the
    statistics stay.
    """
    usable = [batch for batch in batches if samples_in(batch) > 1] if norms else []
    if not norms or not ranks.totals(len(usable))[0]:
        return
    modes, averages = [norm.training for norm in norms], [_Averaging() for _ in norms]
    handles = [norm.register_forward_pre_hook(average) for norm, average in zip(norms, averages, strict=True)]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.training = True
        with torch.no_grad():
            for batch in usable:
                loss(model, batch)
    finally:
        for handle, norm, training in zip(handles, norms, modes, strict=True):
            handle.remove()
            norm.training = training
    _join_averages(norms, [average.calls for average in averages], ranks)


class _Averaging:
    """A hook that makes the n-th call of a norm move its running statistics by 1 / n: their plain average.

    `momentum=None` says the same to a batch norm, but to an instance norm it says 0.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, norm: nn.Module, _: Any) -> None:
        self.calls += 1
        norm.momentum = 1 / self.calls  # type: ignore[assignment]


def _join_averages(norms: Sequence[_NormBase], calls: Sequence[int], ranks: Ranks) -> None:
    """Makes of the averages of every rank, over its calls of each norm, those over all calls."""
    if ranks.count == 1:
        return
    total = torch.tensor([float(number) for number in calls], dtype=torch.float64)
    ranks.add_([total])
    pairs = [(norm, own / whole) for norm, own, whole in zip(norms, calls, total.tolist(), strict=True) if whole]
    contents = [
        (buffer, buffer * share)
        for norm, share in pairs
        for buffer in (norm.running_mean, norm.running_var)
        if buffer is not None
    ]
    ranks.add_([content for _, content in contents])
    for buffer, content in contents:
        buffer.copy_(content)


@contextmanager
def batch_norms(model: nn.Module, *, among: Collection[nn.Module]) -> Iterator[None]:
    """While it lasts, norms take the statistics of the batch at hand; their own stay as they are.

    `among` are the modules that are being trained. It is what `precise_norms` does at half the price, for batches that
    are large enough to speak for all.
    """
    norms = _running_norms(model, among)
    with _as_found(norms):
        for norm in norms:
            norm.momentum, norm.training = 0.0, True
        yield


def _running_norms(model: nn.Module, among: Collection[nn.Module]) -> list[_NormBase]:
    """The norms among these modules that keep running statistics."""
    return [m for m in model.modules() if m in among and isinstance(m, _NormBase) and m.track_running_stats]


@contextmanager
def _as_found(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Afterwards momentum, mode and statistics of the norms are as they were."""
    saved = [(m.momentum, m.training, [(b, b.clone()) for b in m.buffers()]) for m in norms]
    try:
        yield
    finally:
        for norm, (momentum, training, buffers) in zip(norms, saved, strict=True):
            norm.momentum, norm.training = momentum, training
            for buffer, content in buffers:
                buffer.copy_(content)


# ---- other tensors ---------------------------------------------------------------------------------------------------


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, parameters and buffers of these names hold other values of the same shape."""
    targets = named_tensors(model)
    saved = {name: targets[name].data.clone() for name in tensors}
    try:
        for name, content in tensors.items():
            targets[name].data.copy_(content)
        yield
    finally:
        for name, content in saved.items():
            targets[name].data.copy_(content)
