"""A file that would run code when it is unpickled is brought to every entry point: none of them runs it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autowidth import AutoWidthError, History, load_, load_state_dict_, read_run
from autowidth.checkpoint import read_tensors
from autowidth.lab.data import load
from autowidth.lab.models import UnknownModelError, resolve
from autowidth.lab.saved import open_run
from autowidth.lab.settings import settings_from
from autowidth.lab.weights import load_weights_, read_weights
from test_checkpoint import INPUT, Plain, fresh
from test_cli import called

SAVED = Path(__file__).parent / "saved_runs" / "schema_2" / "history_and_map"


class Trap:
    """What a pickle can do to whoever reads it: here, it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def traps(marker: Path) -> dict[str, bytes]:
    """The trap as plain pickles of several protocols, and as torch.save writes it, alone and beside tensors."""
    found = {f"pickle {n}": pickle.dumps({"state_dict": Trap(marker)}, protocol=n) for n in (0, 2, 4, 5)}
    for name, content in (("alone", Trap(marker)), ("beside", {"weight": torch.zeros(2), "config": Trap(marker)})):
        for old in (False, True):
            place = marker.with_name("made")
            torch.save(content, place, _use_new_zipfile_serialization=not old)
            found[f"torch {name}{' old' * old}"] = place.read_bytes()
            place.unlink()
    return found


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def test_the_traps_are_sharp(marker: Path, tmp_path: Path) -> None:
    for name, content in traps(marker).items():
        (tmp_path / "trap").write_bytes(content)
        if name.startswith("pickle"):
            pickle.loads(content)
        else:
            torch.load(tmp_path / "trap", weights_only=False)
        assert marker.exists(), f"{name} is harmless, so that the tests could not fail"
        marker.unlink()


ENDINGS = (".pt", ".pth", ".bin", ".th", ".ckpt", ".tar", ".safetensors", ".pkl", "")

COMMANDS = (
    "train --model resnet8 --weights {file} --epochs 1 --quiet",
    "eval resnet8 --weights {file} --data digits",
    "shrink resnet8 --weights {file} --data digits --macs 0.5",
    "eval {file}", "predict {file} {file}", "shrink {file} --weights {file} --data {file}", "inspect {file}",
    "inspect {file}:Net",
    "train --model {file}", "train --config {file} --quiet", "train --data {file}", "train --data folder:{file}",
    "eval {run}", "predict {run} {file}", "shrink resnet8 --weights {run} --data digits",
    "train --weights {run} --quiet", "train --resume {run} --quiet", "train --resume {file} --quiet",
    "predict {whole} {file}", "bench {file}",
)  # fmt: skip
"""Every command, with the file in every place that takes one; `run` is a folder whose files it has replaced."""


@pytest.mark.parametrize("line", COMMANDS)
def test_no_command_runs_what_is_in_a_file(
    line: str, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = shutil.copytree(SAVED, tmp_path / "whole")
    endings = ENDINGS if "{file}" in line else ("",)
    for number, (name, content) in enumerate(traps(marker).items()):
        file = tmp_path / f"evil{endings[number % len(endings)]}"
        file.write_bytes(content)
        run = tmp_path / f"run {number}"
        shutil.copytree(SAVED, run)
        for inner in sorted(run.iterdir())[number % 3 :: 3]:
            inner.write_bytes(content)
        arguments = [part.format(file=file, run=run, whole=whole) for part in line.split(" ")]
        assert called(*arguments, monkeypatch=monkeypatch) == 2, (line, name)
        said = capfd.readouterr().err
        assert "Traceback" not in said
        if "--weights" in line and "shrink {file}" not in line:
            assert "evil" in said or f"run {number}" in said, said  # it came as far as the file
        assert not marker.exists(), (line, name)
        file.unlink()


FUNCTIONS: dict[str, Callable[[Path, Path], object]] = {
    "read_weights": lambda file, run: read_weights(file),
    "read_weights of a run": lambda file, run: read_weights(run),
    "load_weights_": lambda file, run: load_weights_(fresh(Plain), file, example_inputs=INPUT),
    "load_": lambda file, run: load_(fresh(Plain), run, example_inputs=INPUT),
    "read_tensors": lambda file, run: read_tensors(read_run(run)),
    "history of a run": lambda file, run: read_run(run).history(),
    "open_run": lambda file, run: open_run(run),
    "History.read": lambda file, run: History.read(file),
    "settings_from": lambda file, run: settings_from({}, config=file),
    "load_state_dict_": lambda file, run: load_state_dict_(
        fresh(Plain), {name: Trap(file) for name in fresh(Plain).state_dict()}, example_inputs=INPUT
    ),
    "cifar10": lambda file, run: load(f"cifar10:{batches(file)}"),
    "images": lambda file, run: load(f"folder:{pictures(file)}"),
}


def batches(file: Path) -> Path:
    """The trap where the Python version of CIFAR-10 has its batches."""
    place = file.parent / "cifar-10-batches-py"
    place.mkdir(exist_ok=True)
    for name in ("data_batch_1", "test_batch"):
        shutil.copy(file, place / name)
    return place


def pictures(file: Path) -> Path:
    """The trap as an image of every class."""
    for name in ("bee", "cow"):
        (file.parent / "pictures" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, file.parent / "pictures" / name / "0.png")
    return file.parent / "pictures"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_runs_what_is_in_a_file(name: str, marker: Path, tmp_path: Path) -> None:
    for number, (trap, content) in enumerate(traps(marker).items()):
        file = tmp_path / f"evil{ENDINGS[number % 6]}"
        file.write_bytes(content)
        run = Path(shutil.copytree(SAVED, tmp_path / f"run {number}"))
        for inner in run.iterdir():
            if inner.name != "run.json" or name == "read_weights of a run":
                inner.write_bytes(content)
        with pytest.raises(AutoWidthError):
            FUNCTIONS[name](file, run)
        assert not marker.exists(), (name, trap)


@pytest.mark.parametrize(
    "text", ["os:abort", "os:fork", "subprocess:Popen", "shutil:rmtree", "sys:exit", "antigravity:f"]
)
def test_a_run_cannot_name_a_function_of_the_standard_library_as_its_network(text: str) -> None:
    with pytest.raises(UnknownModelError, match="the standard library"):
        resolve(text)


def test_a_run_of_a_stranger_names_no_other_network_unnoticed(tmp_path: Path) -> None:
    run = Path(shutil.copytree(SAVED, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    record["extra"]["settings"] = {"model": "os:abort"}
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(AutoWidthError, match="its checksum is another one"):
        open_run(run)
