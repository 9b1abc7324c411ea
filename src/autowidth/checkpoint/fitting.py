"""Widths from shapes: which widths of the channel groups give a model the shapes of a file, found before surgery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from autowidth.channels import ChannelMap, IndexMap, ParamAxis, ResizePlan
from autowidth.checkpoint.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

_NEAR = 1e-6
"""Numbers closer than this are the same where widths are solved for in float64; true ones are whole."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The shapes that a file or a state dict shows."""

    what: str
    """What they are of, for errors: `run runs/a`."""
    shapes: Shapes
    widths: Mapping[str, int] = field(default_factory=dict)
    """Channel group name -> width, as far as it is known: it decides where the shapes alone leave a choice."""
    where: str = "in the file"
    """Where they stand, for errors."""
    remedy: str = "build the model as it was built for the run"
    """What to do where they are of another network."""
    decide: str = "save with channel_map="
    """What to do where the shapes leave a choice."""


def plan_for(shown: Shown, channel_map: ChannelMap) -> ResizePlan:
    """The plan that gives the model these shapes; groups that keep their width are left out.

    Every axis with channels is one equation: its length is a fixed part plus, over the groups on it, copies x width.
    Where the shapes alone leave a choice (one layer writes two groups that nothing else tells apart), the known widths
    decide. Nothing as large as a width is made before all shapes are known to fit, to the last number.
    Raises CheckpointError where no widths fit, or several and nothing says which.
    """
    widths = solve(shown, channel_map)
    _check_lengths(shown, channel_map)
    changed = [group for group in channel_map.groups if widths[group.name] != group.width]
    for group in changed:
        for axis in group.axes:
            if axis.name not in shown.shapes:
                raise CheckpointError(
                    f"channel group {group.name!r} has another width in {shown.what}, which does not hold the "
                    f"content of {axis.name!r}: register that buffer as persistent and save again"
                )
    return {group.name: IndexMap.between(group.width, widths[group.name]) for group in changed}


def solve(shown: Shown, channel_map: ChannelMap) -> dict[str, int]:
    """Channel group name -> the width that the shapes show. Raises CheckpointError as `plan_for`."""
    groups = channel_map.groups
    if not groups:
        return {}
    axes, matrix, lengths = _equations(shown, channel_map)
    known = np.array([shown.widths.get(group.name, group.width) for group in groups], dtype=np.float64)
    change = np.linalg.lstsq(matrix, lengths - matrix @ known, rcond=None)[0]
    exact = known + change
    widths = np.rint(exact)
    _check_sums(shown, channel_map, axes, matrix @ exact - lengths)
    # A row of the projector on the null space is zero where the shapes leave the group no choice.
    has_choice = (np.abs(np.eye(len(groups)) - np.linalg.pinv(matrix) @ matrix) > _NEAR).any(axis=1)
    for group, is_open, moved in zip(groups, has_choice, change, strict=True):
        if is_open and abs(moved) > _NEAR:
            raise CheckpointError(f"the shapes in {shown.what} leave the width of {group.name!r} open: {shown.decide}")
    _check_sums(shown, channel_map, axes, matrix @ widths - lengths)
    _check_sums(shown, channel_map, axes, matrix @ (widths < 1))
    return {group.name: int(width) for group, width in zip(groups, widths, strict=True)}


def misfits(shown: Shown, channel_map: ChannelMap) -> list[str]:
    """The tensors whose shapes no widths of the channel groups give, in the order of the map.

    Where equations contradict each other, those go whose loss makes the others meet, the worst first.
    """
    free = _free(channel_map)
    wrong = {name for name in channel_map.shapes if _has_other_lengths(shown, channel_map, name, free)}
    axes, matrix, lengths = _equations(shown, channel_map)
    while axes:
        widths = np.linalg.lstsq(matrix, lengths, rcond=None)[0]
        errors = np.abs(matrix @ widths - lengths)
        if errors.max() <= _NEAR:
            break
        worst = int(errors.argmax())
        wrong.add(axes.pop(worst).name)
        matrix, lengths = np.delete(matrix, worst, axis=0), np.delete(lengths, worst)
    return [name for name in channel_map.shapes if name in wrong]


def _equations(shown: Shown, channel_map: ChannelMap) -> tuple[list[ParamAxis], np.ndarray, np.ndarray]:
    """(Axes, matrix of copies (axes, groups), lengths in the file minus the fixed part (axes)), of axes in the file."""
    rows: dict[ParamAxis, np.ndarray] = {}
    for column, group in enumerate(channel_map.groups):
        for place in group.places:
            if place.axis.name in shown.shapes:
                rows.setdefault(place.axis, np.zeros(len(channel_map.groups)))[column] += place.copies
    axes = list(rows)
    matrix = np.array([rows[axis] for axis in axes]).reshape(len(axes), len(channel_map.groups))
    now = np.array([channel_map.shapes[axis.name][axis.dim] for axis in axes], dtype=np.float64)
    there = np.array([shown.shapes[axis.name][axis.dim] for axis in axes], dtype=np.float64)
    return axes, matrix, there - now + matrix @ np.array(list(channel_map.widths.values()), dtype=np.float64)


def _check_sums(shown: Shown, channel_map: ChannelMap, axes: list[ParamAxis], errors: np.ndarray) -> None:
    """Raises CheckpointError for the first axis whose error is not zero. `errors` (axes)."""
    for axis, error in zip(axes, errors, strict=True):
        if abs(error) > _NEAR:
            raise _foreign(shown, axis.name, channel_map)


def _check_lengths(shown: Shown, channel_map: ChannelMap) -> None:
    """Raises CheckpointError where a length that no channel group decides is another one in the file."""
    free = _free(channel_map)
    for name in channel_map.shapes:
        if _has_other_lengths(shown, channel_map, name, free):
            raise _foreign(shown, name, channel_map)


def _free(channel_map: ChannelMap) -> set[ParamAxis]:
    """The axes on which channel groups stand."""
    return {place.axis for group in channel_map.groups for place in group.places}


def _has_other_lengths(shown: Shown, channel_map: ChannelMap, name: str, free: set[ParamAxis]) -> bool:
    """Whether a length of this tensor that no channel group decides is another one in the file."""
    shape = channel_map.shapes[name]
    there = shown.shapes.get(name, shape)
    fixed = [dim for dim in range(len(shape)) if ParamAxis(name, dim) not in free]
    return len(there) != len(shape) or any(there[dim] != shape[dim] for dim in fixed)


def _foreign(shown: Shown, name: str, channel_map: ChannelMap) -> CheckpointError:
    reasons = dict.fromkeys(frozen.reason for frozen in channel_map.frozen if frozen.axis.name == name)
    why = f" (frozen there: {', '.join(reasons)})" if reasons else ""
    return CheckpointError(
        f"{shown.what} is of another network: {name!r} has shape {shown.shapes[name]} {shown.where} and "
        f"{channel_map.shapes[name]} in the model, and no widths of the channel groups make them meet{why}; "
        f"{shown.remedy}"
    )
