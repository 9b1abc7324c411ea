"""Takes other people's networks through everything that the library promises, and writes down what held.

    python -m tests.zoo.coverage [--only NAME ...] [--out docs/coverage.md]

Every network has a process of its own, two run at a time with one thread each. Rows are kept in results/coverage.json
as they come: what was interrupted goes on where it stopped, and what was measured with other sources is measured anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

import autowidth
from autowidth.channels import ChannelMap, IndexMap, ParamAxis, ResizePlan
from autowidth.checkpoint import load_, save
from autowidth.cost import count_macs, macs_cost
from autowidth.surgery import apply_
from autowidth.trace import trace

from .lively import lively, outputs, step
from .memory import peak_during, resident, returning_memory
from .page import page
from .subjects import SUBJECTS

TOLERANCE, EXACT_TOLERANCE = 1e-5, 1e-10
"""Largest change of any output, over the largest output, at which the function counts as kept in float32. Where it is
more in float32 and less than the second one in float64, it is rounding that a deep random network amplifies."""
REMOVED, INSERTED = 0.3, 0.1
ALLOWANCE = 8 << 20
"""Bytes that Python's own objects may take whatever the network: without it, no network of 2 MiB could be examined."""
REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 1800.0
"""Seconds after which a network is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was found out about one network. None: not reached, or not measurable on this system.

    seconds: tracing with rehearsal; surgery on model and optimizer; one training step at the same batch.
    removal, insertion: relative change of the outputs where it should be none, over all channel groups that cross no
    norm across channels; None where there is no such group.
    removal_crossing, insertion_crossing: the same over all channel groups, where some do cross one.
    removal_exact, insertion_exact: the same in float64, where float32 shows more than TOLERANCE.
    frozen: (reason, channels written, param axes), network inputs and outputs left out. crossing: (norm, groups).
    trace_memory: bytes at the peak of tracing, and at that of the network's own forward pass without gradients, the
    network itself in both. surgery_memory: bytes at the peak of surgery beyond the network, and those of the network.
    code: which sources it was measured with.
    """

    name: str
    code: str = ""
    error: str | None = None
    groups: int | None = None
    share_free: float | None = None
    notes: tuple[str, ...] = ()
    frozen: tuple[tuple[str, int, int], ...] = ()
    crossing: tuple[tuple[str, int], ...] = ()
    trace_seconds: float | None = None
    resize_seconds: float | None = None
    step_seconds: float | None = None
    removal: float | None = None
    insertion: float | None = None
    removal_exact: float | None = None
    insertion_exact: float | None = None
    removal_crossing: float | None = None
    insertion_crossing: float | None = None
    macs: tuple[int, int] | None = None
    macs_foreseen: int | None = None
    params: tuple[int, int] | None = None
    saved: bool | None = None
    trace_memory: tuple[int, int] | None = None
    surgery_memory: tuple[int, int] | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        """The row that was written as this JSON object."""
        return cls(**{key: _frozen(value) for key, value in record.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def broken(row: Row) -> list[str]:
    """The promises that do not hold for this network, in words; empty if all do."""
    if row.error is not None:
        return [row.error]
    found = []
    if not row.groups:
        found.append("no channel group is free")
    for act, change, exact in (
        ("removal", row.removal, row.removal_exact),
        ("insertion", row.insertion, row.insertion_exact),
    ):
        if change is not None and not (change < TOLERANCE or (exact is not None and exact < EXACT_TOLERANCE)):
            found.append(f"{act} changes the outputs by {change:.1e}")
    if not row.saved:
        found.append("the loaded network's outputs differ")
    if row.macs is not None and row.macs[1] != row.macs_foreseen:
        found.append(f"{row.macs_foreseen:,} MACs foreseen, {row.macs[1]:,} counted")
    if row.trace_memory is not None and row.trace_memory[0] > 2 * row.trace_memory[1] + ALLOWANCE:
        found.append("tracing needs more than twice the memory of a forward pass")
    if row.surgery_memory is not None and row.surgery_memory[0] >= row.surgery_memory[1] + ALLOWANCE:
        found.append("surgery needs as much memory as a second copy of the network")
    return found


# ---- one network -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Case:
    """A network under examination; the map is known after the first stage."""

    build: Callable[[], nn.Module]
    inputs: Tensor
    channel_map: ChannelMap = field(init=False)

    def resize(self) -> ResizePlan:
        """Removes 30 % and inserts 10 % in every channel group, at least one of each where there is one to spare."""
        return {
            group.name: IndexMap.removing(_some(group.width), group.width).inserting(_tenth(group.width))
            for group in self.channel_map.groups
        }


def examine(build: Callable[[], nn.Module], inputs: Tensor, *, name: str = "") -> Row:
    """Returns what holds for the network that `build` makes, on images (batch, 3, height, width).

    Whatever fails ends the examination and stands in the row's `error`, with the stage in which it happened.
    """
    case, row = _Case(build, inputs), Row(name=name, code=code())
    for stage in (_tracing, _kept, _resized):
        try:
            row = replace(row, **stage(case))
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return replace(row, error=f"{stage.__name__.strip('_')}: {text[:300]}")
    return row


def _tracing(case: _Case) -> dict[str, Any]:
    """What tracing finds and needs, and what surgery needs."""
    tiny = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    known = trace(tiny, torch.zeros(1, 3, 4, 4))  # late imports and first calls are nobody's memory
    apply_(tiny, known, {"0": IndexMap((0, 1, -1), 4)})
    with returning_memory():
        bare = resident()
        model = case.build().eval()
        forward = peak_during(lambda: outputs(model, case.inputs))
        tracing = peak_during(lambda: setattr(case, "channel_map", trace(model, case.inputs)))
        size, plan, held = _bytes(model), case.resize(), resident()
        surgery = peak_during(lambda: apply_(model, case.channel_map, plan)) if plan else None
    model = case.build()
    start = time.perf_counter()
    trace(model, case.inputs)
    seconds = time.perf_counter() - start
    frozen, share = _frozen_reasons(model, case.channel_map)
    facts = {
        "groups": len(case.channel_map.groups),
        "share_free": share,
        "notes": case.channel_map.notes,
        "frozen": frozen,
        "trace_seconds": seconds,
    }
    if bare is not None and forward is not None and tracing is not None:
        facts["trace_memory"] = (tracing - bare, forward - bare)
    if surgery is not None and held is not None:
        facts["surgery_memory"] = (surgery - held, size)
    return facts


def _kept(case: _Case) -> dict[str, Any]:
    """By how much the outputs change where they should not."""
    model = lively(case.build, case.inputs)
    crossing = _crossing(model, case.channel_map)
    every = [group.name for group in case.channel_map.groups]
    steady = [name for name in every if name not in crossing]
    kinds = sorted(set(crossing.values()))
    facts: dict[str, Any] = {
        "crossing": tuple((kind, sum(kind == other for other in crossing.values())) for kind in kinds),
    }
    for act, change_by in (("removal", _change_by_removal), ("insertion", _change_by_insertion)):
        if not steady:
            continue
        facts[act] = change_by(case, model, steady)
        if not facts[act] < TOLERANCE:
            facts[f"{act}_exact"] = change_by(case, _copy(case, model).double(), steady)
    if crossing:
        facts["removal_crossing"] = _change_by_removal(case, model, every)
        facts["insertion_crossing"] = _change_by_insertion(case, model, every)
    return facts


def _resized(case: _Case) -> dict[str, Any]:
    """Trains, resizes, trains on, saves, loads."""
    model = lively(case.build, case.inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step(model, optimizer, case.inputs)
    start = time.perf_counter()
    step(model, optimizer, case.inputs)
    step_seconds = time.perf_counter() - start
    macs, params = count_macs(model, case.inputs), _size(model)
    start = time.perf_counter()
    resized = apply_(model, case.channel_map, case.resize(), optimizers=[optimizer])
    resize_seconds = time.perf_counter() - start
    outputs(model, case.inputs)
    step(model, optimizer, case.inputs)
    for parameter, state in optimizer.state.items():
        wrong = [key for key, value in state.items() if key != "step" and value.shape != parameter.shape]
        if wrong or state["step"] != 3:
            raise ValueError(f"optimizer state {wrong} does not fit, or was lost: step {state['step']}")
    cost = macs_cost(case.channel_map)
    saved_by_plan = cost.at(case.channel_map.widths) - cost.at(resized.widths)
    return {
        "step_seconds": step_seconds,
        "resize_seconds": resize_seconds,
        "macs": (macs, count_macs(model, case.inputs)),
        "macs_foreseen": round(macs - saved_by_plan),
        "params": (params, _size(model)),
        "saved": _comes_back(case, model, resized),
    }


def _comes_back(case: _Case, model: nn.Module, resized: ChannelMap) -> bool:
    """Whether a fresh network that loads the saved one has its widths and, bit for bit, its outputs."""
    expected = outputs(model.eval(), case.inputs)
    with tempfile.TemporaryDirectory() as folder:
        save(folder, model, channel_map=resized)
        fresh = case.build()
        loaded = load_(fresh, folder, example_inputs=case.inputs)
    found = outputs(fresh.eval(), case.inputs)
    same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    return same and loaded.widths == resized.widths


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


# ---- where the function must be kept ---------------------------------------------------------------------------------


def _some(width: int) -> list[int]:
    """30 % of the channels, evenly spread, one at least and one spared."""
    count = min(max(1, int(REMOVED * width)), width - 1)
    return [(2 * i + 1) * width // (2 * count) for i in range(count)]


def _tenth(width: int) -> int:
    return max(1, round(INSERTED * width))


def _change_by_removal(case: _Case, model: nn.Module, names: Sequence[str]) -> float:
    """Relative change of the outputs by the removal of channels that nobody reads."""
    groups = [case.channel_map.group(name) for name in names]
    plan = {g.name: IndexMap.removing(_some(g.width), g.width) for g in groups if g.width > 1}
    silent = _copy(case, model)
    parameters = dict(silent.named_parameters())
    with torch.no_grad():
        for group in groups:
            for place in group.with_role("read"):
                positions = [p for c in _some(group.width) for p in place.index[c]]
                parameters[place.axis.name].index_fill_(place.axis.dim, torch.tensor(positions, dtype=torch.long), 0)
    return _change(case, silent, plan)


def _change_by_insertion(case: _Case, model: nn.Module, names: Sequence[str]) -> float:
    """Relative change of the outputs by the insertion of channels that nobody reads yet."""
    groups = [case.channel_map.group(name) for name in names]
    plan = {g.name: IndexMap.identity(g.width).inserting(_tenth(g.width)) for g in groups}
    return _change(case, _copy(case, model), plan)


def _copy(case: _Case, model: nn.Module) -> nn.Module:
    fresh = case.build().eval().to(next(model.parameters()).dtype)
    fresh.load_state_dict(model.state_dict())
    return fresh


def _change(case: _Case, model: nn.Module, plan: ResizePlan) -> float:
    """Largest change of any output by the resize, over the largest output. Raises ValueError where it means nothing."""
    before = outputs(model, case.inputs)
    scale = max(float(out.abs().max()) for out in before)
    if not 0 < scale < float("inf"):
        raise ValueError(f"the largest output is {scale}, so that no change can be seen")
    if plan:  # a group of one channel loses none
        apply_(model, case.channel_map, plan, generator=torch.Generator().manual_seed(1))
    after = outputs(model, case.inputs)
    change = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)) / scale
    return change if change == change else float("inf")


_ACROSS = (nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_ACROSS_BY_NAME = ("GlobalResponseNorm", "GlobalResponseNormMlp", "RmsNorm", "RmsNorm2d", "SimpleNorm", "SimpleNorm2d")
_ACROSS_INSIDE = ("EfficientAdditiveAttention",)  # normalises what its layers write, with no parameters of its own
_STANDARDISED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


def _crossing(model: nn.Module, channel_map: ChannelMap) -> dict[str, str]:
    """Channel group -> the norm across channels that it passes: what it does to one channel depends on the others.

    Layer norms and their like do so on activations, weight standardisation on the weights that read the group. A group
    norm with several norm groups is no exception: they are resized as wholes.
    """
    found: dict[str, str] = {}
    for group in channel_map.groups:
        for place in group.places:
            path = place.axis.name.rpartition(".")[0].split(".parametrizations")[0]
            owner, parent = model.get_submodule(path), type(model.get_submodule(path.rpartition(".")[0])).__name__
            kind = type(owner).__name__
            across = isinstance(owner, _ACROSS) or kind in _ACROSS_BY_NAME
            across |= isinstance(owner, nn.GroupNorm) and owner.num_groups == 1
            across |= kind in _STANDARDISED and place.role == "read"
            if parent in _ACROSS_INSIDE and place.role == "write":
                across, kind = True, parent
            if across:
                found.setdefault(group.name, kind)
    return found


# ---- what is frozen --------------------------------------------------------------------------------------------------

_OUTER = ("model input", "model output")


def _frozen_reasons(model: nn.Module, channel_map: ChannelMap) -> tuple[tuple[tuple[str, int, int], ...], float]:
    """((reason, channels written, param axes) ..., share of the written channels that is free).

    The channels that a layer writes are those of its output, of each weight once. Left out are the outputs of the
    network, which nobody could resize, and grouped convolutions, which carry the channels that others have written.
    """
    written = dict(_writing_axes(model, channel_map))
    free = sum(p.copies * g.width for g in channel_map.groups for p in g.places if p.axis in written)
    total = sum(written.values())
    counts: dict[str, list[int]] = {}
    for f in channel_map.frozen:
        length = len(f.index) if f.axis in written else 0
        if f.reason in _OUTER:
            total -= length
            continue
        count = counts.setdefault(general(f.reason), [0, 0])
        count[0] += length
        count[1] += 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1][0], -item[1][1], item[0]))
    return tuple((reason, channels, axes) for reason, (channels, axes) in ranked), free / total if total else 0.0


def _writing_axes(model: nn.Module, channel_map: ChannelMap) -> Iterator[tuple[ParamAxis, int]]:
    """The param axes along which a weight in use writes channels, with their lengths."""
    for name in dict.fromkeys(use.name for use in channel_map.uses):
        owner = model.get_submodule(name.rpartition(".")[0].split(".parametrizations")[0])
        if isinstance(owner, _ConvNd) and owner.groups > 1:
            continue
        dim = 1 if isinstance(owner, _ConvTransposeNd) else 0
        yield ParamAxis(name, dim), channel_map.shapes[name][dim]


def general(reason: str) -> str:
    """The reason with its numbers left out, so that layers of one kind have one reason; file and line stay."""
    text, bracket, line = reason.rpartition(" (") if reason.endswith(")") else (reason, "", "")
    return re.sub(r"\b\d{2,}\b", "N", re.sub(r"\[\d[\d, ]*\]", "[...]", text)) + bracket + line


# ---- all networks ----------------------------------------------------------------------------------------------------


def code() -> str:
    """Names the state of the sources that a row depends on."""
    folder = Path(autowidth.__file__).parent
    files = [file for name in _SOURCES for file in sorted((folder / name).glob("*.py")) or [folder / f"{name}.py"]]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


_SOURCES = ("channels", "rules", "surgery", "cost", "trace", "history", "checkpoint")
"""Files of the library, or folders of files, on which a row depends."""


def examined(name: str, patience: float = PATIENCE) -> Row:
    """Returns the row of one network, from a process of its own: its memory is its own, and a crash is one row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, "-m", "tests.zoo.coverage", "--row", name, str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, env=environment, timeout=patience, check=False, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return Row(name=name, code=code(), error=f"no result after {patience:.0f} s")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return Row(name=name, code=code(), error=f"exit code {done.returncode}: {last[:300]}")
        return Row.of(json.loads(path.read_text()))


def _write_row(name: str, path: Path) -> None:
    """Examines one network in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # those of the libraries themselves
    subject = SUBJECTS[name]
    path.write_text(json.dumps(asdict(examine(subject.build, subject.inputs(), name=name))))


def read_rows(path: Path) -> dict[str, Row]:
    """Name -> row, from the file; empty where there is none."""
    if not path.exists():
        return {}
    return {record["name"]: Row.of(record) for record in json.loads(path.read_text())}


def write_rows(path: Path, rows: Mapping[str, Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    ordered = [asdict(rows[name]) for name in SUBJECTS if name in rows]
    fresh.write_text("[\n" + ",\n".join(json.dumps(record) for record in ordered) + "\n]\n")
    fresh.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Examines the networks, writes rows and page; exit code 1 if a promise does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.coverage", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, metavar="NAME", help="these networks, again")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "coverage.md", help="the page")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "results" / "coverage.json", help="the rows")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2, help="networks at a time")
    parser.add_argument("--page", action="store_true", help="examine nothing, write the page from the rows")
    parser.add_argument("--row", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row:
        _write_row(options.row[0], Path(options.row[1]))
        return 0
    rows = read_rows(options.results)
    stale = [name for name in SUBJECTS if name not in rows or rows[name].code != code()]
    todo = [] if options.page else options.only or stale
    with ThreadPoolExecutor(options.processes) as pool:
        for coming in as_completed([pool.submit(examined, name) for name in todo]):
            row = coming.result()
            rows = read_rows(options.results) | {row.name: row}
            write_rows(options.results, rows)
            _write_page(options.out, rows)
            sys.stderr.write(f"{row.name}: {'; '.join(broken(row)) or 'all promises hold'}\n")
    _write_page(options.out, rows)
    return 1 if any(broken(row) for row in rows.values()) else 0


def _write_page(path: Path, rows: Mapping[str, Row]) -> None:
    failures = {name: found for name, row in rows.items() if (found := broken(row))}
    path.write_text(page(rows, failures, code()))


if __name__ == "__main__":
    sys.exit(main())
