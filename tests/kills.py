"""Runs of a tiny network that are broken off, in processes forked from one that has everything imported."""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth import training
from autowidth.checkpoint import read_run, read_tensors
from autowidth.history import Event
from autowidth.lab import keeping
from autowidth.lab.keeping import TRAINING, Interrupted, Terminated
from autowidth.lab.loop import train
from autowidth.lab.resuming import settings_to_resume, unfinished_at
from autowidth.lab.settings import Settings
from autowidth.plain_data import taken_apart
from autowidth.policy import Budget
from autowidth.review import review
from autowidth.review.effort import Effort
from composed import composed

CONTEXT = multiprocessing.get_context("forkserver")

PHASES = ("training", "review", "surgery", "save")


class Tiny(nn.Module):
    """Two channel groups, a norm, and dropout that draws from the global generator at every step."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.first(x)).relu(), 0.3, self.training)
        return self.head(self.second(x).relu().mean((2, 3)))


SETTINGS = Settings(
    model="kills:Tiny",
    epochs=2,
    limit=128,
    batch_size=16,
    policy=composed(Budget(macs=0.7), count=7, begin=0.1, end=0.95, grace=1),
    effort=Effort(probe_samples=16, audit_samples=16, audit_filters=2),
    ema=0.9,
    device="cpu",
    threads=1,
    save_every=1e-9,  # a save after every step
)


def serve() -> None:
    """Has the process that all runs are forked from import everything once."""
    CONTEXT.set_forkserver_preload(["kills", "torch._dynamo", "sklearn.datasets"])  # optimizers import the former


def run(out: str, marks: str) -> None:
    """Trains to the end, from where the folder stands. What goes on is told in the file `marks`."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(marks, "r+b") as file:
        told = mmap.mmap(file.fileno(), 1)
    for phase, (owner, name) in enumerate(
        ((review.Reviewer, "review"), (review, "operate"), (keeping, "save_training")), 1
    ):
        setattr(owner, name, _marking(getattr(owner, name), told, phase))
    sys.stderr = sys.stdout = io.StringIO()
    place = Path(out)
    found = unfinished_at(place)
    if found is not None and found.finished:
        return
    resume = None if found is None else place
    settings = SETTINGS.model_copy(update={"out": place})
    try:
        train(settings if resume is None else settings_to_resume(place, Settings()), resume=resume)
    except (Interrupted, Terminated) as stopped:
        os._exit(stopped.exit_code)


def _marking(act: Callable[..., Any], told: mmap.mmap, phase: int) -> Callable[..., Any]:
    """The act, which says in a byte that it goes on."""

    @wraps(act)
    def marked(*args: Any, **kwargs: Any) -> Any:
        before, told[0] = told[0], phase
        try:
            return act(*args, **kwargs)
        finally:
            told[0] = before

    return marked


def started(out: Path) -> tuple[Any, Path]:
    """A process that runs, and the file in which it tells what goes on."""
    marks = out.with_suffix(".marks")
    marks.write_bytes(b"\0")
    process = CONTEXT.Process(target=run, args=(str(out), str(marks)))
    process.start()
    return process, marks


def finished(out: Path) -> None:
    """Runs to the end."""
    process, _ = started(out)
    process.join()
    assert process.exitcode == 0, process.exitcode


def broken_off(out: Path, number: signal.Signals, delay: float) -> tuple[str, int]:
    """Starts a run, sends it a signal after so many seconds; what went on by then, and its exit code."""
    process, marks = started(out)
    process.join(delay)
    phase = PHASES[marks.read_bytes()[0]]
    if process.exitcode is None:
        os.kill(process.pid, number)
    process.join()
    return phase, process.exitcode


def outcome(out: Path) -> dict[str, str]:
    """Everything that a finished run left, without wall times: part -> checksum or text."""
    found, saved = read_run(out), training.read_training(out / TRAINING)
    history = found.history()
    assert history is not None
    assert [widths for _, widths in history.replay()][-1:] == [found.widths]
    state = saved.state
    state["engine"]["history"] = [_without_seconds(event) for event in history]
    for name in ("seconds", "cpu_seconds"):
        del state["parts"]["loop"]["state"][name]
    tree, tensors = taken_apart({"state": state, "model": saved.model, "result": read_tensors(found)}, name="all")
    result = {k: v for k, v in found.extra["result"].items() if "seconds" not in k and k != "out"}
    sums = {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in tensors.items()}
    return {**sums, "tree": json.dumps(tree), "result": json.dumps(result)}


def _without_seconds(event: Event) -> str:
    return repr(replace(event, seconds={}))


def trial(folder: Path, name: str, number: signal.Signals, delay: float, wanted: dict[str, str]) -> tuple[str, int]:
    """A run that is broken off once and gone on with: it ends like the one that never was, or this fails."""
    out = folder / name
    phase, code = broken_off(out, number, delay)
    finished(out)
    got = outcome(out)
    assert got.keys() == wanted.keys(), (name, phase, delay, got.keys() ^ wanted.keys())
    assert not (wrong := [key for key in wanted if got[key] != wanted[key]]), (name, phase, delay, wrong)
    left = [p.name for p in out.rglob("*") if p.name.startswith(".")]
    assert not left, left
    return phase, code


def trials(folder: Path, number: signal.Signals, count: int, seed: int = 0) -> tuple[Counter[str], Counter[int]]:
    """So many runs that are broken off at random moments; what went on at the signal, and which exit codes came.

    A run that was done before the signal came does not count, and is tried anew.
    """
    serve()
    reference = folder / "reference"
    finished(folder / "warm")  # the server starts with the first process
    begun = time.perf_counter()
    finished(reference)
    whole = time.perf_counter() - begun
    wanted, chance = outcome(reference), random.Random(1000 * seed + int(number))
    phases, codes = Counter[str](), Counter[int]()
    while codes.total() < count:
        phase, code = trial(folder, f"run{codes.total()}", number, chance.uniform(0.0, 1.0) * whole, wanted)
        if code:
            phases[phase] += 1
            codes[code] += 1
        else:
            whole *= 0.95  # the machine is quicker than it was
        shutil.rmtree(folder / f"run{codes.total() - bool(code)}")
    return phases, codes
