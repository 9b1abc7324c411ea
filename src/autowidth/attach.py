"""What is checked when the engine is attached: everything that can be known to be wrong before training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from autowidth.channels import ChannelMap
from autowidth.errors import AutoWidthError
from autowidth.latency import LatencyMeter
from autowidth.policy import Policy, Start
from autowidth.ranks import ALONE, Ranks
from autowidth.review.batches import Loss, ProbeError, of_pairs, samples_in
from autowidth.review.effort import Effort, FittedEffort
from autowidth.review.review import Reviewer
from autowidth.review.shares import samples_on_all
from autowidth.review.statistics import read_gates
from autowidth.surgery import check_optimizers
from autowidth.trace import Inputs, keep_frozen_parameters, trace
from autowidth.unwrapping import inner_optimizer
from autowidth.wrappers import check_wrapper, refuse_sharded, wrappers_of


class AttachError(AutoWidthError, ValueError):
    """An argument of the engine that is not of the kind it should be."""


class NothingToResizeError(AutoWidthError, ValueError):
    """A model without a single channel group that can be resized."""


class ForeignOptimizerError(AutoWidthError, ValueError):
    """An optimizer that does not hold the model's parameters."""


def check_kinds(
    model: object, optimizers: tuple[object, ...], probe: object, policy: object, total_steps: object
) -> None:
    """Raises AttachError or ProbeError for arguments that are swapped or of another kind, ShardedModelError."""
    refuse_sharded(model)
    if not isinstance(model, nn.Module):
        raise AttachError(f"model is a {type(model).__name__}: pass the nn.Module first, then its optimizer")
    if wrong := [o for o in optimizers if not isinstance(o, Optimizer)]:
        raise AttachError(f"optimizer is a {type(wrong[0]).__name__}: pass a torch.optim.Optimizer, or several")
    wanted = ("limits", "unit", "aim", "check", "reviews", "decide")
    if isinstance(policy, type):
        raise AttachError(f"policy is a class: pass a {policy.__name__}(...) with its settings")
    if missing := [name for name in wanted if not hasattr(policy, name)]:
        raise AttachError(
            f"policy is a {type(policy).__name__} without {missing[0]}: pass Budget(...), Price(...), Auto() or "
            f"Never(), or an object with {', '.join(wanted)}"
        )
    if not isinstance(total_steps, int) or total_steps < 1:
        raise AttachError(f"total_steps={total_steps}: pass the number of optimizer steps of the run, at least 1")
    if not hasattr(probe, "__iter__"):
        raise ProbeError(f"probe is a {type(probe).__name__}: pass a loader, or a list of batches")
    if hasattr(probe, "__next__"):
        raise ProbeError(
            f"probe is a {type(probe).__name__} that can be run through only once: pass the loader itself, or a list"
        )


def resizable(
    model: nn.Module, example_inputs: Inputs, optimizers: tuple[Optimizer, ...], *, resize_frozen: bool
) -> ChannelMap:
    """The channel map of the model; groups whose parameters do not train keep their widths unless asked otherwise.

    Raises UnsupportedOptimizerError, NothingToResizeError, ForeignOptimizerError, TraceError.
    """
    check_optimizers(optimizers)
    traced = trace(model, example_inputs)
    channel_map = traced if resize_frozen else keep_frozen_parameters(traced, model)
    _check_groups(model, channel_map, optimizers)
    return channel_map


def _check_groups(model: nn.Module, channel_map: ChannelMap, optimizers: tuple[Optimizer, ...]) -> None:
    """Raises NothingToResizeError or ForeignOptimizerError."""
    check_groups(channel_map, model)
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    names = {place.axis.name for group in channel_map.groups for place in group.places}
    ours = {id(p): name for name, p in model.named_parameters()}
    foreign = any(ids.isdisjoint(ours) for ids in held)
    if foreign or not any(ours.get(i) in names for ids in held for i in ids):
        raise ForeignOptimizerError(
            f"{' and '.join(type(o).__name__ for o in optimizers) or 'no optimizer'} holds none of the "
            "parameters that would be resized: build the optimizer from this model's parameters()"
        )


def check_ranks(reviewer: Reviewer, total_steps: int) -> None:
    """Raises WrapperError, and RanksDifferError where ranks were not given the same."""
    model = reviewer.model
    for wrapper in wrappers_of([model]):
        check_wrapper(wrapper)
    names = {id(p): name for name, p in model.named_parameters()}
    held = [[names.get(id(p)) for g in o.param_groups for p in g["params"]] for o in reviewer.optimizers]
    facts = {
        "a network of shapes": {name: list(shape) for name, shape in sorted(reviewer.channel_map.shapes.items())},
        "widths": reviewer.channel_map.widths,
        "total_steps": total_steps,
        "seed": reviewer.seed,
        "policy": reviewer.policy,
        "effort": reviewer.effort,
        "importance": reviewer.importance,
        "reconstruct": reviewer.reconstruct,
        "followers": len(reviewer.followers),
        "optimizers": [(type(o).__name__, found) for o, found in zip(reviewer.optimizers, held, strict=True)],
    }
    reviewer.ranks.check_same(
        {name: _ADDRESS.sub("", repr(value)) for name, value in facts.items()},
        "start every rank with the same arguments; the probe alone may differ",
    )


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""What the repr of an object without one of its own holds, and no two processes share."""


def check_groups(channel_map: ChannelMap, model: nn.Module) -> None:
    """Raises NothingToResizeError, with the reasons, for a network without a channel group."""
    if not channel_map.groups:
        reasons = sorted({f.reason for f in channel_map.frozen}) or ["no layer passes channels to another one"]
        raise NothingToResizeError(
            f"{type(model).__name__} has no channel group that can be resized: {'; '.join(reasons[:5])}; "
            "a group needs a layer that writes its channels and another one that reads them"
        )


def first_batch(probe: Iterable[Any]) -> Any:
    """The first batch of the probe. Raises ProbeError where there is none."""
    batch = next(iter(probe), None)
    if batch is None:
        raise ProbeError("the probe has no data: pass a loader, or a list, with at least one batch")
    return batch


def fitted_effort(
    effort: Effort | None, channel_map: ChannelMap, reviews: int, total_steps: int, batch_size: int | None, batch: Any,
    ranks: Ranks,
) -> FittedEffort:  # fmt: skip
    """How much a review looks at, in a run of so many steps with batches of this size, or of that of the probe.

    Batches of all ranks count, and it is all of them together who look.
    """
    samples = round(ranks.totals(batch_size or (1 if batch is None else samples_in(batch)))[0])
    return (effort or Effort()).fitted(total_steps * samples, reviews, groups=len(channel_map.groups))


def check_start(reviewer: Reviewer, batch: Any) -> None:
    """Raises what the policy says of this start, and what a probe of one batch, if there is one, comes upon."""
    reviewer.samples = samples_on_all(reviewer.probe, batch, reviewer.ranks)
    start = Start(costs=reviewer.costs(), widths=reviewer.channel_map.widths, samples=reviewer.samples)
    reviewer.policy.check(start)
    if batch is not None:
        read_gates(reviewer.model, reviewer.channel_map, [batch], reviewer.loss, {})


def loss_of(loss_fn: Callable[[Any, Any], Tensor] | None, loss: Loss | None) -> Loss:
    """The loss of a batch, from either form. Raises AttachError where none or both are given."""
    if (loss_fn is None) == (loss is None):
        both = "both loss_fn and loss are" if loss is not None else "neither loss_fn nor loss is"
        raise AttachError(
            f"{both} given: pass loss_fn for batches (inputs, target), or loss, a function of (model, batch)"
        )
    return loss if loss is not None else of_pairs(loss_fn)  # type: ignore[arg-type]


def latency_of(
    model: nn.Module, channel_map: ChannelMap, policy: Policy, wanted: Inputs | None, example_inputs: Inputs,
    ranks: Ranks = ALONE,
) -> LatencyMeter | None:  # fmt: skip
    """The latency of the model on the inputs that are wanted, or on the examples, where the policy bounds it."""
    inputs = example_inputs if wanted is None else wanted
    if policy.unit != "ms" or not channel_map.groups:
        return None
    return LatencyMeter(model, channel_map, inputs, multiple=policy.limits.multiple, ranks=ranks)


def several(optimizer: Optimizer | Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    """One optimizer or several, as a tuple, without what Accelerate or Lightning put around them."""
    given = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    return tuple(map(inner_optimizer, given))
