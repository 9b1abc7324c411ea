"""The record of reviews: exact on disk, honest after a crash, and true to its index maps."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autowidth.channels import FRESH, IndexMap
from autowidth.history import SCHEMA, Event, Fidelity, History, HistoryError

GROUPS = ("stem", "body.0", "head")


def event(step: int = 1, **fields: object) -> Event:
    required = {
        "step": step,
        "total_steps": 100,
        "macs_before": 10,
        "macs": 9,
        "params_before": 8,
        "params": 7,
        "widths": {"a": 4},
    }
    return Event(**(required | fields))


anything = st.floats() | st.none()
names = st.sampled_from(GROUPS)
counts = st.integers(0, 2**60)


@st.composite
def index_maps(draw: st.DrawFn, size: int | None = None) -> IndexMap:
    size = draw(st.integers(1, 6)) if size is None else size
    return IndexMap(tuple(draw(st.lists(st.integers(FRESH, size - 1), min_size=1, max_size=8))), size)


events = st.builds(
    Event,
    step=counts,
    total_steps=counts,
    loss=anything,
    predicted=anything,
    measured=anything,
    price=anything,
    target=st.none() | counts,
    macs_before=counts,
    macs=counts,
    params_before=counts,
    params=counts,
    widths=st.dictionaries(names, st.integers(1, 999)),
    maps=st.dictionaries(names, index_maps()),
    worths=st.dictionaries(names, st.tuples(st.floats(), st.floats(), st.floats())),
    filter_worths=st.dictionaries(names, st.lists(st.floats(), max_size=5).map(tuple)),
    prices=st.dictionaries(names, st.floats()),
    interactions=st.dictionaries(names, st.floats()),
    fidelity=st.none() | st.builds(Fidelity, spearman=anything, slope=anything, count=counts),
    coefficients=st.lists(st.floats(), max_size=3).map(tuple),
    seconds=st.dictionaries(st.sampled_from(("probe", "audit", "decide", "surgery")), st.floats()),
    notes=st.lists(st.text(), max_size=3).map(tuple),
)


@st.composite
def runs(draw: st.DrawFn) -> History:
    """Histories whose recorded widths agree with their maps."""
    widths = {group: draw(st.integers(1, 6)) for group in GROUPS}
    history = History(widths)
    for step in range(draw(st.integers(0, 5))):
        maps = {group: draw(index_maps(widths[group])) for group in draw(st.sets(names))}
        widths = widths | {group: index_map.width for group, index_map in maps.items()}
        history.append(event(step, maps=maps, widths=widths))
    return history


def slow_channels(history: History) -> dict[str, list[int]]:
    """Reference: every channel of the start carries its number, everything that comes later carries -1."""
    channels = {group: list(range(width)) for group, width in history.widths_start.items()}
    for one in history:
        for group, index_map in one.maps.items():
            before = channels[group]
            channels[group] = [FRESH if s == FRESH else before[s] for s in index_map.source]
    return channels


def test_an_event_has_exactly_the_agreed_fields() -> None:
    agreed = (
        "step total_steps loss predicted measured price target unit macs_before macs params_before params widths maps "
        "worths filter_worths prices interactions fidelity coefficients seconds memory notes"
    )
    assert [f.name for f in dataclasses.fields(Event)] == agreed.split()
    with pytest.raises(dataclasses.FrozenInstanceError):
        event().loss = 1.0


def test_a_file_from_before_memory_was_counted_is_read(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History({"a": 4})
    history.append(event())
    history.write(path)
    _, line = path.read_text().splitlines()
    record = json.loads(line)
    del record["memory"]
    path.write_text(f'{{"schema": 2, "widths_start": {{"a": 4}}}}\n{json.dumps(record)}\n')
    assert History.read(path).events == (dataclasses.replace(event(), memory={}),)


@given(st.lists(events, max_size=3), st.dictionaries(names, counts))
def test_what_is_written_is_read_again_equal(
    tmp_path_factory: pytest.TempPathFactory, some: list[Event], start
) -> None:
    path = tmp_path_factory.mktemp("history") / "history.jsonl"
    history = History(start)
    for one in some:
        history.append(one)
    history.write(path)
    again = History.read(path)
    assert again.events == history.events
    assert again.widths_start == history.widths_start
    copy = path.with_name("copy.jsonl")
    again.write(copy)
    assert copy.read_bytes() == path.read_bytes()


def test_non_finite_numbers_are_null_in_the_file(tmp_path: Path) -> None:
    history = History({"a": 4})
    history.append(
        event(loss=math.nan, price=math.inf, worths={"a": (math.nan, 1.0, -math.inf)}, seconds={"probe": math.nan})
    )
    history.write(tmp_path / "h")
    line = json.loads((tmp_path / "h").read_text().splitlines()[1], parse_constant=pytest.fail)
    assert (line["loss"], line["price"], line["seconds"]["probe"]) == (None, None, None)
    assert line["worths"]["a"] == [None, 1.0, None]


def test_a_file_with_a_path_grows_with_every_event(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History({"a": 4}, path=path)
    assert History.read(path).events == ()
    for step in range(3):
        history.append(event(step))
        assert History.read(path).events == history.events
    with pytest.raises(FileExistsError, match="exists already"):
        History({"a": 4}, path=path)
    assert len(History.read(path)) == 3


def test_a_record_goes_on_after_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History({"a": 4}, path=path)
    history.append(event(1))
    history.append(event(2))
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(second + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match="dropped the last line"):
            again = History.read(path)
        assert again.events == history.events[:1]
    again.attach(path)
    again.append(event(2))
    assert path.read_bytes() == whole


def test_a_complete_last_line_without_a_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History({"a": 4}, path=path).append(event(1))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert len(History.read(path)) == 1


def test_an_event_survives_a_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    program = (
        "import os, signal, sys\n"
        "from autowidth.history import Event, History\n"
        "h = History({'a': 4}, path=sys.argv[1])\n"
        "h.append(Event(step=1, total_steps=9, macs_before=1, macs=1, params_before=1, params=1, widths={'a': 4}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], env={"PYTHONPATH": ":".join(sys.path)}, check=False
    )
    assert done.returncode == -9
    assert [one.step for one in History.read(path)] == [1]


def test_an_event_is_confirmed_by_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.jsonl"
    history = History({"a": 4}, path=path)
    confirmed: list[tuple[int, int]] = []
    monkeypatch.setattr("os.fsync", lambda number: confirmed.append((os.fstat(number).st_size, len(history))))
    history.append(event(1))
    assert confirmed == [(path.stat().st_size, 0)]


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "history.jsonl"
    History({"a": 4}, path=path)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(*{"replace": (Path, "replace"), "fsync": ("os.fsync",)}[where], fail)
    with pytest.raises(OSError, match="disk full"):
        History({"b": 5}).write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_line_that_could_not_be_taken_back_is_cut_off_before_the_next_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails in the middle of a line, and refuses to shorten the file too: two events never share a line."""
    path = tmp_path / "history.jsonl"
    history = History({"a": 4}, path=path)
    history.append(event(1))
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        write(descriptor, bytes(data)[: len(data) // 2])
        raise OSError("disk full")

    def refuse(*args: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", half)
        patch.setattr("os.truncate", refuse)
        with pytest.raises(OSError, match="disk full"):
            history.append(event(2))
    assert not path.read_bytes().endswith(b"\n")
    history.append(event(3))
    assert [one.step for one in History.read(path)] == [one.step for one in history] == [1, 3]


def test_a_file_that_is_gone_is_written_anew_with_the_next_event(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History({"a": 4}, path=path)
    history.append(event(1))
    path.unlink()
    history.append(event(2))
    assert [one.step for one in History.read(path)] == [1, 2]


def test_an_event_that_is_on_disk_but_was_never_counted_is_taken_back(tmp_path: Path) -> None:
    """An interrupt between the line and the list: the review is undone, and so is its line."""
    path = tmp_path / "history.jsonl"
    history = History({"a": 4}, path=path)
    history.append(event(1))
    line = path.read_bytes().splitlines(keepends=True)[-1]
    with path.open("ab") as file:
        file.write(line)
    history.retract(event(2))
    assert [one.step for one in History.read(path)] == [1]


DAMAGE = {
    "empty": lambda lines: [],
    "no header": lambda lines: lines[1:],
    "header without widths": lambda lines: [json.dumps({"schema": SCHEMA}), *lines[1:]],
    "garbage in the middle": lambda lines: [lines[0], "{", lines[2]],
    "not an object": lambda lines: [lines[0], "3", lines[2]],
    "a field is missing": lambda lines: [lines[0], lines[1].replace('"loss"', '"lost"'), lines[2]],
    "a field of the wrong kind": lambda lines: [lines[0], lines[1].replace('"step":1', '"step":"x"'), lines[2]],
    "an empty index map": lambda lines: [
        lines[0],
        lines[1].replace('"maps":{}', '"maps":{"a":{"source":[],"size":1}}'),
    ],
    "a newer format": lambda lines: [json.dumps({"schema": SCHEMA + 1, "widths_start": {}}), *lines[1:]],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "history.jsonl"
    history = History({"a": 4}, path=path)
    history.append(event(1))
    history.append(event(2))
    path.write_text("\n".join(DAMAGE[damage](path.read_text().splitlines())) + "\n")
    with pytest.raises(HistoryError, match=r"history\.jsonl") as caught:
        History.read(path)
    assert ("newer autowidth" in str(caught.value)) == (damage == "a newer format")


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        History.read(tmp_path / "nowhere")


@given(runs())
def test_replay_gives_the_recorded_widths(history: History) -> None:
    assert list(history.replay()) == [(one.step, one.widths) for one in history]


@given(runs(), st.data())
def test_replay_refuses_widths_that_the_maps_do_not_give(history: History, data: st.DataObject) -> None:
    group = data.draw(names)
    wrong = History(history.widths_start)
    for one in history:
        wrong.append(one)
    last = history.events[-1].widths if history.events else history.widths_start
    wrong.append(event(99, widths=last | {group: last[group] + 1}))
    with pytest.raises(ValueError, match=f"step 99: recorded width of '{group}'"):
        list(wrong.replay())


def test_replay_refuses_a_map_for_another_width() -> None:
    history = History({"a": 4})
    history.append(event(5, maps={"a": IndexMap.identity(3)}, widths={"a": 3}))
    with pytest.raises(ValueError, match=r"step 5: the map of 'a' is written for width 3, but .* lead to 4"):
        list(history.replay())
    stranger = History({"b": 4})
    stranger.append(event(5, maps={"a": IndexMap.identity(3)}, widths={"b": 4, "a": 3}))
    for read in (stranger.lineage, lambda: list(stranger.replay())):
        with pytest.raises(ValueError, match=r"step 5: .*'a'"):
            read()


@given(runs())
def test_lineage_follows_every_channel(history: History) -> None:
    expected = slow_channels(history)
    assert {group: list(index_map.source) for group, index_map in history.lineage().items()} == expected
    assert history.inserted_alive == sum(channels.count(FRESH) for channels in expected.values())
    survivors = history.survivors()
    assert sum(sum(alive.values()) for alive in survivors) == history.inserted_alive
    for one, alive in zip(history, survivors, strict=True):
        assert alive.keys() == {group for group, count in one.inserted.items() if count}


def test_the_digest_says_of_every_review_who_left_who_came_and_who_stayed() -> None:
    history = History({"a": 4, "b": 2})
    first = {"a": IndexMap.removing([0], 4).inserting(2), "b": IndexMap.removing([1], 2)}
    history.append(event(10, maps=first, widths={"a": 5, "b": 1}, price=2e-9, predicted=0.25, measured=0.5))
    history.append(event(20, maps={"a": IndexMap.removing([3], 5).inserting(1)}, widths={"a": 5, "b": 1}))
    early, late = history.digest()
    assert (early["removed"], early["inserted"], early["alive"]) == ({"a": 1, "b": 1}, {"a": 2}, {"a": 1})
    assert (late["removed"], late["inserted"], late["alive"]) == ({"a": 1}, {"a": 1}, {"a": 1})
    assert (early["step"], early["price"], early["predicted"], early["measured"]) == (10, 2e-9, 0.25, 0.5)
    assert json.loads(json.dumps(history.digest(), allow_nan=False)) == [early, late]


def test_survivors_refuse_a_map_for_another_width() -> None:
    history = History({"a": 4})
    history.append(event(5, maps={"a": IndexMap.identity(3)}, widths={"a": 3}))
    with pytest.raises(ValueError, match="step 5: the map of 'a' does not fit"):
        history.survivors()


@given(runs())
def test_totals_are_sums_over_events(history: History) -> None:
    removed = sum(len(set(range(m.size)) - set(m.source)) for one in history for m in one.maps.values())
    inserted = sum(m.source.count(FRESH) for one in history for m in one.maps.values())
    assert (history.removed_total, history.inserted_total) == (removed, inserted)
    assert removed == sum(sum(one.removed.values()) for one in history)
    assert inserted == sum(sum(one.inserted.values()) for one in history)


def test_the_record_cannot_be_changed_from_outside() -> None:
    history = History({"a": 4})
    history.append(event(1))
    history.widths_start["a"] = 9
    assert history.widths_start == {"a": 4}
    assert isinstance(history.events, tuple)
    assert len(history) == len(list(history)) == 1


def test_an_event_knows_its_wall_time() -> None:
    assert event(seconds={"probe": 1.0, "audit": 2.5}).seconds_total == 3.5
    assert event().seconds_total == 0


def test_reading_a_whole_file_warns_of_nothing(tmp_path: Path) -> None:
    History({"a": 4}, path=tmp_path / "h").append(event(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        History.read(tmp_path / "h")
