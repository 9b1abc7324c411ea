"""Settings of all tests: one thread per test process, and the same examples on every machine."""

from __future__ import annotations

import signal

import torch
from hypothesis import settings

torch.set_num_threads(1)

# Ctrl-C is ignored by what a script starts in the background and by all children of it; some tests are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is slow without being wrong, so there is no deadline; fixed examples make a failure repeatable.
settings.register_profile("autowidth", deadline=None, derandomize=True)
settings.load_profile("autowidth")
