"""What the documentation promises: links lead somewhere, public names have a place, commands of the README run."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import autowidth as aw
from autowidth.cli import app

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [
    page
    for page in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("results/*.md")]
    if page.is_file()
]
LINK = re.compile(r"\]\(([^)\s]+)\)")

NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.body(x))
"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_to_files_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in LINK.findall(text) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / unquote(target)).exists()] == []


def test_the_site_names_every_page_and_the_reference_every_public_name() -> None:
    nav = (REPOSITORY / "mkdocs.yml").read_text().partition("nav:")[2]
    named = set(re.findall(r"(\S+\.md)", nav))
    pages = {str(page.relative_to(REPOSITORY / "docs")) for page in REPOSITORY.glob("docs/**/*.md")}
    assert {page for page in pages if not page.startswith(("log/", "decisions/"))} == named
    listed = set(re.findall(r"^::: autowidth\.(\w+)$", (REPOSITORY / "docs/reference.md").read_text(), re.MULTILINE))
    assert listed == set(aw.__all__) - {"__version__"}


def readme_commands() -> list[str]:
    """The lines of the README that call the program, without their comments."""
    fenced = (REPOSITORY / "README.md").read_text().split("```")[1::2]
    lines = [line for block in fenced for line in block.splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("autowidth ")]


@pytest.fixture
def visitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README's reader has it: a network, its weights, and 12 pictures of each of three digits."""
    (tmp_path / "my_net.py").write_text(NET)
    scope: dict[str, object] = {}
    exec(NET, scope)  # the network that the file describes
    torch.manual_seed(0)
    torch.save(scope["Net"](num_classes=3).state_dict(), tmp_path / "best.pt")  # type: ignore[operator]
    digits = load_digits()
    for name, number in (("nought", 0), ("one", 1), ("two", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for count, pixels in enumerate(digits.images[digits.target == number][:12]):
            picture = Image.fromarray((pixels * 15).astype("uint8")).resize((32, 32)).convert("RGB")
            picture.save(tmp_path / "photos" / name / f"{count}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_net", raising=False)  # other tests have other networks of this name
    monkeypatch.setenv("AUTOWIDTH_EPOCHS", "2")
    monkeypatch.setenv("AUTOWIDTH_BATCH_SIZE", "8")
    return tmp_path


def test_every_command_of_the_readme_runs_in_its_order(visitor: Path) -> None:
    commands = readme_commands()
    assert len(commands) >= 6
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.stderr}"
