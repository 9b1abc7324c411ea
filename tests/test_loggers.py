"""Figures sent to TensorBoard, MLflow and Lightning are read back from what these have written."""

from __future__ import annotations

import csv
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from autowidth.checkpoint import read_run
from autowidth.cli import app
from autowidth.history import Event, History
from autowidth.loggers import LightningLogger, LoggerError, MlflowLogger, TensorBoardLogger, log_review
from autowidth.report.words import decided
from records import written
from zoo.torchvision_schemas import import_torchvision

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def import_what_lightning_may_import() -> None:
    """torchvision, where it is installed, in a way that suits the torch of this environment."""
    with suppress(ImportError):
        import_torchvision()


@pytest.fixture
def history(tmp_path: Path) -> History:
    """Three reviews of four layers; the last two know the worth of every filter."""
    return written(tmp_path / "history.jsonl", layers=4, reviews=3)


def events_in(folder: Path) -> Any:
    """What TensorBoard reads in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0, "tensors": 0})
    return found.Reload()


def check_tensorboard(folder: Path, events: tuple[Event, ...]) -> None:
    """The event files in the folder hold these reviews."""
    found = events_in(folder)
    assert [(s.step, s.value) for s in found.Scalars("review/macs")] == [
        (event.step, pytest.approx(event.macs)) for event in events
    ]
    for group in events[0].widths:
        assert [s.value for s in found.Scalars(f"widths/{group}")] == [event.widths[group] for event in events]
    widths = found.Histograms("widths")
    assert [int(h.histogram_value.num) for h in widths] == [len(event.widths) for event in events]
    assert [h.histogram_value.sum for h in widths] == [sum(event.widths.values()) for event in events]
    judged = [event for event in events if event.filter_worths]
    group = next(iter(events[0].widths))
    worths = found.Histograms(f"worths/{group}")
    assert [h.step for h in worths] == [event.step for event in judged]
    assert [h.histogram_value.max for h in worths] == [max(event.filter_worths[group]) for event in judged]
    said = [t.tensor_proto.string_val[0].decode() for t in found.Tensors("review/text_summary")]
    assert said == [decided(event) for event in events]


def test_event_files_of_tensorboard_hold_every_review(tmp_path: Path, history: History) -> None:
    logger = TensorBoardLogger(tmp_path / "board")
    for event in history:
        log_review(logger, event)
    logger.close()
    check_tensorboard(tmp_path / "board", history.events)


def test_a_tensorboard_logger_of_lightning_is_given_histograms_too(tmp_path: Path, history: History) -> None:
    import_what_lightning_may_import()
    from lightning.pytorch.loggers import TensorBoardLogger as Theirs

    theirs = Theirs(str(tmp_path), name="run", version="0")
    logger = LightningLogger(theirs)
    for event in history:
        log_review(logger, event)
    logger.close()
    check_tensorboard(Path(theirs.log_dir), history.events)


def test_any_logger_of_lightning_is_given_numbers(tmp_path: Path, history: History) -> None:
    import_what_lightning_may_import()
    from lightning.pytorch.loggers import CSVLogger

    theirs = CSVLogger(str(tmp_path), name="run", version="0")
    logger = LightningLogger(theirs)
    log_review(logger, history.events[0])  # a table of Lightning keeps the columns of its first rows
    logger.close()
    with (Path(theirs.log_dir) / "metrics.csv").open() as file:
        row = {name: value for row in csv.DictReader(file) for name, value in row.items() if value}
    event = history.events[0]
    assert float(row["review/macs"]) == event.macs
    assert float(row["widths/median"]) == np.median(list(event.widths.values()))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of MLflow in files, which it takes only where it is told to."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "store").as_uri()


def runs_in(store: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("autowidth")
    return list(client.search_runs([experiment.experiment_id]))


def test_mlflow_holds_every_review(store: str, history: History) -> None:
    from mlflow import MlflowClient

    logger = MlflowLogger(store, name="run", parameters={"lr": 0.1, "policy": {"macs": 0.5}})
    for event in history:
        log_review(logger, event)
    logger.close()
    (run,) = runs_in(store)
    assert (run.info.run_name, run.info.status, run.data.params["lr"]) == ("run", "FINISHED", "0.1")
    client = MlflowClient(tracking_uri=store)
    macs = client.get_metric_history(run.info.run_id, "review/macs")
    assert [(m.step, m.value) for m in macs] == [(event.step, event.macs) for event in history]
    for event in history:
        place = client.download_artifacts(run.info.run_id, f"review/step-{event.step}.txt")
        assert Path(place).read_text(encoding="utf-8") == decided(event)
    widths = client.get_metric_history(run.info.run_id, "widths/max")
    assert [m.value for m in widths] == [max(event.widths.values()) for event in history]


def test_a_place_that_mlflow_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(LoggerError, match=r"mlflow refuses file:.*: "):
        MlflowLogger((tmp_path / "store").as_uri(), name="run")


def test_the_command_logs_to_both(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = "train --model resnet8 --width 0.25 --epochs 2 --macs 0.6 --out runs/a --quiet --tensorboard --mlflow"
    done = CliRunner().invoke(app, [*line.split(), store])
    assert done.exit_code == 0, done.output
    run = read_run("runs/a")
    history = run.history()
    assert history is not None
    check_tensorboard(tmp_path / "runs" / "tensorboard" / "a", history.events)
    found = events_in(tmp_path / "runs" / "tensorboard" / "a")
    assert len(found.Scalars("train/accuracy")) == 2
    assert found.Scalars("train/accuracy")[-1].value == pytest.approx(run.extra["result"]["accuracy"])
    (logged,) = runs_in(store)
    assert logged.data.metrics["train/accuracy"] == pytest.approx(run.extra["result"]["accuracy"])
    assert logged.data.params["model"] == "resnet8"


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("torch.utils.tensorboard", lambda: TensorBoardLogger("x"), "tensorboard"),
        ("mlflow", lambda: MlflowLogger(None, name="x"), "mlflow"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, module: str, make: Any, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LoggerError, match=rf"pip install 'autowidth\[{extra}\]'"):
        make()
