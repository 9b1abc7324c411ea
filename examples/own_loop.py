"""Your network in your loop: needs `pip install autowidth` and nothing else."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autowidth as aw


def pictures(count: int, seed: int) -> TensorDataset:
    """Noisy stripes of four directions, (3, 16, 16): what stands for your data."""
    source = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (count,), generator=source)
    angle, shift = label * torch.pi / 4, torch.rand(count, generator=source) * 6
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = torch.sin(x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None] + shift[:, None, None])
    return TensorDataset(wave[:, None] + 3 * torch.randn(count, 3, 16, 16, generator=source), label)


class Net(nn.Module):
    """Any module of yours."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


torch.manual_seed(0)
epochs, loader, test = 6, DataLoader(pictures(2000, 0), batch_size=64, shuffle=True), pictures(500, 1).tensors
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
engine = aw.AutoWidth(
    model, optimizer, example_inputs=test[0][:2], probe=loader, loss_fn=F.cross_entropy,
    policy=aw.Budget(macs=0.25), total_steps=epochs * len(loader),
)  # fmt: skip

for epoch in range(epochs):
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        event = engine.step()  # cheap; now and then a review
        if event:
            print(f"  step {event.step}: widths {list(event.widths.values())}")
    model.eval()
    right = (model(test[0]).argmax(1) == test[1]).float().mean().item()
    print(f"epoch {epoch + 1}: accuracy {right:.1%} with {engine.macs / engine.macs_start:.0%} of the MACs")

aw.save("runs/own", model, history=engine.history, channel_map=engine.channel_map)
again = Net()
aw.load_(again, "runs/own", example_inputs=test[0][:2])  # a fresh model of your class takes the shapes of the file
assert torch.equal(again.eval()(test[0]), model(test[0]))
