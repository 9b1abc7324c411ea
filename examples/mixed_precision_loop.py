"""Your network in your loop with autocast, a GradScaler, gradient accumulation and, if you like, torch.compile.

python examples/mixed_precision_loop.py [--float16] [--compile]
"""

import sys

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


device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if "--float16" in sys.argv else torch.bfloat16
epochs, parts = 8, 2  # a batch comes in two parts, whose gradients are added up

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(64, 4),
).to(device)  # fmt: skip
data, test = pictures(2048, 0), [tensor.to(device) for tensor in pictures(500, 1).tensors]
loader = DataLoader(data, batch_size=32, shuffle=True)
fast = torch.compile(model) if "--compile" in sys.argv else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scaler = torch.amp.GradScaler(device)
engine = aw.AutoWidth(
    fast, optimizer, example_inputs=test[0][:2], probe=loader, loss_fn=F.cross_entropy,
    policy=aw.Budget(macs=0.25), total_steps=epochs * len(loader) // parts,
)  # fmt: skip

for epoch in range(epochs):
    model.train()
    for number, (images, labels) in enumerate(loader, 1):
        with torch.autocast(device, dtype):
            loss = F.cross_entropy(fast(images.to(device)), labels.to(device)) / parts
        scaler.scale(loss).backward()
        if number % parts:
            continue
        scaler.step(optimizer)  # leaves the step out where a gradient is not finite: the engine does not count it
        scaler.update()
        optimizer.zero_grad()
        event = engine.step()
        if event:
            print(f"  step {event.step}: widths {list(event.widths.values())}, {event.memory['after']:,} bytes")
    model.eval()
    with torch.no_grad(), torch.autocast(device, dtype):
        right = (model(test[0]).argmax(1) == test[1]).float().mean().item()
    print(f"epoch {epoch + 1}: accuracy {right:.1%} with {engine.macs / engine.macs_start:.0%} of the MACs")
