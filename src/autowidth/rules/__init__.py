"""What each ATen op does to channel labels: one decorated function per kind of op.

To add an op, write one function, decorate it with the op's names, and add one row to the table in tests/test_rules.py:

    @rule("my_op")
    def my_op(call: Call) -> list[Labels]:
        "One sentence on what becomes of the channels."
        return [call.labels_of(call["self"])]  # the label tensors of each output

It belongs to the file of the ops that treat channels alike:

    elementwise.py  keeps the shape, position by position (ops with torch's tag `pointwise` need no rule of their own)
    movement.py     moves, selects, splits or joins positions: runs the same op on the labels
    reductions.py   pooling, interpolation, reductions: ends the identity along the dims that it reduces
    norms.py        normalises, with a scale and statistics per channel
    weights.py      mixes channels: every output depends on every input, or on those of its conv group

What rules are written with: labels.py (label tensors), ledger.py (what is written down), registry.py (the table of
rules, and `Call`, which a rule is given). Every file with rules is imported here, for that is what registers them.
"""

from __future__ import annotations

from autowidth.rules import elementwise, movement, norms, reductions, weights
from autowidth.rules.labels import NEUTRAL, Labels, lies_along, shrunk, spread, tidy
from autowidth.rules.ledger import Ledger, merged
from autowidth.rules.registry import RULES, TAGGED, Call, Rule, no_rule, outputs, rule, rule_for

__all__ = [
    "NEUTRAL",
    "RULES",
    "TAGGED",
    "Call",
    "Labels",
    "Ledger",
    "Rule",
    "elementwise",
    "lies_along",
    "merged",
    "movement",
    "no_rule",
    "norms",
    "outputs",
    "reductions",
    "rule",
    "rule_for",
    "shrunk",
    "spread",
    "tidy",
    "weights",
]
