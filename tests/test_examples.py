"""What the documentation shows runs: the example of the library without the packages of the laboratory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLE = REPOSITORY / "examples" / "own_loop.py"

BLOCKED = """
import sys, runpy
for name in ("typer", "rich", "pydantic", "pydantic_settings", "pyarrow", "PIL", "sklearn", "tabulate", "matplotlib"):
    sys.modules[name] = None  # as if it were not installed
"""


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_the_example_runs_without_the_packages_of_the_laboratory(tmp_path: Path) -> None:
    program = f"{BLOCKED}runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    done = run(sys.executable, "-c", program, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    accuracy, macs = re.fullmatch(r"epoch 6: accuracy ([\d.]+)% with (\d+)% of the MACs", last).groups()  # type: ignore[union-attr]
    assert float(accuracy) > 90
    assert int(macs) <= 25
    assert {file.name for file in (tmp_path / "runs" / "own").iterdir()} == {
        "model.safetensors", "run.json", "history.jsonl",
    }  # fmt: skip


@pytest.mark.parametrize("options", [(), pytest.param(("--float16",), marks=pytest.mark.slow)])
def test_the_example_in_mixed_precision_runs(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run(sys.executable, str(EXAMPLE.with_name("mixed_precision_loop.py")), *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_learnt(done.stdout)
    assert "bytes" in done.stdout


@pytest.mark.slow
def test_the_example_in_mixed_precision_runs_compiled(tmp_path: Path) -> None:
    done = run(sys.executable, str(EXAMPLE.with_name("mixed_precision_loop.py")), "--compile", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_learnt(done.stdout)


def test_the_example_with_accelerate_runs(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    done = run(sys.executable, str(EXAMPLE.with_name("accelerate_loop.py")), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_learnt(done.stdout)
    assert (tmp_path / "runs" / "accelerate" / "model.safetensors").is_file()


def assert_learnt(printed: str) -> None:
    *_, last = printed.splitlines()
    accuracy, macs = re.fullmatch(r"epoch 8: accuracy ([\d.]+)% with (\d+)% of the MACs", last).groups()  # type: ignore[union-attr]
    assert float(accuracy) > 90
    assert int(macs) <= 25


def test_the_command_without_its_packages_says_what_to_install(tmp_path: Path) -> None:
    program = f"{BLOCKED}sys.argv = ['autowidth', 'train']\nrunpy.run_module('autowidth', run_name='__main__')"
    done = run(sys.executable, "-c", program, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert "pip install 'autowidth[lab]'" in sentence


def test_the_loop_of_the_readme_runs_on_the_network_and_data_of_the_example(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 16
    before, attached, _ = EXAMPLE.read_text().partition("engine = aw.AutoWidth(")
    assert attached
    program = f"{before}\nimages = test[0]\n{block}\nassert engine.macs <= 0.25 * engine.macs_start\n"
    done = run(sys.executable, "-W", "error", "-c", program, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("widths {") == 8
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_plain_installation_brings_five_packages_at_most_and_runs_the_example(tmp_path: Path) -> None:
    """In a fresh environment: ours, and beside those of torch itself numpy, scipy and safetensors."""
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")

    def installed() -> set[str]:
        listed = run(python, "-m", "pip", "list", "--format=freeze", folder=tmp_path)
        return {line.split("==")[0].lower() for line in listed.stdout.splitlines()}

    constraints = ["--constraint", str(REPOSITORY / "constraints.txt"), "--quiet"]
    for what in ("torch", str(REPOSITORY)):
        before = installed()
        done = run(python, "-m", "pip", "install", *constraints, what, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert installed() - before == {"autowidth", "numpy", "scipy", "safetensors"}
    done = run(python, str(EXAMPLE), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 6: accuracy" in done.stdout
