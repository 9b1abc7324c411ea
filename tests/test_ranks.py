"""Laws of several ranks, with real processes: they end as one does with all the data, or stop with the reason."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import ranks_program as program

REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(out: Path, names: list[str], count: int, *, timeout: float = 60) -> list[subprocess.Popen[str]]:
    """The ranks of a program, as torchrun would start them."""
    port = str(free_port())
    found = []
    for rank in range(count):
        names_of_torchrun = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "RANKS_TIMEOUT": str(timeout),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.ranks_program", str(out), *names]
        pipe, environment = subprocess.PIPE, os.environ | names_of_torchrun
        found.append(
            subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        )
    return found


def ranks(out: Path, names: list[str], count: int = 2) -> dict[str, list[dict[str, Any]]]:
    """What every rank says of every case, by its name."""
    started = start(out, names, count)
    for process in started:
        told, _ = process.communicate(timeout=900)
        assert process.returncode == 0, told
    return {name: [torch.load(out / f"{name}-{rank}.pt") for rank in range(count)] for name in names}


def assert_as_one(said: list[dict[str, Any]], alone: dict[str, Any], close: float = 2e-4) -> float:
    """Every rank has the plans and widths of one rank with all the data, and its weights but for rounding.

    Returns the largest difference of a weight, and `close` is how large it may be.
    """
    worst = 0.0
    assert any(alone["plans"]), "nothing was resized, so nothing is shown"
    for one in said:
        assert one["plans"] == alone["plans"]
        assert one["widths"] == alone["widths"]
        assert one["weights"].keys() == alone["weights"].keys()
        for name, tensor in alone["weights"].items():
            far = float((one["weights"][name] - tensor).abs().max())
            worst = max(worst, far)
            assert far < close, name
    first = said[0]["weights"]
    for one in said[1:]:
        assert all(torch.equal(first[name], tensor) for name, tensor in one["weights"].items())
    return worst


CLOSE = {"without reconstruction": 3e-6, "adamw without reconstruction": 3e-6}
"""How far weights may be from those of one rank, in ways whose plans lead through no inverse."""

QUICK = ["without reconstruction", "find unused"]
REFUSED = list(program.REFUSED)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Cases that share two processes: starting them takes longest."""
    return ranks(tmp_path_factory.mktemp("ranks"), [*QUICK, "by hand", *REFUSED])


@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_end_as_one(quick: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert_as_one(quick[name], program.train(program.WAYS[name], 0, 1), CLOSE.get(name, 2e-4))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_on_every_rank(quick: dict[str, list[dict[str, Any]]], name: str) -> None:
    for one in quick[name]:
        assert one["error"], "nobody refused"
        for word in program.REFUSED[name][1]:
            assert word in one["error"]


def test_a_resize_by_hand_leaves_the_same_weights(quick: dict[str, list[dict[str, Any]]]) -> None:
    one, other = (said["weights"] for said in quick["by hand"])
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_two_ranks_end_as_one_in_every_way(tmp_path: Path, record_property: Any) -> None:
    names = [name for name in program.WAYS if name not in QUICK]
    for name, said in ranks(tmp_path, names).items():
        worst = assert_as_one(said, program.train(program.WAYS[name], 0, 1), CLOSE.get(name, 2e-4))
        print(f"{name}: {worst:.1e}")


@pytest.mark.slow
def test_four_ranks_end_as_one(tmp_path: Path) -> None:
    (said,) = ranks(tmp_path, ["adamw"], count=4).values()
    print(f"four ranks: {assert_as_one(said, program.train(program.WAYS['adamw'], 0, 1)):.1e}")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_norm_statistics_are_those_of_all_ranks(tmp_path: Path, count: int) -> None:
    """Each rank of a SyncBatchNorm keeps to itself in a review: on a CPU it could not even run in training mode."""
    for said in ranks(tmp_path, ["batch norm", "sync batch norm"], count).values():
        assert_as_one(said, program.run("batch norm", 0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", program.LOST)
def test_a_rank_that_is_lost_stops_the_others(tmp_path: Path, name: str) -> None:
    other, gone = start(tmp_path, [name], 2, timeout=4)
    told, _ = other.communicate(timeout=120)
    gone.communicate(timeout=120)
    said = torch.load(tmp_path / f"{name}-0.pt")["error"]
    assert said is not None, told
    for word in program.LOST[name]:
        assert word in said
