"""A loop of a user's own that saves, is killed, and goes on: run by the tests as a process of its own.

python own_training.py FOLDER sgd|adamw STEPS DIE_AT
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import autowidth as aw


class Noisy(Dataset[tuple[Tensor, int]]):
    """Images that are augmented out of all three global generators."""

    def __init__(self) -> None:
        source = torch.Generator().manual_seed(0)
        self.images, self.labels = torch.randn(96, 1, 8, 8, generator=source), torch.arange(96) % 4

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(1) * 0.1 + random.random() * 0.1 + np.random.rand() * 0.1
        return self.images[index] * (1 + noise.float()), int(self.labels[index])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 10, 3, padding=1), nn.Linear(10, 4)
        self.register_buffer("seen", torch.zeros(()), persistent=False)  # in no state dict

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        x = F.dropout(self.norm(self.first(x)).relu(), 0.2, self.training)
        return self.head(self.second(x).relu().mean((2, 3)))


def main(folder: Path, kind: str, steps: int, die_at: int) -> None:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model = Net().to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    if kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        schedule: object = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, amsgrad=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    data = Noisy()
    loader = aw.Resumable(DataLoader(data, batch_size=16, shuffle=True, num_workers=0))
    probe = DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(1))
    engine = aw.AutoWidth(
        model, optimizer, example_inputs=torch.zeros(2, 1, 8, 8), probe=probe, loss_fn=F.cross_entropy,
        policy=aw.Budget(macs=0.6, schedule=aw.Schedule(count=5, begin=0.1, end=0.9), limits=aw.Limits(grace=1)),
        total_steps=steps, followers=[average], effort=aw.Effort(probe_samples=32, audit_samples=32, audit_filters=2),
    )  # fmt: skip
    mine = torch.Generator().manual_seed(7)
    parts = {"schedule": schedule, "loader": loader, "mine": mine, "scaler": torch.amp.GradScaler("cpu")}
    if aw.saved_trainings(folder):
        aw.resume_(folder, engine, parts=parts)
    engine.history.attach(folder.parent / "history.jsonl")
    while engine.steps < steps:
        for images, labels in loader:
            if engine.steps == steps:
                break
            model.train()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images + 0.01 * torch.randn(1, generator=mine)), labels)
            loss.backward()
            optimizer.step()
            schedule.step(loss.item()) if kind == "sgd" else schedule.step()  # type: ignore[attr-defined]
            average.update_parameters(model)
            engine.step()
            aw.save_training(folder, engine, parts=parts, extra={"step": engine.steps})
            if engine.steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sums = hashlib.sha256()
    for module in (model, average):
        for tensor in (*module.state_dict().values(), *module.buffers()):
            sums.update(tensor.contiguous().numpy().tobytes())
    for entry in optimizer.state_dict()["state"].values():
        for value in entry.values():
            sums.update(torch.as_tensor(value).contiguous().numpy().tobytes())
    steps_of = [event.step for event in aw.History.read(folder.parent / "history.jsonl")]
    drawn = (random.random(), np.random.rand(), torch.rand(()).item(), torch.rand((), generator=mine).item())
    print(sums.hexdigest(), optimizer.param_groups[0]["lr"], engine.widths, steps_of, drawn)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
