"""The study of an accelerator in small, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autowidth.lab.studies.accelerator import main


def test_the_dry_run_measures_everything_that_is_asked_of_an_accelerator(tmp_path: Path) -> None:
    main(["--dry-run", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    dense, narrow, run = found["dense"], found["narrow"], found["run"]
    assert narrow["macs"] <= 0.5 * dense["macs"]
    assert narrow["held_bytes"] < dense["held_bytes"]
    assert found["memory"][0]["before"] == dense["held_bytes"]
    assert found["memory"][-1]["after"] == narrow["held_bytes"]
    assert run["reviews"] == 3
    assert 0 < run["review_seconds"] < run["seconds"]
    assert all(network[key] > 0 for network in (dense, narrow) for key in ("eager_ms", "compiled_ms"))
    assert found["machine"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_it_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    assert "there is no GPU here: give --device cpu, or --dry-run" in capsys.readouterr().err
