"""The drawing and the code are the same: floors, imports, captions, lengths, public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TREE = REPOSITORY / "src" / "autowidth"
PACKAGE = "autowidth"

FLOORS = {
    "version": 0,
    "errors": 0,
    "channels": 0,
    "rules": 1,
    "surgery": 1,
    "cost": 1,
    "profit": 1,
    "policy": 1,
    "history": 1,
    "trace.frames": 2,
    "trace.trainable": 2,
    "trace.groups": 2,
    "trace.scratch": 2.1,
    "trace.labelling": 2.2,
    "trace.passes": 2.3,
    "trace.rehearsal": 2.4,
    "trace.tracing": 2.5,
    "trace.__init__": 2.6,
    "probe": 2,
    "audit": 2,
    "latency": 2,
    "engine": 3,
    "checkpoint": 3,
    "report": 3,
    "export": 3,
    "__init__": 3.9,
    "integrations.__init__": 4,
    "integrations.lightning": 4,
    "lab.__init__": 4,
    "lab.models.registry": 4.001,
    "lab.models.parts": 4.001,
    "lab.models.networks.*": 4.002,
    "lab.models.networks.__init__": 4.003,
    "lab.models.naming": 4.004,
    "lab.models.importing": 4.005,
    "lab.models.__init__": 4.006,
    "lab.data.errors": 4.011,
    "lab.data.pixels": 4.012,
    "lab.data.augment": 4.013,
    "lab.data.decoding": 4.013,
    "lab.data.streaming": 4.014,
    "lab.data.splits": 4.015,
    "lab.data.batches": 4.016,
    "lab.data.sources": 4.016,
    "lab.data.sets": 4.017,
    "lab.data.tables": 4.017,
    "lab.data.readers.*": 4.018,
    "lab.data.readers.__init__": 4.019,
    "lab.data.assembling": 4.019,
    "lab.data.loading": 4.02,
    "lab.data.__init__": 4.021,
    "lab.baselines.axes": 4.05,
    "lab.baselines.calls": 4.06,
    "lab.baselines.registry": 4.07,
    "lab.baselines.*": 4.1,
    "lab.baselines.asymptotic": 4.12,
    "lab.baselines.__init__": 4.2,
    "lab.policies": 4.21,
    "lab.settings": 4.22,
    "lab.prepare": 4.24,
    "lab.result": 4.24,
    "lab.loop": 4.3,
    "lab.other_tools": 4.32,
    "lab.methods": 4.34,
    "lab.plots": 4.38,
    "lab.tables": 4.38,
    "lab.bench": 4.4,
    "lab.suites.registry": 4.45,
    "lab.suites.*": 4.5,
    "lab.suites.__init__": 4.6,
    "lab.studies.__init__": 4.7,
    "lab.studies.widths": 4.71,
    "lab.studies.published": 4.71,
    "lab.studies.surrogate": 4.72,
    "lab.studies.shape_settings": 4.72,
    "lab.studies.shapes_report": 4.74,
    "lab.studies.*": 4.8,
    "cli": 5,
}
"""File -> floor. Imports point to lower numbers only; `*` is every file of a folder without a line of its own."""

HEAVY = (
    "lightning", "onnx", "matplotlib", "datasets", "pyarrow", "rich", "typer", "pydantic", "pydantic_settings", "PIL",
    "sklearn", "tabulate",
)  # fmt: skip
FORBIDDEN_NAMES = ("utils", "util", "helpers", "helper", "base", "common", "misc")
LONGEST = 60


def modules(tree: Path) -> dict[str, ast.Module]:
    """Dotted name below the package -> syntax tree, for every file of the tree."""
    names = {path: ".".join(path.relative_to(tree).with_suffix("").parts) for path in sorted(tree.rglob("*.py"))}
    return {name: ast.parse(path.read_text()) for path, name in names.items()}


def floor(name: str) -> float | None:
    """The floor of a file, or None where the table does not know it."""
    if name in FLOORS:
        return FLOORS[name]
    return FLOORS.get(f"{name.rpartition('.')[0]}.*")


def imports(name: str, module: ast.Module) -> Iterator[str]:
    """Absolute dotted names of everything that a file imports, at its top or inside functions, or by a string."""
    package = [PACKAGE, *name.split(".")[:-1]]
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant))


def inner_imports(tree: Path) -> Iterator[tuple[str, str, str]]:
    """(importing file, imported file or "" for the package root, the name as imported) inside the package."""
    found = modules(tree)
    for name, module in found.items():
        for target in imports(name, module):
            if target.split(".")[0] != PACKAGE:
                continue
            parts = target.split(".")[1:]
            prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            known = (f for p in prefixes for f in (p, f"{p}.__init__") if f in found)
            yield name, next(known, ""), target


def files_without_a_floor(tree: Path) -> list[str]:
    return [name for name in modules(tree) if floor(name) is None]


def imports_that_do_not_point_down(tree: Path) -> list[str]:
    pairs = [(a, b, f) for a, b, _ in inner_imports(tree) if b and (f := (floor(a), floor(b)))]
    return [
        f"{a} imports {b}"
        for a, b, (upper, lower) in pairs
        if upper is not None and lower is not None and upper <= lower
    ]


def imports_of_the_root(tree: Path) -> list[str]:
    """Files that import the package root itself: `import autowidth`, `from autowidth import x`, `from . import x`."""
    wrong = []
    for name, module in modules(tree).items():
        for node in ast.walk(module):
            if isinstance(node, ast.Import):
                direct = any(alias.name == PACKAGE for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                direct = (node.module == PACKAGE and not node.level) or (
                    node.module is None and node.level == name.count(".") + 1
                )
            else:
                continue
            if direct:
                wrong.append(f"{name}, line {node.lineno}")
    return wrong


def imports_of_the_lab(tree: Path) -> list[str]:
    """Files outside the laboratory and the command line that import from the laboratory."""
    outside = lambda name: name.split(".")[0] not in ("lab", "cli", "__main__")  # noqa: E731
    return [
        f"{a} imports {b}"
        for a, b, target in inner_imports(tree)
        if outside(a) and f"{target}.".startswith(f"{PACKAGE}.lab.")
    ]


def files_without_a_caption(tree: Path) -> list[str]:
    """Files whose first line is not one whole sentence between, or at the head of, docstring quotes."""
    caption = re.compile(r'"""[^\s"].*\.("""|\n(\n|"""))')
    return [str(path.relative_to(tree)) for path in sorted(tree.rglob("*.py")) if not caption.match(path.read_text())]


def files_with_a_name_that_says_nothing(tree: Path) -> list[str]:
    return [name for name in modules(tree) if set(name.split(".")) & set(FORBIDDEN_NAMES)]


def functions_that_are_too_long(tree: Path) -> list[str]:
    return [
        f"{name}.{node.name}: {length} lines"
        for name, module in modules(tree).items()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST
    ]


def calls_of_print(tree: Path) -> list[str]:
    """Calls of the built-in print."""
    return [
        f"{name}, line {node.lineno}"
        for name, module in modules(tree).items()
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


Check = Callable[[Path], list[str]]
CHECKS: dict[Check, list[dict[str, str]]] = {
    files_without_a_floor: [{"novelty.py": ""}, {"lab/novelty.py": ""}],
    imports_that_do_not_point_down: [
        {"channels.py": "from autowidth.trace import trace", "trace/__init__.py": ""},
        {"channels.py": "def f():\n    import autowidth.history", "history.py": ""},
        {"channels.py": "from .history import History", "history.py": ""},
        {"channels.py": "import importlib\nimportlib.import_module('autowidth.history')", "history.py": ""},
        {"surgery/edits.py": "from autowidth.rules.labels import spread", "rules/labels.py": ""},
        {"lab/baselines/one.py": "from autowidth.lab.baselines.two import f", "lab/baselines/two.py": ""},
        {"lab/baselines/one.py": "from .two import f", "lab/baselines/two.py": ""},
        {"lab/models.py": "from ..cli import main", "cli/__init__.py": ""},
        {"lab/loop.py": "from autowidth.lab import bench", "lab/bench.py": "", "lab/__init__.py": ""},
    ],
    imports_of_the_root: [
        {"trace.py": "import autowidth", "__init__.py": ""},
        {"trace.py": "def f():\n    import autowidth as aw", "__init__.py": ""},
        {"trace.py": "from autowidth import channels", "__init__.py": "", "channels.py": ""},
        {"trace.py": "from . import channels", "__init__.py": "", "channels.py": ""},
        {"lab/loop.py": "from .. import channels", "__init__.py": "", "channels.py": ""},
    ],
    imports_of_the_lab: [
        {"__init__.py": "from autowidth.lab.models.parts import scaled", "lab/models/parts.py": ""},
        {"engine.py": "def f():\n    from autowidth import lab", "lab/__init__.py": ""},
        {"integrations/lightning.py": "import autowidth.lab.models.parts", "lab/models/parts.py": ""},
    ],
    files_without_a_caption: [
        {"trace.py": ""},
        {"trace.py": "import os"},
        {"trace.py": '"""\nFollows labels.\n"""'},
        {"trace.py": '"""Follows labels and then\ngoes on."""'},
        {"trace.py": '# first\n"""Follows labels."""'},
        {"trace.py": '"""Follows labels"""'},
    ],
    files_with_a_name_that_says_nothing: [{"utils.py": ""}, {"lab/common/models.py": ""}],
    functions_that_are_too_long: [
        {"trace.py": "def f():\n" + "    pass\n" * LONGEST},
        {"trace.py": "class A:\n    async def f():\n" + "        pass\n" * LONGEST},
    ],
    calls_of_print: [{"trace.py": "def f():\n    print(1)"}],
}
"""Each check, and small trees in which it must find something."""


def plant(root: Path, files: dict[str, str]) -> Path:
    """A tree with these files."""
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / PACKAGE


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_passes(check: Check) -> None:
    assert check(TREE) == []


BROKEN = [(check, files) for check, trees in CHECKS.items() for files in trees]


@pytest.mark.parametrize(("check", "files"), BROKEN, ids=[f"{c.__name__}-{n}" for n, (c, _) in enumerate(BROKEN)])
def test_every_check_can_fail(tmp_path: Path, check: Check, files: dict[str, str]) -> None:
    assert check(plant(tmp_path, files)) != []


def test_a_sound_tree_passes_every_check(tmp_path: Path) -> None:
    sound = {
        "__init__.py": '"""The public names."""\nfrom autowidth.trace.tracing import trace\n',
        "channels.py": '"""Vocabulary.\n\nA legend of letters.\n"""\n',
        "trace.py": '"""Follows labels."""\nimport torch\nfrom .channels import ChannelMap\n',
        "lab/models/parts.py": '"""Parts."""\ndef f():\n' + "    pass\n" * (LONGEST - 1),
        "lab/baselines/__init__.py": '"""All methods."""\nfrom autowidth.lab.baselines.one import f\n',
        "lab/baselines/one.py": '"""A method."""\nfrom autowidth.lab.models import f\n',
        "cli/__init__.py": '"""Commands."""\nfrom autowidth.lab.baselines import f\n',
        "__main__.py": '"""The command."""\nfrom autowidth.cli import f\n',
    }
    tree = plant(tmp_path, sound)
    assert {check.__name__: check(tree) for check in CHECKS} == {check.__name__: [] for check in CHECKS}


def floors_of_the_plan(text: str) -> dict[str, int]:
    """File or folder -> floor as the drawing in a document says: lines such as `  trace/   2  follow ...`."""
    return {name: int(number) for name, number in re.findall(r"^ {2}(\w+)(?:\.py|/) +(\d) ", text, flags=re.MULTILINE)}


def test_the_drawing_in_the_documentation_is_the_table() -> None:
    drawn = floors_of_the_plan((REPOSITORY / "docs" / "architecture.md").read_text())
    rooms = {name.split(".")[0]: int(number) for name, number in FLOORS.items() if number < 4 and name != "__init__"}
    assert drawn == rooms


def modules_loaded_by(root: Path) -> set[str]:
    """Top-level names in sys.modules after `import autowidth` in a fresh interpreter."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import autowidth; print(*{m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program, str(root)], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_bare_import_stays_light() -> None:
    loaded = modules_loaded_by(TREE.parent)
    assert {"torch", "numpy"} <= loaded
    assert loaded.isdisjoint(HEAVY)


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    plant(tmp_path, {"__init__.py": "from autowidth.report import f\n", "report.py": "import rich\nf = None\n"})
    assert "rich" in modules_loaded_by(tmp_path)


def differences_from_all(module: ModuleType) -> set[str]:
    """Names that are in `__all__` but not public in the module, or the other way round; files do not count."""
    public = {n for n in dir(module) if not n.startswith("_") and not isinstance(getattr(module, n), ModuleType)}
    return (public - {"annotations"}) ^ {n for n in module.__all__ if not n.startswith("__")}


def test_the_public_names_are_all() -> None:
    import autowidth

    assert differences_from_all(autowidth) == set()
    assert all(hasattr(autowidth, name) for name in autowidth.__all__)
    assert len(set(autowidth.__all__)) == len(autowidth.__all__)


def test_a_difference_from_all_would_be_seen() -> None:
    module = ModuleType("fake")
    module.__all__ = ["trace", "gone"]  # type: ignore[attr-defined]
    module.trace = module.extra = module.annotations = 1  # type: ignore[attr-defined]
    module.file = ModuleType("file")  # type: ignore[attr-defined]
    assert differences_from_all(module) == {"gone", "extra"}
