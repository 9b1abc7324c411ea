"""What a run sends to loggers while it goes on, and the options that name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from autowidth.lab.result import Progress
from autowidth.lab.settings import Settings
from autowidth.loggers import Logger, MlflowLogger, TensorBoardLogger, log_review

OPTIONAL = ("--tensorboard", "--mlflow")
"""Options whose value may be left out."""


class WithOptionalValues(TyperCommand):
    """A command in which an option of `OPTIONAL` may stand without its value, which is then empty."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments that are left when options are read."""
        given = [
            word
            for arg, after in zip(args, [*args, "--"][1:], strict=True)
            for word in ((arg, "") if arg in OPTIONAL and after.startswith("-") else (arg,))
        ]
        return super().parse_args(ctx, given)


class Logs:
    """The loggers of a run; as a context, closes them behind it."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = tuple(loggers)

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *error: object) -> None:
        for logger in self.loggers:
            logger.close()

    def show(self, progress: Progress) -> None:
        """Sends what is known at the end of an epoch, and every review."""
        for logger in self.loggers:
            if progress.moment == "epoch":
                logger.scalars(figures(progress), progress.step)
            elif progress.moment == "review" and progress.event is not None:
                log_review(logger, progress.event)


def figures(p: Progress) -> dict[str, float]:
    """How a run stands, in numbers."""
    known = {
        "epoch": p.epoch, "loss": p.loss, "accuracy": p.accuracy, "macs": p.macs, "params": p.params,
        "macs_share": p.macs / p.macs_start, "params_share": p.params / p.params_start, "seconds": p.seconds,
    }  # fmt: skip
    return {f"train/{name}": float(value) for name, value in known.items() if value is not None}


def logs_for(settings: Settings, folder: Path, *, tensorboard: str | None, mlflow: str | None) -> Logs:
    """The loggers that the options name; an empty value is the usual place. Raises LoggerError."""
    found: list[Logger] = []
    if tensorboard is not None:
        found.append(TensorBoardLogger(tensorboard or folder.parent / "tensorboard" / folder.name))
    if mlflow is not None:
        found.append(MlflowLogger(mlflow or None, name=folder.name, parameters=settings.model_dump(mode="json")))
    return Logs(found)
