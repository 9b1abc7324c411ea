"""What is published: a wheel and an sdist with what belongs in them, which install beside the core packages alone."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from autowidth.version import __version__
from pages import DOCS, REPOSITORY, blocks
from test_recipes import photos

EXAMPLE = REPOSITORY / "examples" / "own_loop.py"


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command outside of this tree, so that nothing is imported from it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def plain(name: str) -> str:
    """The name of a package as indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by(package: str, found: set[str] | None = None) -> set[str]:
    """The package and all that it needs here, by their plain names."""
    found = set() if found is None else found
    if plain(package) in found:
        return found
    try:
        requirements = metadata.distribution(package).requires or []
    except metadata.PackageNotFoundError:
        return found  # needed elsewhere only
    found.add(plain(package))
    for requirement in requirements:
        if "extra ==" not in requirement:
            needed_by(re.split(r"[^\w.-]", requirement)[0], found)
    return found


def environment_with(place: Path, packages: set[str] | None) -> Path:
    """A fresh environment that sees these installed packages, or all but ours, and nothing else; its bin folder."""
    venv.create(place / "env", with_pip=True)
    seen = place / "seen"
    seen.mkdir()
    installed = [d for d in metadata.distributions() if d.metadata["Name"] != "autowidth"]
    for distribution in installed:
        if packages is not None and plain(distribution.metadata["Name"]) not in packages:
            continue
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (seen / top).exists():
                (seen / top).symlink_to(Path(str(distribution.locate_file(top))))
    (libraries,) = (place / "env").glob("lib/python3*/site-packages")
    for bundled in libraries.glob("setuptools*"):  # what Python 3.11 puts there is too old for torch
        shutil.rmtree(bundled)
    (libraries / "seen.pth").write_text(f"{seen}\n")
    return place / "env" / "bin"


def test_the_package_says_that_it_is_typed_and_names_its_version() -> None:
    assert (REPOSITORY / "src" / "autowidth" / "py.typed").is_file()
    assert re.search(rf"^## {re.escape(__version__)}\b", (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", __version__)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with wheel and sdist, as `python -m build` makes them."""
    place = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--outdir", str(place), str(REPOSITORY), folder=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_should(built: Path) -> None:
    name = f"autowidth-{__version__}"
    assert {file.name for file in built.iterdir()} == {f"{name}.tar.gz", f"{name}-py3-none-any.whl"}
    with zipfile.ZipFile(built / f"{name}-py3-none-any.whl") as wheel:
        inside = set(wheel.namelist())
        about = email.message_from_bytes(wheel.read(f"{name}.dist-info/METADATA"))
        entries = wheel.read(f"{name}.dist-info/entry_points.txt").decode()
    ours = {str(f.relative_to(REPOSITORY / "src")) for f in (REPOSITORY / "src").rglob("*.py")} | {"autowidth/py.typed"}
    assert {file for file in inside if ".dist-info/" not in file} >= ours
    assert {file.partition("/")[0] for file in inside} == {"autowidth", f"{name}.dist-info"}
    assert f"{name}.dist-info/licenses/LICENSE" in inside
    assert (about["Name"], about["Version"], about["License-Expression"]) == ("autowidth", __version__, "Apache-2.0")
    assert about["Requires-Python"] == ">=3.10" and "Typing :: Typed" in about.get_all("Classifier")
    core = {re.split(r"[^\w.-]", r)[0] for r in about.get_all("Requires-Dist") if "extra ==" not in r}
    assert core == {"torch", "numpy", "scipy", "safetensors"}
    assert set(about.get_all("Provides-Extra")) >= {"lab", "onnx", "hub", "zoo", "bench"}
    assert "autowidth = autowidth.__main__:main" in entries
    with tarfile.open(built / f"{name}.tar.gz") as sdist:
        names = {file.partition("/")[2] for file in sdist.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "src/autowidth/py.typed", "tests/test_packaging.py"} <= names
    assert not any(file.startswith((".venv", "runs/", "results/")) for file in names)


@pytest.mark.slow
def test_the_wheel_installs_and_works_with_the_core_packages_alone(built: Path, tmp_path: Path) -> None:
    core = set().union(*(needed_by(name) for name in ("torch", "numpy", "scipy", "safetensors")))
    bin = environment_with(tmp_path, core)
    python = str(bin / "python")
    (wheel,) = built.glob("*.whl")
    done = run(python, "-m", "pip", "install", "--no-index", str(wheel), folder=tmp_path)  # all it needs is there
    assert done.returncode == 0, done.stdout + done.stderr
    program = "import autowidth, sys; print(autowidth.__file__, autowidth.__version__, 'rich' in sys.modules)"
    done = run(python, "-W", "error", "-c", program, folder=tmp_path)
    assert done.stdout.split()[1:] == [__version__, "False"], done.stderr
    assert done.stdout.startswith(str(tmp_path / "env"))
    done = run(python, "-c", "import onnx", folder=tmp_path)
    assert "ModuleNotFoundError" in done.stderr  # the environment is as bare as it should be
    done = run(python, str(EXAMPLE), folder=tmp_path)
    assert done.returncode == 0 and "epoch 6: accuracy" in done.stdout, done.stderr
    done = run(str(bin / "autowidth"), "train", folder=tmp_path)
    assert done.returncode == 2 and "pip install 'autowidth[lab]'" in done.stderr


@pytest.mark.slow
def test_a_first_time_user_comes_from_a_clone_to_an_onnx_file_in_five_commands(tmp_path: Path) -> None:
    """In a fresh environment that sees the packages installed here, so that only ours is built and installed."""
    (block,) = [block for block in blocks(DOCS / "recipes" / "five-commands.md") if block.language == "sh"]
    commands = block.text.splitlines()
    assert len(commands) == 5
    photos(tmp_path, classes=10, each=50)
    bin = environment_with(tmp_path, None)
    for command in commands:
        words = command.replace("REPOSITORY", str(REPOSITORY)).replace("--epochs 30", "--epochs 6")
        done = run("bash", "-c", f"PATH={bin}:$PATH; {words}", folder=tmp_path)
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        if "export" in command:
            assert "64 real images: differs from PyTorch by" in done.stdout
            assert "the same class for 100.0%" in done.stdout
    assert (tmp_path / "photos.onnx").stat().st_size > 100_000
    assert "rounded to 8" in done.stdout
    installed = run(str(bin / "python"), "-c", "import autowidth; print(autowidth.__file__)", folder=tmp_path)
    assert installed.stdout.startswith(str(tmp_path / "env"))
