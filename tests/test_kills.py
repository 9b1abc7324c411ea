"""A run that is killed at any moment ends, when it is gone on with, as if nothing had happened: bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from kills import trials

KINDS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
CODES = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130, 1}}
"""Exit codes: asked to stop while it trains; before it began to."""


@pytest.mark.parametrize("number", KINDS, ids=lambda n: n.name)
def test_a_run_that_is_broken_off_ends_like_one_that_was_not(tmp_path: Path, number: signal.Signals) -> None:
    _, codes = trials(tmp_path, number, 3 if number == signal.SIGKILL else 1)
    assert codes.keys() <= CODES[number]


@pytest.mark.slow
@pytest.mark.parametrize("number", KINDS, ids=lambda n: n.name)
def test_a_run_that_is_broken_off_at_any_of_200_moments(tmp_path: Path, number: signal.Signals) -> None:
    phases, codes = trials(tmp_path, number, 200)
    print(number.name, dict(phases), dict(codes))
    assert codes.keys() <= CODES[number]
    assert codes.total() == 200
    assert phases["save"] > 10 and phases["review"] + phases["surgery"] > 10
