"""Forward passes of scratch copies, in training and evaluation mode, and the channel map that they show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autowidth.channels import ChannelMap
from autowidth.trace.frames import described
from autowidth.trace.groups import read_off
from autowidth.trace.labelling import Labeller
from autowidth.trace.scratch import TraceError, copied, meta_copy, shapes_of, tensors_in


@dataclass(frozen=True)
class Passes:
    """A scratch copy of the model with inputs that fit it, and the modes (training or not) in which to run it."""

    make: Callable[[], nn.Module]
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modes: tuple[bool, ...] = (False, True)
    notes: tuple[str, ...] = ()

    def map_of(self, model: nn.Module) -> ChannelMap:
        """The channel map of this copy, without rehearsal. Raises what the forward pass raises."""
        labeller = Labeller(model, self.args, self.kwargs)
        for training in self.modes:
            labeller.follow(model.train(training), self.args, self.kwargs)
        return replace(read_off(labeller.ledger, shapes_of(model)), notes=self.notes)

    def first(self) -> tuple[Passes, ChannelMap] | Exception:
        """These passes in the modes that work, and the map. The error of evaluation mode if none does."""
        labeller = Labeller(self.model, self.args, self.kwargs)
        failures: dict[bool, Exception] = {}
        for training in self.modes:
            try:
                labeller.follow(self.model.train(training), self.args, self.kwargs)
            except TraceError:
                raise
            except Exception as error:
                failures[training] = error
        if len(failures) == len(self.modes):
            return failures[False]
        lost = [
            f"{'training' if training else 'evaluation'} mode was not followed: {described(error)}"
            for training, error in failures.items()
        ]
        modes = tuple(training for training in self.modes if training not in failures)
        modes = modes[:1] if labeller.modes_agree and not failures else modes  # the other one would show nothing new
        passes = replace(self, modes=modes, notes=(*self.notes, *lost))
        return passes, replace(read_off(labeller.ledger, shapes_of(self.model)), notes=passes.notes)

    def scratches(self) -> Iterator[nn.Module]:
        """Copies to spoil, as many as are asked for: first the one that has been run, then fresh ones."""
        yield self.model
        while True:
            yield self.make()


def first_passes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Passes, ChannelMap]:
    """The first passes of a scratch copy: on the meta device if the forward pass needs no values, else on a real one.

    Raises TraceError if neither runs.
    """
    on_meta = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs))
    make = partial(meta_copy, model)
    found = Passes(make, make(), *on_meta).first()
    if isinstance(found, Exception):
        note = "the forward pass depends on values: only the branch taken by the example inputs was followed"
        make = partial(copied, model)
        found = Passes(make, make(), args, kwargs, notes=(note,)).first()
    if isinstance(found, Exception):
        shapes = [tuple(tensor.shape) for tensor in tensors_in((args, kwargs))]
        raise TraceError(
            f"{type(model).__name__} does not run on the example inputs of shape {shapes}: {described(found)}; "
            "pass inputs that the model accepts, on its device and of its dtype"
        ) from found
    return found
