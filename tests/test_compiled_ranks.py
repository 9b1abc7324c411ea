"""What comes on top of two ranks: compiled with an averaged copy, and Lightning; real processes on gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def said(way: str, count: int, folder: Path, program: str = "compiled_ranks.py") -> list[dict[str, Any]]:
    """What each of so many processes says at its end."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1",
        "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / program), way, str(folder)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * count, "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["compiled around", "compiled inside"])
def test_compiled_averaged_and_on_two_ranks_in_one_run(tmp_path: Path, way: str) -> None:
    """Two ranks with half of each batch end as one with all of it, and every step runs compiled."""
    first, second = said(way, 2, tmp_path / "two")
    (alone,) = said("alone", 1, tmp_path / "one")
    assert first["weights"] == second["weights"]
    assert first["widths"] == second["widths"] == alone["widths"]
    assert first["weights"] == pytest.approx(alone["weights"], abs=1e-5)
    assert first["surgeries"] > 8
    assert first["ran"] >= 12


@pytest.mark.slow
def test_lightning_under_ddp_ends_alike_on_both_ranks_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    if find_spec("lightning") is None:
        pytest.skip("Lightning is not installed")
    first, second = said("", 2, tmp_path / "two", "lightning_ranks.py")
    assert first == second
    assert first["whole"]["macs"] <= 0.4
    assert first["again"]["widths"] == first["whole"]["widths"]
    assert first["again"]["weights"] == pytest.approx(first["whole"]["weights"], abs=1e-6)
