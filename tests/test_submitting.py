"""Units as jobs: submitit's own local executor runs them, in real processes, with the files of every other run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from autowidth.lab.bench import BenchError, Outcome, Record, Standing, Suite, Unit, UnitError, bench
from autowidth.lab.submitting import JOBS, MissingSubmititError, options_of, submitted

pytest.importorskip("submitit")


def squares(settings: Mapping[str, Any]) -> Outcome:
    """A unit that takes no time."""
    if settings["number"] < 0:
        raise ValueError("no root of a negative number")
    record = {"number": settings["number"], "square": settings["number"] ** 2, "process": os.getpid()}
    return Outcome(records=[record], raw=[])


def listed(records: Sequence[Record]) -> str:
    return "\n".join(f"{record['number']}: {record['square']}" for record in records)


def suite(*numbers: int) -> Suite:
    units = tuple(Unit(name=f"n{n}", settings={"number": n}, command=f"square {n}") for n in numbers)
    return Suite(name="squares", units=units, run=squares, table=listed, apart=frozenset({"number"}))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job imports what it runs."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))


@pytest.mark.slow
def test_jobs_leave_the_files_of_units_and_are_not_run_again(tmp_path: Path) -> None:
    said: list[Standing] = []
    spread = submitted("local", at_once=2, options={"timeout_min": 5})
    records = bench(suite(2, 3), tmp_path, report=said.append, spread=spread)
    assert sorted(record["square"] for record in records) == [4, 9]
    assert len({record["process"] for record in records} | {os.getpid()}) == 3
    assert (tmp_path / "squares.md").read_text().splitlines() == ["2: 4", "3: 9"]
    written = json.loads((tmp_path / "squares" / "n2.json").read_text())
    assert written["command"] == "square 2" and written["environment"]["threads"] == 1
    again = bench(suite(2, 3, 4), tmp_path, report=said.append, spread=spread)
    assert [one.seconds is None for one in said] == [False, False, True, True, False]
    assert {record["process"] for record in records} < {record["process"] for record in again}
    with pytest.raises(UnitError, match=r"n-1 failed: .*no root.*its log is .*" + JOBS):
        bench(suite(-1, 2), tmp_path, spread=spread)


def test_what_cannot_be_submitted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="no Slurm here"):
        submitted("slurm", at_once=2, options={})
    with pytest.raises(BenchError, match="does not take"):
        bench(suite(2), tmp_path, spread=submitted("local", at_once=2, options={"colour": "gpu"}))
    assert options_of("timeout_min=600, slurm_partition=gpu") == {"timeout_min": 600, "slurm_partition": "gpu"}
    with pytest.raises(BenchError, match="NAME=VALUE"):
        options_of("gpu")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MissingSubmititError, match=r"pip install 'autowidth\[submit\]'"):
        submitted("local", at_once=1, options={})
