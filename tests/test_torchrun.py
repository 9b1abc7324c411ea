"""Laws of a run of several processes: they share every batch, one writes, and a killed one costs a restart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from autowidth import read_run
from autowidth.checkpoint import read_tensors
from autowidth.lab.data import digits
from autowidth.lab.settings import settings_of
from autowidth.lab.torchrun import ProcessesError, joined, left_by_a_restart

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = """
model = "{model}"
epochs = {epochs}
limit = 256
batch_size = 32
width = {width}
save_every = 0.0001
lr = 0.05
effort = {{probe_samples = 64, audit_samples = 64, audit_filters = 2}}
policy = {{name = "budget", macs = 0.5, schedule = {{count = 4}}}}
"""


def command(folder: Path, out: str, count: int, *, restarts: int = 0, **settings: Any) -> subprocess.Popen[str]:
    """torchrun with so many processes."""
    config = folder / f"{out}.toml"
    config.write_text(SMALL.format(**{"model": "resnet8", "epochs": 3, "width": 0.5} | settings))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    options = ["--max-restarts", str(restarts), "-m", "autowidth", "train"]
    return subprocess.Popen(
        [sys.executable, *launcher, *options, "--config", str(config), "--out", str(folder / out), "--json", "--quiet"],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], str]:
    """What was written as JSON to stdout, and all of stderr."""
    told, errors = process.communicate(timeout=1200)
    return [json.loads(line) for line in told.splitlines() if line.startswith("{")], errors


# ------------------------------------------------------------------------------------------------------------- quickly


def test_the_parts_of_all_processes_are_the_batch() -> None:
    whole = digits(limit=200).training_batches(50, seed=3)
    parts = [digits(limit=200).training_batches(50, seed=3) for _ in range(3)]
    for number, batches in enumerate(parts):
        batches.part = (number, 3)
    for (x, y), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(x, torch.cat([images for images, _ in shares]))
        assert torch.equal(y, torch.cat([labels for _, labels in shares]))


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ProcessesError, match="--batch-size 66"), joined(settings_of({"device": "cpu"})):
        pass


def test_a_process_alone_is_left_alone() -> None:
    settings = settings_of({"device": "cpu"})
    with joined(settings) as mine:
        assert mine is settings
    assert not torch.distributed.is_initialized()


def test_only_a_restart_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert left_by_a_restart(None) is None
    assert left_by_a_restart(tmp_path) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert left_by_a_restart(tmp_path) is None


# --------------------------------------------------------------------------------------------------- real processes


@pytest.mark.slow
def test_two_processes_of_the_command_end_as_one(tmp_path: Path) -> None:
    """With norms that know no batch; one process prints and writes."""
    settings = {"model": "tests.ranks_program:command_net", "width": 1.0}
    (said,), errors = ended(command(tmp_path, "two", 2, **settings))
    assert "Traceback" not in errors
    (alone,), _ = ended(command(tmp_path, "one", 1, **settings))
    assert said["widths"] == alone["widths"] != alone["widths_start"]
    assert [event["removed"] for event in said["history"]] == [event["removed"] for event in alone["history"]]
    assert said["loss"] == pytest.approx(alone["loss"], abs=1e-3)
    assert said["accuracy"] == pytest.approx(alone["accuracy"], abs=5e-3)
    assert read_run(tmp_path / "two").history().events[-1].widths == said["widths"]


def workers(launcher: int) -> dict[int, int]:
    """The processes that torchrun has started, by their number."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher:
                names = dict(part.split("=", 1) for part in (place / "environ").read_text().split("\0") if "=" in part)
                found[int(names["RANK"])] = int(place.name)
        except (OSError, KeyError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of torchrun in /proc")
def test_a_killed_process_costs_a_restart_and_nothing_else(tmp_path: Path) -> None:
    (undisturbed,), _ = ended(command(tmp_path, "undisturbed", 2))
    broken = command(tmp_path, "broken", 2, restarts=1)
    until = time.monotonic() + 600
    while len(list((tmp_path / "broken" / "training").glob("*/training.json"))) < 2:
        assert time.monotonic() < until and broken.poll() is None, "no training was saved"
        time.sleep(0.02)
    os.kill(workers(broken.pid)[1], signal.SIGKILL)
    (said,), errors = ended(broken)
    assert "has ended" in errors or "Signal 15" in errors, errors
    mine, theirs = (read_tensors(read_run(tmp_path / name)) for name in ("broken", "undisturbed"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [said[name] for name in ("accuracy", "loss", "widths", "macs")] == [
        undisturbed[name] for name in ("accuracy", "loss", "widths", "macs")
    ]


@pytest.mark.slow
def test_a_killed_process_without_a_restart_is_told(tmp_path: Path) -> None:
    broken = command(tmp_path, "broken", 2, epochs=30)
    until = time.monotonic() + 600
    while not list((tmp_path / "broken" / "training").glob("*/training.json")):
        assert time.monotonic() < until and broken.poll() is None, "no training was saved"
        time.sleep(0.02)
    os.kill(workers(broken.pid)[1], signal.SIGKILL)
    began = time.monotonic()
    said, errors = ended(broken)
    assert broken.returncode and not said
    assert time.monotonic() - began < 60
    assert "has ended" in errors or "stopped at step" in errors
