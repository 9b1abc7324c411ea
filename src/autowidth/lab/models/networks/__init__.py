"""The built-in networks: one file per family, and every file here is read, so that a new one needs no other entry."""

from __future__ import annotations

import importlib
import pkgutil

from autowidth.lab.models.registry import MODELS

_FIRST = ("resnet", "vgg")
"""The families that are listed first; the others follow by name."""


def _place(name: str) -> int:
    return next((place for place, family in enumerate(_FIRST) if name.startswith(family)), len(_FIRST))


for _file in pkgutil.iter_modules(__path__):  # in the order of their names
    importlib.import_module(f"{__name__}.{_file.name}")

_listed = sorted(MODELS.items(), key=lambda entry: _place(entry[0]))
MODELS.clear()
MODELS.update(_listed)
