"""Pages of the documentation as programs: their blocks are taken out of the Markdown and run, in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"

SITE = f"""
import sys
sys.path.insert(0, {str(REPOSITORY / "tests")!r})
from zoo.torchvision_schemas import import_torchvision
try:
    import_torchvision()
except ImportError:
    pass
"""
"""What Python runs first where torchvision is used: its wheel for CUDA does not import beside a CPU-only torch."""


@dataclass(frozen=True)
class Block:
    """A block of code: its language, the file that it is, if it is one, its text."""

    language: str
    file: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are run or written to files: Python, shell, TOML."""
    found = re.findall(r"^```(python|sh|toml)(?: file=(\S+))?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(language, file or None, text) for language, file, text in found]


def programs(page: Path) -> Iterator[tuple[str, str]]:
    """(Language, text) of what is run: blocks of Python that stand next to each other are one program."""
    joined = ""
    for block in blocks(page):
        if block.file is None and block.language == "python":
            joined += block.text
            continue
        if joined:
            yield "python", joined
            joined = ""
        if block.file is not None:
            yield "file " + block.file, block.text
        else:
            yield block.language, block.text
    if joined:
        yield "python", joined


def run_page(
    page: Path, folder: Path, *, replaced: Mapping[str, str] | None = None, torchvision: bool = False
) -> list[str]:
    """Runs a page in a folder and returns what each program printed; what `replaced` names must stand in the page.

    `autowidth` in a shell is the program of this tree. Fails with what a program said when it failed.
    """
    tools = folder / ".tools"
    tools.mkdir()
    (tools / "autowidth").write_text(f'#!/bin/sh\nexec {sys.executable} -m autowidth "$@"\n')
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for tool in ("autowidth", "python"):
        (tools / tool).chmod(0o755)
    if torchvision:
        (tools / "sitecustomize.py").write_text(SITE)
    paths = [str(tools), str(REPOSITORY / "src"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
    printed, missing = [], dict(replaced or {})
    for kind, text in programs(page):
        for old, new in (replaced or {}).items():
            if old in text:
                missing.pop(old, None)
                text = text.replace(old, new)
        if kind.startswith("file "):
            (folder / kind.removeprefix("file ")).write_text(text)
            continue
        command = [sys.executable, "-W", "error", "-c", text] if kind == "python" else ["bash", "-e", "-c", text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    assert not missing, f"{page.name} has none of {list(missing)}"
    return printed
