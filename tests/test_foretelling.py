"""What foretells how a shape ends: orders that agree, orders that do not, and cuts whose losses are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autowidth.lab.loop_parts import evaluate
from autowidth.lab.models import build
from autowidth.lab.prepare import load_images
from autowidth.lab.studies.foretelling import MEASURES, Cutting, agreements, main, recorded, trained
from autowidth.lab.studies.shape_settings import space_of, training_of, uniform_shape
from autowidth.lab.studies.shapes import GLIMPSED

SMALL = "resnet8-digits"


def record(widths: tuple[int, ...], accuracy: float, **more: Any) -> dict[str, Any]:
    """A record of the study of shapes."""
    common = {"setting": SMALL, "part": "held_out", "origin": "structured", "params": sum(widths), "early": []}
    return {**common, "widths": list(widths), "accuracy": accuracy, **more}


def test_an_order_that_is_the_final_one_has_rank_correlation_one_and_a_constant_has_none() -> None:
    accuracies = list(np.linspace(0.5, 0.9, 12))
    quantities = [{"same": a**3, "reverse": -a, "constant": 1.0, "sometimes": a} for a in accuracies]
    del quantities[0]["sometimes"]
    found = {of["quantity"]: of for of in agreements(quantities, accuracies)}
    assert set(found) == {"same", "reverse", "constant"}
    assert found["same"]["spearman"] == pytest.approx(1) and found["reverse"]["spearman"] == pytest.approx(-1)
    assert found["constant"]["spearman"] == 0
    assert all(of["low"] <= of["spearman"] <= of["high"] for of in found.values())


def test_repeats_of_a_shape_are_one_shape_and_other_parts_and_runs_of_ours_are_left_out() -> None:
    shape, other = uniform_shape(SMALL), tuple(w + 1 for w in uniform_shape(SMALL))
    looks = [{"step": 3, "loss": 1.0}], [{"step": 3, "loss": 2.0}]
    shapes = trained([
        record(shape, 0.5, early=looks[0]), record(shape, 0.7, early=looks[1]), record(other, 0.9),
        record(other, 0.1, part="test"), record(other, 0.1, origin="own-run"), record(other, 0.1, setting="vgg8-mini"),
    ], SMALL)  # fmt: skip
    assert [tuple(s["widths"]) for s in shapes] == [shape, other]
    assert [s["accuracy"] for s in shapes] == pytest.approx([0.6, 0.9])
    assert shapes[0]["early"] == {3: 1.5} and shapes[1]["early"] == {}
    said = recorded(SMALL, shapes[0])
    assert said["loss 3 steps after the start"] == -1.5 and said["nearness to uniform width"] == 0
    assert recorded(SMALL, shapes[1])["nearness to uniform width"] < 0


def test_a_cut_of_nothing_loses_nothing_and_keeps_everything_and_a_deeper_cut_keeps_less() -> None:
    images = load_images(training_of(SMALL, "digits", seed=0))
    torch.manual_seed(0)
    network = build("resnet8", num_classes=10, in_channels=1).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cutting = Cutting(network, images)
    whole = cutting.foretold(tuple(cutting.channel_map.widths.values()))
    _, loss = evaluate(network, images.plain_batches("held_out", GLIMPSED), torch.contiguous_format)
    assert whole["loss as cut"] == pytest.approx(-loss, rel=1e-5)
    assert whole["loss reconstructed"] == pytest.approx(-loss, rel=1e-5)
    assert all(whole[f"{name} kept"] == pytest.approx(1) for name in MEASURES if name in ("l1", "l2", "bn-scale"))
    half = cutting.foretold(tuple(max(w // 2, 1) for w in cutting.channel_map.widths.values()))
    assert half["l1 kept"] < 1 and half["worth kept"] != whole["worth kept"]
    assert all(np.isfinite(value) for value in half.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_the_command_says_it_of_every_setting_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    space = space_of(SMALL)
    shapes = [uniform_shape(SMALL), *(tuple(w + n for w in space.dense) for n in range(4))]
    records = [record(shape, 0.5 + 0.1 * n) for n, shape in enumerate(shapes)]
    (tmp_path / "shapes.json").write_text(json.dumps(records), encoding="utf-8")
    main(["--shapes", str(tmp_path), "--out", str(tmp_path / "foretold.json")])
    said = capsys.readouterr().out
    assert f"## {SMALL}" in said and "| parameters" in said and "5 shapes" in said
    written = json.loads((tmp_path / "foretold.json").read_text())
    assert {of["setting"] for of in written} == {SMALL}
    (size,) = [of for of in written if of["quantity"] == "parameters"]
    assert size["spearman"] == pytest.approx(1)
