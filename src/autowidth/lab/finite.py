"""Losses and gradients that are not finite: seen, told, counted; too many in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from autowidth.errors import AutoWidthError


class DivergedError(AutoWidthError, FloatingPointError):
    """Losses or gradients that are not finite, too often in a row or at the end of a run."""

    exit_code = 3


class FiniteCheck:
    """Looks at every step and every evaluation; counts those in a row that are not finite.

    A step that is not finite leaves weights, optimizer and running statistics of norms as they were. Raises
    DivergedError when `most` of one kind have followed each other. `say` takes a sentence for the user.
    """

    def __init__(self, network: nn.Module, *, most: int, remedy: Callable[[], str], say: Callable[[str], None]) -> None:
        self.most, self.remedy, self.say = most, remedy, say
        self.steps = 0
        """Training steps in a row that were not finite."""
        self.evaluations = 0
        """Evaluations in a row that were not."""
        self.follow(network)

    def follow(self, network: nn.Module) -> None:
        """Looks after the parameters and buffers that the network has now; call it again when shapes have changed."""
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._buffers = [b for b in network.buffers() if b.is_floating_point()]
        self._kept = [b.clone() for b in self._buffers]

    def before(self) -> None:
        """Keeps the buffers as they are before a step: its forward pass may spoil the running statistics."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def step(self, loss: Tensor, number: int) -> bool:
        """Whether the loss and the gradients of step `number` are finite; if not, the buffers are as before it."""
        if _all_finite(loss, self._parameters):
            self.steps = 0
            return True
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        self.steps += 1
        what = f"training loss is {loss.item()}" if not bool(torch.isfinite(loss)) else "gradient is not finite"
        self._count(self.steps, f"the {what} at step {number}", "the step is left out")
        return False

    def evaluation(self, loss: float, what: str, number: int) -> bool:
        """Whether the loss of an evaluation after step `number` is finite."""
        if math.isfinite(loss):
            self.evaluations = 0
            return True
        self.evaluations += 1
        self._count(self.evaluations, f"the loss on {what} is {loss} at step {number}", "training goes on")
        return False

    def diverged(self, what: str) -> DivergedError:
        """The error that ends the run."""
        return DivergedError(f"{what}: training has diverged; {self.remedy()}")

    def _count(self, count: int, what: str, then: str) -> None:
        if count >= self.most:
            raise self.diverged(f"{what}, for the {self.most}th time in a row" if self.most > 1 else what)
        self.say(f"{what}, {count} of {self.most} in a row before the run ends: {then}, no review and no checkpoint")


def _all_finite(loss: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the loss, a scalar, and all gradients are finite. One wait for an accelerator where they are.

    Norms are quick, but their sums of squares overflow where no gradient does: then every element is looked at.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients) if gradients else ()
    if bool(torch.stack([loss.detach().float(), *(norm.float() for norm in norms)]).isfinite().all()):
        return True
    return bool(torch.isfinite(loss)) and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
