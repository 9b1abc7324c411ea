"""Runs of every version of the format, written by the code of their time: they load as what was saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from autowidth.checkpoint import SCHEMA, CheckpointError, load_, read_run
from test_checkpoint import INPUT, Plain, Tied, fresh

CORPUS = Path(__file__).parent / "saved_runs"
"""schema_N/NAME: a run that was saved by a version of this package that wrote format N."""

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "history_and_map": Plain,
    "tied": Tied,
    "cut_short": Plain,
    "bfloat16": lambda: Plain().to(torch.bfloat16),
    "older_history": Plain,
}
"""Name of a run -> the class of its network, fresh."""

RUNS = sorted(path.parent for path in CORPUS.glob("schema_*/*/run.json"))


def copied(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place / run.name))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name}-{run.name}")
def test_a_run_of_an_older_format_loads_as_what_was_saved(tmp_path: Path, run: Path) -> None:
    folder = copied(run, tmp_path)
    found = read_run(folder)
    assert found.schema == int(run.parent.name.removeprefix("schema_"))
    model = fresh(NETWORKS[run.name], seed=9)
    example = INPUT.to(next(model.parameters()).dtype)
    channel_map = load_(model, folder, example_inputs=example)
    stored = load_file(next(iter(folder.glob(".model.safetensors.*")), folder / "model.safetensors"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[found.tied.get(name, name)])
    assert found.widths in (None, channel_map.widths)


def test_what_the_runs_say_is_what_was_given() -> None:
    for folder in CORPUS.glob("schema_*"):
        run = read_run(folder / "history_and_map")
        assert run.extra == {"epoch": 3, "policy": {"macs": 0.5, "names": ["a", None, True]}}
        assert run.widths == {"a.0": 7, "b.0": 7}
        (event,) = run.history().events
        assert (event.loss, event.measured, event.notes) == (1.25, 0.125, ("first",))
        assert read_run(folder / "cut_short").widths == {"a.0": 9, "b.0": 9}


def test_every_format_has_runs() -> None:
    assert {path.name for path in CORPUS.iterdir()} == {f"schema_{number}" for number in range(1, SCHEMA + 1)}
    for folder in CORPUS.iterdir():
        assert {run.name for run in folder.iterdir()} >= NETWORKS.keys() - {"older_history"}


def test_a_history_in_a_format_before_that_of_its_run_is_read() -> None:
    folder = CORPUS / "schema_1" / "older_history"
    assert '"schema":1' in (folder / "history.jsonl").read_text().splitlines()[0]
    (event,) = read_run(folder).history().events
    assert (event.predicted, event.target, event.unit) == (0.0, 9.0, "macs")


def test_a_newer_format_is_refused_with_both_versions(tmp_path: Path) -> None:
    folder = copied(RUNS[0], tmp_path)
    record = json.loads((folder / "run.json").read_text()) | {"schema": SCHEMA + 1, "unheard of": 1}
    (folder / "run.json").write_text(json.dumps(record))
    message = f"has format {SCHEMA + 1}, this version reads up to {SCHEMA}: install a newer autowidth"
    with pytest.raises(CheckpointError, match=message):
        read_run(folder)


@pytest.mark.parametrize("schema", [0, -1, True, 1.0, "1", None])
def test_a_format_that_never_was_is_refused(tmp_path: Path, schema: object) -> None:
    folder = copied(RUNS[0], tmp_path)
    record = json.loads((folder / "run.json").read_text()) | {"schema": schema}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="it names no format"):
        read_run(folder)
