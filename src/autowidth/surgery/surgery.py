"""The act itself: resize a live model, its optimizers and its followers, inside a journal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autowidth.channels import ChannelMap, ResizePlan
from autowidth.surgery.attributes import attributes
from autowidth.surgery.changes import AttributeChange, ShapeChange, TensorChange
from autowidth.surgery.checks import Targets, checked_targets
from autowidth.surgery.contents import fills_of, formatted, gathered, resized_content, resized_shape, with_fresh_of
from autowidth.surgery.edits import Edits, edits_of
from autowidth.surgery.journal import Journal, all_or_nothing
from autowidth.surgery.optimizers import State, states


def apply_(
    model: nn.Module,
    channel_map: ChannelMap,
    plan: ResizePlan,
    *,
    optimizers: Sequence[Optimizer] = (),
    followers: Sequence[nn.Module] = (),
    generator: torch.Generator | None = None,
) -> ChannelMap:
    """Resizes the live model, its optimizers and its followers, and returns the channel map of the result.

    Parameters, buffers and state tensors stay the same Python objects and keep dtype, device, requires_grad and memory
    format; only their data changes shape. Gradients of resized parameters become None. A fresh channel has weights
    drawn with the standard deviation of the surviving ones (`generator`, or torch's default one) and zero fan-out, so
    that in eval mode the function of the network is unchanged unless a norm averages over channels. `followers` are
    copies with the same names (`AveragedModel`: its `.module`), which get the same fresh content.

    A failure or interrupt at any point leaves everything as it was, bit for bit, random state included, and is raised
    again. Memory beyond the old and the new model: one tensor, and the removed slices until the end.

    A plan without effect warns (UserWarning) and returns `channel_map`. Raises UnknownGroupError or ValueError where
    the plan does not fit the map, StaleMapError where the map does not fit the model, a follower or an optimizer state,
    SurgeryError for an optimizer without a resized parameter, for a DistributedDataParallel wrapper, for tensors that
    share memory and for a conv or norm group that is torn apart, UnsupportedOptimizerError for an optimizer outside
    `OPTIMIZER_STATE`.
    """
    with all_or_nothing(generator or torch.default_generator) as journal:
        resized = operate(
            journal, model, channel_map, plan, optimizers=optimizers, followers=followers, generator=generator
        )
        if resized is channel_map:
            warnings.warn(
                "the resize plan changes nothing: give at least one channel group an index map that is not the "
                "identity",
                stacklevel=2,
            )
        return resized


def operate(
    journal: Journal,
    model: nn.Module,
    channel_map: ChannelMap,
    plan: ResizePlan,
    *,
    optimizers: Sequence[Optimizer] = (),
    followers: Sequence[nn.Module] = (),
    generator: torch.Generator | None = None,
) -> ChannelMap:
    """Does what `apply_` does, inside the caller's journal: a failure of the caller, later, undoes it too.

    The journal must be that of an `all_or_nothing` block that names the generator (torch's default one where it is
    None), or its random state is not put back. A plan without effect returns `channel_map`, without a word.
    """
    gathers, resized = channel_map.gathers_and_resized(plan)
    if not gathers:
        return channel_map
    edits = edits_of(channel_map, plan, gathers)
    targets = checked_targets(
        model, channel_map, edits, tuple(dict.fromkeys(optimizers)), tuple(dict.fromkeys(followers))
    )
    with torch.no_grad():
        for name, axis_edits in edits.items():
            _move(targets, name, axis_edits, generator, journal)
        for module in targets.modules:
            for attribute, value in attributes(module, journal).items():
                if getattr(module, attribute) != value:
                    journal.perform(AttributeChange(module, attribute, getattr(module, attribute), value))
    return resized


def _move(targets: Targets, name: str, edits: Edits, generator: torch.Generator | None, journal: Journal) -> None:
    """Moves one parameter or buffer, its copies in the followers, its optimizer state."""
    target = targets.tensors[name]
    if target.is_meta and not targets.copies and not targets.optimizers:
        journal.perform(ShapeChange(target, target.data, resized_shape(target, edits)))
        return
    new = resized_content(target, edits, fills_of(targets.model, name, target, edits), generator)
    journal.perform(TensorChange.of(target, new, edits))
    for copy in targets.copies:
        followed = with_fresh_of(gathered(copy[name].detach(), edits), new, edits)
        journal.perform(TensorChange.of(copy[name], formatted(followed, copy[name]), edits))
    for optimizer in targets.optimizers:
        for _, state, spec in list(states(optimizer, target)):
            _move_state(state, spec, new, edits, generator, journal)


def _move_state(
    state: Tensor, spec: State, weight: Tensor, edits: Edits, generator: torch.Generator | None, journal: Journal
) -> None:
    """Moves one state tensor of a parameter, whose new content is `weight`."""
    collapsed = None if spec.collapsed is None else spec.collapsed % state.dim()
    moving = tuple(edit for edit in edits if edit.dim != collapsed)
    if not moving:
        return
    if spec.fill == "weight":
        content = formatted(with_fresh_of(gathered(state.detach(), moving), weight, moving), state)
    else:
        content = resized_content(state, moving, (spec.fill,) * len(moving), generator)
    journal.perform(TensorChange.of(state, content, moving))
