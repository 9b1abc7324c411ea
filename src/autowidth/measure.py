"""What networks take on this machine: forward passes timed side by side, in alternation, and layer by layer."""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autowidth.channels import ChannelMap, IndexMap
from autowidth.errors import AutoWidthError
from autowidth.export import export_onnx, onnx_session
from autowidth.surgery import apply_

Runtime = Literal["eager", "compiled", "onnx"]
"""PyTorch as it is, PyTorch compiled by torch.compile, ONNX Runtime on the CPU."""

ROUNDS = 30
"""How often every network is timed, in turns."""

LEAST_SECONDS = 0.02
"""How long a timing takes at least: fast networks are called several times for one."""

FILLED = 16
"""CPUs compute this many channels at a time (AVX-512; with AVX2, eight): widths between cost as much as the next."""

Call = Callable[[], object]


class MeasureError(AutoWidthError, ValueError):
    """A measurement that cannot be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds of one forward pass of a batch: median, first and third quartile, fastest; images in a second.

    processor: median of the processor time of all threads, on which other programs weigh less.
    """

    network: str
    runtime: Runtime
    batch: int
    median: float
    quartiles: tuple[float, float]
    fastest: float
    processor: float
    per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Milliseconds of a layer in each network by name: the fastest pass, for other work can only slow one down."""

    layer: str
    milliseconds: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """The layers of networks of one class in one runtime; `rest` is what a pass takes beside them."""

    runtime: Runtime
    batch: int
    layers: tuple[LayerTime, ...]
    rest: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """All of it, in what JSON can hold."""
        return asdict(self)


def time_side_by_side(
    networks: Mapping[str, nn.Module], example: Tensor, *, runtimes: Sequence[Runtime] = ("eager",),
    batches: Sequence[int] = (1, 32), threads: int | None = None, rounds: int = ROUNDS,
) -> list[Timing]:  # fmt: skip
    """Times the networks in evaluation mode on the CPU on batches of random inputs like `example` (N, ...).

    All networks of a runtime and batch are timed in turns, so that whatever else the machine does meets all of them.
    Raises MissingExtraError for ONNX Runtime without the extra `onnx`, ExportError for a network that ONNX cannot
    express, MeasureError for one that torch cannot compile here, or for nothing to time.
    """
    if not networks or not batches or min(batches) < 1 or rounds < 1:
        raise MeasureError(
            f"{len(networks)} networks, batches {list(batches)}, {rounds} rounds: give at least 1 of each"
        )
    found = []
    with _threads(threads) as count, tempfile.TemporaryDirectory() as place:
        quiet = {name: copy.deepcopy(network).cpu().eval() for name, network in networks.items()}
        for runtime in runtimes:
            files = _onnx_files(quiet, example, Path(place)) if runtime == "onnx" else {}
            for batch in batches:
                x = torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(0))
                calls = {name: _call(runtime, net, x, files.get(name), count) for name, net in quiet.items()}
                found += _in_turns(calls, runtime, batch, rounds)
    return found


def time_layers(
    networks: Mapping[str, nn.Module], example: Tensor, *, runtime: Runtime, batch: int = 32,
    threads: int | None = None, rounds: int = ROUNDS,
) -> LayerTimes:  # fmt: skip
    """What every convolution and linear layer takes in each network; all networks are of one class.

    In PyTorch by a clock around each layer; in ONNX Runtime by its own profile, where a layer takes along the norm and
    the activation that are melted into it, and nodes that cannot be traced back to a layer have their own name.
    Raises MeasureError for "compiled", whose layers are melted into each other.
    """
    if runtime == "compiled":
        raise MeasureError("a compiled network has no layers that could be timed: take eager or onnx")
    x = torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    with _threads(threads) as count, tempfile.TemporaryDirectory() as place:
        quiet = {name: copy.deepcopy(network).cpu().eval() for name, network in networks.items()}
        if runtime == "onnx":
            files = _onnx_files(quiet, example, Path(place))
            tables = {name: _profiled(file, x, count, rounds) for name, file in files.items()}
        else:
            tables = _clocked(quiet, x, rounds)
    names = list(dict.fromkeys(layer for table in tables.values() for layer in table[0]))
    layers = [LayerTime(layer=n, milliseconds={k: t[0][n] for k, t in tables.items() if n in t[0]}) for n in names]
    rest = {name: max(total - sum(table.values()), 0.0) for name, (table, total) in tables.items()}
    return LayerTimes(runtime=runtime, batch=batch, layers=tuple(layers), rest=rest)


def rounded_copy(
    network: nn.Module, channel_map: ChannelMap, multiple: int, *, up: bool = False
) -> tuple[nn.Module, ChannelMap]:
    """A copy whose widths are multiples, each the nearest, or with `up` the next; and its channel map.

    Groups that cannot have such a width, because they must be resized by whole groups of a convolution, keep theirs.
    """
    made, found = copy.deepcopy(network), channel_map
    for name, width in channel_map.widths.items():
        whole = -(-width // multiple) if up else max(1, round(width / multiple))
        if whole * multiple == width:
            continue
        try:
            found = apply_(made, found, {name: IndexMap.between(width, whole * multiple)})
        except AutoWidthError:
            continue
    return made, found


def layer_macs(channel_map: ChannelMap) -> dict[str, int]:
    """Layer -> MACs of one sample."""
    found: dict[str, float] = {}
    for use in channel_map.uses:
        layer = use.name.rpartition(".")[0]
        found[layer] = found.get(layer, 0.0) + use.macs_per_weight * math.prod(channel_map.shapes[use.name])
    return {layer: round(macs) for layer, macs in found.items()}


# ---- calls and clocks ------------------------------------------------------------------------------------------------


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """So many threads in torch, and afterwards as many as before; yields how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def _onnx_files(networks: Mapping[str, nn.Module], example: Tensor, place: Path) -> dict[str, Path]:
    """Each network as a checked ONNX file."""
    files = {name: place / f"{number}.onnx" for number, name in enumerate(networks)}
    for name, file in files.items():
        if not file.exists():
            export_onnx(networks[name], file, example_inputs=example)
    return files


def _call(runtime: Runtime, network: nn.Module, x: Tensor, file: Path | None, threads: int) -> Call:
    """What runs the network on this batch."""
    if file is not None:
        session = onnx_session(file, threads=threads)
        given = {session.get_inputs()[0].name: x.numpy()}
        return lambda: session.run(None, given)
    run: Callable[[Tensor], object] = _compiled(network, x) if runtime == "compiled" else network

    def call() -> object:
        with torch.inference_mode():
            return run(x)

    return call


def _compiled(network: nn.Module, x: Tensor) -> Callable[[Tensor], object]:
    """The network compiled for this batch. Raises MeasureError where torch cannot."""
    quick = torch.compile(network, dynamic=False)
    try:
        with torch.inference_mode():
            quick(x)
    except Exception as error:  # the compiler's, of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MeasureError(f"torch cannot compile {type(network).__name__} here: {reason}; leave it out") from error
    return quick


def _in_turns(calls: Mapping[str, Call], runtime: Runtime, batch: int, rounds: int) -> list[Timing]:
    """Every call timed once a round, in a row that begins elsewhere every time."""
    counts = {name: _count(call) for name, call in calls.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(_seconds(calls[name], counts[name]))
    return [_timing(name, runtime, batch, took) for name, took in seconds.items()]


def _count(call: Call) -> int:
    """How many calls one timing needs; the first call, which may prepare things, does not count."""
    call()
    return max(1, round(LEAST_SECONDS / max(_seconds(call, 1)[0], 1e-6)))


def _seconds(call: Call, count: int) -> tuple[float, float]:
    """Wall time and processor time of a call."""
    began, worked = time.perf_counter(), time.process_time()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count, (time.process_time() - worked) / count


def _timing(name: str, runtime: Runtime, batch: int, seconds: Sequence[tuple[float, float]]) -> Timing:
    milliseconds = sorted(1000 * wall for wall, _ in seconds)
    quarters = (
        statistics.quantiles(milliseconds, n=4, method="inclusive") if len(milliseconds) > 1 else milliseconds * 3
    )
    return Timing(
        network=name, runtime=runtime, batch=batch, median=quarters[1], quartiles=(quarters[0], quarters[2]),
        fastest=milliseconds[0], processor=1000 * statistics.median(worked for _, worked in seconds),
        per_second=1000 * batch / quarters[1],
    )  # fmt: skip


# ---- layers ----------------------------------------------------------------------------------------------------------

Table = tuple[dict[str, float], float]
"""Layer -> milliseconds, and milliseconds of the whole pass."""


def _clocked(networks: Mapping[str, nn.Module], x: Tensor, rounds: int) -> dict[str, Table]:
    """By a clock around each layer of PyTorch, the networks in turns."""
    took: dict[str, dict[str, list[float]]] = {name: {} for name in networks}
    whole: dict[str, list[float]] = {name: [] for name in networks}
    with ExitStack() as stack, torch.inference_mode():
        for name, network in networks.items():
            for layer, module in network.named_modules():
                if _is_layer(module):
                    _clock(module, took[name].setdefault(layer, []), stack)
        for _ in range(rounds):
            for name, network in networks.items():
                began = time.perf_counter()
                network(x)
                whole[name].append(1000 * (time.perf_counter() - began))
    return {
        name: ({layer: min(t) for layer, t in table.items() if t}, min(whole[name])) for name, table in took.items()
    }


def _is_layer(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1 and not list(module.children())


def _clock(module: nn.Module, took: list[float], stack: ExitStack) -> None:
    """Notes the milliseconds of every call of the module until the stack unwinds."""
    began = [0.0]

    def start(*_: object) -> None:
        began[0] = time.perf_counter()

    def stop(*_: object) -> None:
        took.append(1000 * (time.perf_counter() - began[0]))

    stack.callback(module.register_forward_pre_hook(start).remove)
    stack.callback(module.register_forward_hook(stop).remove)


def _profiled(file: Path, x: Tensor, threads: int, rounds: int) -> Table:
    """By the profile of ONNX Runtime: what each node took, under the name of its layer."""
    session = onnx_session(file, threads=threads, profile=file.with_suffix(""))
    given = {session.get_inputs()[0].name: x.numpy()}
    for _ in range(rounds + 1):
        session.run(None, given)
    events = json.loads(Path(session.end_profiling()).read_text())
    names = _layer_names(file)
    took: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            took.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1000)
    table: dict[str, float] = {}
    rest = 0.0
    for node, milliseconds in took.items():
        layer = names.get(node.removesuffix("_nchwc"))
        if layer is None:
            rest += min(milliseconds)
        else:
            table[layer] = table.get(layer, 0.0) + min(milliseconds)
    return table, sum(table.values()) + rest


def _layer_names(file: Path) -> dict[str, str]:
    """Name of a node, and of every value that norms and activations make of what it gives -> name of its layer.

    ONNX Runtime melts norms and activations into the layer ahead of them, and names what it made after its output.
    """
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    names: dict[str, str] = {}
    for node in graph.node:
        layer = next((value.removesuffix(".weight") for value in node.input if value in weights), None)
        if layer is None or node.op_type not in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
            continue
        names[node.name] = layer
        value, after = node.output[0], readers.get(node.output[0], [])
        names.setdefault(value, layer)
        while len(after) == 1 and after[0].op_type in ("BatchNormalization", "Relu", "Clip"):
            value = after[0].output[0]
            names.setdefault(value, layer)
            after = readers.get(value, [])
    return names
