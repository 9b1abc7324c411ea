"""Your network in your loop with Accelerate: needs `pip install autowidth accelerate`.

python examples/accelerate_loop.py, or on several processes: torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
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


set_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(64, 4),
)  # fmt: skip
accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
epochs, data, test = 8, pictures(2000, 0), pictures(500, 1).tensors
model, optimizer, loader = accelerator.prepare(
    net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), DataLoader(data, batch_size=32, shuffle=True)
)
steps = epochs * -(-len(loader) // accelerator.gradient_accumulation_steps)
engine = aw.AutoWidth(
    model, optimizer, example_inputs=test[0][:2], probe=DataLoader(data, batch_size=64, shuffle=True),
    loss_fn=F.cross_entropy, policy=aw.Budget(macs=0.25), total_steps=steps,
)  # fmt: skip

for epoch in range(epochs):
    model.train()
    for images, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
            event = engine.step()  # counts optimizer steps: in the middle of an accumulation it does nothing
        if event:
            accelerator.print(f"  step {event.step}: widths {list(event.widths.values())}")
    model.eval()
    with torch.no_grad():
        right = (model(test[0]).argmax(1) == test[1]).float().mean().item()
    accelerator.print(f"epoch {epoch + 1}: accuracy {right:.1%} with {engine.macs / engine.macs_start:.0%} of the MACs")

assert engine.steps == steps
if accelerator.is_main_process:
    aw.save("runs/accelerate", accelerator.unwrap_model(model), history=engine.history, channel_map=engine.channel_map)
accelerator.end_training()
