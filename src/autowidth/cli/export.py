"""autowidth export: the network of a run as a file that runs elsewhere, checked against PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autowidth.cli.display import console_for
from autowidth.cli.door import door
from autowidth.export import TOLERANCE, Checked
from autowidth.lab.deploying import Deployed, Where, export_run

EXAMPLES = """[bold]Examples[/bold]

one file that takes pixels from 0 to 1 and knows its classes:
  autowidth export runs/my-run --onnx net.onnx
for a program that scales pixels itself; mean, std and classes lie in net.onnx.json:
  autowidth export runs/my-run --onnx net.onnx --normalization beside --classes beside
for PyTorch without the class of the network: torch.export.load("net.pt2").module()
  autowidth export runs/my-run --torch-export net.pt2

In Python, with onnxruntime alone:
  session = onnxruntime.InferenceSession("net.onnx")
  scores = session.run(None, {"images": pixels})[0]     # (N, C, H, W) float32, any N
"""


def command(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    onnx: Annotated[Path | None, typer.Option("--onnx", help="write this ONNX file")] = None,
    program: Annotated[
        Path | None, typer.Option("--torch-export", help="write this program of torch.export, a .pt2 file")
    ] = None,
    normalization: Annotated[
        Where, typer.Option(help="inside: the file takes pixels from 0 to 1; beside: scaled ones, see FILE.json")
    ] = "inside",
    classes: Annotated[
        Where, typer.Option(help="inside: names of the classes in the file's metadata; beside: in FILE.json")
    ] = "inside",
    data: Annotated[
        str | None, typer.Option(help="images to check the file on; default the test images of the run")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="how many of them")] = 64,
    tolerance: Annotated[
        float, typer.Option(min=0, help="largest difference from PyTorch, as a share of the largest output")
    ] = TOLERANCE,
    force: Annotated[bool, typer.Option("--force", help="replace files that are there")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Write the network of a run as ONNX or as a torch.export program, and check it against PyTorch."""
    with door(debug=debug):
        found = export_run(
            run, onnx=onnx, program=program, normalization=normalization, classes=classes, data=data, images=images,
            tolerance=tolerance, force=force,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(found.as_json(), allow_nan=False))
            return
        console = console_for(stderr=False)
        for line in _lines(found):
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def _lines(found: Deployed) -> list[str]:
    """What was written, and how well it was checked, for people."""
    lines = []
    for file in found.files:
        lines.append(f"written to {file.path}: {file.size / 2**20:.2f} MiB, for any number of images at once")
        lines += [f"  {_checked(check)}" for check in file.checks]
    lines += [f"written to {path}" for path in found.beside]
    if found.unchecked is not None:
        lines.append(f"not checked on real images ({found.unchecked}): name some with --data")
    return lines


def _checked(check: Checked) -> str:
    what = "random inputs" if check.inputs == "random" else "real images"
    return (
        f"{check.samples} {what}: differs from PyTorch by {check.difference:.1e} of the largest score at most, the "
        f"same class for {check.agreement:.1%}"
    )
