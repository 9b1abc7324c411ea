"""A training that is saved and taken up: whole at any fault, bit for bit in another process, foreign ones refused."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from autowidth import training
from autowidth.checkpoint import CheckpointError, load_
from autowidth.checkpoint.folder import _seal
from autowidth.engine import AutoWidth
from autowidth.engine_state import StateError
from autowidth.lab.loop_parts import probe_batches
from autowidth.loaders import LoaderError, Resumable, load_loader_state, loader_state
from autowidth.plain_data import PlainDataError, put_together, taken_apart
from autowidth.randomness import load_random_state, random_state
from autowidth.training import resume_, save_training, saved_trainings
from test_engine import IMAGE, Looks, Mixed, attached, bits, images, resnet, sgd, train

HERE = Path(__file__).resolve().parent


def own(folder: Path, kind: str, die_at: int = 0) -> subprocess.CompletedProcess[str]:
    """A user's loop in a process of its own."""
    line = [sys.executable, str(HERE / "own_training.py"), str(folder / "saved"), kind, "14", str(die_at)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
def test_a_loop_of_ones_own_goes_on_in_another_process_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """Killed in the middle of an epoch, between two reviews: order, augmentation, schedule, average, all of it."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = own(tmp_path / "whole", kind)
    assert whole.returncode == 0, whole.stderr
    assert own(tmp_path / "killed", kind, die_at=8).returncode == -9
    again = own(tmp_path / "killed", kind)
    assert again.returncode == 0, again.stderr
    assert again.stdout == whole.stdout
    assert len(json.loads(whole.stdout.split("} ")[1].split("] ")[0] + "]")) == 5


# ---- whole at any fault ----------------------------------------------------------------------------------------------


def engine_at(steps: int) -> AutoWidth:
    torch.manual_seed(0)
    model = Mixed()
    engine = attached(model, sgd(model), Looks(), 40, followers=[AveragedModel(model)])
    engine.steps = steps
    with torch.no_grad():
        model.head.bias.fill_(steps)
    return engine


def taken_up(folder: Path) -> int:
    """The step of the training that is taken up, whose content is that of the same moment."""
    engine = engine_at(0)
    resumed = resume_(folder, engine)
    assert resumed.extra == {"step": engine.steps}
    assert engine.model.head.bias.tolist() == [float(engine.steps)] * 10
    return engine.steps


ACTS = ("write", "fsync", "replace", "unlink", "rmdir", "mkdir", "open")


class Faults:
    """Lets the n-th of the acts on the disk fail, and all that follow it if the disk is gone."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None, *, for_good: bool) -> None:
        self.count, self.at, self.for_good = 0, at, for_good
        for name in ACTS:
            patch.setattr(os, name, self.failing(getattr(os, name)))

    def failing(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def done(*args: Any, **kwargs: Any) -> Any:
            if act is os_open and not (len(args) > 1 and args[1] & os.O_WRONLY):
                return act(*args, **kwargs)
            self.count += 1
            if self.at is not None and (self.count == self.at or (self.for_good and self.count > self.at)):
                raise OSError(errno.ENOSPC, "No space left on device")
            return act(*args, **kwargs)

        return done


os_open = os.open


@pytest.mark.parametrize("for_good", [pytest.param(False, marks=pytest.mark.slow), True], ids=["once", "for good"])
def test_a_fault_at_every_act_on_the_disk_leaves_the_old_training_or_the_new_one_whole(
    tmp_path: Path, for_good: bool
) -> None:
    engines = {step: engine_at(step) for step in (1, 2, 3)}

    def saved(at: int | None, folder: Path) -> tuple[int, bool]:
        for step in (1, 2):
            save_training(folder, engines[step], extra={"step": step}, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, at, for_good=for_good)
            try:
                save_training(folder, engines[3], extra={"step": 3}, keep=1)
            except OSError:
                return faults.count, False
        return faults.count, True

    acts, _ = saved(None, tmp_path / "all")
    assert acts > 20
    seen = set()
    for at in range(1, acts + 1):  # every one of them
        folder = tmp_path / str(at)
        _, succeeded = saved(at, folder)
        step = taken_up(folder)
        assert step == 3 or (step == 2 and not succeeded), at
        seen.add(step)
        save_training(folder, engines[1], extra={"step": 1}, keep=1)  # and the next save clears what was left
        assert taken_up(folder) == 1
        names = sorted(p.name for p in folder.rglob("*") if p.is_file())
        assert names == sorted(training._FILES), at
    assert seen == {2, 3}


def test_a_disk_that_is_full_leaves_the_training_that_was_there(tmp_path: Path) -> None:
    """A real limit to the size of files, in a process of its own, of every size up to what is needed."""
    folder = tmp_path / "saved"
    save_training(folder, engine_at(1), extra={"step": 1})
    largest = max(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from test_training import engine_at, save_training\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "engine, refused = engine_at(2), 0\n"
        "for size in range(0, int(sys.argv[2]), int(sys.argv[2]) // 12):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        save_training(Path(sys.argv[1]), engine, extra={'step': 2})\n"
        "    except OSError as error:\n"
        "        refused += 'make room' in str(error)\n"
        "print(refused)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(largest)],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 12
    assert taken_up(folder) == 1
    assert [p.name for p in folder.iterdir()] == ["000001"]


def test_the_last_few_stay_and_files_of_others_too(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_training(tmp_path, engine_at(step), extra={"step": step}, keep=3)
    assert [p.name for p in saved_trainings(tmp_path)] == ["000003", "000004", "000005"]
    (tmp_path / "000003" / "notes.txt").write_text("mine")
    save_training(tmp_path, engine_at(6), extra={"step": 6}, keep=1)
    assert [p.name for p in saved_trainings(tmp_path)] == ["000006"]
    assert (tmp_path / "000003" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "000004").exists()


def test_a_training_that_is_damaged_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        save_training(tmp_path, engine_at(step), extra={"step": step})
    file = tmp_path / "000002" / training.TENSORS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="checksum.*going on from the save before it"):
        assert taken_up(tmp_path) == 1
    with pytest.raises(CheckpointError, match="checksum"):
        resume_(tmp_path / "000002", engine_at(0))


def test_a_saved_training_is_a_run_that_load_reads(tmp_path: Path) -> None:
    engine = engine_at(4)
    train(engine, 4)
    folder = save_training(tmp_path, engine)
    fresh = Mixed()
    assert load_(fresh, folder, example_inputs=IMAGE).widths == engine.widths
    assert bits(fresh) == bits(engine.model)


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_what_was_built_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    generator = torch.Generator()
    save_training(tmp_path, engine_at(3), parts={"mine": generator})
    with pytest.raises(StateError, match="'mine' is only in the save"):
        resume_(tmp_path, engine_at(0))
    with pytest.raises(StateError, match="'other' is only in parts="):
        resume_(tmp_path, engine_at(0), parts={"mine": generator, "other": generator})
    model = Mixed()
    with pytest.raises(StateError, match="1 followers, the engine has 0"):
        resume_(tmp_path, attached(model, sgd(model), Looks(), 40), parts={"mine": generator})
    kind = attached(model, torch.optim.Adam(model.parameters()), Looks(), 40, followers=[AveragedModel(model)])
    with pytest.raises(StateError, match=r"optimizers \['SGD'\]"):
        resume_(tmp_path, kind, parts={"mine": generator})
    other = resnet()
    foreign = attached(other, torch.optim.SGD(other.parameters()), Looks(), 40, followers=[AveragedModel(other)])
    with pytest.raises(StateError, match="is only in"):
        resume_(tmp_path, foreign, parts={"mine": generator})


def test_where_nothing_can_be_taken_up_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing was saved there yet; begin anew"):
        resume_(tmp_path / "nowhere", engine_at(0))
    folder = save_training(tmp_path, engine_at(1))
    record = json.loads((folder / "run.json").read_text())
    for value, message in ((2, "format 2, this version reads up to 1"), (None, "no training")):
        changed = {k: v for k, v in record.items() if k != "sha256"} | {"training": value}
        (folder / "run.json").write_text(json.dumps(changed | {"sha256": _seal(changed)}))
        with pytest.raises(CheckpointError, match=message):
            resume_(folder, engine_at(0))


def test_a_part_without_a_state_is_refused_and_one_that_needs_pickle_too(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, object]:
            return {"deep": [{"down": print}]}

        def load_state_dict(self, state: object) -> None: ...

    with pytest.raises(StateError, match=r"'list' is a list without a state_dict.*Resumable"):
        save_training(tmp_path, engine_at(1), parts={"list": []})
    with pytest.raises(PlainDataError, match=r"parts\.odd\.state\.deep\.0\.down is a builtin_function"):
        save_training(tmp_path, engine_at(1), parts={"odd": Odd()})
    assert saved_trainings(tmp_path) == []


# ---- plain data, random state, loaders -------------------------------------------------------------------------------


def test_what_is_taken_apart_is_put_together_equal() -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tree = {
        "numbers": [1, -(2**70), 0.5, float("inf"), True, None, "text"],
        "tuple": (1, (2.0, "x")),
        3: {"keys": {0: "int", "$odd": 1}},
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "one": torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
        "types": [torch.zeros(2, dtype=d) for d in (torch.bool, torch.int64, torch.bfloat16, torch.uint8)],
        "twice": [shared, shared],
    }
    apart, tensors = taken_apart(tree, name="t")
    again = put_together(json.loads(json.dumps(apart, allow_nan=False)), tensors)
    assert len(tensors) == 7
    assert {k: v for k, v in again.items() if k in ("numbers", "tuple", 3)} == {
        k: tree[k] for k in ("numbers", "tuple", 3)
    }
    for key in ("last", "one"):
        assert torch.equal(again[key], tree[key]) and again[key].stride() == tree[key].stride()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again["types"], tree["types"], strict=True))
    for spoilt in ({"$tensor": "gone"}, {"$tensor": "t.last", "strides": [10**9, 1, 1, 1]}, {"$odd": 1}):
        with pytest.raises(PlainDataError, match="damaged"):
            put_together(spoilt, tensors)


def test_the_random_state_is_put_back_for_python_numpy_and_torch() -> None:
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second number back
    state = random_state()

    def drawn() -> tuple[float, ...]:
        return random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), float(torch.rand(()))

    first = drawn()
    assert drawn() != first
    load_random_state(state)
    assert drawn() == first


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(workers: int, own_generator: bool) -> None:
    def loader() -> Resumable[Any]:
        generator = torch.Generator().manual_seed(3) if own_generator else None
        inner = DataLoader(range(20), batch_size=3, shuffle=True, num_workers=workers, generator=generator)
        return Resumable(inner)

    torch.manual_seed(0)
    one, seen, states = loader(), [], []
    for _ in range(3):
        for batch in one:
            seen.append(batch.tolist())
            states.append((one.state_dict(), random_state()))
    assert seen[:7] != seen[7:14]
    for at in (0, 3, 6, 9, 13):
        two, rest = loader(), []
        torch.manual_seed(99)
        two.load_state_dict(states[at][0])
        load_random_state(states[at][1])
        while len(rest) < len(seen) - at - 1:
            rest += [batch.tolist() for batch in two]
        assert rest == seen[at + 1 :], at


def test_a_state_of_another_loader_is_refused() -> None:
    plain = DataLoader(range(4))
    assert loader_state(plain) is None and loader_state([1]) is None
    state = loader_state(DataLoader(range(4), generator=torch.Generator()))
    for loader in (plain, probe_batches(images(), 0)):
        with pytest.raises(LoaderError, match="not taken of a loader like this"):
            load_loader_state(loader, state)
    with pytest.raises(LoaderError, match="lacks its batch"):
        Resumable(plain).load_state_dict({"batch": 1})
