"""Where figures of a run go beside its folder: TensorBoard, MLflow, any logger of Lightning, through one door."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from autowidth.errors import AutoWidthError
from autowidth.history import Event
from autowidth.report.words import decided

EXPERIMENT = "autowidth"
"""The experiment of MLflow that runs are put into."""

LONGEST = 500
"""Characters of a parameter that MLflow's stores take in any case."""


class LoggerError(AutoWidthError, RuntimeError):
    """A logger that cannot be set up: its package is not installed, or refuses."""


class Logger(Protocol):
    """What figures are written to. Steps are optimizer steps; names have parts between slashes."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes one number for each name."""

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Writes how these numbers are distributed."""

    def text(self, name: str, words: str, step: int) -> None:
        """Writes a sentence."""

    def close(self) -> None:
        """Everything is written on return."""


def log_review(logger: Logger, event: Event) -> None:
    """Writes one review: cost, losses, price, moves, how well it predicted, all widths, all worths, and its words."""
    known = {
        "macs": event.macs, "params": event.params, "loss": event.loss, "predicted": event.predicted,
        "measured": event.measured, "price": event.price, "target": event.target,
        "removed": sum(event.removed.values()), "inserted": sum(event.inserted.values()),
        "spearman": event.fidelity.spearman if event.fidelity else None, "seconds": event.seconds_total,
    }  # fmt: skip
    figures = {f"review/{name}": float(value) for name, value in known.items() if value is not None}
    widths = {f"widths/{group}": float(width) for group, width in event.widths.items()}
    logger.scalars(figures | widths, event.step)
    logger.histogram("widths", list(event.widths.values()), event.step)
    for group, worths in event.filter_worths.items():
        logger.histogram(f"worths/{group}", worths, event.step)
    logger.text("review", decided(event), event.step)


class TensorBoardLogger:
    """Event files of TensorBoard in a folder. Raises LoggerError where the package is missing."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise LoggerError(
                "event files are written with tensorboard, which is not installed: pip install 'autowidth[tensorboard]'"
            ) from error
        self._writer: Any = SummaryWriter(os.fspath(folder))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        self._writer.add_histogram(name, np.asarray(values, dtype=np.float64), step)

    def text(self, name: str, words: str, step: int) -> None:
        self._writer.add_text(name, words, step)

    def close(self) -> None:
        self._writer.close()


class MlflowLogger:
    """A run of MLflow. It has no histograms: their least, middle and largest number are metrics; texts are artifacts.

    uri: of the tracking server or store; None for what MLflow's environment says. parameters: kept with the run.
    Raises LoggerError where the package is missing.
    """

    def __init__(self, uri: str | None, *, name: str, parameters: Mapping[str, object] | None = None) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise LoggerError("mlflow is not installed: pip install 'autowidth[mlflow]'") from error
        self._metric = Metric
        try:
            self._client: Any = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(EXPERIMENT)
            experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
            self._run = self._client.create_run(experiment, run_name=name).info.run_id
            known = [Param(_plain(key), str(value)[:LONGEST]) for key, value in (parameters or {}).items()]
            self._client.log_batch(self._run, params=known)
        except MlflowException as error:
            raise LoggerError(f"mlflow refuses {uri or 'its usual place'}: {error.message}") from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run, metrics=[self._metric(_plain(name), value, now, step) for name, value in values.items()]
        )

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        self.scalars(spread(name, values), step)

    def text(self, name: str, words: str, step: int) -> None:
        self._client.log_text(self._run, words, f"{_plain(name)}/step-{step}.txt")

    def close(self) -> None:
        self._client.set_terminated(self._run)


class LightningLogger:
    """Any logger of Lightning. What can draw histograms and texts, as its TensorBoardLogger can, is given them.

    Others are given the least, the middle and the largest number, and no texts.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._logger.log_metrics(dict(values), step=step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        draw = getattr(self._logger.experiment, "add_histogram", None)
        if draw is None:
            self.scalars(spread(name, values), step)
        else:
            draw(name, np.asarray(values, dtype=np.float64), step)

    def text(self, name: str, words: str, step: int) -> None:
        if (write := getattr(self._logger.experiment, "add_text", None)) is not None:
            write(name, words, step)

    def close(self) -> None:
        self._logger.finalize("success")


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The least, the middle and the largest of these numbers, by name."""
    numbers = np.asarray(values, dtype=np.float64)
    found = {"min": numbers.min(), "median": np.median(numbers), "max": numbers.max()} if len(numbers) else {}
    return {f"{name}/{kind}": float(value) for kind, value in found.items()}


def _plain(name: str) -> str:
    """A name in characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)
