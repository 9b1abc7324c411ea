"""What a run needs before it trains: what cannot be is refused in a sentence, and leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autowidth.attach import NothingToResizeError
from autowidth.lab.loop import DivergedError, train
from autowidth.lab.models import UnknownModelError
from autowidth.lab.prepare import DeviceError, FolderError, ModelError, check_folder
from autowidth.policy import Budget, BudgetError, Never
from composed import composed
from test_train import short

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": "resnet21"}, UnknownModelError, "resnet20"),
    ({"model": "vgg16"}, ModelError, "at least 16 x 16.*vgg8"),
    ({"model": "test_train:broken", "width": 1.0}, ModelError, "no such luck"),
    ({"model": "test_train:Dropping"}, ModelError, "width"),
    ({"model": "test_train:Flat", "width": 1.0}, NothingToResizeError, "no channel group"),
    ({"model": "torch.nn:Identity", "width": 1.0}, ModelError, "one score per class"),
    ({"model": "torch.nn:LazyBatchNorm1d", "width": 1.0}, ModelError, "does not run on images"),
    ({"device": "cuda:99"}, DeviceError, "cuda:99"),
    ({"device": "abacus"}, DeviceError, "allowed are auto, cpu"),
    ({"policy": Budget(macs=0.001)}, BudgetError, "least that widths allow"),
    ({"policy": composed(Budget(macs=1.5), offer=0.0)}, BudgetError, "offer"),
    ({"policy": Never(), "lr": 1e30}, DivergedError, "lower lr, which is 1e"),
    ({"lr": 1e30}, FloatingPointError, "diverged"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED, ids=[f"{next(iter(c))}-{k}" for c, k, _ in REFUSED])
def test_a_run_that_cannot_be_is_refused_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        train(short(out=tmp_path / "a" / "b", **changes))
    assert list(tmp_path.iterdir()) == []


def a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "run"


def full_of_other_things(folder: Path) -> Path:
    (folder / "thesis.tex").touch()
    return folder


@pytest.mark.parametrize("make", [a_file, below_a_file, full_of_other_things])
def test_a_folder_that_cannot_take_a_run_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FolderError, match="name a"):
        check_folder(folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_a_run_and_a_new_one_are_taken_and_left_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").touch()
    (tmp_path / "old" / "notes.txt").touch()
    (tmp_path / "cut short").mkdir()
    (tmp_path / "cut short" / ".run.json.0123456789abcdef").touch()
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name in ("old", "cut short", "empty", "new", "new/and/deep"):
        check_folder(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
