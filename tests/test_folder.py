"""Any set of files is written as one act and read back checked; what is not ours stays, nothing is believed."""

from __future__ import annotations

import errno
import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

from autowidth.checkpoint import SCHEMA, CheckpointError, WriteError, load_, read_run, read_tensors, save
from autowidth.checkpoint.folder import RECORD_LIMIT, checked_path, read, read_bytes_of, remove, write
from autowidth.checkpoint.saving import write_run
from autowidth.checkpoint.tensors import plain, read_tensor_file, tensor_file
from autowidth.history import Event, History, HistoryError
from autowidth.reading import LARGEST_NUMBER, ReadError, opened, read_bytes, size_of, strict_json
from test_checkpoint import INPUT, Plain, event, fresh, lived_in, outputs


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- the layer -------------------------------------------------------------------------------------------------------


def test_any_set_of_files_is_given_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "empty": torch.zeros(0, 4), "half": torch.ones(3).bfloat16()}
    pieces = [b"one", memoryview(b"two"), bytes(3_000_000)]
    files = {
        "optimizer.safetensors": tensor_file(tensors),
        "loops.json": b"[1]",
        "log.jsonl": lambda sink: [sink.write(piece) for piece in pieces],
    }
    written = write(tmp_path / "new", fields={"step": 7, "text": "é\ud800"}, files=files)
    record = read(tmp_path / "new")
    assert record == written
    assert record.fields == {"step": 7, "text": "é\ud800"}
    assert names(tmp_path / "new") == ["log.jsonl", "loops.json", "optimizer.safetensors", "run.json"]
    assert read_bytes_of(record, "loops.json", limit=10) == b"[1]"
    assert read_bytes_of(record, "log.jsonl", limit=1 << 22) == b"onetwo" + bytes(3_000_000)
    found = read_tensor_file(record, "optimizer.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_a_run_with_more_files_loads_as_a_run(tmp_path: Path) -> None:
    model = lived_in(Plain)
    state = plain({"momentum": torch.ones(3)})
    write_run(tmp_path, model, fields={"training": {"epoch": 3}}, files={"optimizer.safetensors": tensor_file(state)})
    other = fresh(Plain, seed=5)
    load_(other, tmp_path, example_inputs=INPUT)
    assert torch.equal(outputs(other), outputs(model))
    record = read(tmp_path)
    assert record.fields["training"] == {"epoch": 3}
    assert torch.equal(read_tensor_file(record, "optimizer.safetensors")["momentum"], torch.ones(3))
    save(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"was saved without optimizer\.safetensors"):
        read_tensor_file(read(tmp_path), "optimizer.safetensors")


def test_a_file_that_may_grow_is_read_as_it_was(tmp_path: Path) -> None:
    record = write(tmp_path, fields={}, files={"log.jsonl": b"1\n", "fixed.json": b"1"}, growing=("log.jsonl",))
    for name in ("log.jsonl", "fixed.json"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"2\n")
    assert read_bytes_of(record, "log.jsonl", limit=10) == b"1\n"
    assert checked_path(record, "log.jsonl") == tmp_path / "log.jsonl"
    with pytest.raises(CheckpointError, match="it has 3 bytes, saved were 1"):
        read_bytes_of(record, "fixed.json", limit=10)
    (tmp_path / "log.jsonl").write_bytes(b"3\n2\n")
    for act in (checked_path, lambda r, n: read_bytes_of(r, n, limit=10)):
        with pytest.raises(CheckpointError, match="its checksum is another one"):
            act(record, "log.jsonl")


def test_a_run_is_taken_away_with_its_files_and_nothing_else(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / str(number), fields={}, files={"a.json": b"1"})
    (tmp_path / "1" / "mine.txt").write_text("mine")
    for number in range(2):
        remove(tmp_path / str(number))
    assert not (tmp_path / "0").exists()
    assert names(tmp_path / "1") == ["mine.txt"]
    with pytest.raises(CheckpointError, match=r"has no run\.json"):
        remove(tmp_path / "1")


@pytest.mark.parametrize(
    "name", ["../a.json", "/a.json", ".a.json", "a", "a.txt", "", "a/b.json", "a..json", "a\0.json"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="allowed are names such as"):
        write(tmp_path / "run", fields={}, files={name: b""})
    assert not (tmp_path / "run").exists()


def test_fields_of_the_format_and_records_that_nobody_could_read_are_refused(tmp_path: Path) -> None:
    deep: list[object] = []
    for _ in range(40):
        deep = [deep]
    for fields, message in (
        ({"token": 1}, "belongs to the format"),
        ({"text": "x" * RECORD_LIMIT}, "allowed are 4,194,304"),
        ({"deep": deep}, "more than 32 deep"),
        ({"big": LARGEST_NUMBER + 1}, "is too large"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write(tmp_path / "run", fields=fields, files={"a.json": b""})
        assert names(tmp_path / "run") == []


# ---- what lies around ------------------------------------------------------------------------------------------------


def test_nothing_that_is_not_ours_is_removed_or_in_the_way(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    ours = [f".{name}.{token}" for name in ("run.json", "model.safetensors", "history.jsonl", "engine.safetensors")]
    theirs = [
        ".my_run.json.bak", ".run.json.bak", "run.json.0123456789abcdef", ".tmpAb3xYz", ".model.safetensors.backup-1",
        f".model.safetensors.{token}0", f".notes.txt.{token}", f".run.json.{token.upper()}",
    ]  # fmt: skip
    for name in (*ours, *theirs):
        (tmp_path / name).write_text("x")
    (tmp_path / ".history.jsonl.d").mkdir()
    (tmp_path / f".history.jsonl.{token[::-1]}").mkdir()
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / f".model.safetensors.{token[:-1]}0").symlink_to("elsewhere")
    history = History({"a.0": 6}, path=tmp_path / "history.jsonl")
    for number in range(2):
        history.append(event(number + 1))
        save(tmp_path, fresh(Plain), history=history)
    left = set(names(tmp_path))
    assert left.isdisjoint(ours)
    assert {*theirs, ".history.jsonl.d", "elsewhere"} <= left
    assert len(read_run(tmp_path).history()) == 2


def test_a_run_that_cannot_be_read_keeps_what_may_be_left_of_it(tmp_path: Path) -> None:
    """Until the new run is whole."""
    save(tmp_path, fresh(Plain))
    record = json.loads((tmp_path / "run.json").read_text())
    staged = tmp_path / f".model.safetensors.{record['token']}"
    (tmp_path / "model.safetensors").rename(staged)
    (tmp_path / "run.json").write_text(json.dumps(record | {"schema": SCHEMA + 1}))
    with pytest.raises(CheckpointError, match="cannot be written as safetensors"):
        write(tmp_path, fields={}, files={"model.safetensors": tensor_file({"a": torch.ones(2).to_sparse()})})
    assert staged.exists()
    save(tmp_path, fresh(Plain))
    assert names(tmp_path) == ["model.safetensors", "run.json"]


def test_a_folder_where_a_file_goes_is_named_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"history\.jsonl is a folder there; move it away"):
        save(tmp_path, fresh(Plain), history=History({}))
    assert names(tmp_path) == ["history.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_os_error_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, fresh(Plain), extra={"number": 0})
    real, full = os.write, os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(full, data))
    with pytest.raises(WriteError, match="No space left on device; make room there, or name another folder") as caught:
        save(tmp_path, fresh(Plain), extra={"number": 1})
    monkeypatch.undo()
    os.close(full)
    assert isinstance(caught.value, OSError) and caught.value.errno == errno.ENOSPC
    assert read_run(tmp_path).extra == {"number": 0}
    assert names(tmp_path) == ["model.safetensors", "run.json"]


# ---- what is not believed --------------------------------------------------------------------------------------------


def test_every_byte_of_every_file_counts(tmp_path: Path) -> None:
    history = History({"a.0": 6})
    history.append(event(1))
    save(tmp_path, fresh(Plain), history=history, extra={"a": 1})
    for name in ("model.safetensors", "history.jsonl", "run.json"):
        path = tmp_path / name
        whole = path.read_bytes()
        for place in range(0, len(whole), 1 if name == "run.json" else 61):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            try:
                run = read_run(tmp_path)
                read_tensors(run), run.history()
            except CheckpointError:
                continue
            assert json.loads(damaged) == json.loads(whole), "only the spaces of a record may differ"
        path.write_bytes(whole)


def test_a_width_that_no_tensor_has_costs_nothing(tmp_path: Path) -> None:
    from hostile import sealed

    save(tmp_path, fresh(Plain))
    path = tmp_path / "run.json"
    record = json.loads(path.read_text())
    record["shapes"] = {n: [10**7 if s == 6 else s for s in shape] for n, shape in record["shapes"].items()}
    path.write_text(json.dumps(record))
    sealed(tmp_path)
    model = fresh(Plain)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"does not belong to the run\.json beside it"):
        load_(model, tmp_path, example_inputs=INPUT)
    assert time.process_time() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


DUBIOUS: dict[str, tuple[bytes, str]] = {
    "twice": (b'{"a": 1, "a": 1}', "the key 'a' stands twice"),
    "nan": (b"[NaN]", "NaN is no number"),
    "infinity": (b"[-Infinity]", "Infinity is no number"),
    "large float": (b"[1e999]", "is too large"),
    "large int": (str(2**63).encode(), "is too large"),
    "endless int": (b"9" * 100_000, "is too large"),
    "deep": (b"[" * 40 + b"]" * 40, "more than 32 deep"),
    "very deep": (b"[" * 150_000, "more than 32 deep"),
    "many": (b"[" + b"0," * 300_000 + b"0]", "200,000 values or more"),
    "many texts": (b"[" + b'"",' * 300_000 + b"0]", "200,000 values or more"),
    "not unicode": (b'"\xff"', "can't decode"),
    "cut": (b'{"a": "', "damaged"),
    "escapes that never end": (b'"' + b'\\"' * 200_000, "damaged"),
    "trailing": (b"{} {}", "Extra data"),
    "empty": (b"", "damaged"),
}


@pytest.mark.parametrize("case", DUBIOUS)
def test_dubious_json_is_refused_at_once(case: str) -> None:
    data, message = DUBIOUS[case]
    start = time.process_time()
    with pytest.raises(ReadError, match=message):
        strict_json(data, "it")
    assert time.process_time() - start < 1


def test_json_that_is_plain_is_what_it_is() -> None:
    for value in ({"a": [1, -(2**63) + 1, 0.1, None, True, 'say "[{" \\ ü']}, [], "text", 5, {"[": "]" * 100}):
        for ascii_only in (True, False):
            assert strict_json(json.dumps(value, ensure_ascii=ascii_only).encode(), "it") == value


def test_only_regular_files_inside_are_opened(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(b"12345")
    (tmp_path / "outside").write_bytes(b"1")
    (folder / "inner").symlink_to("file")
    (folder / "out").symlink_to("../outside")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    assert read_bytes(folder / "inner", limit=5, inside=folder) == b"12345"
    (tmp_path / "link").symlink_to("folder")
    assert read_bytes(tmp_path / "link" / "file", limit=5, inside=tmp_path / "link") == b"12345"
    for path, message in (
        (folder / "out", "a link out of its folder"), (folder / "loop", "cannot be read"), (folder / "pipe", "a pipe"),
        (folder, "a folder"), (folder / "gone", "no such file"), (folder / "file", "allowed are 4"),
    ):  # fmt: skip
        with pytest.raises(ReadError, match=message):
            read_bytes(path, limit=4, inside=folder)
    for path in (Path("/dev/zero"), Path("a\0b"), Path("x" * 300)):
        with pytest.raises(ReadError):
            size_of(path)
    with pytest.raises(ReadError, match="disk fails"), opened(folder / "file", limit=9):
        raise OSError("disk fails")


def test_a_history_takes_nothing_that_it_would_have_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History({"a": 4}, path=path).append(
        Event(step=1, total_steps=9, macs_before=1, macs=1, params_before=1, params=1, widths={"a": 4}, unit="macs")
    )
    whole = path.read_text()
    assert len(History.read(path)) == 1
    for old, new in (
        ('"step":1', '"step":1.5'), ('"step":1', '"step":"1"'), ('"step":1', '"step":true'), ('"step":1', '"step":-1'),
        ('"loss":null', '"loss":"0"'), ('"unit":"macs"', '"unit":3'), ('"notes":[]', '"notes":"text"'),
        ('"widths":{"a":4}', '"widths":{"a":4.0}'), ('"widths":{"a":4}', '"widths":[["a",4]]'),
        ('"maps":{}', '"maps":{"a":{"source":[0],"size":1e1}}'), ('"maps":{}', '"maps":{"a":{"source":"01","size":4}}'),
        ('"maps":{}', f'"maps":{{"a":{{"source":[0],"size":{2**62}}}}}'), ('"worths":{}', '"worths":{"a":[1,2]}'),
        ('"fidelity":null', '"fidelity":{"spearman":1,"slope":1,"count":1,"more":1}'),
        ('"step":1', '"step":1,"step":1'),
        ('"coefficients":[]', '"coefficients":[true]'), ('"seconds":{}', '"seconds":{"probe":[]}'),
    ):  # fmt: skip
        assert old in whole, old
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(HistoryError, match=r"line 2 is damaged"):
            History.read(path)
    for special in (tmp_path, Path("/dev/zero")):
        with pytest.raises(HistoryError, match="expected a file"):
            History.read(special)
