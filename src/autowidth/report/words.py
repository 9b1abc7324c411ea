"""Reviews and widths in words: what a review decided and why, and why a layer is as wide as it is."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autowidth.history import Event, History

UNITS = {"macs": "MACs", "params": "parameters", "ms": "ms"}
"""What a cost is counted in, for people."""

NAMED = 3
"""Channel groups that a sentence names; of the others it says how many there are."""

NEAR = 0.005
"""Within this share two costs are said to be the same."""


def short(number: float) -> str:
    """A count in three digits: 41.2 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun: 1 filter, 2 filters."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


# ---- a review --------------------------------------------------------------------------------------------------------


def decided(event: Event) -> str:
    """What a review decided and why, in a sentence or three, without a full stop at the end."""
    left, came = _groups(event.removed), _groups(event.inserted)
    if not left and not came:
        return f"nothing was removed or inserted: {reason_for_nothing(event)}"
    parts = []
    if left:
        count = sum(event.removed.values())
        parts.append(f"{counted(count, 'filter')} left that earned least for what they cost ({_listed(left)})")
    if came:
        parts.append(
            f"{counted(sum(event.inserted.values()), 'filter')} came where more may earn most ({_listed(came)})"
        )
    return "; ".join([" and ".join(parts), *_reasons(event)])


def _reasons(event: Event) -> list[str]:
    """Why: where the review was going, what a filter has to earn, what the policy noted."""
    found = []
    if event.target is not None:
        found.append(f"aiming at {_cost(event.target, event.unit)}{_from(event)}")
    if event.price:
        unit = UNITS.get(event.unit, event.unit)
        price = (
            f"{event.price * 1e6:.3g} nats per million {unit}"
            if event.unit != "ms"
            else f"{event.price:.3g} nats per ms"
        )
        found.append(f"who stays earns at least {price}")
    return found + list(event.notes)


def reason_for_nothing(event: Event) -> str:
    """Why a review changed no width."""
    if event.notes:
        return "; ".join(event.notes)
    now = _now(event)
    if event.target is None or now is None:
        return "the policy decides nothing here" if event.target is None else "no filter may leave, and none may come"
    aim = f"the network is at {_cost(now, event.unit)}, and {_cost(event.target, event.unit)} are allowed"
    if now <= event.target * (1 + NEAR):
        return f"{aim}, so that none has to leave"
    return f"{aim}, but no filter may leave (limits, protected groups, or nothing is known of their worth)"


def _now(event: Event) -> float | None:
    """What the network cost before the review, in the event's unit; milliseconds are not recorded."""
    return {"macs": event.macs_before, "params": event.params_before}.get(event.unit)


def _from(event: Event) -> str:
    now = _now(event)
    return "" if now is None else f", from {_cost(now, event.unit)}"


def _cost(cost: float, unit: str) -> str:
    return f"{short(cost)} {UNITS.get(unit, unit)}"


def _groups(counts: Mapping[str, int]) -> list[tuple[int, str]]:
    """(How many, channel group), the most first, of those with any."""
    return sorted(((n, name) for name, n in counts.items() if n), key=lambda pair: (-pair[0], pair[1]))


def _listed(groups: Sequence[tuple[int, str]]) -> str:
    named = [f"{name} {n}" for n, name in groups[:NAMED]]
    rest = len(groups) - NAMED
    return ", ".join([*named, *([f"{counted(rest, 'other group')}"] if rest > 0 else [])])


# ---- a run -----------------------------------------------------------------------------------------------------------


def reason_for_no_removal(history: History) -> str | None:
    """Why a run removed nothing, in a sentence without a full stop; None where it removed something."""
    if history.removed_total:
        return None
    if not history.events:
        return "no review took place"
    return f"at the last of {counted(len(history), 'review')}, {_of_last(history.events[-1])}"


def _of_last(event: Event) -> str:
    came = sum(event.inserted.values())
    why = "; ".join(_reasons(event)) if came else reason_for_nothing(event)
    return f"{counted(came, 'filter')} came; {why}" if came else why


# ---- a layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the last review that looked at a channel group found out about it, and what became of that.

    stayed, left: worths of the filters that stayed and that left then, nats; price: what one filter had to be worth,
    None where there was none; interaction: see Event.
    """

    stayed: tuple[float, ...]
    left: tuple[float, ...]
    price: float | None
    interaction: float = 0.0


def found_of(history: History) -> dict[str, Found]:
    """Channel group name -> what the last review that knows the worth of its filters found."""
    found: dict[str, Found] = {}
    for event in history.events:
        for group, worths in event.filter_worths.items():
            index_map = event.maps.get(group)
            gone = set(index_map.removed if index_map else ())
            found[group] = Found(
                stayed=tuple(w for c, w in enumerate(worths) if c not in gone),
                left=tuple(w for c, w in enumerate(worths) if c in gone),
                price=event.prices.get(group), interaction=event.interactions.get(group, 0.0),
            )  # fmt: skip
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What became of a channel group: its widths at the start and now, who left, who came, and is still there."""

    start: int
    now: int
    left: int
    came: int
    alive: int


def is_protected(group: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns of `Limits.protect` names the channel group."""
    return any(fnmatch.fnmatchcase(group, pattern) for pattern in patterns)


def why_group(moved: Moved, found: Found | None, *, protected: bool, reviewed: bool) -> str:
    """Why a channel group is as wide as it is, in one or two sentences."""
    if protected:
        return f"Kept at {moved.start}: it is protected by the settings (protect)."
    if not reviewed:
        return f"As wide as it was brought, {moved.start}: no review took place."
    told = [f"{counted(moved.left, 'filter')} left"] if moved.left else []
    told += [f"{moved.came:,} came ({moved.alive:,} of them still there)"] if moved.came else []
    what = (
        f"From {moved.start} to {moved.now}: {', '.join(told)}." if told else f"Kept all of its {moved.start} filters."
    )
    return f"{what} {_balance(found)}".rstrip()


def _balance(found: Found | None) -> str:
    """What its weakest filter is worth beside what it has to be worth, in a sentence; empty where nobody knows."""
    if found is None or not found.stayed:
        return ""
    weakest = float(np.min(found.stayed))
    if not found.price:
        return f"The weakest that stays is worth {_nats(weakest)}."
    ask = f"one filter here has to be worth {_nats(found.price)}"
    if weakest >= found.price:
        return f"The weakest that stays is worth {_nats(weakest)}, and {ask}: it pays for itself."
    together = weakest + found.interaction * (2 * len(found.left) + 1)
    if together >= found.price:
        return (
            f"Alone its weakest is worth {_nats(weakest)} and {ask}, but its filters stand in for each other: "
            f"the next one to leave would cost {_nats(together)}."
        )
    return (
        f"The weakest that stays is worth {_nats(weakest)}, and {ask}: more would leave if a review might go further."
    )


def _nats(worth: float) -> str:
    return f"{worth:.2g} nats"
