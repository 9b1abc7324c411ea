"""The laboratory: data, networks, published methods, training, measurements; it needs the extra `lab`."""

import importlib.util

from autowidth.errors import AutoWidthError

PACKAGES = ("pydantic", "pydantic_settings", "pyarrow", "PIL", "sklearn", "tabulate", "typer", "rich")
"""What the laboratory and the command import beside the packages of the library."""


class MissingPackageError(AutoWidthError, ImportError):
    """The packages of the laboratory are not installed."""


if _missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
    raise MissingPackageError(
        "the laboratory and the command of autowidth need packages that are not installed here "
        f"({', '.join(_missing)}): pip install 'autowidth[lab]'"
    )
