"""Units of a suite on other machines: handed to Slurm, or to processes of this one, by submitit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from autowidth.lab.bench import BenchError, Spread, Suite, Unit, UnitError, file_of, work

Where = Literal["local", "slurm"]

JOBS = ".jobs"
"""The folder, in that of a suite, with what submitit writes: scripts, logs."""

RULER = "-" * 22
"""What submitit puts around a traceback."""

POLL = {"local": 0.2, "slurm": 10.0}
"""Seconds between two looks at the jobs; Slurm's accounting does not like to be asked often."""


DEFAULTS = {"timeout_min": 24 * 60, "cpus_per_task": 1}
"""What a job is given where nothing else is asked for."""


class MissingSubmititError(BenchError):
    """submitit is not installed."""


def submitted(where: Where, *, at_once: int, options: Mapping[str, Any]) -> Spread:
    """What runs units as jobs, `at_once` at a time, each in a process with one CPU thread.

    `options` are those of submitit's `update_parameters`: timeout_min, slurm_partition and the like. The folder of the
    results has to be the same on all machines, and so has the Python that runs. Raises BenchError for options that are
    not known, MissingSubmititError.
    """
    try:
        import submitit
    except ImportError as error:
        raise MissingSubmititError(
            "spreading a suite over machines needs submitit: pip install 'autowidth[submit]'"
        ) from error
    if where == "slurm" and submitit.SlurmExecutor.affinity() < 0:
        raise BenchError("there is no Slurm here (srun is not in PATH): log in to its head node, or use --submit local")
    return partial(_each_as_a_job, partial(submitit.AutoExecutor, cluster=where), where, at_once, dict(options))


def options_of(text: str | None) -> dict[str, Any]:
    """Options out of a text such as timeout_min=600,slurm_partition=gpu. Raises BenchError."""
    found: dict[str, Any] = {}
    for word in filter(None, (part.strip() for part in (text or "").split(","))):
        name, sign, value = word.partition("=")
        if not sign or not name or not value:
            raise BenchError(f"--submit-with {word!r}: give NAME=VALUE, such as timeout_min=600,slurm_partition=gpu")
        found[name] = int(value) if value.isdigit() else value
    return found


def _each_as_a_job(
    executor_in: Callable[[Path], Any], where: Where, at_once: int, options: dict[str, Any], suite: Suite,
    units: Sequence[Unit], place: Path,
) -> Iterator[tuple[Unit, float]]:  # fmt: skip
    """Runs every unit as a job; yields each with its seconds when its file is there.

    Raises UnitError where a job fails; those that are running are then cancelled.
    """
    executor = executor_in(place.resolve() / JOBS)
    try:
        executor.update_parameters(**(DEFAULTS | options))
    except (ValueError, TypeError, NameError) as error:
        raise BenchError(f"submitit does not take --submit-with {options}: {error}") from error
    waiting, running = list(units), dict[Any, tuple[Unit, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                unit = waiting.pop(0)
                job = executor.submit(work, suite.name, suite.run, unit, file_of(place.resolve(), unit))
                running[job] = unit, time.perf_counter()
            for job in [job for job in running if job.done()]:
                unit, began = running.pop(job)
                _check(job, unit, place)
                yield unit, time.perf_counter() - began
            time.sleep(POLL[where])
    finally:
        for job in running:
            job.cancel(check=False)


def _check(job: Any, unit: Unit, place: Path) -> None:
    """Raises UnitError for a job that failed, with the last line of what it said."""
    error = job.exception()
    if error is None and file_of(place, unit).exists():
        return
    parts = str(error or "it left no result").split(RULER)  # what is around the traceback points to logs
    lines = [line for line in parts[min(1, len(parts) - 1)].splitlines() if line.strip()]
    raise UnitError(
        f"{unit.name} failed: {lines[-1].strip()}; its log is {job.paths.stderr}; finished units are kept, the same "
        "command goes on"
    )
