"""What a run has won in time: its starting and its final network side by side, and the layers that keep it back."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autowidth.channels import ChannelMap
from autowidth.cost import macs_cost
from autowidth.lab.loop_parts import cpu_threads
from autowidth.lab.prepare import built
from autowidth.lab.saved import Opened, open_run
from autowidth.latency import timed
from autowidth.measure import (
    FILLED,
    ROUNDS,
    LayerTimes,
    Runtime,
    Timing,
    layer_macs,
    rounded_copy,
    time_layers,
    time_side_by_side,
)
from autowidth.trace import trace
from autowidth.widths import widths_of

START, FINAL, FULL = "start", "final", f"filled to {FILLED}"

SPARED = 1.05
"""A layer is unkind if all its channels up to the next multiple of 16 would cost less than this factor in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer before and after: its widths, MACs of one image, milliseconds of a batch.

    filled: the same with all widths of the network raised to the next multiple of 16. excess: milliseconds above what
    MACs promised, which is start x macs / macs_start. unkind: the widths are raised, more is computed, and it takes no
    longer.
    """

    layer: str
    reads: int
    writes: int
    reads_start: int
    writes_start: int
    macs: int
    macs_start: int
    start: float
    final: float
    filled: float
    excess: float
    unkind: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was timed, and on what. macs: network -> MACs of one image.

    latency_ms: network -> the least `--latency-ms` that it meets: one image in eager PyTorch, as `autowidth train`
    times it. load: processes that wanted a core, averaged over the minute before: above 0 others worked too. rest:
    network -> milliseconds beside its layers.
    """

    run: str
    model: str
    processor: str
    threads: int
    load: float
    versions: dict[str, str]
    macs: dict[str, int]
    timings: tuple[Timing, ...]
    layers_in: Runtime
    layers_batch: int
    layers: tuple[Layer, ...]
    rest: dict[str, float]
    latency_ms: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """All of it, in what JSON can hold."""
        return asdict(self)

    def of(self, network: str, runtime: Runtime, batch: int) -> Timing:
        """The timing of a network. Raises StopIteration where there is none."""
        return next(t for t in self.timings if (t.network, t.runtime, t.batch) == (network, runtime, batch))

    def speedup(self, timing: Timing) -> tuple[float, float]:
        """How many times faster than the starting network: by medians of wall time, and of processor time."""
        start = self.of(START, timing.runtime, timing.batch)
        return start.median / timing.median, start.processor / max(timing.processor, 1e-9)


def measure_run(
    path: Path,
    *,
    runtimes: Sequence[Runtime] | None = None,
    batches: Sequence[int] = (1, 32),
    multiple: int | None = None,
    threads: int | None = None,
    rounds: int = ROUNDS,
) -> Measured:
    """Times a run's starting and final network on this machine's CPU, and one rounded to a multiple if asked for.

    runtimes: None for eager PyTorch and, where its packages are installed, ONNX Runtime. Layers are timed in the last
    of them that has layers, at the largest batch. threads: None for as many as torch takes.

    Raises what `open_run` and `time_side_by_side` raise.
    """
    opened = open_run(path)
    chosen = tuple(
        runtimes or (("eager", "onnx") if find_spec("onnxruntime") and find_spec("onnxscript") else ("eager",))
    )
    networks = _networks(opened, multiple)
    example, load = torch.zeros(2, *opened.input_shape), os.getloadavg()[0]
    plain = {name: network for name, (network, _) in networks.items() if name != FULL}
    timings = time_side_by_side(plain, example, runtimes=chosen, batches=batches, threads=threads, rounds=rounds)
    layered: Runtime = next((r for r in reversed(chosen) if r != "compiled"), "eager")
    three = {name: networks[name][0] for name in (START, FINAL, FULL)}
    times = time_layers(three, example, runtime=layered, batch=max(batches), threads=threads, rounds=rounds)
    with cpu_threads(threads):
        used = torch.get_num_threads()
        latencies = [1000 * seconds for seconds in timed(list(plain.values()), example[:1])]
    return Measured(
        run=str(path), model=opened.settings.model, processor=_processor(), threads=used, load=load,
        versions=_versions(chosen),
        macs={name: round(macs_cost(found).at(found.widths)) for name, (_, found) in networks.items()},
        timings=tuple(timings), layers_in=layered, layers_batch=max(batches), layers=_layers(networks, times),
        rest=times.rest, latency_ms=dict(zip(plain, latencies, strict=True)),
    )  # fmt: skip


def _versions(runtimes: Sequence[Runtime]) -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    return found | {"onnxruntime": version("onnxruntime")} if "onnx" in runtimes else found


def _networks(opened: Opened, multiple: int | None) -> dict[str, tuple[nn.Module, ChannelMap]]:
    """The networks that are timed, by name. The starting one has fresh weights, which take as long as any."""
    settings, example = opened.settings, torch.zeros(2, *opened.input_shape)
    start = built(settings.model, opened.input_shape, len(opened.classes), width=settings.width).eval()
    found = {START: (start, trace(start, example)), FINAL: (opened.network, opened.channel_map)}
    if multiple is not None:
        found[f"rounded to {multiple}"] = rounded_copy(opened.network, opened.channel_map, multiple)
    found[FULL] = rounded_copy(opened.network, opened.channel_map, FILLED, up=True)
    return found


def _layers(networks: dict[str, tuple[nn.Module, ChannelMap]], times: LayerTimes) -> tuple[Layer, ...]:
    """The layers that were timed in all three networks, the one with the largest excess first."""
    final, start = networks[FINAL], networks[START]
    widths = widths_of(*final, start=start[1].widths).layers
    macs = {name: layer_macs(channel_map) for name, (_, channel_map) in networks.items()}
    found = []
    for timed_layer in times.layers:
        name, took = timed_layer.layer, timed_layer.milliseconds
        if name not in widths or took.keys() != {START, FINAL, FULL}:
            continue
        now, before, full = (macs[network][name] for network in (FINAL, START, FULL))
        io = widths[name]
        found.append(
            Layer(
                layer=name,
                reads=io.reads,
                writes=io.writes,
                reads_start=io.reads_start,
                writes_start=io.writes_start,
                macs=now,
                macs_start=before,
                start=took[START],
                final=took[FINAL],
                filled=took[FULL],
                excess=took[FINAL] - took[START] * now / max(before, 1),
                unkind=full > SPARED * now and took[FULL] < SPARED * took[FINAL],
            )
        )
    return tuple(sorted(found, key=lambda layer: -layer.excess))


def _processor() -> str:
    """The name of the processor, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        named = ""
    return f"{named or platform.processor() or platform.machine()}, {os.cpu_count()} cores, {_vectors()}"


def _vectors() -> str:
    return str(torch.backends.cpu.get_cpu_capability())
