"""Measurements that can be repeated: suites of units, one JSON per finished unit, resumable, merged into one table.

A suite is a list of units and a function that turns a unit into records. Under the folder DIR lie:

    DIR/SUITE/UNIT.json     one finished unit: settings, machine, versions, records, raw numbers; written at once or not
    DIR/SUITE.json          the records of all finished units
    DIR/SUITE.md            the same as tables for people
    DIR/SUITE.svg           the same as a picture, where the suite has one

A unit whose file exists is not run again. Every unit has a process of its own, with one CPU thread.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from autowidth.errors import AutoWidthError
from autowidth.lab.prepare import FolderError
from autowidth.version import __version__

Array: TypeAlias = NDArray[np.float64]
Record: TypeAlias = dict[str, Any]

_log = logging.getLogger(__name__)


class BenchError(AutoWidthError, ValueError):
    """A suite that cannot be run as asked, or results that do not belong together."""


class UnitError(AutoWidthError, RuntimeError):
    """A unit whose process ended without a result and without saying why."""


# ---- suites ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A piece of work that is done at a stretch.

    name: unique in its suite, and the name of its file. settings: all that decides the outcome, in what JSON can hold.
    command: the command line that runs this unit alone; places on this machine are spelt PATH.
    """

    name: str
    settings: Mapping[str, Any]
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a unit found: its records, one flat mapping each, and the raw numbers behind them."""

    records: Sequence[Record]
    raw: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Units, the function that runs one (importable by name: it runs in another process), and the tables it ends in.

    `apart` names the settings in which units of one suite may differ; all others must be equal in one folder.
    `draw`, if any, writes a picture of the records to a file.
    """

    name: str
    units: tuple[Unit, ...]
    run: Callable[[Mapping[str, Any]], Outcome]
    table: Callable[[Sequence[Record]], str]
    apart: frozenset[str]
    draw: Callable[[Sequence[Record], Path], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A unit is there: how long it took (None: it was there before), and how many of all units are done now."""

    unit: str
    seconds: float | None
    done: int
    total: int


def _silent(standing: Standing) -> None:
    """Tells nobody."""


def logged(standing: Standing) -> None:
    """Logs a unit that ended just now; for `report`."""
    if standing.seconds is not None:
        _log.info("%d of %d: %s, %.0f s", standing.done, standing.total, standing.unit, standing.seconds)


Spread: TypeAlias = Callable[[Suite, Sequence[Unit], Path], Iterator[tuple[Unit, float]]]
"""What runs units somewhere, and yields each with its seconds when its file is in the folder."""


def bench(
    suite: Suite, out: Path, *, processes: int = 2, report: Callable[[Standing], None] = _silent,
    spread: Spread | None = None,
) -> list[Record]:  # fmt: skip
    """Runs the units that are not there yet, up to `processes` at a time, and returns the records of all in `out`.

    They run in processes of this machine, or where `spread` runs them.

    Raises FolderError where `out` cannot be written to, BenchError where it holds results of other settings or what
    cannot be read, UnitError where a process ends without a result, and whatever a unit raises; finished units stay.
    """
    if processes < 1:
        raise BenchError(f"processes={processes}: allowed are 1 to the number of cores")
    place = out / suite.name
    with _folder(place):
        _check(suite, place)
        todo = [unit for unit in suite.units if not file_of(place, unit).exists()]
        done = [unit for unit in suite.units if unit not in todo]
        for number, unit in enumerate(done, 1):
            report(Standing(unit=unit.name, seconds=None, done=number, total=len(suite.units)))
        if done:
            merge(suite, out)
        each = spread or partial(_each_in_a_process, min(processes, os.cpu_count() or 1))
        for number, (unit, seconds) in enumerate(each(suite, todo, place), len(done) + 1):
            merge(suite, out)
            report(Standing(unit=unit.name, seconds=seconds, done=number, total=len(suite.units)))
        return merge(suite, out)


def merge(suite: Suite, out: Path) -> list[Record]:
    """Writes the records of all finished units in `out`, also of other calls, as JSON and as tables; returns them."""
    files = sorted((out / suite.name).glob("*.json"))
    records = [record for file in files for record in _read(file)["records"]]
    write_whole(out / f"{suite.name}.json", _listed(records))
    write_whole(out / f"{suite.name}.md", suite.table(records))
    if suite.draw is not None:
        suite.draw(records, out / f"{suite.name}.svg")
    return records


def _listed(records: Sequence[Record]) -> str:
    """A JSON list with one record per line."""
    return "[\n" + ",\n".join(json.dumps(record, allow_nan=False) for record in records) + "\n]\n"


# ---- files -----------------------------------------------------------------------------------------------------------


def file_of(place: Path, unit: Unit) -> Path:
    """The file of a unit that is done."""
    return place / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', unit.name)}.json"


@contextmanager
def _folder(place: Path) -> Iterator[None]:
    """The folder exists while it lasts, and afterwards if anything is in it. Raises FolderError."""
    missing = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        trial = place / f".trial-{os.getpid()}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        sentence = f"cannot write results to {place}: {error.strerror}; name a folder you may write to"
        raise FolderError(sentence) from error
    try:
        yield
    finally:
        for folder in missing:
            if not any(folder.iterdir()):
                folder.rmdir()


def write_whole(file: Path, text: str) -> None:
    """Writes the file so that it is there whole or not at all, whenever the process ends."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _read(file: Path) -> dict[str, Any]:
    """A finished unit. Raises BenchError where the file holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.keys() >= {"records", "settings"}:
            return found
        reason = "it has no records and settings"
    except ValueError as error:
        reason = str(error)
    raise BenchError(f"{file} is no result of a unit: {reason}; move it out of the folder")


def _check(suite: Suite, place: Path) -> None:
    """Raises BenchError where the folder holds results that were made with other settings."""
    asked = {unit.name: _shown(unit.settings) for unit in suite.units}
    for file in sorted(place.glob("*.json")):
        found = _read(file)
        for wanted in asked.values():
            for name, value in wanted.items():
                got = _completed(found["settings"].get(name, value), value)
                if name not in suite.apart and got != value:
                    raise BenchError(
                        f"{file} was made with {name} {_brief(got, value)}, here it is {_brief(value, got)}: "
                        "name another folder, or ask for the same"
                    )


def _completed(got: Any, wanted: Any) -> Any:
    """A setting as it was written, with what did not exist then (or not for that method) as it is asked for now."""
    return (
        {key: got.get(key, wanted[key]) for key in wanted}
        if isinstance(got, dict) and isinstance(wanted, dict)
        else got
    )


def _brief(value: Any, other: Any) -> str:
    """A setting for people; of two tables what differs."""
    if isinstance(value, dict) and isinstance(other, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items() if other.get(k) != v) or "nothing of its own"
    return str(value)


PLACES = ("data", "weights")
"""Settings that name a place on this machine, behind a kind and a colon."""


def _shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are written: the same on every machine, with PATH for what lies elsewhere on each."""
    return {name: nameless(value) if name in PLACES and value else value for name, value in settings.items()}


def nameless(data: str) -> str:
    """A text that names data, without a place on this machine: cifar10:PATH."""
    kind, colon, _ = data.partition(":")
    return f"{kind}{colon}PATH" if colon and kind != "hf" else data


# ---- processes -------------------------------------------------------------------------------------------------------


class _Spawn(SpawnContext):
    """Starts fresh interpreters, and remembers the last one: a pool does not say how its process ended.

    Nothing of torch, of threads or of generators comes along into a fresh interpreter.
    """

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        self.started = SpawnProcess(*args, **kwargs)
        return self.started


class _Worker:
    """A unit in a process of its own."""

    def __init__(self, suite: Suite, unit: Unit, place: Path) -> None:
        self.unit = unit
        self.began = time.perf_counter()
        self._context = _Spawn()
        self._pool = ProcessPoolExecutor(1, mp_context=self._context, initializer=_end_with_the_parent)
        self.future = self._pool.submit(work, suite.name, suite.run, unit, file_of(place, unit))

    def result(self) -> float:
        """The seconds since its beginning, once its future is done.

        Raises what the unit raised, UnitError where its process ended without a word.
        """
        self._pool.shutdown()
        try:
            self.future.result()
        except BrokenProcessPool:
            raise UnitError(
                f"the process of {self.unit.name} ended with code {self._context.started.exitcode} and no result; "
                "finished units are kept, the same command goes on"
            ) from None
        return time.perf_counter() - self.began

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._context.started.terminate()
        self._pool.shutdown()


def _each_in_a_process(count: int, suite: Suite, units: Sequence[Unit], place: Path) -> Iterator[tuple[Unit, float]]:
    """Runs every unit in a process of its own, `count` at a time; yields each with its seconds when its file is there.

    Raises what a unit raises, and UnitError where its process just ends; the others are then ended too.
    """
    waiting, running = list(units), dict[Future[None], _Worker]()
    try:
        while waiting or running:
            while waiting and len(running) < count:
                worker = _Worker(suite, waiting.pop(0), place)
                running[worker.future] = worker
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                worker = running.pop(future)
                yield worker.unit, worker.result()
    finally:
        for worker in running.values():
            worker.end()


def work(suite: str, run: Callable[[Mapping[str, Any]], Outcome], unit: Unit, file: Path) -> None:
    """The work of a unit's process: run, write. Raises what the unit raises, in a form that can be sent."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        outcome = run(unit.settings)
    except Exception as error:
        sent = _sendable(error)
        if sent is error:
            raise
        raise sent from error
    seconds = time.perf_counter() - began
    write_whole(file, json.dumps(_finished(suite, unit, outcome, seconds), allow_nan=False))


def _end_with_the_parent() -> None:
    """From now on this process ends when the one that started it has ended."""
    threading.Thread(target=_wait_for_the_parent, daemon=True).start()


def _wait_for_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a kill of the parent leaves no time to tell; half of a unit is worth nothing


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error's own constructor runs here
        return UnitError(f"{type(error).__name__}: {error}")
    return error


def _finished(suite: str, unit: Unit, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """A finished unit in what JSON can hold."""
    return {
        "suite": suite,
        "unit": unit.name,
        "command": unit.command,
        "settings": _shown(unit.settings),
        "environment": environment(),
        "seconds": seconds,
        "records": list(outcome.records),
        "raw": list(outcome.raw),
    }


def environment() -> dict[str, Any]:
    """Versions, the machine without its name, the revision of the source: what one must know to repeat a figure."""
    return {
        "autowidth": __version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
    }


def _processor() -> str:
    """The processor's name as the system tells it."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # not on Linux
        found = None
    return found[1] if found else platform.processor()


def _revision() -> str | None:
    """The commit of the source, with -dirty where files differ from it; None where the source is under no git."""
    here = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "channels.py")  # else the repository around is somebody else's
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
