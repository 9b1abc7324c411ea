"""The methods that are compared: ours, its ablations, controls, published ones, other tools; a row each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap, IndexMap
from autowidth.cost import macs_cost
from autowidth.errors import AutoWidthError
from autowidth.lab.baselines import IMPORTANCES, TRAINING_RULES
from autowidth.lab.baselines.registry import Scope, TrainingRule
from autowidth.lab.data import ImageSet
from autowidth.lab.loop import Method, train
from autowidth.lab.models import initialise
from autowidth.lab.other_tools import gromo_grown, growing_network, growth_plan, inner_widths, torch_pruned
from autowidth.lab.policies import auto_of, budget_of
from autowidth.lab.prepare import build_network, find_device
from autowidth.lab.result import Result
from autowidth.lab.settings import Settings
from autowidth.policy import BudgetError, Cost, Decision, Limits, Never, Situation, Start, Unit, uniform_share
from autowidth.review.batches import Batches, Loss
from autowidth.review.profit import profits
from autowidth.review.review import Importance
from autowidth.review.statistics import probe
from autowidth.surgery import apply_
from autowidth.trace import trace

SECOND_PHASE = 2**16
"""Added to the seed for fine-tuning: its order and augmentation are not those of training once more."""

PHASES = 3
"""Parts of a run with GroMo, which grows between them; fewer where there are fewer epochs."""


class UnknownMethodError(AutoWidthError, ValueError):
    """A name that is no method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a method has to do: train by these settings and end at this share of the dense network's MACs.

    `settings.width` is the factor on all widths at the start; `macs` counts from the network with the factor one;
    `images` are those that the settings name.
    """

    settings: Settings
    macs: float
    images: ImageSet

    def lasting(self, longer: int) -> Settings:
        """The task's settings with so many times its epochs."""
        return self.settings.model_copy(update={"epochs": self.settings.epochs * longer})

    def trained(self, *, settings: Settings | None = None, **how: Any) -> Result:
        """A run on the task's images, by other settings where they are given; `how` as `train` takes it."""
        return train(settings or self.settings, images=self.images, **how)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """What a method ended with. `policy` says in two words who chose the widths."""

    method: str
    policy: str
    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShot:
    """Removes once, at the share `at` of the run, and never inserts: how most published methods prune.

    scope: `layer` leaves every channel group the same share of its filters, those of most worth; `network` removes
    the filters of least worth wherever they are, at whatever they cost, until the target is met.
    """

    macs: float
    at: float = 0.5
    scope: Scope = "layer"
    limits: Limits = field(default_factory=lambda: Limits(grace=0, trial_share=0.0, offer=0.0))

    @property
    def unit(self) -> Unit:
        return "macs"

    @property
    def aim(self) -> str:
        return f"at once to {self.macs:.0%} of the MACs"

    def check(self, start: Start) -> None:
        """Raises BudgetError for a target above the start or below what minimum widths cost."""
        macs = start.costs.macs
        least = macs.at(self.limits.narrowest(start.widths)) / macs.at(start.widths)
        if not least <= self.macs <= 1:
            raise BudgetError(f"one-shot pruning to macs={self.macs:g} is impossible: allowed are {least:.3g} to 1")

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """The one step."""
        return (max(1, round(self.at * total_steps)),)

    def decide(self, situation: Situation) -> Decision:
        """The filters to remove."""
        names = situation.costs.macs.names
        worths = {report.name: report.worth for report in situation.groups}
        target = self.macs * situation.costs.macs.at(situation.widths)
        widths = self._by_layer if self.scope == "layer" else self._by_network
        left = widths(situation.costs.macs, worths, target)
        plan = {}
        for name in names:
            order = sorted(range(len(worths[name])), key=worths[name].__getitem__)
            gone = order[: len(order) - left[name]]
            if gone:
                plan[name] = IndexMap.removing(gone, len(order))
        return Decision(plan=plan, target=target)

    def _by_layer(self, macs: Cost, worths: Mapping[str, Sequence[float]], target: float) -> dict[str, int]:
        return uniform_widths(macs, {name: len(worth) for name, worth in worths.items()}, target, self.limits.min_width)

    def _by_network(self, macs: Cost, worths: Mapping[str, Sequence[float]], target: float) -> dict[str, int]:
        left = {name: len(worth) for name, worth in worths.items()}
        for worth, name in sorted((w, name) for name, found in worths.items() for w in found):
            if macs.at(left) <= target or math.isinf(worth):
                break
            left[name] = max(left[name] - 1, min(self.limits.min_width, left[name]))
        return left


def uniform_widths(macs: Cost, widths: Mapping[str, int], target: float, min_width: int = 1) -> dict[str, int]:
    """The widths of a uniformly narrowed (or widened) network that costs as much as fits under the target."""
    factor = uniform_share(macs, widths, target)
    scaled = {name: max(round(width * factor), min_width) for name, width in widths.items()}
    while macs.at(scaled) > target and factor > 0.01:
        factor *= 0.995
        scaled = {name: max(round(width * factor), min_width) for name, width in widths.items()}
    return scaled


def fresh_network(task: Task, widths: Callable[[ChannelMap], Mapping[str, int]]) -> nn.Module:
    """A network as the task's settings name it, with other widths and weights drawn anew from their seed."""
    settings = task.settings
    torch.manual_seed(settings.seed)
    network = build_network(settings, task.images)
    channel_map = trace(network, torch.zeros(2, *task.images.image_shape))
    wanted = widths(channel_map)
    plan = {g.name: IndexMap.between(g.width, wanted[g.name]) for g in channel_map.groups if g.width != wanted[g.name]}
    if plan:
        apply_(network, channel_map, plan)
    torch.manual_seed(settings.seed)
    initialise(network)
    return network


def _channel_map(task: Task, width: float) -> ChannelMap:
    """The channel map of the task's network with this factor on its widths."""
    network = build_network(task.settings.model_copy(update={"width": width}), task.images)
    return trace(network, torch.zeros(2, *task.images.image_shape))


def dense_macs(task: Task) -> float:
    """The MACs of the network with the factor one on its widths."""
    channel_map = _channel_map(task, 1.0)
    return macs_cost(channel_map).at(channel_map.widths)


def _of_start(task: Task) -> float:
    """The target as a share of the starting network's MACs, which policies count from."""
    if task.settings.width == 1:
        return task.macs
    channel_map = _channel_map(task, task.settings.width)
    return task.macs * dense_macs(task) / macs_cost(channel_map).at(channel_map.widths)


# ---- ours and its ablations ------------------------------------------------------------------------------------------


def ours(
    task: Task, *, name: str, method: Method | None = None, retrained: bool = False, longer: int = 1, **budget: Any
) -> list[Finish]:
    """Our run under a budget, with parts of it replaced, over the epochs times `longer`.

    With `retrained` the same widths are trained from scratch as well.
    """
    settings = task.lasting(longer)
    policy = budget_of(task.settings, macs=_of_start(task), **budget)
    chosen = f"budget {task.macs:g}"
    found = task.trained(settings=settings, method=replace(method or Method(), policy=policy))
    finishes = [Finish(method=_named(name, longer), policy=chosen, result=found)]
    if retrained:
        again = task.trained(
            settings=settings, method=Method(policy=Never()), network=fresh_network(task, lambda _: found.widths)
        )
        finishes.append(Finish(method=_named("retrained", longer), policy=chosen, result=again))
    return finishes


def _named(name: str, longer: int) -> str:
    """The name of a method that takes so many times the epochs."""
    return name if longer == 1 else f"{name}-x{longer}"


def automatic(task: Task) -> list[Finish]:
    """Our run without a target."""
    method = Method(policy=auto_of(task.settings))
    return [Finish(method="autowidth", policy="auto", result=task.trained(method=method))]


def part_alone(
    model: nn.Module, channel_map: ChannelMap, batches: Batches, loss: Loss, *, generator: torch.Generator, part: int
) -> dict[str, Tensor]:
    """One of our two profits alone, (width,) by channel group, nats per sample: 0 next-layer, 1 own-layer."""
    sums = probe(model, channel_map, batches, loss).sums
    return {name: found[:, part] for name, found in profits(sums, channel_map).items()}


# ---- controls --------------------------------------------------------------------------------------------------------


def dense(task: Task) -> list[Finish]:
    """The starting network, trained plainly."""
    return [Finish(method="dense", policy="none", result=task.trained(method=Method(policy=Never())))]


def uniform(task: Task, *, longer: int = 1) -> list[Finish]:
    """A uniformly narrowed network of the target's MACs, trained from scratch for the epochs times `longer`."""

    def narrowed(channel_map: ChannelMap) -> dict[str, int]:
        return uniform_widths(macs_cost(channel_map), channel_map.widths, task.macs * dense_macs(task))

    found = task.trained(
        settings=task.lasting(longer), method=Method(policy=Never()), network=fresh_network(task, narrowed)
    )
    return [Finish(method=_named("uniform", longer), policy=f"uniform {task.macs:g}", result=found)]


# ---- published methods and other tools -------------------------------------------------------------------------------


def one_shot(task: Task, *, name: str, importance: Importance, scope: Scope, ruled: bool = False) -> list[Finish]:
    """Trains for half of the epochs, prunes by the importance measure, fine-tunes for the other half.

    With `ruled` the first half is trained under the method's own rule.
    """
    target = _of_start(task)
    rule = _rule(name, task, target) if ruled else None
    method = Method(policy=OneShot(macs=target, scope=scope), importance=importance, reconstruct=False, rule=rule)
    found = task.trained(settings=task.settings.model_copy(update={"cycles": 2}), method=method)
    return [Finish(method=name, policy=f"{'scheduled' if ruled else 'one-shot'} {task.macs:g}", result=found)]


def _rule(name: str, task: Task, target: float) -> TrainingRule:
    """The rule of a published method, for the share of every layer's filters that the target leaves."""
    channel_map = _channel_map(task, task.settings.width)
    cost = macs_cost(channel_map)
    return TRAINING_RULES[name].schedule(
        widths_left=uniform_share(cost, channel_map.widths, target * cost.at(channel_map.widths))
    )


def torch_pruning(task: Task, *, importance: str, scope: Scope, longer: int = 1) -> list[Finish]:
    """Torch-Pruning as itself: half of the epochs (times `longer`), its pruner, the other half."""
    half, rest = _phases(task.lasting(longer), 2)
    plainly = Method(policy=Never())
    first = task.trained(settings=half, method=plainly)
    began = time.perf_counter()
    network = torch_pruned(
        first.network, task.images, importance=importance, scope=scope, macs=_of_start(task), seed=half.seed
    )
    pruning = time.perf_counter() - began
    second = task.trained(settings=rest, method=plainly, network=network)
    whole = _joined([first, second], review_seconds=pruning)
    name = _named(f"torch-pruning-{importance}-{scope}", longer)
    return [Finish(method=name, policy=f"one-shot {task.macs:g}", result=whole)]


def _joined(results: Sequence[Result], *, review_seconds: float, review_cpu_seconds: float = 0.0) -> Result:
    """Runs one after the other as one, with what a tool took between them."""
    first, last = results[0], results[-1]
    return replace(
        last,
        seed=first.seed,
        epochs=sum(result.epochs for result in results),
        macs_start=first.macs_start,
        params_start=first.params_start,
        widths_start=first.widths_start,
        seconds=sum(result.seconds for result in results) + review_seconds,
        cpu_seconds=sum(result.cpu_seconds for result in results) + review_cpu_seconds,
        review_seconds=review_seconds,
    )


def gromo(task: Task) -> list[Finish]:
    """GroMo as itself: its ResNet starts with half of its inner widths, and grows between phases of equal length.

    Every phase is a training run by the task's recipe. Before each but the first all blocks grow by the same share,
    so that the last phase trains a nearly uniform network of the target's MACs; the streams have their final width
    from the start. Raises UnfitModelError, MissingToolError and BudgetError as `growth_plan` does.
    """
    settings = task.settings
    plan = growth_plan(settings.model, task.images, task.macs * dense_macs(task))
    phases = _phases(settings, min(PHASES, settings.epochs))
    shares = [1 - (len(phases) - 1 - number) / (2 * max(len(phases) - 1, 1)) for number in range(len(phases))]
    torch.manual_seed(settings.seed)
    network = growing_network(plan, task.images, share=shares[0], device=find_device(settings.device))
    results: list[Result] = []
    before, growing, worked = _total_inner(network), 0.0, 0.0
    for phase, share in zip(phases, shares, strict=True):
        if results:
            began, busy = time.perf_counter(), time.process_time()
            network = gromo_grown(results[-1].network, task.images, inner=plan.inner_at(share), seed=phase.seed)
            growing, worked = growing + time.perf_counter() - began, worked + time.process_time() - busy
        results.append(task.trained(settings=phase, method=Method(policy=Never()), network=network))
    added = _total_inner(results[-1].network) - before
    whole = _joined(results, review_seconds=growing, review_cpu_seconds=worked)
    whole = replace(whole, inserted=added, inserted_alive=added)
    return [Finish(method="gromo", policy=f"growing {task.macs:g}", result=whole)]


def _phases(settings: Settings, count: int) -> list[Settings]:
    """The settings of every phase: epochs as equal as can be, the last ones longer, and each with a seed of its own."""
    return [
        settings.model_copy(
            update={"epochs": (settings.epochs + number) // count, "seed": settings.seed + number * SECOND_PHASE}
        )
        for number in range(count)
    ]


def _total_inner(network: nn.Module) -> int:
    return sum(sum(widths) for widths in inner_widths(network))


def _published(name: str) -> Importance:
    return IMPORTANCES[name].importance


def _one_shot(name: str) -> Callable[[Task], list[Finish]]:
    """One-shot pruning by the importance measure of this name, within the layers or the network as its paper does."""
    return partial(one_shot, name=name, importance=_published(name), scope=IMPORTANCES[name].scope)


def _scheduled(name: str) -> Callable[[Task], list[Finish]]:
    """Training under the rule of this name, then the removal by its measure.

    Soft pruning as published removes at the very end. With so many filters and so few epochs that ends near chance (17
    %, asymptotic 22 %, on the suite mini at 25 % of the MACs, one seed): here it is fine-tuned like all others. Where
    half of a layer is zeroed its norms run away all the same: docs/decisions/010.
    """
    measure = IMPORTANCES[TRAINING_RULES[name].importance]
    return partial(one_shot, name=name, importance=measure.importance, scope=measure.scope, ruled=True)


METHODS: Mapping[str, Callable[[Task], list[Finish]]] = {
    "autowidth": partial(ours, name="autowidth", retrained=True),
    "autowidth-x2": partial(ours, name="autowidth", longer=2),
    "autowidth-auto": automatic,
    "dense": dense,
    "uniform": uniform,
    "uniform-x2": partial(uniform, longer=2),
    "autowidth-no-insertion": partial(ours, name="autowidth-no-insertion", offer=0.0),
    "autowidth-no-compensation": partial(ours, name="autowidth-no-compensation", method=Method(reconstruct=False)),
    "autowidth-next": partial(ours, name="autowidth-next", method=Method(importance=partial(part_alone, part=0))),
    "autowidth-own": partial(ours, name="autowidth-own", method=Method(importance=partial(part_alone, part=1))),
    "autowidth-random": partial(ours, name="autowidth-random", method=Method(importance=_published("random"))),
    "autowidth-l1": partial(ours, name="autowidth-l1", method=Method(importance=_published("l1"))),
    "torch-pruning-magnitude-layer": partial(torch_pruning, importance="magnitude", scope="layer"),
    "torch-pruning-magnitude-layer-x2": partial(torch_pruning, importance="magnitude", scope="layer", longer=2),
    "torch-pruning-magnitude-network": partial(torch_pruning, importance="magnitude", scope="network"),
    "torch-pruning-taylor-network": partial(torch_pruning, importance="taylor", scope="network"),
    "torch-pruning-bn-scale-network": partial(torch_pruning, importance="bn-scale", scope="network"),
    "gromo": gromo,
    **{name: _one_shot(name) for name in IMPORTANCES if name not in TRAINING_RULES},
    **{name: _scheduled(name) for name in TRAINING_RULES},
}
"""The methods by name: each takes a task and returns what it ended with, and its control where it has one."""
