"""The suites of measurements: a file each, found here by themselves."""

import importlib
import pkgutil

from autowidth.lab.suites.registry import SUITES, UnknownSuiteError, find_suite

for _found in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_found.name)

__all__ = ["SUITES", "UnknownSuiteError", "find_suite"]
