"""One undo for everything: what is performed through a journal is undone, last first, when its block fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from autowidth.errors import AutoWidthError

T = TypeVar("T")
_TRIES = 3
"""How often an undo that fails is tried before it is given up."""


class UndoError(AutoWidthError, RuntimeError):
    """Something failed, and so did taking back what had been done before it."""


class Change(Protocol):
    """One write. `undo` puts back what was there: also where `do` was cut short or never began, and also twice."""

    def do(self) -> None: ...

    def undo(self) -> None: ...


class Journal:
    """What has been done inside an `all_or_nothing` block, and how each of it is undone."""

    def __init__(self) -> None:
        self._undos: list[Callable[[], object]] = []

    def perform(self, change: Change) -> None:
        """Enters the change, then makes it."""
        self._undos.append(change.undo)
        change.do()

    def write_(self, tensor: Tensor, content: Tensor) -> None:
        """Writes content of the same shape into the tensor, in place; the old content is cloned.

        Raises ValueError for another shape.
        """
        if content.shape != tensor.shape:
            raise ValueError(
                f"content of shape {tuple(content.shape)} cannot be written into a tensor of shape "
                f"{tuple(tensor.shape)}: both must be equal"
            )
        self.perform(_ContentChange(tensor, tensor.detach().clone(), content))

    def call(self, do: Callable[[], T], undo: Callable[[], object]) -> T:
        """Enters how an act is undone, then does it and returns what it returns.

        `undo` must do no harm where `do` was cut short or never began, and where it is called twice.
        """
        self._undos.append(undo)
        return do()

    def _commit(self) -> None:
        """Forgets how it was: what was done stays."""
        self._undos.clear()

    def _undo(self) -> None:
        """Undoes everything, last first. An interrupt meanwhile is held back until that is done, then raised.

        An undo that was cut short is begun again. One that goes on failing is given up, and UndoError is raised once
        all others are done.
        """
        tries: Counter[int] = Counter()
        failures: list[Exception] = []
        held: BaseException | None = None
        if self._undos:
            torch.set_grad_enabled(False)  # the first entry of the block, undone last, puts it back
        while self._undos:
            try:
                while self._undos:
                    self._undos[-1]()
                    self._undos.pop()
            except Exception as error:
                tries[len(self._undos)] += 1
                if tries[len(self._undos)] == _TRIES:
                    failures.append(error)
                    self._undos.pop()
            except BaseException as interrupt:
                held = interrupt
        if failures:
            raise UndoError(
                f"{len(failures)} change{'s' * (len(failures) > 1)} could not be undone ({failures[0]}): what they had "
                "changed is unusable, load the last checkpoint"
            ) from failures[0]
        if held is not None:
            raise held


@contextmanager
def all_or_nothing(*generators: torch.Generator) -> Iterator[Journal]:
    """A journal; everything performed through it is undone when the block is left by any exception or interrupt.

    The random states of the generators are put back too, so name those that the block draws from. What is changed past
    the journal stays. The exception is raised again when all is as it was before.

        with all_or_nothing(generator) as journal:
            journal.write_(weight, reconstructed)
            channel_map = operate(journal, model, channel_map, plan, generator=generator)
            journal.call(lambda: file.write(line), undo=lambda: file.truncate(length))
    """
    journal = Journal()
    journal.call(_nothing, partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    for generator in generators:
        journal.call(_nothing, partial(generator.set_state, generator.get_state()))
    try:
        try:
            yield journal
            journal._commit()
        except BaseException:
            journal._undo()
            raise
    except BaseException:  # as a rule nothing is left to do: only where an interrupt hit the lines above
        journal._undo()
        raise


def _nothing() -> None:
    """No act: the entry is there for its undo."""


@dataclass(frozen=True, slots=True)
class _ContentChange:
    """New content of the same shape, in place."""

    target: Tensor
    old: Tensor
    new: Tensor

    def do(self) -> None:
        with torch.no_grad():
            self.target.copy_(self.new)

    def undo(self) -> None:
        with torch.no_grad():
            self.target.copy_(self.old)
