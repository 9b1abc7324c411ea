"""What others put around models and optimizers is taken off, and compiled code is passed by, or forgotten."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

Kind = TypeVar("Kind")

COMPILED: Mapping[str, str] = {"torch._dynamo.eval_frame.OptimizedModule": "_orig_mod"}
"""Class of what `torch.compile` puts around a model, by its full name -> the attribute that holds the model."""

MODELS: Mapping[str, str] = {**COMPILED, "torch.nn.parallel.distributed.DistributedDataParallel": "module"}
"""The same of all that may stand around a model."""

OPTIMIZERS: Mapping[str, str] = {
    "accelerate.optimizer.AcceleratedOptimizer": "optimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer": "_optimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer": "_optimizer",
}
"""The same of wrappers around an optimizer that keep no state of their own by parameter."""


def inner_model(model: nn.Module) -> nn.Module:
    """The model itself: what `torch.compile` and DistributedDataParallel have put around it is taken off, in any order.

    A model that was compiled in place, by `model.compile()`, is the model itself already.
    """
    return _inside(model, MODELS)


def written(model: nn.Module) -> nn.Module:
    """The model without what `torch.compile` has put around it; DistributedDataParallel stays."""
    return _inside(model, COMPILED)


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside of that of Accelerate or Lightning; others are returned as they are."""
    return _inside(optimizer, OPTIMIZERS)


def body_of(follower: nn.Module) -> nn.Module:
    """The copy of the model inside of an EMA copy, which may be one of a compiled model."""
    return inner_model(follower.module if isinstance(follower, AveragedModel) else follower)


def _inside(outer: Kind, wrappers: Mapping[str, str]) -> Kind:
    """What is left when all wrappers are taken off, by the names of their classes: none is imported for it."""
    while True:
        names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(outer).__mro__)
        attribute = next((wrappers[name] for name in names if name in wrappers), None)
        if attribute is None:
            return outer
        outer = getattr(outer, attribute)


# ---- compiled code ---------------------------------------------------------------------------------------------------


@contextmanager
def uncompiled() -> Iterator[None]:
    """While it lasts, what has been compiled runs as it was written: the model, parts of it, a compiled loss.

    A review asks a model in ways in which it is never trained: compiling for that would take longer than the answer,
    and hide what layers read.
    """
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and importing it takes half a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def forget_compiled() -> None:
    """Lets compiled code be made anew when it is next called: what there is holds the old shapes.

    Without it torch compiles again for every new shape, and after eight times stops, without a word, for good.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
