"""From a text to a network: a built-in name, or `module:callable` out of the current folder or an installed package."""

from __future__ import annotations

import builtins
import importlib
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from autowidth.lab.models.naming import build
from autowidth.lab.models.registry import UnknownModelError, close_names


def resolve(text: str, *, num_classes: int | None = None, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """The network that `text` names: a built-in name, or `module:callable`, which is imported and called.

    The callable gets those of the keywords num_classes, in_channels and width that its signature takes; where it takes
    any keyword and hands them on, those that are not refused further down. Without num_classes a built-in network has
    ten classes, and a callable its own number, or ten if it has none. While it is imported and called, and no longer,
    modules of the current folder can be imported.
    Raises UnknownModelError where the text leads nowhere, TypeError where it leads to something that is no module,
    and ValueError for a width factor that the callable does not take.
    """
    if ":" not in text:
        return build(text, num_classes=num_classes or 10, in_channels=in_channels, width=width)
    with _current_folder():
        maker = _import(text)
        if not callable(maker) or isinstance(maker, nn.Module):
            raise TypeError(f"{text} is {_a(maker)}, expected a class or function that returns an nn.Module")
        offered: dict[str, object] = {"num_classes": num_classes or 10, "in_channels": in_channels, "width": width}
        if num_classes is None and not _requires(maker, "num_classes"):
            del offered["num_classes"]
        taken = _accepted(maker, offered)
        if width != 1.0 and "width" not in taken:
            refused = f"{text} takes no keyword 'width', so the width factor {width} cannot be given to it; use 1.0"
            raise ValueError(refused)
        model = _made(maker, taken)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{text} returned {_a(model)}, expected an nn.Module")
    return model


@contextmanager
def _current_folder() -> Iterator[None]:
    """Modules of the current folder can be imported, but none in place of one of the standard library.

    The folder stands behind the standard library and before installed packages: a file `random.py` in it is found by
    nobody, also not by a package that the user's module imports.
    """
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:  # Python was started that way
        yield
        return
    standard = _standard_folders()
    behind = max((place for place, entry in enumerate(sys.path, 1) if os.path.realpath(entry) in standard), default=0)
    sys.path.insert(behind, folder)
    try:
        yield
    finally:
        if folder in sys.path:  # unless the user's module took it away
            sys.path.remove(folder)


def _standard_folders() -> set[str]:
    """The folders of the standard library, those of its compiled modules among them."""
    library = sysconfig.get_path("stdlib")
    compiled = (os.path.join(library, "lib-dynload"), os.path.join(sys.base_prefix, "DLLs"))  # Unix, Windows
    return {os.path.realpath(folder) for folder in (library, sysconfig.get_path("platstdlib"), *compiled)}


def _import(text: str) -> object:
    """What `module:name` names; the name may be dotted."""
    module_name, _, path = text.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", text):
        raise UnknownModelError(f"cannot import a model from {text!r}: the form is module:callable")
    root = module_name.partition(".")[0]
    is_class = root == "builtins" and isinstance(getattr(builtins, path, None), type)  # refused below, by its own fault
    if root in sys.stdlib_module_names and not is_class:  # a saved run may name it, and it is called
        raise UnknownModelError(
            f"cannot import a model from {text!r}: {_hidden(module_name) or f'{root} belongs to the standard library'}"
        )
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, something that it imports does not
        raise UnknownModelError(
            f"cannot import {text!r}: no module is named {error.name!r} in the current folder or on the Python path"
        ) from None
    for name in path.split("."):
        if not hasattr(found, name):
            hint = _hidden(module_name) or close_names(name, vars(found))
            raise UnknownModelError(f"{text!r} names no callable: there is no {name!r}; {hint}")
        found = getattr(found, name)
    return found


def _hidden(module_name: str) -> str | None:
    """What to do where a file of the user's has the name of a module of the standard library, which is taken."""
    root = module_name.partition(".")[0]
    if root in sys.stdlib_module_names and (os.path.exists(f"{root}.py") or os.path.isdir(root)):
        return f"{root} is a module of the standard library: give your own another name"
    return None


def _accepted(maker: Callable[..., object], offered: Mapping[str, object]) -> dict[str, object]:
    """Those of the keywords that the callable's signature takes."""
    try:
        parameters = inspect.signature(maker).parameters.values()
    except ValueError:
        raise TypeError(
            f"{maker!r} has no readable signature, expected a class or function written in Python"
        ) from None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(offered)
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {p.name for p in parameters if p.kind in by_keyword}
    return {name: value for name, value in offered.items() if name in names}


def _requires(maker: Callable[..., object], name: str) -> bool:
    """Whether the callable cannot be called without this keyword."""
    try:
        parameter = inspect.signature(maker).parameters.get(name)
    except ValueError:
        return False  # what that means is said where the signature is needed
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _made(maker: Callable[..., object], keywords: dict[str, object]) -> object:
    """What the callable returns, without the keyword that it, or what it calls, says it does not know."""
    try:
        return maker(**keywords)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in keywords or ("width" in keywords and keywords["width"] != 1.0):
            raise
        return _made(maker, {name: value for name, value in keywords.items() if name != unknown[1]})


def _a(thing: object) -> str:
    kind = type(thing).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
