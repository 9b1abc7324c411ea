"""What the future of an engine depends on, as plain data: taken, checked, put back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from autowidth.channels import ChannelMap, IndexMap, ResizePlan
from autowidth.errors import AutoWidthError
from autowidth.history import History
from autowidth.latency import Latency
from autowidth.loaders import load_loader_state, loader_state
from autowidth.review.calibrate import Calibration
from autowidth.review.review import Reviewer
from autowidth.surgery import Journal, all_or_nothing, holders, operate
from autowidth.unwrapping import forget_compiled

SCHEMA = 1
"""Version of the state. A newer one is refused."""


class StateError(AutoWidthError, ValueError):
    """A state that is damaged, too new, or was taken of another engine than this one."""


def state_of(reviewer: Reviewer) -> dict[str, Any]:
    """All that a reviewer has learnt and drawn: tensors, numbers, strings, lists and dicts of them.

    Not the content of the model, nor that of optimizers and followers: they have state dicts of their own.
    """
    drawn = reviewer.rng.bit_generator.state
    return {
        "widths": reviewer.channel_map.widths,
        "history": [line.decode() for line in reviewer.history.lines()],
        "calibration": {name: _nested(value) for name, value in asdict(reviewer.calibration).items()},
        "ages": {name: torch.tensor([-1 if a is None else a for a in ages]) for name, ages in reviewer.ages.items()},
        "generator": reviewer.generator.get_state(),
        # 128 bits each, more than a JSON reader has to take
        "rng": {**drawn, "state": {name: str(number) for name, number in drawn["state"].items()}},
        "latency": None if reviewer.latency is None else asdict(reviewer.latency.fit),
        "probe": loader_state(reviewer.probe),
        "policy": _own_state(reviewer.policy),
        "importance": _own_state(reviewer.importance),
    }


def restore_(reviewer: Reviewer, state: Mapping[str, Any]) -> None:
    """Resizes all that the reviewer holds to the widths of the state, and gives it what was learnt. All or nothing.

    Raises StateError. What fresh channels hold is without meaning: load the content of the model, the optimizers and
    the followers afterwards.
    """
    found = _read(reviewer, state)
    plan = _plan(reviewer.channel_map, found.channel_map.widths)
    with all_or_nothing(reviewer.generator) as journal:
        _resize(journal, reviewer, plan)
        for name in ("channel_map", "history", "calibration", "ages"):
            before = getattr(reviewer, name)
            journal.call(
                partial(setattr, reviewer, name, getattr(found, name)), partial(setattr, reviewer, name, before)
            )
        if reviewer.latency is not None and found.latency is not None:
            before = reviewer.latency.fit
            journal.call(
                partial(setattr, reviewer.latency, "fit", found.latency),
                partial(setattr, reviewer.latency, "fit", before),
            )
        drawn = reviewer.rng.bit_generator.state
        journal.call(
            partial(setattr, reviewer.rng.bit_generator, "state", found.rng),
            partial(setattr, reviewer.rng.bit_generator, "state", drawn),
        )
        reviewer.generator.set_state(state["generator"])
        load_loader_state(reviewer.probe, state["probe"], anew=True)  # a review leaves its pass when it has enough
        _load_own(reviewer.policy, state["policy"])
        _load_own(reviewer.importance, state["importance"])
    if plan:
        forget_compiled()


# ---- what an engine was made with ------------------------------------------------------------------------------------


def made_with(reviewer: Reviewer, total_steps: int) -> dict[str, Any]:
    """What must be the same again for a run to go on as it would have, by name: numbers and texts."""
    return {
        "total_steps": total_steps,
        "policy": _described(reviewer.policy),
        "effort": _described(reviewer.effort),
        "samples": reviewer.samples,
        "seed": reviewer.seed,
        "importance": reviewer.importance is not None,
        "reconstruct": reviewer.reconstruct,
        "latency": reviewer.latency is not None,
    }


def check_made(was: Mapping[str, Any], now: Mapping[str, Any], differing: Collection[str]) -> None:
    """Raises StateError for what differs and is not named in `differing`, and for a name that is nothing here."""
    if unknown := set(differing) - now.keys():
        raise StateError(f"differing={min(unknown)!r} is nothing that an engine is made with: {', '.join(now)}")
    allowed = {*differing, *(("effort",) if "total_steps" in differing else ())}  # effort is fitted to the steps
    for name, value in now.items():
        if name not in allowed and was.get(name) != value:
            raise StateError(
                f"the state was taken of an engine with {name} {was.get(name)}, this one has {value}: build it as it "
                f"was built, or say differing=({name!r},) if that is meant"
            )


def _described(thing: object) -> str:
    """The settings of a policy or an effort in a line: what is a number, a text, or frozen data itself."""
    if not is_dataclass(thing):
        return f"{type(thing).__name__} ({getattr(thing, 'aim', '')})"
    own = {field.name: getattr(thing, field.name) for field in fields(thing)}
    plain = {name: v for name, v in own.items() if v is None or isinstance(v, int | float | str) or is_dataclass(v)}
    return f"{type(thing).__name__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What a state says, in the types of a reviewer."""

    channel_map: ChannelMap
    history: History
    calibration: Calibration
    ages: dict[str, list[int | None]]
    rng: dict[str, Any]
    latency: Latency | None


def _read(reviewer: Reviewer, state: Mapping[str, Any]) -> _Found:
    """The parts of a state. Raises StateError where it is damaged or of another network; nothing is changed."""
    try:
        widths = {str(name): int(width) for name, width in state["widths"].items()}
        history = History.parse("".join(state["history"]).encode(), "in the state")
        calibration = Calibration(**{name: _frozen(value) for name, value in state["calibration"].items()})
        ages = {name: [None if a < 0 else a for a in found.tolist()] for name, found in state["ages"].items()}
        drawn = state["rng"]
        rng = {**drawn, "state": {name: int(number) for name, number in drawn["state"].items()}}
        latency = None if state["latency"] is None else Latency(**state["latency"])
        np.random.default_rng().bit_generator.state = rng
        torch.Generator().set_state(state["generator"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StateError(f"the state of the engine is damaged ({type(error).__name__}: {error})") from error
    _check_groups(reviewer.channel_map.widths, widths)
    if {name: len(found) for name, found in ages.items()} != widths:
        raise StateError("the state of the engine is damaged: its ages are those of other widths")
    channel_map = _map_at(reviewer.channel_map, history, widths)
    return _Found(
        channel_map=channel_map, history=history, calibration=calibration, ages=ages, rng=rng, latency=latency
    )  # fmt: skip


def _check_groups(own: Mapping[str, int], saved: Mapping[str, int]) -> None:
    """Raises StateError where the channel groups are others."""
    if own.keys() == saved.keys():
        return
    missing, foreign = sorted(saved.keys() - own.keys()), sorted(own.keys() - saved.keys())
    what = f"has a channel group {missing[0]!r} that this one has not" if missing else f"has no group {foreign[0]!r}"
    raise StateError(
        f"the state is of another network: it {what}; build the model, resize_frozen and example_inputs as they were"
    )


def _map_at(start: ChannelMap, history: History, widths: Mapping[str, int]) -> ChannelMap:
    """The channel map at these widths: as the reviews led there where the model is the one that they began with.

    Where channels of several groups are interleaved on an axis, positions depend on which of them left.
    """
    if start.widths == history.widths_start:
        reached = start
        for event in history:
            reached = reached.resized(event.maps) if event.maps else reached
        if reached.widths == widths:
            return reached
    plan = _plan(start, widths)
    return start.resized(plan) if plan else start


def _plan(channel_map: ChannelMap, widths: Mapping[str, int]) -> ResizePlan:
    """A plan that leads to these widths: the last channels leave, or fresh ones come behind them."""
    return {
        group.name: IndexMap.between(group.width, widths[group.name])
        for group in channel_map.groups
        if widths[group.name] != group.width
    }


def _resize(journal: Journal, reviewer: Reviewer, plan: ResizePlan) -> None:
    """Surgery on everything that has the model's shapes."""
    if not plan:
        return
    touched = {axis.name for name in plan for axis in reviewer.channel_map.group(name).axes}
    operate(
        journal, reviewer.model, reviewer.channel_map, plan, followers=reviewer.followers,
        optimizers=holders(reviewer.optimizers, reviewer.model, touched), generator=torch.Generator(),
    )  # fmt: skip


# ---- plain data ------------------------------------------------------------------------------------------------------


def _nested(value: Any) -> Any:
    return [_nested(v) for v in value] if isinstance(value, list | tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def _own_state(thing: object) -> Any:
    """The state of a policy or an importance that keeps one."""
    return thing.state_dict() if hasattr(thing, "state_dict") else None


def _load_own(thing: object, state: Any) -> None:
    if state is not None and hasattr(thing, "load_state_dict"):
        thing.load_state_dict(state)
