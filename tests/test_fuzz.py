"""Settings and command lines of any content: they are understood, or refused in one sentence with exit code 2."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from autowidth.__main__ import main
from autowidth.errors import AutoWidthError
from autowidth.lab.prepare import build_network, load_images
from autowidth.lab.settings import Settings, SettingsError, settings_from

quick = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
long = settings(quick, max_examples=3000)

ODD = st.sampled_from([
    "", " ", "\0", "\n", "nan", "-inf", "1e999", "9" * 400, "-1", "0", "1", "2", "0.5", "3.5", "true", "null", "[]",
    "{}", "../..", "/dev/null", "~", "\ud800", "é", "%s", "{x}", "[bold]", "x" * 5000, "--", "-", "digits", "resnet8",
    "resnet20", "folder:", "folder:\0", "folder:/dev", "cifar10:.", "os:abort", "a:b:c", "cuda:-1", "cpu", "meta",
    "cuda:999999999999", "budget", "price", "imagenet", "0,0,0,1,1,1", "hf:",
])  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 3), st.sampled_from([10**6, 2**31, 2**63, 10**30, -(10**30)]), st.floats(), st.floats(0, 1)
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, ODD, st.text(max_size=8))
NAMES = st.one_of(
    st.sampled_from([*Settings.model_fields, "name", "macs", "count", "begin", "end", "offer", "multiple", "minimum",
                     "probe_samples", "audit_filters", "mean", "std", "protect", "grace"]),
    st.text(max_size=6),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))
TABLES = st.dictionaries(NAMES, VALUES, max_size=4)
POLICIES = st.fixed_dictionaries(
    {"policy": st.dictionaries(st.sampled_from(["name", "macs", "params", "latency", "schedule", "limits"]), VALUES)}
)


def understood(path: Path) -> bool:
    """Whether the file holds settings; else it is refused in a sentence."""
    try:
        settings_from({}, config=path)
    except SettingsError:
        return False
    return True


def check_table(place: Path, table: dict[str, Any]) -> None:
    path = place / "run.json"
    path.write_text(json.dumps(table))
    understood(path)


@quick
@given(TABLES | POLICIES)
@example({"looks": 2})
@example({"policy": {"name": [1]}})
@example({"policy": {"name": "budget", "macs": 10**30, "schedule": {"count": 10**9}}})
@example({"width": 1e300, "model": "\ud800", "out": "\0"})
@example({"effort": {"probe_samples": "x"}, "normalize": {"mean": [0, "a"], "std": None}})
def test_any_table_is_settings_or_refused(tmp_path: Path, table: dict[str, Any]) -> None:
    check_table(tmp_path, table)


@pytest.mark.slow
@long
@given(TABLES | POLICIES)
def test_thousands_of_tables_are_settings_or_refused(tmp_path: Path, table: dict[str, Any]) -> None:
    check_table(tmp_path, table)


TEXTS = (
    'model = "resnet8"\nepochs = 3\npolicy = {name = "budget", macs = 0.5, schedule = {count = 2}}\n',
    '{"model": "resnet8", "epochs": 3, "policy": {"name": "price", "nats_per_model": 0.1}}',
    "", "[", "a = " + "[" * 5000, "[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "3", "null", "epochs = 1_0",
    "x = 1979-05-27",
)  # fmt: skip


@quick
@given(st.sampled_from(TEXTS), st.sampled_from((".toml", ".json", "")), st.randoms(use_true_random=False))
def test_any_text_is_a_configuration_or_refused(tmp_path: Path, text: str, ending: str, chance: Any) -> None:
    data = bytearray(text.encode())
    for _ in range(chance.randint(0, 4) if data else 0):
        data[chance.randrange(len(data))] = chance.choice(b'\0\xff"=[]{},.0x\n')
    path = tmp_path / f"run{ending}"
    path.write_bytes(data)
    understood(path)


def test_the_files_are_understood_when_nothing_is_changed(tmp_path: Path) -> None:
    for text, ending in zip(TEXTS[:2], (".toml", ".json"), strict=True):
        path = tmp_path / f"run{ending}"
        path.write_text(text)
        assert understood(path)


# ---- command lines ---------------------------------------------------------------------------------------------------


class NotTrainedError(AutoWidthError, RuntimeError):
    """What is in place of the first epoch."""


def prepared(settings: Settings, **keywords: object) -> None:
    """Everything that `train` does before the first step; then stops."""
    images = load_images(settings)
    build_network(settings, images)
    raise NotTrainedError("ready to train")


OPTIONS = ("--model", "--data", "--macs", "--params", "--latency", "--latency-ms", "--price", "--auto", "--policy",
           "--epochs", "--batch-size", "--lr", "--seed", "--width", "--out", "--weights", "--new-head", "--normalize",
           "--config", "--device", "--threads", "--no-edit", "--json", "--quiet", "--input", "--size", "--pool",
           "--top", "--suite", "--seeds", "--keep", "--keep-nats", "--keep-time", "--help", "--nothing")  # fmt: skip
COMMANDS = ("train", "eval", "predict", "inspect", "shrink", "", "none")
LINES = st.tuples(
    st.sampled_from(COMMANDS), st.lists(ODD, max_size=2), st.lists(st.tuples(st.sampled_from(OPTIONS), ODD), max_size=4)
)


def ended(arguments: list[str]) -> tuple[int, str]:
    """Exit code and complaint of the program, called in this process."""
    said = io.StringIO()
    before, path = sys.argv, sys.path.copy()
    sys.argv = ["autowidth", *arguments]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as ending:
        return int(ending.code or 0), said.getvalue()
    finally:
        sys.argv, sys.path[:] = before, path
    raise AssertionError("the program did not end")


def check_line(line: tuple[str, list[str], list[tuple[str, str]]]) -> None:
    command, arguments, options = line
    code, said = ended([command, *arguments, *(part for option in options for part in option)])
    assert code in (0, 2), said
    assert "Traceback" not in said
    if said.startswith("autowidth: "):
        assert said.count("\n") == 1


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder in which nothing is trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("autowidth.cli.train.train", prepared)
    monkeypatch.setattr("autowidth.cli.train.train_kept", prepared)
    monkeypatch.setitem(os.environ, "COLUMNS", "120")
    return tmp_path


@quick
@given(LINES)
@example(("train", [], [("--width", "1e300")]))
@example(("train", [], [("--model", "\ud800")]))
@example(("train", [], [("--data", "folder:\0"), ("--out", "\0")]))
@example(("train", [], [("--model", "resnet8"), ("--epochs", "9" * 400), ("--threads", "999999999")]))
@example(("train", [], [("--out", "\0"), ("--model", "resnet8")]))
@example(("predict", ["\0", "\0"], []))
@example(("eval", ["x" * 5000], []))
@example(("inspect", ["resnet8"], [("--input", "2,3,999999999,999999999")]))
@example(("inspect", ["resnet8"], [("--input", "9" * 400)]))
def test_any_line_ends_in_0_or_2(bench: Path, line: tuple[str, list[str], list[tuple[str, str]]]) -> None:
    check_line(line)


@pytest.mark.slow
@long
@given(LINES)
def test_thousands_of_lines_end_in_0_or_2(bench: Path, line: tuple[str, list[str], list[tuple[str, str]]]) -> None:
    check_line(line)


def test_a_line_that_is_right_comes_as_far_as_training(bench: Path) -> None:
    assert ended(["train", "--model", "resnet8", "--quiet"]) == (2, "autowidth: ready to train\n")
