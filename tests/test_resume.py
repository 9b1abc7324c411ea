"""Runs that go on: settings, longer runs, full disks, losses that are not finite, one run per folder."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autowidth.checkpoint import read_run
from autowidth.engine import AutoWidth
from autowidth.lab import keeping
from autowidth.lab.finite import DivergedError, FiniteCheck
from autowidth.lab.keeping import TRAINING, Interrupted, NowhereError
from autowidth.lab.lock import LockedError, locked
from autowidth.lab.loop import train
from autowidth.lab.prepare import FolderError
from autowidth.lab.result import Progress, Result
from autowidth.lab.resuming import ResumeError, settings_to_resume
from autowidth.lab.saved import open_run
from autowidth.lab.settings import Settings
from autowidth.policy import Never
from autowidth.training import saved_trainings
from kills import SETTINGS, Tiny, outcome


class Spoilt(Tiny):
    """A hazard: its output is not a number in some steps of training, or whenever it is evaluated."""

    steps: frozenset[int] = frozenset()
    in_evaluation = False
    in_gradient = False
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x) * (math.nan if self.in_evaluation else 1.0)
        type(self).count += 1
        if self.count not in self.steps:
            return super().forward(x)
        if self.in_gradient:
            return _InfiniteGradient.apply(super().forward(x))  # type: ignore[no-untyped-call,no-any-return]
        return super().forward(x * math.nan)  # the running statistics of the norm are hit too


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.inf


@pytest.fixture
def spoilt() -> Iterator[type[Spoilt]]:
    yield Spoilt
    Spoilt.steps, Spoilt.in_evaluation, Spoilt.in_gradient, Spoilt.count = frozenset(), False, False, 0


def settings(out: Path | None, **changes: Any) -> Settings:
    return SETTINGS.model_copy(update={"out": out, **changes})


class Told(list[str]):
    """The notices of a run."""

    def __call__(self, progress: Progress) -> None:
        if progress.notice is not None:
            self.append(progress.notice)


def newest_step(out: Path) -> int | None:
    saved = saved_trainings(out / TRAINING)
    return int(read_run(saved[-1]).extra["step"]) if saved else None


def stopping_at(step: int, number: signal.Signals = signal.SIGINT) -> Callable[[AutoWidth], None]:
    """Sends a signal after this step."""

    def watch(engine: AutoWidth) -> None:
        if engine.steps == step:
            signal.raise_signal(number)

    return watch


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_goes_on_in_this_folder_or_another_one(tmp_path: Path) -> None:
    train(settings(tmp_path / "whole"))
    with pytest.raises(Interrupted, match="stopped at step 5 of 16; go on with: autowidth train --resume"):
        train(settings(tmp_path / "a", save_every=0), watch=stopping_at(5))
    assert newest_step(tmp_path / "a") == 5
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ResumeError, match="holds a run that was broken off: go on with"):
        train(settings(tmp_path / "a"))
    for there, out in (("a", None), ("b", tmp_path / "c")):
        given = Settings() if out is None else Settings(out=out)
        again = settings_to_resume(tmp_path / there, given)
        train(again, resume=tmp_path / there)
    wanted = outcome(tmp_path / "whole")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "c") == wanted
    assert not (tmp_path / "b" / "run.json").exists()
    train(settings(tmp_path / "a", epochs=1, policy=Never()))  # a finished run is replaced, as ever
    assert open_run(tmp_path / "a").settings.epochs == 1


def test_a_finished_run_goes_on_for_more_epochs_and_says_what_that_means(tmp_path: Path) -> None:
    first = train(settings(tmp_path))
    with pytest.raises(ResumeError, match="is finished, with 2 of 2 epochs: give more to go on, such as --epochs 4"):
        settings_to_resume(tmp_path, Settings())
    told = Told()
    again = train(settings_to_resume(tmp_path, Settings(epochs=4)), resume=tmp_path, report=told)
    assert told[0] == "going on at step 16 of 32, epoch 3"
    assert "as if 4 epochs had been planned instead of 2" in told[1] and "learning rate goes from" in told[1]
    assert (again.epochs, again.history.events[: first.reviews]) == (4, first.history.events)
    late = [step for step in SETTINGS.policy.reviews(32) if step > 16]
    assert [event.step for event in again.history.events[first.reviews :]] == late
    assert f"{len(late)} reviews to come" in told[1]
    assert [widths for _, widths in again.history.replay()][-1] == again.widths


def test_settings_that_cannot_differ_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(settings(tmp_path), watch=stopping_at(3))
    for changes, name in (
        ({"batch_size": 32}, "batch_size = 16"),
        ({"seed": 3}, "seed = 0"),
        ({"policy": Never()}, "policy"),
    ):
        with pytest.raises(ResumeError, match=f"has {name}.*what may differ: epochs, lr, device"):
            settings_to_resume(tmp_path, Settings(**changes))
    given = Settings(threads=1, device="cpu", batch_size=16, lr=0.01, save_every=7)
    again = settings_to_resume(tmp_path, given)
    assert (again.lr, again.save_every, again.out, again.batch_size) == (0.01, 7, tmp_path, 16)
    told = Told()
    train(again, resume=tmp_path, report=told)
    assert "with lr 0.01" in told[1]
    with pytest.raises(ResumeError, match="nothing that could be gone on with"):
        settings_to_resume(tmp_path / "nowhere", Settings())
    train(settings(tmp_path / "kept nothing", saves=0))
    with pytest.raises(ResumeError, match=r"not the training that it came from.*--weights"):
        settings_to_resume(tmp_path / "kept nothing", Settings())


def test_an_end_that_is_behind_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(settings(tmp_path, epochs=4), watch=stopping_at(18))
    for epochs in (1, 2):
        with pytest.raises(ResumeError, match=f"has 2 epochs behind it: epochs = {epochs} cannot be its end"):
            settings_to_resume(tmp_path, Settings(epochs=epochs))
    result = train(settings_to_resume(tmp_path, Settings(epochs=3)), resume=tmp_path)
    assert (result.epochs, result.history.events[-1].total_steps) == (3, 24)


def test_other_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(settings(tmp_path), watch=stopping_at(3))
    again = settings_to_resume(tmp_path, Settings()).model_copy(update={"pool": 2})
    with pytest.raises(ResumeError, match="images are not those of the run: their input_shape was"):
        train(again, resume=tmp_path)


# ---- disks that refuse -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here; full disks are tested by a limit to the size of files")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> None:
    """Leaves no room in a file system."""
    descriptor = os.open(place / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(descriptor, bytes(4096))
    os.close(descriptor)


def test_a_full_disk_is_told_once_and_training_goes_on_and_is_saved_when_there_is_room(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "RETRY", 1e-9)
    told, out, steps = Told(), small_disk / "run", []

    def watch(engine: AutoWidth) -> None:
        steps.append(newest_step(out))
        if engine.steps == 5:
            fill(small_disk)
        if engine.steps == 9:
            (small_disk / "filler").unlink()

    train(settings(out), report=told, watch=watch)
    assert len(told) == 2
    assert "make room there" in told[0] and "training goes on" in told[0]
    assert told[1] == f"the training is saved again, in {out / TRAINING}"
    assert steps[:10] == [None, 1, 2, 3, 4, 4, 4, 4, 4, 9]
    train(settings(tmp_path / "whole"))
    assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("rescue", [True, False])
def test_a_result_that_its_disk_does_not_take_is_written_elsewhere(
    small_disk: Path, tmp_path: Path, rescue: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    told, place = Told(), tmp_path / "safe"

    def watch(engine: AutoWidth) -> None:
        if engine.steps == 3:
            fill(small_disk)

    wanted = settings(small_disk / "run", rescue=place if rescue else None, save_every=0)
    result = train(wanted, report=told, watch=watch)
    assert result.out is not None
    lies = Path(result.out)
    assert lies == place if rescue else lies.parent == tmp_path / "tmp"
    opened = open_run(lies)
    assert all(torch.equal(a, b) for a, b in zip(opened.network.parameters(), result.network.parameters(), strict=True))
    assert told[0] == f"{small_disk / 'run'} took nothing: the run was written to {lies}"
    assert not (small_disk / "run" / "run.json").exists()


def test_a_training_that_is_stopped_on_a_full_disk_is_saved_elsewhere(small_disk: Path, tmp_path: Path) -> None:
    def watch(engine: AutoWidth) -> None:
        if engine.steps == 4:
            fill(small_disk)
            signal.raise_signal(signal.SIGINT)

    place = tmp_path / "safe"
    with pytest.raises(Interrupted, match=f"took nothing, so the training was saved in {place}: go on with"):
        train(settings(small_disk / "run", rescue=place, save_every=0), watch=watch)
    train(settings_to_resume(place, Settings()), resume=place)
    train(settings(tmp_path / "whole"))
    assert outcome(place) == outcome(tmp_path / "whole")


def test_where_no_disk_takes_the_result_it_is_still_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder has become a file, and there is no other place."""
    monkeypatch.setattr(keeping, "_places", lambda out, rescue: iter([out]))

    def watch(engine: AutoWidth) -> None:
        if engine.steps == 4:
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").touch()

    told = Told()
    with pytest.raises(NowhereError, match=r"no disk takes the run: .*it is a file") as caught:
        train(settings(tmp_path / "run"), watch=watch, report=told)
    assert isinstance(caught.value.result, Result) and caught.value.result.reviews == 7
    assert len(told) == 1


# ---- not finite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_step_that_is_not_finite_is_left_out_told_and_neither_reviewed_nor_saved(
    tmp_path: Path, spoilt: type[Spoilt], in_gradient: bool
) -> None:
    due = SETTINGS.policy.reviews(16)
    bad = due[1]
    spoilt.steps, spoilt.in_gradient = frozenset({bad, bad + 1}), in_gradient
    told, saves, moved = Told(), {}, []

    def watch(engine: AutoWidth) -> None:
        saves[engine.steps] = newest_step(tmp_path)
        moved.append([p.detach().clone() for p in engine.model.parameters()])

    result = train(settings(tmp_path, model="test_resume:Spoilt"), report=told, watch=watch)
    what = "gradient is not finite" if in_gradient else "training loss is nan"
    then = "in a row before the run ends: the step is left out, no review and no checkpoint"
    assert told == [f"the {what} at step {bad + n}, {n + 1} of 10 {then}" for n in (0, 1)]
    assert saves[bad + 1] == saves[bad + 2] == bad - 1
    assert all(torch.equal(a, b) for a, b in zip(moved[bad - 2], moved[bad], strict=True))
    assert bad + 2 in [event.step for event in result.history] and bad not in [e.step for e in result.history]
    assert math.isfinite(result.loss)
    assert all(torch.isfinite(t).all() for t in result.network.state_dict().values())


def test_gradients_that_are_huge_are_finite_and_one_infinite_element_is_not() -> None:
    network = Tiny(10, 1)
    check = FiniteCheck(network, most=10, remedy=lambda: "", say=lambda sentence: None)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 3e38)  # the square of which no float32 holds
    check.before()
    assert check.step(torch.tensor(1.0), 1)
    for bad in (math.inf, -math.inf, math.nan):
        assert network.norm.bias.grad is not None
        network.norm.bias.grad[2] = bad
        assert not check.step(torch.tensor(1.0), 2)
        network.norm.bias.grad[2] = 0.0
        assert check.step(torch.tensor(1.0), 3) and not check.step(torch.tensor(bad), 4)


def test_too_many_in_a_row_end_the_run_and_leave_what_was_saved(tmp_path: Path, spoilt: type[Spoilt]) -> None:
    spoilt.steps = frozenset({4, *range(6, 99)})
    told = Told()
    remedy = f"lower lr, which is 0.1, from the last step that was saved: autowidth train --resume {tmp_path}"
    with pytest.raises(DivergedError, match=f"training loss is nan at step 8, for the 3th time in a row.*{remedy}"):
        train(settings(tmp_path, model="test_resume:Spoilt", bad_steps=3), report=told)
    assert len(told) == 3
    assert newest_step(tmp_path) == 5
    assert DivergedError.exit_code == 3
    spoilt.steps = frozenset()
    train(settings_to_resume(tmp_path, Settings(lr=0.01)), resume=tmp_path)
    assert read_run(tmp_path).extra["result"]["reviews"] == 7


def test_a_held_out_loss_that_is_not_finite_is_told_and_nothing_is_written(
    tmp_path: Path, spoilt: type[Spoilt]
) -> None:
    spoilt.in_evaluation = True
    told = Told()
    wanted = settings(tmp_path, model="test_resume:Spoilt", policy=Never(), holdout=0.2, ema=None)
    with pytest.raises(DivergedError, match="loss on the held_out images is nan at step"):
        train(wanted, report=told)
    assert told[0].startswith("the loss on the held_out images is nan at step") and "1 of 10 in a row" in told[0]
    assert not (tmp_path / "run.json").exists()


# ---- one run per folder ----------------------------------------------------------------------------------------------


def test_a_second_run_on_a_folder_is_refused_until_the_first_is_gone_however_it_went(tmp_path: Path) -> None:
    program = "import sys, time\nfrom pathlib import Path\nfrom autowidth.lab.lock import locked\n" + (
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=r"another process is writing a run to .*run: wait for it"):
        train(settings(tmp_path / "run"))
    child.kill()
    child.wait()
    child.stdout.close()
    train(settings(tmp_path / "run", epochs=1, policy=Never()))
    with locked(tmp_path / "run"), pytest.raises(LockedError), locked(tmp_path / "run"):
        pass


def test_a_folder_that_was_made_for_the_lock_goes_if_it_stays_empty(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert (tmp_path / "a" / "file").exists()
    with pytest.raises(FolderError):
        train(settings(tmp_path / "a"))
