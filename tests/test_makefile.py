"""The furniture: what `make` does, what is installed, what is pinned."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import autowidth
from autowidth.lab import PACKAGES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent
TABLES = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT, TOOLS = TABLES["project"], TABLES["tool"]
PINS = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
FILES = ("Makefile", "pyproject.toml", "constraints.txt")

FAKE_PYTHON = """#!/bin/sh
echo "$@" >> calls
case "$1 $2" in
    "-m venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/autowidth;;
esac
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the files that make reads, and a Python that writes down how it is called."""
    for name in FILES:
        shutil.copy(REPOSITORY / name, tmp_path)
    fake = tmp_path / "fakepython"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    return tmp_path


def calls(folder: Path, *targets: str) -> list[str]:
    """Runs make for real and returns how Python and the program were called."""
    log = folder / "calls"
    log.unlink(missing_ok=True)
    command = ["make", "--silent", f"PYTHON={folder / 'fakepython'}", *targets]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return log.read_text().splitlines() if log.exists() else []


def normal(requirement: str) -> str:
    """The bare name of a requirement, in the spelling of the package index."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!;\[ ]", requirement, maxsplit=1)[0]).lower()


def test_make_alone_is_the_demo_and_installs_only_what_it_needs(copy: Path) -> None:
    told = calls(copy)
    assert told[-1] == "train --auto --out runs/demo"
    installs = [line for line in told if "pip install" in line]
    assert len(installs) == 1
    assert "--constraint constraints.txt" in installs[0]
    assert "dev" not in installs[0]
    assert installs[0].endswith("--editable .[lab]")


def test_the_environment_is_made_once(copy: Path) -> None:
    first = calls(copy, "test")
    assert sum("venv" in line for line in first) == 1
    assert sum(".[dev]" in line for line in first) == 1
    assert calls(copy, "test") == ["-m pytest -n 2"]
    assert calls(copy, "demo") == ["train --auto --out runs/demo"]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_the_environment_is_made_anew_when_its_description_changes(copy: Path, changed: str) -> None:
    calls(copy, "test")
    later = (copy / ".venv" / ".dev").stat().st_mtime + 10

    os.utime(copy / changed, (later, later))
    again = calls(copy, "test")
    assert sum("-m venv --clear" in line for line in again) == 1
    assert sum("pip install" in line for line in again) == 2


def test_check_is_lint_types_and_test(copy: Path) -> None:
    done = subprocess.run(["make", "-n", "check"], cwd=copy, check=True, capture_output=True, text=True)
    said = [part for part in ("ruff check", "ruff format --check", "mypy", "pytest") if part in done.stdout]
    assert len(said) == 4


def test_help_lists_every_verb(copy: Path) -> None:
    done = subprocess.run(["make", "--silent", "help"], cwd=copy, check=True, capture_output=True, text=True)
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    phony = re.search(r"^\.PHONY: (.*)$", (copy / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    assert listed == phony[1].split()
    assert listed[0] == "demo"


def test_clean_leaves_the_runs(copy: Path) -> None:
    calls(copy, "test")
    for folder in ("runs/demo", "src/autowidth/__pycache__", "tests/__pycache__", ".mypy_cache"):
        (copy / folder).mkdir(parents=True)
    calls(copy, "clean")
    left = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_dir()}
    assert left == {"runs", "runs/demo", "src", "src/autowidth", "tests"}


def test_every_pin_is_exact_and_portable() -> None:
    exact = re.compile(r'[A-Za-z0-9_.-]+==\d[\w.]*(; python_version (<|>=) "3\.11")?')
    assert [pin for pin in PINS if not exact.fullmatch(pin)] == []


def test_everything_that_is_asked_for_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["lab"], *extras["bench"], *extras["docs"], *extras["dev"]]
    asked = [requirement for requirement in asked if not requirement.startswith("autowidth[")]
    pinned = {normal(pin) for pin in PINS}
    assert {normal(requirement) for requirement in asked} <= pinned
    # A pin for one side of Python 3.11 needs its twin, unless only old Pythons need the package.
    halves = [normal(pin) for pin in PINS if ">=" in pin]
    assert {normal(pin) for pin in PINS if "python_version <" in pin} >= set(halves)


def test_the_program_and_the_extras_have_the_promised_names() -> None:
    assert PROJECT["scripts"] == {"autowidth": "autowidth.__main__:main"}
    logs = {"report", "tensorboard", "mlflow"}
    promised = {"lab", "lightning", *logs, "hub", "onnx", "submit", "bench", "zoo", "docs", "dev"}
    assert set(PROJECT["optional-dependencies"]) == promised
    assert PROJECT["requires-python"] == ">=3.10"
    assert all(
        "autowidth[lab]" in asked
        for extra, asked in PROJECT["optional-dependencies"].items()
        if extra not in ("lab", "lightning", "onnx")
    )


def test_the_library_alone_needs_four_packages() -> None:
    assert {normal(requirement) for requirement in PROJECT["dependencies"]} == {
        "torch",
        "numpy",
        "scipy",
        "safetensors",
    }


def test_the_laboratory_names_the_packages_of_its_extra() -> None:
    imported = {"pillow": "PIL", "scikit-learn": "sklearn", "pydantic-settings": "pydantic_settings"}
    drawn = {"plotly", "jinja2"}  # a run that cannot draw its page says so, and goes on
    names = {normal(requirement) for requirement in PROJECT["optional-dependencies"]["lab"]} - {"tomli"} - drawn
    assert {imported.get(name, name) for name in names} == set(PACKAGES)


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    read = (REPOSITORY / TOOLS["hatch"]["version"]["path"]).read_text()
    assert re.findall(r'^__version__ = "(.*)"$', read, flags=re.MULTILINE) == [autowidth.__version__]
