"""Published networks made smaller: every method keeps its promise; the suite runs, goes on and tells what it found."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from autowidth.cost import count_macs
from autowidth.lab.bench import BenchError, bench
from autowidth.lab.data import ImageSet, load
from autowidth.lab.loop_parts import evaluate
from autowidth.lab.merging import Filters, mergeable, merged, scaling
from autowidth.lab.methods import UnknownMethodError
from autowidth.lab.models import build
from autowidth.lab.prepare import build_network, load_images
from autowidth.lab.published_table import published_plot, published_table
from autowidth.lab.removing import METHODS, Removal, inside_widths, seen, with_precise_norms
from autowidth.lab.studies.fine_tuning import LAYOUTS, Layout, layouts, settings_of_row
from autowidth.lab.studies.fine_tuning import main as layout_main
from autowidth.lab.studies.published_parts import PARTS, best, main
from autowidth.lab.suites import find_suite
from autowidth.lab.suites.published import TABLES, as_trained, settings_for
from autowidth.lab.tuning import TAUGHT, TUNED, Tuning
from autowidth.policy import BudgetError
from autowidth.trace import trace

X = torch.zeros(2, 3, 8, 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 training and 60 test pictures of 8 x 8 in ten colours, laid out as CIFAR-10."""
    folder = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (10, 3))
    for name, count in (("train-0.parquet", 400), ("test-0.parquet", 60)):
        labels = [number % 10 for number in range(count)]
        noisy = [np.clip(colours[k] + rng.normal(0, 40, (8, 8, 3)), 0, 255).astype(np.uint8) for k in labels]
        rows = []
        for pixels in noisy:
            Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
            rows.append({"bytes": buffer.getvalue()})
        pq.write_table(pa.table({"img": rows, "label": labels}), folder / name)
    return folder


@pytest.fixture(scope="module")
def images(place: Path) -> ImageSet:
    return as_trained(load(f"cifar10:{place}", holdout=0.2))


@pytest.fixture(scope="module")
def network(images: ImageSet) -> nn.Module:
    """A ResNet-8 of half the width with padding shortcuts that tells the colours apart."""
    torch.manual_seed(0)
    trained = build("resnet8-padding", width=1.0)
    optimizer = torch.optim.SGD(trained.parameters(), 0.05, momentum=0.9)
    for _ in range(6):
        for x, y in images.training_batches(32, seed=0):
            optimizer.zero_grad()
            F.cross_entropy(trained(x), y).backward()
            optimizer.step()
    return trained.eval()


@pytest.fixture(scope="module")
def weights(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this network's weights."""
    folder = tmp_path_factory.mktemp("weights")
    save_file(network.state_dict(), folder / "resnet8.safetensors")
    return folder


def accuracy(network: nn.Module, images: ImageSet) -> float:
    return evaluate(network, images.plain_batches("test", 60), torch.contiguous_format)[0]


# ---- the methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_every_method_meets_the_target_and_leaves_the_network_alone(
    name: str, network: nn.Module, images: ImageSet
) -> None:
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    task = Removal(network=network, images=images, macs=0.6, seed=3)
    smaller = METHODS[name](task)
    assert 0.3 * count_macs(network, X) < count_macs(smaller, X) <= 0.6 * count_macs(network, X)
    assert not any(module.training for module in smaller.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    again = METHODS[name](task)
    assert all(torch.equal(one, other) for one, other in zip(smaller.parameters(), again.parameters(), strict=True))


def test_reconstruction_repairs_what_a_measure_removes(network: nn.Module, images: ImageSet) -> None:
    def loss(name: str) -> float:
        smaller = METHODS[name](Removal(network=network, images=images, macs=0.5, seed=0))
        return evaluate(smaller, images.plain_batches("held_out", 80), torch.contiguous_format)[1]

    for name in ("l1", "fpgm"):
        assert loss(f"{name}-reconstructed") < loss(name)


def test_precise_norms_are_plain_averages_and_the_same_for_all(network: nn.Module, images: ImageSet) -> None:
    spoilt = copy.deepcopy(network)
    for module in spoilt.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(9.0)  # type: ignore[union-attr]
    found = with_precise_norms(spoilt, images, 0)
    batches = seen(images, 8192, 2**17)
    stem = network.get_submodule("stem.conv")
    pixels = torch.cat([stem(x) for x, _ in batches]).transpose(0, 1).flatten(1)
    norm = found.get_submodule("stem.norm")
    torch.testing.assert_close(norm.running_mean, pixels.mean(1).detach(), rtol=1e-3, atol=1e-4)
    assert accuracy(found, images) > accuracy(spoilt, images)
    assert not any(module.training for module in found.modules())


def test_images_are_varied_as_they_were(images: ImageSet) -> None:
    assert (images.augmentation.edge, images.augmentation.flip, images.augmentation.padding) == ("zero", True, 1)


# ---- neuron merging --------------------------------------------------------------------------------------------------


def twins() -> nn.Module:
    """A network in which filter 2 of the inside of a block is three times filter 0, and its norm twice that of 0's."""
    torch.manual_seed(0)
    network = build("resnet8-padding").eval()
    first = network.get_submodule("stages.0.0.first")
    conv, norm = first.get_submodule("conv"), first.get_submodule("norm")
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
        conv.weight[2] = 3 * conv.weight[0]  # type: ignore[index]
        norm.running_mean[2] = 3 * norm.running_mean[0]  # type: ignore[index]
        norm.running_var[2] = 9 * (norm.running_var[0] + 1e-5) - 1e-5  # type: ignore[index]
        norm.weight[2], norm.bias[2] = 2 * norm.weight[0], 2 * norm.bias[0]  # type: ignore[index]
    return network


def test_a_filter_that_is_a_multiple_of_another_is_merged_without_loss() -> None:
    network = twins()
    channel_map = trace(network, X)
    name = next(g.name for g in channel_map.groups if "stages.0.0.first" in g.name)
    smaller = merged(network, channel_map, {name: [2]})
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), network(x), rtol=1e-4, atol=1e-4)
    assert smaller.get_submodule("stages.0.0.first.conv").weight.shape[0] == 15  # type: ignore[union-attr,index]


def test_scales_are_those_of_the_formulas() -> None:
    torch.manual_seed(0)
    n = 5
    f = Filters(
        w=torch.randn(n, 12).double(), gamma=torch.rand(n).double() + 0.5, beta=torch.randn(n).double(),
        mu=torch.randn(n).double(), sigma=torch.rand(n).double() + 0.5,
    )  # fmt: skip
    found = scaling(f, [1, 3])
    for gone in (0, 2, 4):
        scores, scales, cosines = [], [], []
        for k in (1, 3):
            s = f.w[gone].norm() / f.w[k].norm()
            cosines.append(float(F.cosine_similarity(f.w[gone], f.w[k], dim=0)))
            scales.append(float(s * f.gamma[gone] / f.gamma[k] * f.sigma[k] / f.sigma[gone]))
            shift = s * (f.mu[k] - f.sigma[k] * f.beta[k] / f.gamma[k]) - f.mu[gone]
            scores.append(abs(float(f.gamma[gone] / f.sigma[gone] * shift + f.beta[gone])) / scales[-1])
        spread = [(score - min(scores)) / (max(scores) - min(scores)) for score in scores]
        total = [0.85 * (1 - c) + 0.15 * b for c, b in zip(cosines, spread, strict=True)]
        chosen = total.index(min(total))
        expected = [0.0, 0.0]
        if cosines[chosen] >= 0.1:
            expected[chosen] = scales[chosen]
        assert found[[1, 3], gone].tolist() == pytest.approx(expected)
    assert torch.equal(found[[1, 3]][:, [1, 3]], torch.eye(2).double())
    assert not found[[0, 2, 4]].any()


def test_only_insides_of_blocks_are_merged() -> None:
    network = build("resnet8-padding")
    channel_map = trace(network, X)
    able = mergeable(network, channel_map)
    assert able == {g.name: f"stages.{n}.0.first.norm" for n, g in enumerate(
        g for g in channel_map.groups if ".first." in g.name)}  # fmt: skip
    left = inside_widths(channel_map, able, 0.7)
    assert set(left) == set(able) and all(1 <= left[name] < channel_map.group(name).width for name in able)
    with pytest.raises(BudgetError, match="one channel each"):
        inside_widths(channel_map, able, 0.001)


# ---- the suite -------------------------------------------------------------------------------------------------------


def asked(place: Path, weights: Path, **changes: Any) -> dict[str, Any]:
    few = {"models": ("resnet8",), "budgets": (0.6,), "limit": 320, "methods": ("dense", "autowidth", "neuron-merging")}
    return {"data": f"cifar10:{place}", "weights": str(weights), **few, **changes}


def test_the_suite_runs_goes_on_and_tells(place: Path, weights: Path, tmp_path: Path) -> None:
    suite = find_suite("published", **asked(place, weights, tables=("no-training",)))
    records = bench(suite, tmp_path, processes=1)
    assert [r["method"] for r in records] == ["autowidth", "dense", "neuron-merging"]
    promised = {
        "table", "model", "method", "target", "macs", "macs_dense", "params", "accuracy", "seed", "epochs", "seconds"
    }  # fmt: skip
    assert all(promised <= set(r) and r["table"] == "no-training" and r["epochs"] == 0 for r in records)
    by_name = {r["method"]: r for r in records}
    assert by_name["dense"]["macs"] == by_name["dense"]["macs_dense"]
    assert all(by_name[name]["macs"] <= 0.6 * by_name[name]["macs_dense"] for name in ("autowidth", "neuron-merging"))
    assert by_name["dense"]["accuracy_as_left"] > 0.5
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "published").glob("*.json")}
    text = "".join(file.read_text() for file in (tmp_path / "published").glob("*.json"))
    assert str(place) not in text and str(weights) not in text and "cifar10:PATH" in text and "folder:PATH" in text
    more = find_suite(
        "published", **asked(place, weights, tables=("fine-tuned",), epochs=1, methods=("autowidth", "l1"))
    )
    bench(more, tmp_path, processes=1)
    now = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "published").glob("*.json")}
    assert len(now) == 5 and all(now[name] == time for name, time in written.items())
    table = (tmp_path / "published.md").read_text()
    assert (
        "## resnet8, without training" in table and "## resnet8, fine-tuned" in table and "At 60% of the MACs" in table
    )
    assert (tmp_path / "published.svg").stat().st_size > 1000
    assert len(json.loads((tmp_path / "published.json").read_text())) == 5


@pytest.mark.parametrize("name", ["autowidth", "l1"])
def test_a_taught_method_learns_from_what_was_brought(name: str, place: Path, weights: Path) -> None:
    suite = find_suite("published", **asked(place, weights, tables=("fine-tuned",), epochs=1, methods=(name,)))
    settings = settings_for(suite.units[0].settings)
    images, brought = load_images(settings), build_network(settings, load_images(settings)).eval()

    def ends(method: str) -> list[Tensor]:
        network = copy.deepcopy(brought)
        task = Tuning(settings=settings, images=images, network=network, macs=0.6)
        return list(TUNED[method](task).network.state_dict().values())

    before = copy.deepcopy(brought.state_dict())
    plain, taught = ends(name), ends(name + TAUGHT)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(plain, taught, strict=True))
    assert all(torch.equal(before[key], content) for key, content in brought.state_dict().items())


def test_units_can_be_chosen_and_have_names_of_their_own() -> None:
    suite = find_suite(
        "published", data="cifar10:PATH", weights="PATH", models=("resnet20",), budgets=(0.7, 0.5), seeds=(0, 1),
        device="cuda",
    )  # fmt: skip
    assert len({unit.name for unit in suite.units}) == len(suite.units) == 4 * (len(METHODS) + len(TUNED))
    assert all("--device cuda" in unit.command and "--weights PATH" in unit.command for unit in suite.units)
    tuned = [unit for unit in suite.units if unit.settings["table"] == "fine-tuned"]
    assert {unit.settings["training"]["epochs"] for unit in tuned} == {TABLES["fine-tuned"].epochs}
    kept = settings_for(tuned[0].settings)
    assert (kept.model, kept.lr, kept.schedule, kept.policy.limits.offer) == ("resnet20-padding", 0.05, "cosine", 0.0)
    short = find_suite("published", data="cifar10:PATH", weights="PATH", epochs=2, tables=("fine-tuned",))
    assert not {unit.name for unit in short.units} & {unit.name for unit in suite.units}


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"data": "digits"}, BenchError, "pass --data cifar10:PATH"),
    ({"weights": None}, BenchError, "pass --weights FOLDER"),
    ({"tables": ("no-trainig",)}, BenchError, "allowed are no-training, fine-tuned"),
    ({"methods": ("autowith",)}, UnknownMethodError, "did you mean autowidth"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG)
def test_what_is_not_there_is_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        find_suite("published", **{"data": "cifar10:PATH", "weights": "PATH", **changes})


# ---- parts -----------------------------------------------------------------------------------------------------------


def record(method: str, target: float, held_out: float, **changes: Any) -> dict[str, Any]:
    return {
        "table": "no-training", "model": "resnet20", "method": method, "target": target, "accuracy_held_out": held_out,
        "accuracy": held_out - 0.05, "accuracy_as_left": 0.1, "cpu_seconds": 2.0, "seed": 0, **changes,
    }  # fmt: skip


def test_the_best_are_those_of_most_held_out_accuracy_where_all_were_measured() -> None:
    records = [
        record("a", 0.5, 0.7), record("b", 0.5, 0.8), record("c", 0.5, 0.6), record("c", 0.7, 0.99),
        record("b", 0.5, 0.1, table="fine-tuned"), record("c", 0.5, 1.0, model="resnet56"),
    ]  # fmt: skip
    assert best(records, 2, among=("a", "b", "c")) == ("b", "a")
    assert best([], 2, among=("a", "b", "c")) == ("a", "b")


def test_all_parts_are_what_the_suite_takes(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO")
    main(["--data", "cifar10:PATH", "--weights", "PATH", "--list", "--out", str(tmp_path), "--device", "cuda"])
    lines = [line for line in caplog.messages if line.startswith("autowidth bench published")]
    assert len(lines) == len(PARTS) and all("--device cuda" in line for line in lines)
    for part in PARTS:
        find_suite(
            "published", data="cifar10:PATH", weights="PATH", tables=(part.table,), models=(part.model,),
            methods=part.methods([]), budgets=part.targets, seeds=part.seeds,
        )  # fmt: skip
    with pytest.raises(SystemExit):
        main(["--data", "cifar10:PATH", "--weights", "PATH", "--part", "99"])


def test_a_part_runs(place: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autowidth.lab.studies import published_parts

    part = published_parts.Part(
        about="", table="no-training", model="resnet8", targets=(0.7,), methods=lambda _: ("dense", "l1")
    )
    monkeypatch.setattr(published_parts, "PARTS", (part,))
    main(["--data", f"cifar10:{place}", "--weights", str(weights), "--limit", "300", "--out", str(tmp_path)])
    assert {r["method"] for r in published_parts.records_in(tmp_path)} == {"dense", "l1"}


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_the_table_marks_the_best_and_sets_others_figures_apart(tmp_path: Path) -> None:
    rows = [
        record("dense", 0.5, 0.95), record("autowidth", 0.5, 0.8), record("autowidth", 0.5, 0.9, seed=1),
        record("l1", 0.5, 0.3), record("l1", 0.7, 0.6, model="resnet56"),
    ]  # fmt: skip
    text = published_table(rows)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["autowidth", "80.00 ± 7.07 *", "2", "0, 1"] in cells
    assert ["l1", "25.00", "2", "0"] in cells and ["dense", "90.00", "2", "0"] in cells
    assert "## resnet56, figures of others" in text and "CORING" in text
    published_plot(rows, tmp_path / "picture.svg")
    assert "autowidth" in (tmp_path / "picture.svg").read_text() or (tmp_path / "picture.svg").stat().st_size > 1000
    published_plot([], tmp_path / "nothing.svg")
    assert not (tmp_path / "nothing.svg").exists()


# ---- how a network is trained on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", LAYOUTS, ids=[row.label for row in LAYOUTS])
def test_every_layout_is_what_the_run_gets(row: Layout, place: Path, weights: Path) -> None:
    suite = layouts(f"cifar10:{place}", str(weights), model="resnet8", rows=[row.label])
    settings = settings_of_row(suite.units[0].settings)
    assert row.method in TUNED
    assert all(getattr(settings, name) == value for name, value in row.train.items())
    assert all(getattr(settings.policy.schedule, name) == value for name, value in row.schedule.items())
    assert all(getattr(settings.policy.limits, name) == value for name, value in row.limits.items())
    assert settings.lr == row.train.get("lr", 0.05) and settings.policy.limits.offer == row.limits.get("offer", 0.0)


def test_layouts_differ_and_run(place: Path, weights: Path, tmp_path: Path) -> None:
    suite = layouts(f"cifar10:{place}", str(weights), model="resnet8", seeds=(0, 1))
    assert len({unit.name for unit in suite.units}) == 2 * len(LAYOUTS)
    told = [json.dumps({**unit.settings, "label": "", "predicted": ""}, sort_keys=True) for unit in suite.units]
    assert len(set(told)) == len(told)
    few = ["--model", "resnet8", "--rows", "one review", "--epochs", "1", "--out", str(tmp_path)]
    layout_main(["--data", f"cifar10:{place}", "--weights", str(weights), *few])
    (record,) = json.loads((tmp_path / "fine-tuning.json").read_text())
    assert record["part"] == "held_out" and record["accuracy_start"] > 0.5 and record["inserted"] == 0
    assert "| one review at the first step" in (tmp_path / "fine-tuning.md").read_text()
