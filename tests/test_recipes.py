"""What the recipes say is what happens: every block of every page is run."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from pages import DOCS, blocks, run_page
from zoo.torchvision_schemas import import_torchvision

RECIPES = DOCS / "recipes"


def photos(place: Path, *, classes: int, each: int) -> None:
    """A folder of real files: the digits of scikit-learn as PNG, 32 x 32, a sub-folder for each class."""
    pixels, labels = load_digits(return_X_y=True)
    for label in range(classes):
        folder = place / "photos" / str(label)
        folder.mkdir(parents=True)
        for number, image in enumerate(pixels[labels == label][:each]):
            picture = Image.fromarray((image.reshape(8, 8) * 255 / 16).astype(np.uint8))
            picture.resize((32, 32)).convert("RGB").save(folder / f"{number}.png")


def needs(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -c constraints.txt -e '.[zoo]'")


# ---- quick ones ------------------------------------------------------------------------------------------------------


def test_the_recipe_of_a_loop_runs(tmp_path: Path) -> None:
    (printed,) = run_page(RECIPES / "own-loop.md", tmp_path)
    accuracy, macs = re.findall(r"^([\d.]+)% with (\d+)% of the MACs$", printed, flags=re.MULTILINE)[0]
    assert float(accuracy) > 85 and int(macs) <= 30
    assert (tmp_path / "runs" / "loop" / "widths.json").is_file()


def test_the_recipe_of_a_network_of_ones_own_runs(tmp_path: Path) -> None:
    shell, python = run_page(RECIPES / "own-network.md", tmp_path, replaced={"--epochs 8": "--epochs 2"})
    assert "features.0" in shell and "accuracy" in shell
    assert re.search(r"LayerWidths\(kind='Conv2d'.*writes_start=64\) 3\d% of the MACs", python)


@pytest.mark.parametrize(("page", "module"), [("unet.md", "unet"), ("time-series.md", "time_series")])
def test_a_script_of_a_recipe_trains_and_resizes(
    page: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch in this process; the whole of it is slow."""
    (script,) = [block for block in blocks(RECIPES / page) if block.file]
    (tmp_path / f"{module}.py").write_text(script.text)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = __import__(module)
    import autowidth as aw

    policy = aw.Budget(macs=0.5, schedule=aw.Schedule(count=1, begin=0.3, end=0.5))
    dense, narrow = (found.trained(0, p, width=4, epochs=1) for p in (aw.Never(), policy))
    assert narrow[1] <= 0.5 * dense[1] and 0 <= narrow[0] < 1 and len(narrow[2]) == len(dense[2])
    sys.modules.pop(module)


DEPLOYED = """
import torch
from torch import nn
import torch.nn.functional as F
import autowidth as aw

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, num_classes)
    def forward(self, x):
        return self.head(self.body(x).flatten(1))

model, x = Net(10), torch.randn(4, 3, 12, 12)
batches = [(x, torch.arange(4))]
policy = aw.Budget(macs=0.5, schedule=aw.Schedule(count=1, begin=0, end=0.5))
engine = aw.AutoWidth(model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=x, probe=batches,
                      loss_fn=F.cross_entropy, policy=policy, total_steps=4)
for _ in range(4):
    engine.step()
extra = {"input_shape": [3, 12, 12]}
aw.save("runs/my-run", model, history=engine.history, channel_map=engine.channel_map, extra=extra)
folder, fresh = "runs/my-run", Net(10)
"""
"""What the page on deployment takes for granted."""


def test_the_page_on_taking_it_away_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "deploy.md").read_text()
    first, second, hub = (block.text for block in blocks(DOCS / "deploy.md"))
    (writing,) = re.findall(r"`(aw\.write_widths\(folder, .*?\))` writes", text, flags=re.DOTALL)
    (applying,) = re.findall(r"`(aw\.apply_widths_\(.*?\))`", text)
    assert "push_to_hub" in hub  # tested where there is a hub
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    known: dict[str, object] = {}
    for program in (DEPLOYED, first, second, writing, applying):
        exec(program.replace("\nstart=", " start="), known)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.pt2", "runs"]
    assert torch.equal(known["model"](known["x"]), known["engine"].model.eval()(known["x"]))  # type: ignore[operator, attr-defined, index]


def test_every_recipe_is_listed_and_every_link_leads_somewhere() -> None:
    pages = {page.name for page in RECIPES.glob("*.md")} - {"README.md"}
    links = {
        page: re.findall(r"\]\(([^)#:]+)\)", page.read_text()) for page in [*RECIPES.glob("*.md"), *DOCS.glob("*.md")]
    }
    assert pages <= set(links[RECIPES / "README.md"])
    assert [
        (page.name, link) for page, found in links.items() for link in found if not (page.parent / link).exists()
    ] == []


# ---- slow ones -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_recipe_of_several_budgets_draws_its_curve(tmp_path: Path) -> None:
    (printed,) = run_page(RECIPES / "several-budgets.md", tmp_path)
    assert printed.count(" MACs, seed ") == 8
    assert (tmp_path / "curve.svg").read_text().count("<path") > 10


@pytest.mark.slow
def test_the_recipe_of_a_trained_network_runs(tmp_path: Path) -> None:
    needs("timm")
    photos(tmp_path, classes=3, each=100)
    *_, last = run_page(RECIPES / "trained-network.md", tmp_path, torchvision=True)
    dense, narrow = (float(found) for found in re.findall(r"accuracy ([\d.]+)%", last))
    print(last)
    assert dense > 80 and narrow > 60
    assert "the same class for" in last and (tmp_path / "smaller.onnx").is_file()


@pytest.mark.slow
def test_the_recipe_of_resnet50_runs_on_small_pictures(tmp_path: Path) -> None:
    needs("torchvision")
    photos(tmp_path, classes=2, each=40)
    import_torchvision()
    from torchvision import models

    torch.manual_seed(0)
    torch.save(models.resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    smaller = {"size = 224": "size = 64", "epochs = 10": "epochs = 1", "batch_size = 64": "batch_size = 16"}
    (printed,) = run_page(RECIPES / "resnet50.md", tmp_path, replaced=smaller, torchvision=True)
    assert "the same class for 100.0%" in printed
    session = onnxruntime.InferenceSession(tmp_path / "photos.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": np.zeros((3, 3, 64, 64), np.float32)})[0].shape == (3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["unet.md", "time-series.md"])
def test_the_figures_of_a_recipe_can_be_made_again(page: str, tmp_path: Path) -> None:
    """With two seeds, and within what seeds differ by."""
    module = {"unet.md": "unet.py", "time-series.md": "time_series.py"}[page]
    (printed,) = run_page(RECIPES / page, tmp_path, replaced={f"python {module}": f"python {module} 2"})
    print(printed)
    pattern = r"^(\w[^:\n]*): ([\d.]+) ± ([\d.]+) %"
    said = {name: (float(mean), float(spread)) for name, mean, spread in re.findall(
        pattern, (RECIPES / page).read_text(), re.MULTILINE)}  # fmt: skip
    found = {name: float(mean) for name, mean, _ in re.findall(pattern, printed, re.MULTILINE)}
    assert found.keys() == said.keys() and len(found) == 3
    assert all(abs(found[name] - mean) < max(2, 1.5 * spread) for name, (mean, spread) in said.items())
