"""Variants of decisions: today's code can run every row, from held-out images, and each decision names its command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from autowidth.lab.bench import BenchError
from autowidth.lab.methods import METHODS
from autowidth.lab.settings import SettingsError
from autowidth.lab.studies.variants import VARIANTS, Variant, main, table, training_of, unit_of, variants

DECISIONS = Path(__file__).resolve().parent.parent / "docs" / "decisions"
ROWS = [(decision, row) for decision, rows in VARIANTS.items() for row in rows]


def squeezed(text: str) -> str:
    """A table without the blanks that align its columns."""
    return re.sub(" +", " ", text)


@pytest.mark.parametrize(("decision", "row"), ROWS, ids=[f"{d}-{row.label}" for d, row in ROWS])
def test_every_row_is_what_todays_code_can_run(decision: str, row: Variant) -> None:
    assert row.method in METHODS
    training = training_of(row, "cifar10:PATH", 3)
    assert (training.holdout, training.limit, training.seed, training.threads) == (0.5, 40_000, 3, 1)
    assert (training.model, training.width, training.epochs, training.pool) == (row.model, row.start, 16, 2)
    policy = training.policy
    for name, value in {**row.settings.get("budget", {}), **row.settings.get("auto", {})}.items():
        parts = (policy, policy.schedule, policy.limits)
        assert [getattr(part, name) for part in parts if hasattr(part, name)] == [value]
    assert training.lr == row.settings.get("lr", 0.6)


@pytest.mark.parametrize("decision", VARIANTS)
def test_rows_have_names_of_their_own_and_the_decision_names_the_command(decision: str) -> None:
    labels = [row.label for row in VARIANTS[decision]]
    assert len(set(labels)) == len(labels)
    suite = variants(decision, "cifar10:PATH", seeds=(0, 1))
    assert len({unit.name for unit in suite.units}) == 2 * len(labels) == len(suite.units)
    (file,) = DECISIONS.glob(f"{decision}-*.md")
    assert f"python -m autowidth.lab.studies.variants {decision}" in file.read_text()


def test_rows_that_differ_run_differently() -> None:
    for rows in VARIANTS.values():
        told = [(row.method, row.model, row.macs, row.start, training_of(row, "cifar10:PATH", 0)) for row in rows]
        assert all(one != other for n, one in enumerate(told) for other in told[n + 1 :])


def test_a_units_name_changes_with_its_settings() -> None:
    one = unit_of("009", Variant(label="a", settings={"lr": 0.1}), "digits", 0)
    other = unit_of("009", Variant(label="a", settings={"lr": 0.2}), "digits", 0)
    elsewhere = unit_of("009", Variant(label="a", settings={"lr": 0.1}), "digits", 0)
    assert one.name != other.name and one == elsewhere
    again = unit_of("009", Variant(label="a", settings={"lr": 0.1}), "digits", 1)
    assert again.name == one.name.replace("seed0", "seed1")


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(BenchError, match="decision '001' has no variants"):
        variants("001", "digits")
    with pytest.raises(BenchError, match="no row of decision 009 is named nothing"):
        variants("009", "digits", rows=["nothing"])
    with pytest.raises(BenchError, match="cifar10 or digits"):
        variants("009", "folder:photos")
    with pytest.raises(SettingsError, match="sped"):
        training_of(Variant(label="a", settings={"budget": {"sped": 1}}), "digits", 0)


def test_the_command_runs_a_row_from_two_seeds_and_not_again(tmp_path: Path) -> None:
    asked = ["008", "--data", "digits", "--seeds", "0-1", "--rows", "VGG-8, uniform", "--epochs", "1"]
    main([*asked, "--out", str(tmp_path), "--processes", "2"])
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "variants-008").glob("*.json")}
    main([*asked, "--out", str(tmp_path)])
    assert len(files) == 2 and all(file.stat().st_mtime_ns == time for file, time in files.items())
    records = json.loads((tmp_path / "variants-008.json").read_text())
    assert [(r["seed"], r["part"], r["label"]) for r in records] == [
        (s, "held_out", "VGG-8, uniform width") for s in (0, 1)
    ]
    assert all(0.2 < r["macs"] / r["macs_dense"] <= 0.25 for r in records)
    text = (tmp_path / "variants-008.md").read_text()
    assert "| VGG-8, uniform width |" in squeezed(text) and "| 0, 1 |" in squeezed(text)


def test_the_table_keeps_the_order_of_the_decision() -> None:
    def record(label: str, seed: int) -> dict[str, object]:
        return {
            "label": label, "predicted": "", "accuracy": 0.5 + seed / 100, "loss": 1.0, "macs": 1, "macs_dense": 4,
            "cpu_seconds": 2.0, "seed": seed,
        }  # fmt: skip

    text = squeezed(table("009", ["b", "a"], [record("gone", 0), record("a", 1), record("a", 0), record("b", 0)]))
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")][1:] == ["| b", "| a", "| gone"]
    assert "| a | | 50.50 ± 0.71 | 1.000 ± 0.000 | 25.0 | 2 | 0, 1 |" in text
