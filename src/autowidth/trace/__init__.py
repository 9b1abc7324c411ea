"""Follow channel labels through eager forward passes: the channel map, frozen axes with reasons.

    tracing.py     `trace`, the door
    scratch.py     inputs that fit, scratch copies, an undisturbed place to run them
    frames.py      the line of the user's code, for reasons and errors
    labelling.py   label tensors go through one forward pass
    groups.py      from the ledger of the passes to channel groups
    passes.py      the passes of one trace: without values or with them, in both modes
    rehearsal.py   a trial resize of every group on a scratch copy
    trainable.py   groups whose parameters do not train

What an op does to labels is the business of `autowidth.rules`.
"""

from __future__ import annotations

from autowidth.trace.scratch import Inputs, TraceError
from autowidth.trace.tracing import trace
from autowidth.trace.trainable import keep_frozen_parameters

__all__ = ["Inputs", "TraceError", "keep_frozen_parameters", "trace"]
