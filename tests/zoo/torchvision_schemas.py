"""torchvision beside a CPU-only torch: declares the operators without which it cannot be imported."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch
from torch.library import Library

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""Operators of torchvision's compiled part, which its wheel for CUDA cannot load beside a CPU-only torch. No
classification model calls them, but the import of the package registers shapes for them."""

_DECLARED: list[Library] = []  # a library that is collected takes its schemas along


def import_torchvision() -> ModuleType:
    """Returns torchvision, after declaring its operators where they are absent.

    Raises ImportError (ModuleNotFoundError where it is not installed).
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    _declare()
    return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """Returns timm, which needs torchvision. Raises ImportError where one of them is not installed."""
    import_torchvision()
    return importlib.import_module("timm")


def _declare() -> None:
    """Declares the operators that are absent: names and types only, calling them would fail."""
    for schema in SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            library = Library("torchvision", "FRAGMENT")
            library.define(schema)
            _DECLARED.append(library)
