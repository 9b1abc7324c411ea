"""To add a thing is one function or class in one file: scratch ones are dropped into a copy of the package, and work.

What CONTRIBUTING.md promises under "How to add a thing"; the row in a test table is the second place, and there is no
third.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "autowidth"

POLICY = '''

@policy("scratch")
@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """Removes one filter of the first group at every review."""

    every: int = 10
    limits: Limits = field(default_factory=Limits)

    @property
    def unit(self) -> Unit:
        return "macs"

    @property
    def aim(self) -> str:
        return f"one filter every {self.every} steps"

    def check(self, start: Start) -> None:
        """Accepts everything."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        """Every so many steps."""
        return tuple(range(self.every, total_steps + 1, self.every))

    def decide(self, situation: Situation) -> Decision:
        """The first filter of the first group."""
        from autowidth.channels import IndexMap

        report = situation.groups[0]
        return Decision(plan={report.name: IndexMap.removing([0], report.width)})
'''

IMPORTANCE = '''
"""The first weight of a filter (nobody, nowhere)."""

from __future__ import annotations

from typing import Any

from autowidth.lab.baselines.axes import sum_over_writers
from autowidth.lab.baselines.registry import importance
from autowidth.review.statistics import effective_weights


@importance(name="scratch", unit=None, scope="layer", source="nobody, nowhere")
def scratch(model: Any, channel_map: Any, batches: Any, loss: Any, *, generator: Any) -> Any:
    """The size of the first weight, (width,) by channel group."""
    return sum_over_writers(channel_map, effective_weights(model), lambda filters: filters[:, 0].abs())
'''

SUITE = '''
"""A suite that counts."""

from __future__ import annotations

from typing import Any

from autowidth.lab.bench import Outcome, Suite, Unit
from autowidth.lab.suites.registry import suite


def count(settings: Any) -> Outcome:
    """The number itself."""
    return Outcome(records=[{"number": settings["number"]}], raw=[])


@suite("scratch")
def scratch(*, seeds: Any = (0,), **asked: Any) -> Suite:
    """A unit for each seed."""
    units = tuple(Unit(name=f"n{n}", settings={"number": n}, command="autowidth bench scratch") for n in seeds)
    return Suite(name="scratch", units=units, run=count, table=str, apart=frozenset({"number"}))
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, to add to."""
    shutil.copytree(SOURCE, tmp_path / "autowidth", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "autowidth"


def command(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command of the copy, run in its folder."""
    return subprocess.run(
        [sys.executable, "-m", "autowidth", *arguments], cwd=package.parent, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def changed(package: Path) -> list[str]:
    """The files of the copy that differ from the package or are new."""
    files = [path.relative_to(package) for path in package.rglob("*.py")]
    return [str(f) for f in files if not (SOURCE / f).exists() or (SOURCE / f).read_text() != (package / f).read_text()]


def test_a_policy_is_a_class_in_one_file(package: Path) -> None:
    targets = package / "policy" / "targets.py"
    targets.write_text(targets.read_text() + POLICY)
    done = command(
        package, "train", "--policy", "scratch", "--model", "resnet8", "--epochs", "1", "--out", "run", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "one filter every 10 steps" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["removed"] == result["reviews"] > 0
    assert changed(package) == ["policy/targets.py"]


def test_a_published_importance_is_a_function_in_one_file(package: Path) -> None:
    (package / "lab" / "baselines" / "scratch.py").write_text(textwrap.dedent(IMPORTANCE).lstrip())
    done = command(package, "bench", "digits", "--methods", "scratch", "--epochs", "2", "--out", "results")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((package.parent / "results" / "digits.json").read_text())
    assert record["method"] == "scratch"
    assert record["macs"] <= 0.25 * record["macs_dense"]
    assert changed(package) == ["lab/baselines/scratch.py"]


def test_a_suite_is_a_function_in_one_file(package: Path) -> None:
    (package / "lab" / "suites" / "scratch.py").write_text(textwrap.dedent(SUITE).lstrip())
    done = command(package, "bench", "scratch", "--seeds", "3,5", "--out", "results")
    assert done.returncode == 0, done.stderr
    assert json.loads((package.parent / "results" / "scratch.json").read_text()) == [{"number": 3}, {"number": 5}]
    assert changed(package) == ["lab/suites/scratch.py"]
