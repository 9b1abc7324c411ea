"""What is taken away: a network out of the folder of a run, its widths for people, runs on a hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autowidth as aw
from autowidth.checkpoint import CheckpointError
from autowidth.extras import MissingExtraError
from autowidth.lab.models import build
from autowidth.lab.result import Result
from autowidth.takeaway import FromRunError
from autowidth.widths import WidthsError
from hub_server import HubServer, hub
from small_run import small_run

DIGIT = torch.zeros(2, 1, 8, 8)


def fresh() -> nn.Module:
    return build("resnet8", in_channels=1, width=0.5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return small_run(tmp_path_factory.mktemp("runs") / "run")


def folder(run: Result) -> Path:
    return Path(run.out or "")


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- from_run --------------------------------------------------------------------------------------------------------


def test_a_network_comes_out_of_the_folder_alone(run: Result) -> None:
    network = aw.from_run(folder(run), fresh)
    assert same(network, run.network) and not network.training
    assert same(aw.from_run(folder(run), fresh, example_inputs=DIGIT), network)


@pytest.mark.parametrize(
    ("factory", "kind", "message"),
    [
        (fresh(), FromRunError, "model_factory is a ResNet: give a class or function"),
        (lambda: 3, FromRunError, "returned a int, expected an nn.Module"),
        (lambda: build("resnet8", in_chanels=1), FromRunError, r"model_factory failed: TypeError: .*in_chanels"),
        (lambda: build("vgg8", in_channels=1), CheckpointError, "is of another network"),
    ],
)
def test_a_factory_of_something_else_is_refused(run: Result, factory: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        aw.from_run(folder(run), factory)


def test_a_run_that_does_not_say_its_input_shape_asks_for_inputs(run: Result, tmp_path: Path) -> None:
    for extra in ({}, {"input_shape": "1,8,8"}, {"input_shape": [1, 0, 8]}):
        aw.save(tmp_path / "run", run.network, extra=extra)
        with pytest.raises(FromRunError, match="does not say the shape of its inputs: give example_inputs"):
            aw.from_run(tmp_path / "run", fresh)
    assert same(aw.from_run(tmp_path / "run", fresh, example_inputs=DIGIT), run.network)
    with pytest.raises(CheckpointError, match="no run at"):
        aw.from_run(tmp_path / "nowhere", fresh)


# ---- widths.json -----------------------------------------------------------------------------------------------------


def test_every_run_says_its_widths_to_people(run: Result) -> None:
    record = json.loads((folder(run) / "widths.json").read_text())
    modules = dict(run.network.named_modules())
    before = dict(fresh().named_modules())
    assert record["layers"].keys() == {n for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)}
    for name, layer in record["layers"].items():
        now, then = modules[name], before[name]
        width = ("in_channels", "out_channels") if isinstance(now, nn.Conv2d) else ("in_features", "out_features")
        assert [layer["in"], layer["out"]] == [getattr(now, w) for w in width]
        assert [layer["in_start"], layer["out_start"]] == [getattr(then, w) for w in width]
        assert layer["kind"] == type(now).__name__
    groups = record["groups"]
    assert {name: group["width"] for name, group in groups.items()} == run.widths
    assert {name: group["width_start"] for name, group in groups.items()} == run.widths_start
    assert all(record["layers"][layer]["out"] == g["width"] for g in groups.values() for layer in g["layers"])
    for name in ("macs", "macs_start", "params", "params_start"):
        assert record[name] == getattr(run, name)
    assert record["model"] == "resnet8"
    lines = (folder(run) / "widths.json").read_text().splitlines()
    assert len([line for line in lines if '"kind"' in line]) == len(record["layers"])  # a line each


def test_a_network_is_built_from_its_widths(run: Result, tmp_path: Path) -> None:
    widths = aw.read_widths(folder(run))
    assert aw.read_widths(folder(run) / "widths.json") == widths
    for start in (fresh(), build("resnet8", in_channels=1)):  # from any start of the class
        found = aw.apply_widths_(start, folder(run), example_inputs=DIGIT)
        assert found.widths == run.widths
        assert {k: v.shape for k, v in start.state_dict().items()} == {
            k: v.shape for k, v in run.network.state_dict().items()
        }
        start(DIGIT).sum().backward()
    some = fresh()
    name = next(iter(run.widths))
    assert aw.apply_widths_(some, {name: 3}, example_inputs=DIGIT).widths == run.widths_start | {name: 3}
    aw.write_widths(tmp_path, widths)
    assert aw.read_widths(tmp_path) == widths


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"nobody": 3}, "ResNet has no channel group 'nobody': its groups are stem.conv"),
        ({"stem.conv": 0}, "the width of 'stem.conv' is 0, allowed are whole numbers from 1"),
        ({"stem.conv": 2.5}, "the width of 'stem.conv' is 2.5"),
    ],
)
def test_widths_of_another_network_are_refused_and_nothing_changes(widths: dict[str, Any], message: str) -> None:
    network = fresh()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(WidthsError, match=message):
        aw.apply_widths_(network, widths, example_inputs=DIGIT)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_damaged_file_of_widths_is_refused(run: Result, tmp_path: Path) -> None:
    text = (folder(run) / "widths.json").read_text()
    file = tmp_path / "widths.json"
    for broken, message in (
        (text[: len(text) // 2], "is damaged"),
        (text.replace('"out"', '"ouch"'), r"is damaged \(KeyError: 'out'\)"),
        (text.replace('"format": 1', '"format": 2'), "has format 2, this version reads up to 1"),
        ("[]", "is damaged"),
    ):
        file.write_text(broken)
        with pytest.raises(WidthsError, match=message):
            aw.read_widths(tmp_path)
    with pytest.raises(WidthsError, match="there is no such file"):
        aw.read_widths(tmp_path / "nowhere.json")
    with pytest.raises(WidthsError, match="differ in"):
        aw.widths_of(run.network, run.channel_map, start={"stem.conv": 3})


# ---- the hub ---------------------------------------------------------------------------------------------------------

PUSH_AND_LOAD = """
import sys, torch, autowidth as aw
from autowidth.lab.models import build
run, repository = sys.argv[1:]
print(aw.push_to_hub(run, repository, token="hf_test"))
network = aw.from_hub(repository, lambda: build("resnet8", in_channels=1, width=0.5), token="hf_test")
torch.save(network.state_dict(), "loaded.pt")
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with hub() as running:
        yield running


def speaking(server: HubServer, place: Path, *arguments: str, program: str = PUSH_AND_LOAD) -> Any:
    """Runs a program for which the hub is our server on 127.0.0.1, and its cache a folder of its own.

    Our server speaks LFS, not Xet, which the real hub prefers for large files.
    """
    ours = {"HF_ENDPOINT": server.address, "HF_HOME": str(place / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **ours, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=place, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_a_run_goes_to_the_hub_and_comes_back(run: Result, server: HubServer, tmp_path: Path) -> None:
    done = speaking(server, tmp_path, str(folder(run)), "someone/small-net")
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    assert all(torch.equal(loaded[name], value) for name, value in run.network.state_dict().items())
    files = server.files("someone/small-net")
    for name in ("model.safetensors", "run.json", "history.jsonl", "widths.json"):
        assert files[name] == (folder(run) / name).read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: autowidth\n") and "`resnet8`" in card and "aw.from_hub(" in card
    assert server.large == {"model.safetensors"}  # by the way of large files, as the real hub asks for it


def test_what_the_hub_refuses_is_said(run: Result, server: HubServer, tmp_path: Path) -> None:
    program = (
        "import sys, autowidth as aw\n"
        "load, push = lambda: aw.from_hub('someone/nothing', None), lambda: aw.push_to_hub(sys.argv[1], 'a/b/c')\n"
        "for act in (load, push):\n"
        "    try: act()\n"
        "    except aw.AutoWidthError as error: print(type(error).__name__, error)\n"
    )
    done = speaking(server, tmp_path, str(folder(run)), program=program)
    assert done.returncode == 0, done.stderr
    missing, malformed = done.stdout.splitlines()
    assert missing.startswith("HubError cannot load someone/nothing: ") and "404" in missing
    assert malformed.startswith("HubError cannot push run ") and "'a/b/c'" in malformed


def test_a_damaged_run_is_not_pushed(run: Result, tmp_path: Path) -> None:
    shutil.copytree(folder(run), tmp_path / "run")
    weights = tmp_path / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        aw.push_to_hub(tmp_path / "run", "someone/small-net")


def test_without_the_extra_the_hub_says_what_to_install(run: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in (lambda: aw.push_to_hub(folder(run), "a/b"), lambda: aw.from_hub("a/b", fresh)):
        with pytest.raises(MissingExtraError, match=r"pip install 'autowidth\[hub\]'"):
            act()
