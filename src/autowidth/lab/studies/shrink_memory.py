"""What memory shrinking takes beyond the network and its images, in activations of one batch; and where the time goes.

    python -m autowidth.lab.studies.shrink_memory --data cifar10:PATH --weights resnet56.safetensors
    python -m autowidth.lab.studies.shrink_memory ... --model resnet20-padding --macs 0.5

Resident memory of this process is read every few milliseconds while `shrink_` works; before, images are loaded, the
network is traced and one batch is passed forward and back, so that what torch takes for itself is there already (on its
first trace it imports eight hundred modules). What the C library keeps of freed memory is given back to the system
first, or the peak would hide in it. The same batch passed forward and back once more is what training takes. The
activations of a batch are all that autograd keeps for one backward pass in training mode, each storage counted once.
For Linux with glibc.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from autowidth.lab.data import ImageSet
from autowidth.lab.loop_parts import augmented_batches
from autowidth.lab.prepare import build_network, load_images
from autowidth.lab.settings import settings_of
from autowidth.policy import Budget
from autowidth.review.memory import held_bytes
from autowidth.shrink import shrink_
from autowidth.trace import trace

MIB = 2**20

EVERY = 0.005
"""Seconds between two looks at resident memory."""


def resident() -> int:
    """Bytes of this process in memory, as Linux counts them."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Peak(AbstractContextManager["Peak"]):
    """The most resident memory while this context lasts, in `bytes`; before: what it was, freed memory given back."""

    def __init__(self) -> None:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = self.bytes = resident()
        self.began, self.ended = time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.ended.wait(EVERY):
            self.bytes = max(self.bytes, resident())

    def __enter__(self) -> Peak:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()
        self.bytes = max(self.bytes, resident())


def activation_bytes(network: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of this batch, which is done; parameters are not counted."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def noted(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        loss = F.cross_entropy(network(x), y)
    loss.backward()
    network.zero_grad()
    return sum(kept.values())


def measured(network: nn.Module, images: ImageSet, macs: float, seed: int) -> list[tuple[str, str]]:
    """What shrinking the network to this share of its MACs takes: (what, how much)."""
    batches = augmented_batches(images, seed)
    x, y = next(iter(batches))
    model = held_bytes(network)
    trace(network, x[:2])
    activations = activation_bytes(network.train(), x, y)
    with Peak() as step:
        F.cross_entropy(network(x), y).backward()
    network.zero_grad()
    network.eval()
    with Peak() as peak:
        history = shrink_(
            network, example_inputs=x[:2], batches=batches, loss_fn=F.cross_entropy, policy=Budget(macs=macs), seed=seed
        )
    seconds, more = time.perf_counter() - peak.began, peak.bytes - peak.before
    return [
        ("network", f"{model / MIB:.1f} MiB"),
        (f"activations of a batch of {len(x)}", f"{activations / MIB:.0f} MiB"),
        ("peak of training on it, beyond what was there", f"{(step.bytes - step.before) / MIB:.0f} MiB"),
        ("peak of shrinking", f"{more / MIB:.0f} MiB"),
        ("(peak - 3 networks) / activations", f"{(more - 3 * model) / activations:.2f}"),
        ("seconds", f"{seconds:.0f}"),
        *((f"of them {part}", f"{taken:.0f}") for part, taken in history.seconds_total.items()),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m autowidth.lab.studies.shrink_memory", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", required=True, help="as for autowidth train")
    parser.add_argument("--weights", help="as for autowidth train; not given: fresh ones")
    parser.add_argument("--model", default="resnet56-padding", help="a network of the laboratory")
    parser.add_argument("--macs", type=float, default=0.7, help="end at this share of the MACs")
    parser.add_argument("--limit", type=int, default=4000, help="training images")
    parser.add_argument("--threads", type=int, help="CPU threads; not given: torch's own number")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads or torch.get_num_threads())
    settings = settings_of({"model": asked.model, "data": asked.data, "weights": asked.weights, "limit": asked.limit})
    images = load_images(settings)
    torch.manual_seed(settings.seed)
    rows = measured(build_network(settings, images), images, asked.macs, settings.seed)
    sys.stdout.write(tabulate(rows, tablefmt="github") + "\n")


if __name__ == "__main__":
    main()
