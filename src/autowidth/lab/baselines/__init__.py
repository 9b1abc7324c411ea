"""The published methods that ours is compared with: a file each, found here by themselves."""

import importlib
import pkgutil

from autowidth.lab.baselines.registry import IMPORTANCES, TRAINING_RULES

for _found in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_found.name)

__all__ = ["IMPORTANCES", "TRAINING_RULES"]
