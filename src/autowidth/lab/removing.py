"""A trained network made smaller without training, by every method compared: ours, published ones, other tools."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from autowidth.channels import ChannelMap, ResizePlan
from autowidth.cost import macs_cost
from autowidth.lab.baselines import IMPORTANCES, TRAINING_RULES
from autowidth.lab.baselines.registry import PublishedImportance, Scope
from autowidth.lab.data import ImageSet
from autowidth.lab.merging import mergeable, merged
from autowidth.lab.methods import OneShot
from autowidth.lab.other_tools import torch_pruned
from autowidth.policy import Budget, BudgetError, Costs, GroupReport, Situation
from autowidth.review.batches import Batches, of_pairs
from autowidth.review.reconstruct import readers_without, reconstruction
from autowidth.review.state import named_tensors, precise_statistics, quiet
from autowidth.review.statistics import effective_weights, read_moments
from autowidth.review.untrained import PROBE
from autowidth.shrink import shrink_
from autowidth.surgery import apply_
from autowidth.trace import trace

AT_ONCE = 128
"""Images that are looked at together."""

NORMED = 8192
"""Training images, augmented, from which the norm statistics of every network are taken that is compared."""

NORM_STREAM = 2**17
"""Added to the seed for those images: not the order in which filters were scored."""

SHARES = 2001
"""Shares that are tried for one that all layers are narrowed by."""

LOSS = of_pairs(F.cross_entropy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What a method has to do: a trained network to end at this share of its MACs, by what these images say.

    The network, in evaluation mode, stays as it is. `seed` decides which training images are looked at.
    """

    network: nn.Module
    images: ImageSet
    macs: float
    seed: int

    def example(self) -> torch.Tensor:
        """A batch of the network's input, all zero, where the images are."""
        return torch.zeros(2, *self.images.image_shape, device=self.images.train.labels.device)

    def batches(self) -> Batches:
        """The training images that score filters, as training sees them."""
        return seen(self.images, PROBE, self.seed)


Method = Callable[[Removal], nn.Module]
"""Returns a smaller copy of the network, in evaluation mode, with norms as the method leaves them."""


def seen(images: ImageSet, count: int, seed: int) -> Batches:
    """About so many training images in batches, augmented, in an order of this seed."""
    at_once = min(AT_ONCE, len(images.train))
    stream: Iterable[Any] = images.training_batches(at_once, seed=seed)
    return list(islice(iter(stream), max(1, count // at_once)))


def with_precise_norms(network: nn.Module, images: ImageSet, seed: int) -> nn.Module:
    """A copy whose norm statistics are plain averages over `NORMED` augmented training images: the same for all."""
    network = copy.deepcopy(network).train()
    batches = seen(images, NORMED, seed + NORM_STREAM)
    with quiet(network) as trained:
        found = precise_statistics(network, batches, LOSS, among=trained)
    with torch.no_grad():
        for buffer, content in found:
            buffer.copy_(content)
    return network.eval()


# ---- the methods -----------------------------------------------------------------------------------------------------


def dense(task: Removal) -> nn.Module:
    """The network as it was brought."""
    return copy.deepcopy(task.network)


def ours(task: Removal, *, reviews: int | None = None) -> nn.Module:
    """What `shrink_` does with so many reviews, None for its own number."""
    network = copy.deepcopy(task.network)
    shrink_(
        network, example_inputs=task.example(), policy=Budget(macs=task.macs), reviews=reviews,
        batches=task.images.training_batches(min(AT_ONCE, len(task.images.train)), seed=task.seed), seed=task.seed,
    )  # fmt: skip
    return network


def by_importance(task: Removal, *, measure: PublishedImportance, reconstructed: bool) -> nn.Module:
    """The filters of least importance leave at once, within layers or the network as the measure's paper has it.

    With `reconstructed` the readers are refitted as ours are.
    """
    network = copy.deepcopy(task.network)
    channel_map, batches = trace(network, task.example()), task.batches()
    generator = torch.Generator().manual_seed(task.seed)
    with quiet(network):
        worths = measure.importance(network, channel_map, batches, LOSS, generator=generator)
        plan = _plan(worths, channel_map, OneShot(macs=task.macs, scope=measure.scope))
        if reconstructed:
            _refit_(network, channel_map, plan, batches)
    apply_(network, channel_map, plan)
    return network


def _plan(worths: Mapping[str, torch.Tensor], channel_map: ChannelMap, policy: OneShot) -> ResizePlan:
    """What a one-shot removal by these worths takes; what a measure says nothing of stays."""
    known = {name: np.nan_to_num(w.detach().cpu().double().numpy(), nan=np.inf) for name, w in worths.items()}
    groups = tuple(
        GroupReport(name=name, width_start=len(w), worth=tuple(w.tolist()), grace=(False,) * len(w))
        for name, w in known.items()
    )
    costs = Costs(macs=macs_cost(channel_map))
    return policy.decide(Situation(step=1, total_steps=1, groups=groups, costs=costs)).plan


def _refit_(network: nn.Module, channel_map: ChannelMap, plan: ResizePlan, batches: Batches) -> None:
    """Puts into the readers what the channels that stay can predict of those that the plan removes."""
    moments = read_moments(network, channel_map, batches, LOSS)
    known = reconstruction(moments, channel_map, effective_weights(network))
    removed = {name: index_map.removed for name, index_map in plan.items()}
    tensors = named_tensors(network)
    with torch.no_grad():
        for name, content in readers_without(removed, channel_map, known, tensors).items():
            tensors[name].copy_(content)


def by_merging(task: Removal) -> nn.Module:
    """Neuron merging: the same share of the insides of all blocks, those of least L1 norm, merged into the others."""
    channel_map = trace(task.network, task.example())
    able = mergeable(task.network, channel_map)
    with quiet(task.network):
        worths = IMPORTANCES["l1"].importance(
            task.network, channel_map, task.batches(), LOSS, generator=torch.Generator().manual_seed(task.seed)
        )
    left = inside_widths(channel_map, able, task.macs)
    removed = {
        name: sorted(worths[name].argsort().tolist()[: len(worths[name]) - width]) for name, width in left.items()
    }
    return merged(task.network, channel_map, removed)


def inside_widths(channel_map: ChannelMap, inside: Iterable[str], macs: float) -> dict[str, int]:
    """The widths of these groups, narrowed by one share, at which the network meets this share of its MACs.

    Raises BudgetError where one channel in each is still too much.
    """
    cost, widths = macs_cost(channel_map), channel_map.widths
    names = tuple(inside)
    for share in np.linspace(1, 0, SHARES):
        left = {name: max(round(share * widths[name]), 1) for name in names}
        if cost.at({**widths, **left}) <= macs * cost.at(widths):
            return left
    raise BudgetError(f"insides of blocks of one channel each still take more than {macs:g} of the MACs")


def by_torch_pruning(task: Removal, *, importance: str, scope: Scope) -> nn.Module:
    """Torch-Pruning as itself, on the insides of blocks alone: with padding shortcuts it breaks on the streams."""
    channel_map = trace(task.network, task.example())
    groups = [channel_map.group(name) for name in mergeable(task.network, channel_map)]
    inside = [place.axis.name.rpartition(".")[0] for group in groups for place in group.with_role("write")]
    return torch_pruned(
        task.network, task.images, importance=importance, scope=scope, macs=task.macs, seed=task.seed, only=inside
    )


SCORES = tuple(name for name in IMPORTANCES if name not in TRAINING_RULES)
"""The published importance measures that score a trained network as it is."""

TOOLS = tuple(
    (importance, scope) for importance in ("magnitude", "bn-scale", "taylor", "hessian") for scope in get_args(Scope)
)
"""The settings of Torch-Pruning."""

METHODS: Mapping[str, Method] = {
    "dense": dense,
    "autowidth": ours,
    **{name: partial(by_importance, measure=IMPORTANCES[name], reconstructed=False) for name in SCORES},
    **{
        f"{name}-reconstructed": partial(by_importance, measure=IMPORTANCES[name], reconstructed=True)
        for name in SCORES
    },
    **{f"torch-pruning-{i}-{s}": partial(by_torch_pruning, importance=i, scope=s) for i, s in TOOLS},
    "neuron-merging": by_merging,
}
"""The methods by name; names as in the comparisons of runs."""
