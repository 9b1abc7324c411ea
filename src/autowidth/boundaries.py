"""Where in a training loop a review may take place: behind an optimizer step, with nothing left to go backward."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.optim import Optimizer

from autowidth.errors import AutoWidthError

LOOKS = 3
"""Steps at the start of a run after which it is looked whether gradients wait: later that costs more than it says."""


class LoopError(AutoWidthError, RuntimeError):
    """A review, or a backward pass, at a place in the training loop where it cannot be."""


class Boundary:
    """What an engine knows of the loop around it: whether the optimizers have stepped, and what they have not used.

    It learns that from a hook on each optimizer, which ends with it; modules and parameters have none.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], *, due: bool = False) -> None:
        self.optimizers = tuple(optimizers)
        self.calls = 0
        self._parameters = tuple(p for p in model.parameters() if p.requires_grad)
        self._stepped = self.seen = False
        self.gradients: dict[Optimizer, tuple[weakref.ref[Tensor], int]] = {}
        self._saved: list[int] | None = None
        self.due = due
        """Whether a review follows the next optimizer step, before which more is noted."""
        hook = _weakly(weakref.ref(self))
        handles = [optimizer.register_step_post_hook(hook) for optimizer in self.optimizers]
        weakref.finalize(self, _remove, handles)

    def after_step(self, optimizer: Optimizer) -> None:
        """Notes which gradient an optimizer has used, and what graphs hold that are there already."""
        self._stepped = True
        gradient = _first_gradient(optimizer)
        if gradient is not None:
            self.gradients[optimizer] = (weakref.ref(gradient), gradient._version)
        self._saved = [_saved(parameter) for parameter in self._parameters] if self.due else None

    def passed(self) -> bool:
        """Whether an optimizer step has been made since the last call.

        None has been made in the middle of an accumulation, and where a GradScaler has left it out. Where none has ever
        been seen and no gradient waits for one, somebody steps in a way that is not seen, and each call counts. Warns
        where a step has been made and gradients wait again.
        """
        self.calls = min(self.calls + 1, LOOKS + 1)
        stepped, self._stepped = self._stepped, False
        self.seen |= stepped
        waiting = (self.calls <= LOOKS or not self.seen) and self.waiting()
        if stepped and waiting and self.calls <= LOOKS:
            warnings.warn(
                "engine.step() finds gradients that no optimizer has used, and a review drops them: call it after "
                "optimizer.step(), before the next backward()",
                stacklevel=3,
            )
        return stepped or not (self.seen or waiting)

    def waiting(self) -> bool:
        """Whether there are gradients that no optimizer has used."""
        return any(self._waits(optimizer) for optimizer in self.optimizers)

    def _waits(self, optimizer: Optimizer) -> bool:
        gradient = _first_gradient(optimizer)
        if gradient is None:
            return False
        used, version = self.gradients.get(optimizer, (lambda: None, 0))
        if used() is gradient and version == gradient._version:
            return False
        return bool(gradient.any())  # zeros are what zero_grad(set_to_none=False) leaves behind

    def check_graphs(self) -> None:
        """Raises LoopError where a forward pass since the last optimizer step waits for its backward pass.

        A graph keeps the weights that its backward pass needs until that is over, and each counts as one more
        reference to the parameter. Weights that it keeps as copies only, as under autocast, are not seen by this;
        `forbid_backward` finds those later.
        """
        if self._saved is None:
            return
        before, self._saved = self._saved, None
        if any(_saved(parameter) > count for parameter, count in zip(self._parameters, before, strict=True)):
            raise LoopError(
                "a review is due, and a forward pass since the last optimizer step waits for its backward pass, which "
                "the review would break: call engine.step() right after optimizer.step(), and look at the model under "
                "torch.no_grad() in between"
            )


def check_inference(what: str) -> None:
    """Raises LoopError inside of torch.inference_mode."""
    if torch.is_inference_mode_enabled():
        raise LoopError(
            f"{what} is called inside of torch.inference_mode(), where no gradient can be had and parameters that are "
            "written to can never train again: call it outside (torch.no_grad() does no harm)"
        )


def accumulators(model: nn.Module) -> list[tuple[Tensor, Node]]:
    """Each parameter with the node at which the backward passes of all present graphs would hand in its gradient."""
    return [(p, get_gradient_edge(p).node) for p in model.parameters() if p.requires_grad and not p.is_inference()]


def forbid_backward(before: Iterable[tuple[Tensor, Node]], step: int) -> None:
    """Makes backward passes through graphs from before a review raise LoopError where they reach a resized parameter.

    `before`: what `accumulators` gave before the review. Surgery gives a resized parameter another node, so that graphs
    from then on do not come by.
    """

    def refuse(gradients: Any) -> None:
        raise LoopError(
            f"backward() goes through a forward pass from before the review at step {step}, which has changed the "
            "widths since: call engine.step() after optimizer.step(), never between forward and backward"
        )

    for parameter, node in before:
        if get_gradient_edge(parameter).node is not node:
            node.register_prehook(refuse)


# ---- what is counted -------------------------------------------------------------------------------------------------


def _first_gradient(optimizer: Optimizer) -> Tensor | None:
    """A gradient that stands for all of an optimizer's."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return next((p.grad for p in parameters if p.grad is not None), None)


def _saved(parameter: Tensor) -> int:
    """References to a parameter beside that of its gradient accumulator, which is there while any graph is."""
    references: Callable[[], int] = parameter._use_count  # type: ignore[attr-defined]
    count = references()
    edge = get_gradient_edge(parameter)
    there = references() == count
    del edge
    return count - there


def _weakly(boundary: weakref.ref[Boundary]) -> Any:
    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found = boundary()
        if found is not None:
            found.after_step(optimizer)

    return hook


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
