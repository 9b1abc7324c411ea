"""A rank of two that Lightning trains under ddp, and goes on from a checkpoint; run by test_compiled_ranks.py."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from zoo.torchvision_schemas import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from autowidth.integrations.lightning import AutoWidthCallback
from autowidth.policy import Budget, Schedule
from autowidth.review.effort import Effort


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fitted(folder: Path, epochs: int, steps: int, *more: Any, ckpt_path: str | None = None) -> dict[str, Any]:
    """A run of so many epochs: widths, and weights."""
    torch.manual_seed(0)
    net = Net()
    widths = AutoWidthCallback(
        policy=Budget(macs=0.4, schedule=Schedule(count=5, begin=0.1, end=0.9)), total_steps=steps,
        effort=Effort(probe_samples=32, audit_samples=32, audit_filters=2),
    )  # fmt: skip
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(192, 1, 8, 8), torch.randint(4, (192,)))
    pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=2, strategy="ddp", logger=False, callbacks=[widths, *more],
        enable_checkpointing=bool(more), enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    ).fit(net, DataLoader(data, batch_size=16), ckpt_path=ckpt_path)  # fmt: skip
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    share = widths.engine.macs / widths.engine.macs_start
    return {"widths": [e.widths for e in widths.engine.history], "macs": share, "weights": weights.tolist()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[2])
    whole = fitted(out, 2, 12)
    fitted(out, 1, 12, ModelCheckpoint(out, filename="half"))
    again = fitted(out, 2, 12, ckpt_path=str(out / "half.ckpt"))
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps({"whole": whole, "again": again}))
