"""What a review may do: the settings that all policies share."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autowidth.errors import AutoWidthError


class PolicyError(AutoWidthError, ValueError):
    """A setting of a policy that is out of range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a review may do.

    offer: share of the present cost that is offered to newborns at a review (0: no insertion). Newborns are not
        judged for `grace` reviews, and none are offered in the last `grace` reviews, so that all are judged.
    newborn: price of newborns: what a filter not yet born is expected to be worth, as a share of the mean worth of the
        weaker half of its group.
    diminishing: exponent g of a prior of diminishing returns. A filter's worth is taken as
        worth x (uniform share / width that would be left) ** g, where the uniform share is the width that the group
        would have in a uniformly narrowed network of the same cost (docs/decisions/002). 0, no prior, does best where
        trials measure returns instead of guessing them (docs/decisions/008).
    trial_share: share of every group's filters that a review takes away together, on trial, to see how much more that
        costs than one by one (0: not tried). Filters of a residual stream stand in for each other, so that the first
        ones seem to cost nothing, and many of them very much (docs/decisions/008).
    min_width: no group gets narrower.
    multiple: widths that change become multiples of this; groups that are narrower than it stay.
    protect: patterns of names (as in `stem.*`) of groups that keep their widths. One that matches nothing is an error.
    max_move: the largest share of the present cost that one review may remove; the last review of a budget may more.
    tolerance: a plan that turns out to cost this many nats (the unit of the loss) more than twice what was predicted is
        carried out by half; what is left is made up for at later reviews. The last review always meets a budget.
    doubt: where the worths ranked the filters of the last audits worse than this (Spearman), a plan may cost only half
        of that, and the review says so. Where filters cost next to nothing, as in a network that is far too wide,
        their order hardly matters, and nothing is held up (docs/decisions/011). -1: never.

    Raises PolicyError for values out of range.
    """

    offer: float = 0.05
    newborn: float = 1.0
    grace: int = 2
    diminishing: float = 0.0
    trial_share: float = 0.5
    min_width: int = 2
    multiple: int = 1
    protect: tuple[str, ...] = ()
    max_move: float = 0.5
    tolerance: float = 0.1
    doubt: float = 0.2

    def __post_init__(self) -> None:
        if self.min_width < 1 or self.grace < 0 or not 0 <= self.offer < 1:
            raise PolicyError(
                f"min_width={self.min_width}, grace={self.grace}, offer={self.offer:g}: "
                "need min_width >= 1, grace >= 0 and 0 <= offer < 1"
            )
        if self.tolerance < 0 or self.diminishing < 0 or self.newborn < 0:
            raise PolicyError(
                f"tolerance={self.tolerance:g}, diminishing={self.diminishing:g}, newborn={self.newborn:g}: "
                "none may be negative"
            )
        if not 0 <= self.trial_share < 1:
            raise PolicyError(f"trial_share={self.trial_share:g}: need a share from 0 to below 1")
        if not -1 <= self.doubt <= 1:
            raise PolicyError(f"doubt={self.doubt:g}: need a rank correlation, from -1 to 1")
        if self.multiple < 1 or not 0 < self.max_move <= 1:
            raise PolicyError(
                f"multiple={self.multiple}, max_move={self.max_move:g}: need multiple >= 1 and 0 < max_move <= 1"
            )

    def check(self, names: Sequence[str]) -> None:
        """Raises PolicyError for a pattern in `protect` that matches no group, or where it leaves nothing to edit."""
        for pattern in self.protect:
            if not fnmatch.filter(names, pattern):
                close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names)[:3]
                raise PolicyError(
                    f"protect={pattern!r} matches no channel group; close names are {', '.join(close)} "
                    "(`autowidth inspect` lists all)"
                )
        if len(self.protected(names)) == len(names):
            raise PolicyError(f"protect={self.protect} matches all channel groups: nothing is left to resize")

    def protected(self, names: Sequence[str]) -> frozenset[str]:
        """The names that a pattern in `protect` matches."""
        return frozenset(name for pattern in self.protect for name in fnmatch.filter(names, pattern))

    def narrowest(self, widths: Mapping[str, int]) -> dict[str, int]:
        """The least widths that removal can lead to: protected groups stay, others end at a multiple.

        >>> Limits(multiple=8, min_width=2, protect=("stem",)).narrowest({"stem": 16, "a": 64, "b": 12, "c": 6})
        {'stem': 16, 'a': 8, 'b': 8, 'c': 6}
        """
        kept = self.protected(tuple(widths))
        least = -(-self.min_width // self.multiple) * self.multiple
        return {name: width if name in kept else min(width, least) for name, width in widths.items()}
