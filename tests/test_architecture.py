"""The drawing and the code are the same: floors, imports, captions, lengths, public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TREE = REPOSITORY / "src" / "autowidth"
PACKAGE = "autowidth"

DRAWING = REPOSITORY / "docs" / "architecture.md"


@dataclass(frozen=True)
class Drawn:
    """A line of the floor plan: a file, or all files of a folder that have no line of their own (`folder/*.py`)."""

    path: str
    floor: float
    caption: str


def drawn(text: str) -> dict[str, Drawn]:
    """The floor plan in a document by path: lines such as `  review/trial.py   2.4  The one trial: ...`."""
    rows = re.findall(r"^ {2}([\w/*]+\.py) +(\d+(?:\.\d+)?)  (\S.*)$", text, flags=re.MULTILINE)
    return {path: Drawn(path, float(number), caption) for path, number, caption in rows}


PLAN = drawn(DRAWING.read_text())
"""The floor plan of docs/architecture.md, which every check below holds against the files."""

HEAVY = (
    "lightning", "mlflow", "onnx", "plotly", "tensorboard", "matplotlib", "datasets", "pyarrow", "rich", "typer",
    "pydantic", "PIL", "sklearn",
)  # fmt: skip
FORBIDDEN_NAMES = ("utils", "util", "helpers", "helper", "base", "common", "misc")
LONGEST = 40
LARGEST = 500


def modules(tree: Path) -> dict[str, ast.Module]:
    """Dotted name below the package -> syntax tree, for every file of the tree."""
    names = {path: ".".join(path.relative_to(tree).with_suffix("").parts) for path in sorted(tree.rglob("*.py"))}
    return {name: ast.parse(path.read_text()) for path, name in names.items()}


def line_of(name: str) -> Drawn | None:
    """The line of the floor plan for a file, by its dotted name; None where the plan has none."""
    path = name.replace(".", "/")
    return PLAN.get(f"{path}.py") or PLAN.get(f"{path.rpartition('/')[0]}/*.py")


def floor(name: str) -> float | None:
    """The floor of a file, or None where the plan does not draw it."""
    line = line_of(name)
    return None if line is None else line.floor


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


def points_down(upper: str, lower: str) -> bool:
    """Whether one file may import another: to a lower floor, or on one floor further down in the same room."""
    above, below = floor(upper), floor(lower)
    if above is None or below is None:
        return True  # another check says that they are not drawn
    same_room = upper.split(".")[0] == lower.split(".")[0]
    return above > below if same_room else int(above * 2) > int(below * 2)


def imports_that_do_not_point_down(tree: Path) -> list[str]:
    return [f"{a} imports {b}" for a, b, _ in inner_imports(tree) if b and not points_down(a, b)]


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
    outside = lambda name: name.split(".")[0] not in ("cli", "__main__", "lab")  # noqa: E731
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


def files_that_are_too_large(tree: Path) -> list[str]:
    counts = {path: len(path.read_text().splitlines()) for path in sorted(tree.rglob("*.py"))}
    return [f"{path.relative_to(tree)}: {count} lines" for path, count in counts.items() if count > LARGEST]


def captions_that_are_not_drawn(tree: Path) -> list[str]:
    """Files whose caption is not their line in the floor plan; of a folder drawn as a whole, no caption is asked."""
    lines = {name: line_of(name) for name in modules(tree)}
    return [
        name
        for name, module in modules(tree).items()
        if (line := lines[name]) is not None
        and "*" not in line.path
        and (ast.get_docstring(module) or "").split("\n")[0] != line.caption
    ]


def functions_that_are_too_long(tree: Path) -> list[str]:
    return [
        f"{name}.{node.name}: {length} lines"
        for name, module in modules(tree).items()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST
    ]


def calls_of_print(tree: Path) -> list[str]:
    """Calls of the built-in print outside the command line."""
    calls = [
        (name, node)
        for name, module in modules(tree).items()
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    return [f"{name}, line {node.lineno}" for name, node in calls if not name.startswith("cli.")]


Check = Callable[[Path], list[str]]
CHECKS: dict[Check, list[dict[str, str]]] = {
    files_without_a_floor: [{"novelty.py": ""}, {"lab/novelty.py": ""}],
    imports_that_do_not_point_down: [
        {"channels.py": "from autowidth.engine import AutoWidth", "engine.py": ""},
        {"channels.py": "def f():\n    import autowidth.history", "history.py": ""},
        {"channels.py": "from .history import History", "history.py": ""},
        {"channels.py": "import importlib\nimportlib.import_module('autowidth.history')", "history.py": ""},
        {"surgery/surgery.py": "from autowidth.rules.labels import spread", "rules/labels.py": ""},
        {"review/profit.py": "from autowidth.review.trial import Subject", "review/trial.py": ""},
        {"policy/targets.py": "from autowidth.cost import Cost", "cost.py": ""},
        {"lab/baselines/one.py": "from autowidth.lab.baselines.two import f", "lab/baselines/two.py": ""},
        {"lab/baselines/one.py": "from .two import f", "lab/baselines/two.py": ""},
        {"lab/plots.py": "from ..cli.train import command", "cli/train.py": ""},
        {"lab/loop.py": "from autowidth.lab import bench", "lab/bench.py": "", "lab/__init__.py": ""},
    ],
    imports_of_the_root: [
        {"trace.py": "import autowidth", "__init__.py": ""},
        {"trace.py": "def f():\n    import autowidth as aw", "__init__.py": ""},
        {"trace.py": "from autowidth import channels", "__init__.py": "", "channels.py": ""},
        {"trace.py": "from . import channels", "__init__.py": "", "channels.py": ""},
        {"lab/train.py": "from .. import channels", "__init__.py": "", "channels.py": ""},
    ],
    imports_of_the_lab: [
        {"__init__.py": "from autowidth.lab.models import build", "lab/models.py": ""},
        {"engine.py": "def f():\n    from autowidth import lab", "lab/__init__.py": ""},
        {"integrations/lightning.py": "import autowidth.lab.models", "lab/models.py": ""},
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
    files_that_are_too_large: [{"trace.py": "pass\n" * (LARGEST + 1)}],
    captions_that_are_not_drawn: [{"channels.py": '"""Something else."""'}],
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
    caption = {path: f'"""{line.caption}"""\n' for path, line in PLAN.items()}
    sound = {
        "__init__.py": caption["__init__.py"] + "from autowidth.trace import trace\n",
        "channels.py": caption["channels.py"].replace('."""', '.\n\nA legend of letters.\n"""'),
        "trace/__init__.py": caption["trace/__init__.py"] + "import torch\nfrom ..channels import ChannelMap\n",
        "lab/plots.py": caption["lab/plots.py"] + "def f():\n" + "    pass\n" * (LONGEST - 1),
        "lab/baselines/one.py": '"""A method."""\nfrom autowidth.lab.baselines.axes import f\n',
        "lab/baselines/axes.py": caption["lab/baselines/axes.py"],
        "cli/bench.py": caption["cli/bench.py"] + "from autowidth.lab.plots import f\nprint(1)\n",
    }
    tree = plant(tmp_path, sound)
    assert {check.__name__: check(tree) for check in CHECKS} == {check.__name__: [] for check in CHECKS}


def test_everything_drawn_exists() -> None:
    """A file is drawn when it exists, not before."""
    missing = [path for path in PLAN if not list(TREE.glob(path))]
    assert missing == []
    assert len(PLAN) > 40


def test_a_line_of_the_drawing_is_read_as_it_stands() -> None:
    text = "  review/trial.py   2.4  The one trial.\n  lab/baselines/*.py 4.1  One file a method.\nreview/x.py  3  No."
    found = drawn(text)
    assert found == {
        "review/trial.py": Drawn("review/trial.py", 2.4, "The one trial."),
        "lab/baselines/*.py": Drawn("lab/baselines/*.py", 4.1, "One file a method."),
    }


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
