"""The callback for Lightning: unmodified modules, accumulation, precision plugins, checkpoints, loggers, refusals."""

from __future__ import annotations

import contextlib
import csv
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autowidth.cost import count_macs
from autowidth.lab.data import digits
from autowidth.policy import Budget, Schedule
from autowidth.review.effort import Effort
from zoo.torchvision_schemas import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()  # metrics import it where it is there, and beside a CPU-only torch that needs help
pl: Any = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from torchmetrics import Accuracy  # noqa: E402

from autowidth.integrations.lightning import AutoWidthCallback, CallbackError, load_  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # Lightning warns of workers, loggers and small data

EFFORT = Effort(probe_samples=64, audit_samples=64, audit_filters=6)
IMAGE = torch.zeros(2, 1, 8, 8)


class Classifier(pl.LightningModule):  # type: ignore[misc,name-defined]
    """A module as people write it: metrics, logging, a scheduler that steps with the batches."""

    def __init__(self, kind: str = "sgd") -> None:
        super().__init__()
        self.kind = kind
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(16, 10)
        self.accuracy = Accuracy(task="multiclass", num_classes=10)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        scores = self(x)
        self.accuracy.update(scores, y)
        loss = F.cross_entropy(scores, y)
        self.log("loss", loss, on_step=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.seen = int(sum(getattr(self.accuracy, name).sum() for name in ("tp", "fn")))
        self.accuracy.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        sgd, adamw = torch.optim.SGD, torch.optim.AdamW
        optimizer = (
            sgd(self.parameters(), lr=0.05, momentum=0.9) if self.kind == "sgd" else adamw(self.parameters(), lr=3e-3)
        )
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ByHand(Classifier):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


@functools.cache
def data() -> TensorDataset:
    parts = list(digits(limit=384).plain_batches("train", 64))
    return TensorDataset(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))


def loader() -> DataLoader[Any]:
    """12 batches, always in the same order."""
    return DataLoader(data(), batch_size=32)


def callback(**options: Any) -> AutoWidthCallback:
    options.setdefault("policy", Budget(macs=0.5, schedule=Schedule(count=4, begin=0.1, end=0.9)))
    return AutoWidthCallback(effort=EFFORT, **options)


def module(kind: type[Classifier] = Classifier, *args: Any) -> Classifier:
    torch.manual_seed(0)
    return kind(*args)


def trainer(tmp_path: Path, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    options.setdefault("logger", False)
    options.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks), default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_unmodified_module_ends_at_its_budget_and_every_logger_is_told(tmp_path: Path, kind: str) -> None:
    net, widths = module(Classifier, kind), callback()
    full = count_macs(net, IMAGE)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer(tmp_path, widths, logger=logger, log_every_n_steps=5).fit(net, loader())
    assert count_macs(net, IMAGE) == widths.engine.macs <= 0.5 * full
    assert widths.engine.total_steps == widths.engine.steps == 24
    assert len(widths.engine.history) == 4
    assert net.seen == len(data())  # metrics have not counted what reviews look at
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    told = [row for row in rows if row["autowidth/macs"]]
    assert [int(row["step"]) for row in told] == [0, *(event.step for event in widths.engine.history)]
    assert float(told[-1]["autowidth/macs"]) == widths.engine.macs
    assert all(float(told[-1][f"autowidth/width/{g}"]) == w for g, w in widths.engine.widths.items())
    assert told[-1]["autowidth/worth_spearman"] and told[-1]["autowidth/loss"]
    assert net.on_load_checkpoint.__func__ is pl.LightningModule.on_load_checkpoint


def test_accumulation_and_a_precision_plugin_are_those_of_the_trainer(tmp_path: Path) -> None:
    net, widths = module(), callback()
    trainer(tmp_path, widths, accumulate_grad_batches=3, precision="bf16-mixed").fit(net, loader())
    assert widths.engine.total_steps == widths.engine.steps == 8
    assert widths.engine.macs <= 0.5 * widths.engine.macs_start
    assert not any(note.startswith("gradients") for event in widths.engine.history for note in event.notes)
    assert all(p.dtype is torch.float32 for p in net.parameters())


@pytest.mark.parametrize("averaged", [False, True])
def test_a_checkpoint_goes_on_across_a_resize_to_the_same_end(tmp_path: Path, averaged: bool) -> None:
    """Stopped after the first of two epochs, in which widths have changed, and gone on with in a fresh module."""

    def extra() -> list[Any]:
        return [EMAWeightAveraging(decay=0.8)] if averaged else []

    whole, first, second = module(), module(), module()
    to_the_end, before, after = callback(), callback(total_steps=24), callback()
    trainer(tmp_path, to_the_end, *extra()).fit(whole, loader())
    keeper = ModelCheckpoint(tmp_path / "kept", filename="one", save_on_train_epoch_end=True)
    trainer(tmp_path, before, *extra(), keeper, epochs=1).fit(first, loader())
    assert before.engine.macs < before.engine.macs_start
    trainer(tmp_path, after, *extra()).fit(second, loader(), ckpt_path=tmp_path / "kept" / "one.ckpt")
    assert after.engine.history.events[:1] == before.engine.history.events[:1]
    assert after.engine.widths == to_the_end.engine.widths
    assert after.engine.macs_start == to_the_end.engine.macs_start
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_checkpoint_gives_its_widths_to_tests_and_to_whoever_loads_it(tmp_path: Path) -> None:
    net, keeper = module(), ModelCheckpoint(tmp_path / "kept", filename="last")
    trainer(tmp_path, callback(), keeper).fit(net, loader())
    path = tmp_path / "kept" / "last.ckpt"
    fresh = module()
    (found,) = trainer(tmp_path, callback()).test(fresh, loader(), ckpt_path=path, verbose=False)
    x, y = data().tensors
    assert found["test_loss"] == pytest.approx(F.cross_entropy(net.eval()(x), y).item(), rel=1e-5)
    again = module()
    load_(again, path)
    assert torch.equal(again.eval()(x), net(x))
    with pytest.raises(CallbackError, match=r"has no state of an AutoWidthCallback for part='head'"):
        load_(module(), path, part="head")


def test_a_part_is_resized_and_the_rest_is_not(tmp_path: Path) -> None:
    net, widths = module(), callback(part="backbone", policy=Budget(macs=0.8))
    trainer(tmp_path, widths).fit(net, loader())
    assert widths.engine.model is net.backbone
    assert net.head.in_features == 16
    assert net.backbone[0].out_channels < 12
    with pytest.raises(CallbackError, match=r"part='body' is no part of Classifier, which has backbone, head"):
        trainer(tmp_path, callback(part="body")).fit(module(), loader())


def test_manual_optimization_needs_a_loss_and_the_number_of_steps(tmp_path: Path) -> None:
    with pytest.raises(CallbackError, match=r"steps its optimizers itself .* pass loss=.* and total_steps"):
        trainer(tmp_path, callback()).fit(module(ByHand), loader())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(CallbackError, match=r"steps cannot be counted beforehand: pass total_steps"):
        trainer(tmp_path, callback(loss=loss)).fit(module(ByHand), loader())
    widths = callback(loss=loss, total_steps=24)
    trainer(tmp_path, widths).fit(module(ByHand), loader())
    assert widths.engine.steps == 24
    assert widths.engine.macs <= 0.5 * widths.engine.macs_start


class Idle(Classifier):
    def configure_optimizers(self) -> Any:
        return None


class Late(Classifier):
    """Exchanges its optimizer in the middle."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), lr=0.01)]


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (Idle, loader, "configure_optimizers of Idle gives no optimizer"),
        (Late, loader, "the optimizers of Late have changed while it was trained"),
        (Classifier, lambda: [next(iter(loader()))] * 8, "the training data are a list, .*: pass probe="),
    ],
)
def test_what_it_cannot_work_with_is_refused_by_name(tmp_path: Path, kind: Any, given: Any, words: str) -> None:
    with pytest.raises(CallbackError, match=words):
        trainer(tmp_path, callback()).fit(module(kind), given())


def test_no_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CallbackError, match=r"the Trainer has no end .*: pass total_steps"):
        trainer(tmp_path, callback(), epochs=-1).fit(module(), loader())


def test_the_engine_is_there_once_training_has_begun() -> None:
    with pytest.raises(CallbackError, match="no engine yet"):
        _ = callback().engine


OTHER_PACKAGE = """
import sys
sys.path.insert(0, sys.argv[1])
from zoo.torchvision_schemas import import_torchvision
try:
    import_torchvision()
except ImportError:
    pass
import pytorch_lightning as pl
sys.modules["lightning"] = None
import torch, torch.nn.functional as F
from torch import nn
from autowidth.integrations.lightning import AutoWidthCallback
from autowidth.policy import Budget

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch):
        return {"loss": F.cross_entropy(self(batch[0]), batch[1])}
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

data = torch.utils.data.TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(2, (64,)))
widths = AutoWidthCallback(policy=Budget(macs=0.5))
pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
           enable_model_summary=False, callbacks=[widths]).fit(Net(), torch.utils.data.DataLoader(data, batch_size=8))
assert widths.engine.macs <= 0.5 * widths.engine.macs_start
"""


def test_it_works_with_the_package_pytorch_lightning_too(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    command = [sys.executable, "-c", OTHER_PACKAGE, str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_lightning_the_import_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys\nsys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "import autowidth.integrations.lightning"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("needs Lightning: pip install 'autowidth[lightning]'")
