"""Suites of measurements: what is finished stays, units run apart, what goes wrong is named."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from autowidth.__main__ import main
from autowidth.cli.bench import read_seeds
from autowidth.cli.door import UsageError
from autowidth.lab import bench as benches
from autowidth.lab.bench import BenchError, Outcome, Standing, Suite, Unit, UnitError, bench, logged
from autowidth.lab.prepare import FolderError
from autowidth.lab.suites import SUITES, UnknownSuiteError, find_suite, registry
from autowidth.lab.suites.fidelity import fidelity
from autowidth.lab.tables import spread

REPOSITORY = Path(__file__).resolve().parent.parent

# ---- units in processes ----------------------------------------------------------------------------------------------


def note(settings: Mapping[str, Any]) -> Outcome:
    """A unit that writes down when it ran, and then does as it was told."""
    place = Path(settings["place"])
    with (place / f"{settings['key']}.log").open("a") as log:
        log.write(f"{os.getpid()} {torch.get_num_threads()}\n")
    for word in settings["does"].split():
        if word == "wait":
            time.sleep(60)
        elif word == "meet":
            (place / settings["key"]).touch()
            while len([p for p in place.iterdir() if not p.suffix]) < 2:
                time.sleep(0.01)
        elif word == "fail":
            raise FolderError("this unit went wrong")
        elif word == "shout":
            raise FolderError("loud " * 60_000)
        elif word == "crash":
            raise UnsendableError(1, 2)
        elif word == "vanish":
            os._exit(3)
    return Outcome(records=[{"key": settings["key"]}], raw=[])


class UnsendableError(Exception):
    """An error that cannot be built again from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def notes(place: Path, **does: str) -> Suite:
    """A suite of such units, by key."""
    units = tuple(
        Unit(name=key, settings={"key": key, "place": str(place), "does": what}, command=f"do {key}")
        for key, what in does.items()
    )
    return Suite(name="notes", units=units, run=note, table=lambda r: f"{len(r)}\n", apart=frozenset({"key", "does"}))


def ran(place: Path) -> dict[str, int]:
    """How often each unit has begun."""
    return {log.stem: len(log.read_text().splitlines()) for log in place.glob("*.log")}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    found = tmp_path / "place"
    found.mkdir()
    return found


def test_units_run_at_the_same_time_in_one_thread_each(tmp_path: Path, place: Path) -> None:
    suite = notes(place, one="meet", two="meet")  # each waits for the other
    assert bench(suite, tmp_path / "out", processes=2) == [{"key": "one"}, {"key": "two"}]
    rows = [log.read_text().split() for log in place.glob("*.log")]
    assert {threads for _, threads in rows} == {"1"}
    assert len({pid for pid, _ in rows} | {str(os.getpid())}) == 3
    assert (tmp_path / "out" / "notes.md").read_text() == "2\n"


KILLED = """
import sys
from pathlib import Path
from test_bench import notes
from autowidth.lab.bench import bench
if __name__ == "__main__":
    bench(notes(Path(sys.argv[1]), one="", two="wait"), Path(sys.argv[2]), processes=1)
"""


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_suite_that_was_killed_goes_on_where_it_stood(tmp_path: Path, place: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    out = tmp_path / "out"
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "tests")])
    command = [sys.executable, str(tmp_path / "killed.py"), str(place), str(out)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    until(lambda: (place / "two.log").exists())
    process.send_signal(signal.SIGKILL)
    process.wait()
    worker = int((place / "two.log").read_text().split()[0])
    until(lambda: not alive(worker))  # no orphan goes on
    first = out / "notes" / "one.json"
    before = first.stat().st_mtime_ns
    assert [p.name for p in (out / "notes").iterdir()] == ["one.json"]
    assert json.loads((out / "notes.json").read_text()) == [{"key": "one"}]
    (out / "notes" / ".two.json.partial").write_text("{")  # as if it had been killed while it wrote
    told = list[Standing]()
    records = bench(notes(place, one="", two=""), out, report=told.append)
    assert records == [{"key": "one"}, {"key": "two"}]
    assert ran(place) == {"one": 1, "two": 2}
    assert first.stat().st_mtime_ns == before
    assert [(t.unit, t.seconds is None, t.done) for t in told] == [("one", True, 1), ("two", False, 2)]


def until(condition: Any) -> None:
    """Waits for something to become true. Fails after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_error_of_a_unit_comes_out_and_what_is_finished_stays(tmp_path: Path, place: Path) -> None:
    with pytest.raises(FolderError, match="this unit went wrong") as caught:
        bench(notes(place, one="", two="fail", three=""), tmp_path, processes=1)
    assert "in note" in str(caught.value.__cause__)  # the traceback of the other process
    assert ran(place) == {"one": 1, "two": 1}
    assert json.loads((tmp_path / "notes.json").read_text()) == [{"key": "one"}]


def test_an_error_ends_the_units_that_run_beside_it(tmp_path: Path, place: Path) -> None:
    with pytest.raises(UnitError, match="UnsendableError: 1 and 2"):
        bench(notes(place, one="wait", two="crash"), tmp_path / "out", processes=2)
    assert not (tmp_path / "out").exists()
    for log in place.glob("one.log"):  # it may not even have begun
        assert not alive(int(log.read_text().split()[0]))


LOUD = """
import sys
from pathlib import Path
from test_bench import notes
from autowidth.lab.bench import bench
from autowidth.lab.prepare import FolderError
if __name__ == "__main__":
    try:
        bench(notes(Path(sys.argv[1]), one="shout"), Path(sys.argv[2]), processes=1)
    except FolderError as error:
        print(len(str(error)), "in note" in str(error.__cause__))
"""


def test_an_error_of_any_length_comes_out(tmp_path: Path, place: Path) -> None:
    """More than the 64 kB that a pipe takes before its writer waits for a reader."""
    (tmp_path / "loud.py").write_text(LOUD)
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "tests")])
    command = [sys.executable, str(tmp_path / "loud.py"), str(place), str(tmp_path / "out")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "300000 True\n"


def test_a_process_that_vanishes_is_named(tmp_path: Path, place: Path) -> None:
    with pytest.raises(UnitError, match="process of one ended with code 3 and no result"):
        bench(notes(place, one="vanish"), tmp_path / "out")


# ---- the door --------------------------------------------------------------------------------------------------------


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path, place: Path) -> None:
    suite = notes(place, one="")
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="name a folder"):
        bench(suite, tmp_path / "file")
    (tmp_path / "notes").mkdir()
    for content in ("{", "[1]", '{"records": []}'):
        (tmp_path / "notes" / "other.json").write_text(content)
        with pytest.raises(BenchError, match="no result of a unit"):
            bench(suite, tmp_path)
    with pytest.raises(BenchError, match="processes=0"):
        bench(suite, tmp_path, processes=0)
    assert ran(place) == {}


def test_the_suites_are_those_of_the_table() -> None:
    assert set(SUITES) == {"fidelity", "digits", "mini", "cifar10", "published", "default"}
    with pytest.raises(ValueError, match="two suites are named 'fidelity'"):
        registry.suite("fidelity")(fidelity)


def test_names_that_lead_nowhere() -> None:
    with pytest.raises(UnknownSuiteError, match="did you mean fidelity"):
        find_suite("fidelty")
    with pytest.raises(BenchError, match="allowed are digits and cifar10:PATH"):
        find_suite("fidelity", data="folder:x")
    with pytest.raises(ValueError, match="nearest is resnet20"):
        find_suite("fidelity", models=("resnet21",))
    with pytest.raises(ValueError, match="'epochs' should be greater"):
        find_suite("fidelity", epochs=-1)


@pytest.mark.parametrize(("text", "seeds"), [("0", (0,)), ("3,1,3", (3, 1)), ("0-2", (0, 1, 2)), ("7, 0-1", (7, 0, 1))])
def test_seeds_are_read(text: str, seeds: tuple[int, ...]) -> None:
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "x", "1,", "2-1", "-1", "0-5000", "1.5"])
def test_no_seeds_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no seeds"):
        read_seeds(text)


def called(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the console entry."""
    monkeypatch.setattr(sys, "argv", ["autowidth", *arguments])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_runs_a_suite_and_prints_its_table(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def suite(**options: Any) -> Suite:
        asked.append(options)
        return notes(place, one="")

    monkeypatch.setattr(registry, "SUITES", {"notes": suite})
    line = f"bench notes --out {tmp_path / 'out'} --models a,b --seeds 0-1 --epochs 3 --processes 1".split()
    for how in ("took", "was there"):
        assert called(*line, monkeypatch=monkeypatch) == 0
        captured = capfd.readouterr()
        assert captured.out.splitlines()[0] == "1"
        assert "written to" in captured.out
        assert captured.err.startswith(f"one {how}")
    assert asked == [{"models": ("a", "b"), "seeds": (0, 1), "epochs": 3}] * 2
    assert ran(place) == {"one": 1}


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("bench fidelty", "did you mean fidelity"),
        ("bench fidelity --seeds x", "names no seeds"),
        ("bench fidelity --models resnet21", "nearest is resnet20"),
        ("bench fidelity --processes 0", "allowed are 1"),
        ("bench fidelity --data cifar10:nowhere", "no folder nowhere"),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(
    tmp_path: Path, line: str, part: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert called(*line.split(), monkeypatch=monkeypatch) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("autowidth: ")
    assert captured.err.count("\n") == 1
    assert part in captured.err
    assert list(tmp_path.iterdir()) == []


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert called("bench", "--help", monkeypatch=monkeypatch) == 0
    text = capfd.readouterr().out
    assert "  autowidth bench fidelity" in text
    assert max(map(len, text.splitlines())) <= 80


def test_places_on_this_machine_are_not_told() -> None:
    suite = fidelity(data="cifar10:/some/where", seeds=(0, 2))
    assert [u.name for u in suite.units] == [
        f"{m}-seed{s}" for m in ("resnet20", "vgg8", "densenet22") for s in (0, 2)
    ]  # fmt: skip
    assert suite.units[0].settings["data"] == "cifar10:/some/where"
    told = benches._finished("fidelity", suite.units[0], Outcome(records=[], raw=[]), 1.0)
    assert told["settings"]["data"] == "cifar10:PATH"
    assert "where" not in json.dumps(told)
    assert "--data cifar10:PATH" in suite.units[0].command
    training = suite.units[0].settings["training"]
    assert (training["limit"], training["limit"] * training["holdout"]) == (22_000, pytest.approx(2000))
    assert (training["pool"], training["epochs"], training["batch_size"]) == (2, 12, 128)


def test_means_are_told_with_what_is_known_of_their_spread() -> None:
    assert spread([]) == "-" and spread([], none="") == ""
    assert spread([1.25]) == "1.25" and spread([1.25], digits=1, counted=True) == "1.2"
    assert spread([1.0, 3.0]) == "2.00 ± 1.41" and spread([1.0, 3.0], digits=0, counted=True) == "2 ± 1 (2)"


def test_units_that_ended_are_logged_and_those_that_were_there_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "autowidth.lab.bench"):
        logged(Standing(unit="there before", seconds=None, done=1, total=3))
        logged(Standing(unit="new", seconds=12.4, done=2, total=3))
    assert [record.getMessage() for record in caplog.records] == ["2 of 3: new, 12 s"]
