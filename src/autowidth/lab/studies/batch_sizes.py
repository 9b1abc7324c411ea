"""How many images to work on at once without training: images a second of processor time, by batch size.

    python -m autowidth.lab.studies.batch_sizes                  ResNet-20 at 32 x 32 and at 16 x 16
    python -m autowidth.lab.studies.batch_sizes --model vgg8 --size 16

In evaluation mode, float32, one thread. The batch sizes take turns, `ROUNDS` times over, and the median is taken, so
that what else the machine does falls on all alike. `PIXELS` of lab/loop_parts.py rests on it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import nn

from autowidth.lab.models import build

BATCHES = (16, 32, 64, 128, 256, 512, 1000)
"""Images in a batch."""

ROUNDS = 3


def pace(network: nn.Module, batch: int, size: int, images: int) -> float:
    """Images a second of processor time, in about so many images of size x size."""
    x = torch.randn(batch, 3, size, size)
    count = max(images // batch, 1)
    with torch.no_grad():
        network(x)  # the first of a shape prepares the convolutions
        began = time.process_time()
        for _ in range(count):
            network(x)
        return count * batch / (time.process_time() - began)


def paces(model: str, size: int, images: int) -> dict[int, float]:
    """The median pace by batch size."""
    network = build(model).eval()
    rounds = [{batch: pace(network, batch, size, images) for batch in BATCHES} for _ in range(ROUNDS)]
    return {batch: statistics.median(found[batch] for found in rounds) for batch in BATCHES}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m autowidth.lab.studies.batch_sizes", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="resnet20", help="a network of the laboratory")
    parser.add_argument("--size", type=int, action="append", help="pixels on a side; not given: 32 and 16")
    parser.add_argument("--images", type=int, default=2000, help="images of a measurement")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {size: paces(asked.model, size, asked.images) for size in asked.size or (32, 16)}
    rows = [[batch, *(f"{by[batch]:.0f}" for by in found.values())] for batch in BATCHES]
    heads = ["images in a batch", *(f"{asked.model}, {size} x {size}" for size in found)]
    sys.stdout.write(tabulate(rows, heads, "github") + "\n")


if __name__ == "__main__":
    main()
