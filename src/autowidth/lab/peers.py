"""Other people's pruning tools, run as themselves; they are extras of the benchmark."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from autowidth.cost import count_macs
from autowidth.lab.data import ImageSet
from autowidth.lab.train import probe_batches

STEPS = 400
"""Steps in which Torch-Pruning walks to the target when it ranks the whole network; fine enough to end near it."""

NARROWEST = 0.9
"""The largest share of a layer's filters that may go when the whole network is ranked."""


class PeerError(ImportError):
    """A tool that is not installed."""


def torch_pruned(
    network: nn.Module,
    images: ImageSet,
    *,
    importance: str,
    scope: Literal["layer", "network"],
    macs: float,
    seed: int,
) -> nn.Module:
    """The network, pruned by Torch-Pruning to the share `macs` of its MACs; the one that is passed stays as it is.

    importance: `magnitude` (its group magnitude, L2), `taylor` (first order, gradients summed over two probe batches)
    or `bn-scale`. scope: `layer` prunes every layer by the same share, the smallest that meets the target; `network`
    by its global ranking with the default normalisation. The last linear layer keeps its outputs. Raises PeerError
    where the tool is not installed.
    """
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise PeerError("Torch-Pruning is not installed: pip install 'autowidth[bench]'") from error
    kinds: dict[str, Any] = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "bn-scale": tp.importance.BNScaleImportance,
    }
    example = torch.zeros(2, *images.image_shape, device=images.train.images.device)
    target = macs * count_macs(network, example)

    def pruned(ratio: float, steps: int) -> nn.Module:
        """A copy, pruned by this ratio in equal steps, up to the first that meets the target."""
        candidate = copy.deepcopy(network).eval()
        _put_gradients(candidate, images, seed)
        last = [module for module in candidate.modules() if isinstance(module, nn.Linear)][-1]
        pruner = tp.pruner.BasePruner(
            candidate, example, importance=kinds[importance](), global_pruning=scope == "network",
            pruning_ratio=ratio, max_pruning_ratio=NARROWEST if scope == "network" else 1.0, iterative_steps=steps,
            ignored_layers=[last],
        )  # fmt: skip
        for _ in range(steps):
            pruner.step()
            if count_macs(candidate, example) <= target:
                break
        for parameter in candidate.parameters():
            parameter.grad = None
        return candidate

    if scope == "network":
        return pruned(NARROWEST + 0.05, STEPS)
    ratios = (number / 100 for number in range(100))
    return next(c for ratio in ratios if count_macs(c := pruned(ratio, 1), example) <= target)


def _put_gradients(network: nn.Module, images: ImageSet, seed: int) -> None:
    """Leaves the gradients of two probe batches on the parameters, as its Taylor importance wants them."""
    for number, (x, y) in enumerate(probe_batches(images, seed)):
        F.cross_entropy(network(x), y).backward()
        if number == 1:
            return
