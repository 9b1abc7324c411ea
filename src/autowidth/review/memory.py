"""Bytes that a network takes before and after a review, and what is given back to the accelerator."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a review measures memory of, and what it found before surgery.

    before: bytes of parameters, buffers, optimizer state and averaged copies. reserved: bytes that the caching
    allocator holds of each accelerator that the model is on, by its index; empty on a CPU.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    followers: Sequence[nn.Module]
    before: int
    reserved: dict[int, int]

    @classmethod
    def of(cls, model: nn.Module, optimizers: Sequence[Optimizer], followers: Sequence[nn.Module]) -> Memory:
        """What is there now."""
        homes = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        return cls(
            model=model, optimizers=optimizers, followers=followers, before=held_bytes(model, optimizers, followers),
            reserved={home: torch.cuda.memory_reserved(home) for home in homes},
        )  # fmt: skip

    def now(self) -> dict[str, int]:
        """Bytes by what they are counted of, for the event.

        before, after: of parameters, buffers, optimizer state and averaged copies. On an accelerator also
        reserved_before, reserved: what the caching allocator holds, and still holds once freed blocks are handed back,
        removed slices among it, which are kept until the event is recorded; peak: the most that tensors have taken
        since the last review, in training and reviews together.
        """
        found = {"before": self.before, "after": held_bytes(self.model, self.optimizers, self.followers)}
        if not self.reserved:
            return found
        give_back()
        found["reserved_before"] = sum(self.reserved.values())
        found["reserved"] = sum(map(torch.cuda.memory_reserved, self.reserved))
        found["peak"] = sum(map(torch.cuda.max_memory_allocated, self.reserved))
        for home in self.reserved:
            torch.cuda.reset_peak_memory_stats(home)
        return found


def give_back() -> None:
    """Hands freed blocks back to the accelerator: those of the old shapes fit nothing that comes. Nothing on a CPU."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def held_bytes(model: nn.Module, optimizers: Sequence[Optimizer] = (), followers: Sequence[nn.Module] = ()) -> int:
    """Bytes of all parameters and buffers, optimizer state and averaged copies; memory that is shared counts once."""
    modules = itertools.chain.from_iterable((*m.parameters(), *m.buffers()) for m in (model, *followers))
    states: Iterable[object] = (state for optimizer in optimizers for state in optimizer.state.values())
    tensors = [*modules, *(leaf for state in states for leaf in tree_leaves(state) if isinstance(leaf, Tensor))]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
