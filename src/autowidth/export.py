"""A network as a file that runs elsewhere: ONNX or a torch.export program, each checked against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autowidth.errors import AutoWidthError
from autowidth.extras import check_extra

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

TOLERANCE = 1e-4
"""Largest relative difference from PyTorch that a file may show."""

BATCHES = (1, 3, 8)
"""Batches of random inputs that a file is tried on; none is the one that it was made with."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Outputs = list[Tensor]
Call = Callable[[tuple[Tensor, ...]], Outputs]


class ExportError(AutoWidthError, ValueError):
    """A network that the form of the file cannot express, or inputs that it cannot be exported with."""


class DifferentError(AutoWidthError, ArithmeticError):
    """A file that does not compute what the network computes."""


class OutputError(AutoWidthError, FileExistsError):
    """A file that cannot be written where it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """How far a file is from PyTorch on some inputs.

    difference: the largest, over samples and outputs, of max |file - PyTorch| / max |PyTorch|, each over the numbers
    of one output of one sample. agreement: share of samples in which the largest number of the first output stands in
    the same place.
    """

    inputs: str
    samples: int
    difference: float
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A file that was written: where, its size in bytes, what its check gave."""

    path: str
    size: int
    checks: tuple[Checked, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it, in what JSON can hold."""
        return asdict(self)


class Scaled(nn.Module):
    """A network that takes pixels, 0 to 1, and scales them itself: (pixel - mean) / std, by channel of (N, C, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pixels: Tensor) -> Any:
        """What the network says of the pixels (N, C, H, W)."""
        return self.network((pixels - self.mean) / self.std)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Tensor | Sequence[Tensor],
    real_inputs: Iterable[Tensor | Sequence[Tensor]] = (),
    names: tuple[Sequence[str], Sequence[str]] = (("input",), ("output",)),
    metadata: Mapping[str, str] | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Exported:
    """Writes the network in evaluation mode as one ONNX file whose batch is open, and checks it in ONNX Runtime.

    example_inputs: what the model is called with: a tensor (N, ...) or several. real_inputs: batches of real ones, on
    which it is checked as on random ones. names: of inputs and of outputs in the file. metadata: kept in it.
    force: replace a file that is there.

    Raises MissingExtraError without the extra `onnx`, OutputError where the file cannot be written, ExportError for a
    network that ONNX cannot express, DifferentError where the file is further than `tolerance` from PyTorch. Nothing is
    then written, and what was there is there still. The model is not touched.
    """
    check_extra("onnx", ONNX_PACKAGES, what="writing an ONNX file")
    network, example = _prepared(model, example_inputs)

    def write(staged: Path) -> Call:
        with _quiet(), _said_of(model, "ONNX"):
            torch.onnx.export(
                network, example, staged, dynamo=True, dynamic_shapes=_open_batch(example), external_data=False,
                input_names=list(names[0]), output_names=list(names[1]), verbose=False,
            )  # fmt: skip
            _describe(staged, metadata or {})
            return onnx_call(staged)

    return _written(network, Path(path), example, real_inputs, tolerance, force, write)


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Tensor | Sequence[Tensor],
    real_inputs: Iterable[Tensor | Sequence[Tensor]] = (),
    metadata: Mapping[str, str] | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Exported:
    """The same as a program of torch.export (.pt2): `torch.export.load(FILE).module()` runs it without the class.

    `metadata` lies in it as extra files of these names. Raises what `export_onnx` raises, but needs no extra.
    """
    network, example = _prepared(model, example_inputs)

    def write(staged: Path) -> Call:
        with _quiet(), _said_of(model, "torch.export"), torch.no_grad():
            program = torch.export.export(network, example, dynamic_shapes=_open_batch(example))
            torch.export.save(program, staged, extra_files=dict(metadata or {}))
            module = torch.export.load(staged).module()
        return lambda inputs: tree_leaves(module(*inputs))

    return _written(network, Path(path), example, real_inputs, tolerance, force, write)


def onnx_session(
    path: str | os.PathLike[str], *, threads: int | None = None, profile: Path | None = None
) -> InferenceSession:
    """A session of ONNX Runtime on the CPU, with so many threads; `profile` is where it notes what its nodes took."""
    check_extra("onnx", ONNX_PACKAGES, what="running an ONNX file")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, and no remarks on what it optimizes
    options.intra_op_num_threads = threads or 0
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_call(path: str | os.PathLike[str], *, threads: int | None = None) -> Call:
    """What calls an ONNX file in ONNX Runtime on the CPU: tensors in their order -> outputs."""
    session = onnx_session(path, threads=threads)
    names = [found.name for found in session.get_inputs()]

    def call(inputs: tuple[Tensor, ...]) -> Outputs:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.as_tensor(output) for output in session.run(None, given)]

    return call


def check_output(path: Path, *, force: bool) -> None:
    """Raises OutputError where the file is there already and is not to be replaced, or cannot be written."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file in it")
    if path.exists() and not force:
        raise OutputError(f"{path} is there already: name another file, or replace it with --force (force=True)")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}; make it first")


# ---- its parts -------------------------------------------------------------------------------------------------------


def _prepared(model: nn.Module, inputs: Tensor | Sequence[Tensor]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy of the model in evaluation mode on the CPU, and inputs of two samples: of one, a batch would be fixed."""
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not inputs or not all(isinstance(t, Tensor) and t.dim() and len(t) == len(inputs[0]) > 0 for t in inputs):
        raise ExportError(
            "example_inputs are no tensors whose first dim is the batch: give a tensor (N, ...) or several"
        )
    example = tuple(torch.cat([t[:1], t[:1]]).detach().cpu() for t in inputs)
    return copy.deepcopy(model).cpu().eval().requires_grad_(False), example


def _open_batch(example: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """The dims of the inputs that are not fixed: of every input the first, and they are the same."""
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in example)


def _written(
    network: nn.Module, path: Path, example: tuple[Tensor, ...], real: Iterable[Tensor | Sequence[Tensor]],
    tolerance: float, force: bool, write: Callable[[Path], Call],
) -> Exported:  # fmt: skip
    """Writes beside the place, checks, and puts the file there in one go."""
    check_output(path, force=force)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        staged = staging / path.name
        call = write(staged)
        checks = [compared("random", network, call, _random(example))]
        if batches := [(batch,) if isinstance(batch, Tensor) else tuple(batch) for batch in real]:
            checks.append(compared("real", network, call, batches))
        for check in checks:
            _hold(check, tolerance, type(network).__name__)
        size = staged.stat().st_size
        os.replace(staged, path)
    finally:
        shutil.rmtree(staging)
    return Exported(path=str(path), size=size, checks=tuple(checks))


def _random(example: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Batches of normal numbers, or where the inputs are integers, of those of the example."""
    generator = torch.Generator().manual_seed(0)

    def drawn(like: Tensor, count: int) -> Tensor:
        if like.is_floating_point():
            return torch.randn(count, *like.shape[1:], generator=generator, dtype=like.dtype)
        return like[:1].expand(count, *like.shape[1:]).contiguous()

    return [tuple(drawn(tensor, count) for tensor in example) for count in BATCHES]


def compared(what: str, network: nn.Module, call: Call, batches: Iterable[tuple[Tensor, ...]]) -> Checked:
    """How far a file is from the network in evaluation mode on these inputs."""
    worst, same, samples = 0.0, 0, 0
    for inputs in batches:
        with torch.inference_mode():
            ours = tree_leaves(network(*inputs))
            theirs = call(tuple(tensor.contiguous() for tensor in inputs))
        for one, other in zip(ours, theirs, strict=True):
            apart = (one - other).abs().flatten(1).amax(1) / one.abs().flatten(1).amax(1).clamp_min(1e-12)
            # NaN, which the file must not have where the network has none, would get lost in a maximum.
            worst = max(worst, float(apart.nan_to_num(nan=torch.inf, posinf=torch.inf).max()))
        first, other = ours[0].flatten(1), theirs[0].flatten(1)
        same += int((first.argmax(1) == other.argmax(1)).sum())
        samples += len(first)
    return Checked(inputs=what, samples=samples, difference=worst, agreement=same / samples)


def _hold(check: Checked, tolerance: float, name: str) -> None:
    """Raises DifferentError where the check says that the file computes something else."""
    if not check.difference <= tolerance:
        raise DifferentError(
            f"nothing is written: on {check.samples} {check.inputs} inputs the file of {name} differs from PyTorch by "
            f"{check.difference:.1e} of the largest output, allowed are {tolerance:.1e}"
        )


def _describe(path: Path, metadata: Mapping[str, str]) -> None:
    """Puts texts into an ONNX file, and lets ONNX look through it."""
    import onnx

    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {**{p.key: p.value for p in proto.metadata_props}, **metadata})
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps in what exporters say while they work: how far they are, what they will do otherwise some day."""
    before, silence = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _said_of(model: nn.Module, form: str) -> Iterator[None]:
    """Turns what an exporter raises into a sentence."""
    try:
        yield
    except (AutoWidthError, OSError, MemoryError):
        raise
    except Exception as error:
        raise ExportError(f"{form} cannot express {type(model).__name__}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of what lies at the bottom of an exporter's error, and the line of code that it names."""
    text = str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = next((line[2:] for line in lines if line.startswith("- ")), lines[0])  # of a list, its first item
    place = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+(\S[^\n]*)', text)
    where = f" (at {Path(place[-1][0]).name}, line {place[-1][1]}: {place[-1][2]})" if place else ""
    return f"{first[:300]}{where}"


def in_json(value: object) -> str:
    """A text for the metadata of a file."""
    return json.dumps(value, allow_nan=False)
