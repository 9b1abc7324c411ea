"""Apply a plan to parameters, buffers, optimizer state, module attributes: all or nothing.

    surgery.py     `apply_`, and `operate`, which does it inside a caller's journal
    journal.py     `all_or_nothing`: what is performed through its journal is undone when the block fails
    refusals.py    the errors for what cannot be resized as it is
    optimizers.py  `OPTIMIZER_STATE`: which optimizer state is per channel, and what a fresh entry holds
    edits.py       what is to be done to each tensor
    checks.py      everything that is touched, checked before the first write
    contents.py    what stands at each position afterwards
    attributes.py  numbers of channels in the attributes of modules
    changes.py     the writes, each of which can be undone

A kind of optimizer is one row of `OPTIMIZER_STATE`, and one in the table `OPTIMIZERS` of tests/surgery_nets.py.
"""

from __future__ import annotations

from autowidth.surgery.journal import Change, Journal, UndoError, all_or_nothing
from autowidth.surgery.optimizers import OPTIMIZER_STATE, State, check_optimizers, holders
from autowidth.surgery.refusals import StaleMapError, SurgeryError, UnsupportedOptimizerError
from autowidth.surgery.surgery import apply_, operate

__all__ = [
    "OPTIMIZER_STATE",
    "Change",
    "Journal",
    "StaleMapError",
    "State",
    "SurgeryError",
    "UndoError",
    "UnsupportedOptimizerError",
    "all_or_nothing",
    "apply_",
    "check_optimizers",
    "holders",
    "operate",
]
