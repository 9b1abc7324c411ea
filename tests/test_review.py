"""Laws of a review: all of it or nothing, whatever norms, batches, precision and interruptions are about."""

from __future__ import annotations

import copy
import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import autowidth
from autowidth import Auto, AutoWidth, Budget, Effort, Event, History, Limits, Never, Schedule
from autowidth.attach import AttachError
from autowidth.policy import BudgetError
from autowidth.review.batches import ProbeError, of_pairs, samples_of
from autowidth.review.state import deferred_interrupts, precise_norms, quiet
from autowidth.surgery import UnsupportedOptimizerError

pytestmark = pytest.mark.filterwarnings("error")

LITTLE = Effort(probe_samples=24, audit_samples=16, audit_filters=3)


class Net(nn.Module):
    """Three convolutions, two norms and a head."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.one, self.first = nn.Conv2d(2, 6, 3, padding=1), norm(6)
        self.two, self.second = nn.Conv2d(6, 8, 3, padding=1), norm(8)
        self.three, self.head = nn.Conv2d(8, 7, 3, padding=1), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(self.two(F.relu(self.first(self.one(x))))))
        return self.head(F.relu(self.three(x)).mean((2, 3)))


def data(count: int = 40, batch: int = 8) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, 5, 5, generator=source) + 0.5
    y = (x.mean((1, 2, 3)) * 9).long() % 3
    return list(zip(x.split(batch), y.split(batch), strict=True))


def made(norm: Callable[[int], nn.Module] = nn.BatchNorm2d, **how: Any) -> tuple[Net, torch.optim.Optimizer, AutoWidth]:
    """A net in training, its optimizer after two steps, and an engine that is about to review."""
    torch.manual_seed(0)
    model = Net(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    given = {
        "example_inputs": torch.zeros(2, 2, 5, 5), "probe": data(), "loss_fn": F.cross_entropy, "total_steps": 10,
        "policy": Budget(macs=0.6, schedule=Schedule(count=1, begin=0.0, end=1.0), limits=Limits(offer=0.0)),
        "effort": LITTLE,
    }  # fmt: skip
    engine = AutoWidth(model, optimizer, **(given | how))
    for x, y in data(16):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer, engine


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, engine: AutoWidth) -> dict[str, Any]:
    """All that a review may change, bit for bit."""
    state = optimizer.state_dict()["state"]
    return {
        "model": {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()},
        "optimizer": {f"{i}.{k}": torch.as_tensor(v).numpy().tobytes() for i, e in state.items() for k, v in e.items()},
        "attributes": [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, nn.Conv2d)],
        "modes": [module.training for module in model.modules()],
        "widths": engine.widths,
        "calibration": engine.calibration,
        "ages": {name: list(ages) for name, ages in engine._reviewer.ages.items()},
        "draws": (str(engine._reviewer.rng.bit_generator.state), engine._reviewer.generator.get_state().tolist()),
        "events": len(engine.history),
    }


# ---- all of it or nothing --------------------------------------------------------------------------------------------


@contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """Sends SIGINT to this process at the n-th line of this package that is run. Yields a list of the lines run."""
    home, count = str(Path(autowidth.__file__).parent), [0]

    def local(frame: FrameType, what: str, _: object) -> Any:
        if what == "line":
            count[0] += 1
            if count[0] == line:
                signal.raise_signal(signal.SIGINT)
        return local

    def entered(frame: FrameType, what: str, argument: object) -> Any:
        return local if frame.f_code.co_filename.startswith(home) else None

    sys.settrace(entered)
    try:
        yield count
    finally:
        sys.settrace(None)


def lines_of_a_review() -> tuple[int, int]:
    """How many lines a review runs, and how many of them before it commits."""
    _, _, engine = made()
    reviewer, committed = engine._reviewer, [0]
    commit = reviewer._commit
    with interrupted_at(-1) as count:

        def noted(*args: Any) -> Event:
            committed[0] = count[0]
            return commit(*args)

        reviewer._commit = noted  # type: ignore[method-assign]
        engine.step()
    return count[0], committed[0]


def test_an_interrupt_at_any_line_leaves_all_of_a_review_or_nothing() -> None:
    """Most moments are taken from the commit: surgery, norm statistics and the record are one act."""
    total, committing = lines_of_a_review()
    moments = [
        *range(1, committing, max(committing // 12, 1)),
        *range(committing, total, max((total - committing) // 60, 1)),
    ]
    whole = made()
    whole[2].step()
    after, outcomes = everything(*whole), set()
    for moment in [*moments, total - 1, total]:
        model, optimizer, engine = made()
        before = everything(model, optimizer, engine)
        with pytest.raises(KeyboardInterrupt), interrupted_at(moment):
            engine.step()
        now = everything(model, optimizer, engine)
        outcomes.add(now["events"])
        expected = after if now["events"] else before
        differing = [key for key, value in now.items() if value != expected[key]]
        assert not differing, f"line {moment} of {total}"
        assert [widths for _, widths in engine.history.replay()] == [engine.widths] * now["events"]
    assert outcomes == {0, 1}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait() -> None:
    seen = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as check:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        seen.append("waits")
        signal.raise_signal(signal.SIGINT)
        seen.append("never")
        check()
    assert seen == ["waits"]


@pytest.mark.parametrize("where", ["append", "norms", "surgery"])
def test_a_failure_in_the_commit_leaves_everything_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses the record, the loss fails on the resized network, a write of surgery fails."""
    model, optimizer, engine = made()
    average = AveragedModel(model, use_buffers=True)
    engine._reviewer.followers = (average,)
    before, averaged = everything(model, optimizer, engine), copy.deepcopy(average.state_dict())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "append":
        monkeypatch.setattr(engine.history, "append", refuse)
    elif where == "norms":
        monkeypatch.setattr("autowidth.review.review.precise_statistics", refuse)
    else:
        monkeypatch.setattr("autowidth.review.review.History.__len__", refuse, raising=True)
    with pytest.raises(OSError, match="No space left"):
        engine.step()
    monkeypatch.undo()
    assert everything(model, optimizer, engine) == before
    assert all(torch.equal(averaged[name], tensor) for name, tensor in average.state_dict().items())
    event = engine.review()
    assert event.maps
    assert [widths for _, widths in engine.history.replay()] == [engine.widths]


def test_a_history_on_a_full_disk_holds_whole_lines_and_goes_on(tmp_path: Path) -> None:
    """A real limit to the size of files, in a process of its own: the event that did not fit is not there at all."""
    program = textwrap.dedent("""
        import resource, signal, sys
        from autowidth import Event, History
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = sys.argv[1]
        event = lambda step: Event(step=step, total_steps=9, macs_before=1, macs=1, params_before=1, params=1,
                                   widths={"a": 4}, notes=("x" * 300,))
        history = History({"a": 4}, path=path)
        history.append(event(1))
        size = len(open(path, "rb").read())
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 200, resource.RLIM_INFINITY))
        try:
            history.append(event(2))
            raise SystemExit("the limit did not hold")
        except OSError:
            pass
        assert len(open(path, "rb").read()) == size, "half a line is left"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        history.append(event(3))
        assert [e.step for e in History.read(path)] == [e.step for e in history] == [1, 3]
    """)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    assert hard == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "h.jsonl")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_retracted_event_is_gone_from_the_disk_too(tmp_path: Path) -> None:
    history = History({"a": 4}, path=tmp_path / "h")
    one, two = (
        Event(step=n, total_steps=9, macs_before=1, macs=1, params_before=1, params=1, widths={"a": 4}) for n in (1, 2)
    )
    history.append(one)
    history.append(two)
    history.retract(one)  # not the last one
    assert len(history) == 2
    history.retract(two)
    assert [event.step for event in history] == [event.step for event in History.read(tmp_path / "h")] == [1]


def test_an_engine_with_a_path_has_every_event_on_disk_before_training_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    _, _, engine = made(history=path, policy=Budget(macs=0.6, schedule=Schedule(count=3)))
    for number in range(1, 4):
        engine.review()
        assert History.read(path).events == engine.history.events
        assert len(engine.history) == number
    with pytest.raises(FileExistsError):
        made(history=path)


# ---- norms -----------------------------------------------------------------------------------------------------------


def test_running_statistics_of_an_instance_norm_survive_a_review() -> None:
    """To an instance norm `momentum=None` means 0: a reset one would keep means of 0 and variances of 1."""
    model, _, engine = made(lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True))
    scoring = engine._reviewer.look().scoring
    event = engine.step()
    assert event.maps
    twin = copy.deepcopy(model)
    twin.train()
    read: list[Tensor] = []
    twin.first.register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))
    with torch.no_grad():
        for x, _ in scoring:
            twin(x)
    assert not torch.equal(model.first.running_var, torch.ones_like(model.first.running_var))
    expected = torch.stack([r.mean((0, 2, 3)) for r in read]).mean(0)
    torch.testing.assert_close(model.first.running_mean, expected, rtol=1e-4, atol=1e-5)
    assert model.first.momentum == 0.1


def test_a_norm_that_is_called_twice_averages_both_calls() -> None:
    norm = nn.BatchNorm2d(2)
    x = torch.randn(9, 2, 3, 3)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum() + model(2 * batch + 1).sum()

    with precise_norms(norm.eval(), [x], loss, among={norm}):
        torch.testing.assert_close(norm.running_mean, (x.mean((0, 2, 3)) + (2 * x + 1).mean((0, 2, 3))) / 2)


def test_a_held_out_rest_of_one_sample_is_no_obstacle() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = AutoWidth(
        model, optimizer, example_inputs=torch.zeros(2, 2, 5, 5), probe=data(17, 8), loss_fn=F.cross_entropy,
        policy=Budget(macs=0.5, schedule=Schedule(count=1)), total_steps=1, batch_size=8,
        effort=Effort(probe_samples=16, audit_samples=8),
    )  # fmt: skip
    event = engine.step()
    assert event.maps and event.measured is not None


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
def test_a_review_inside_an_autocast_block_is_the_one_outside(norm: Callable[[int], nn.Module]) -> None:
    """Autocast keeps casts of the weights: stale ones hide ablations, and have old shapes after surgery."""
    outcomes = []
    for inside in (False, True):
        model, optimizer, engine = made(norm)
        x, y = data(8)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            F.cross_entropy(model(x), y).backward()  # leaves casts of all weights behind
            optimizer.step()
            if inside:
                event = engine.step()
                after = model(x)  # with weights of the new shapes
        if not inside:
            event = engine.step()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                after = model(x)
        assert torch.is_autocast_enabled("cpu") is False
        outcomes.append((event.loss, event.predicted, event.measured, event.maps, event.coefficients, after.tolist()))
        assert event.fidelity is not None and event.fidelity.spearman is not None
    assert outcomes[0] == outcomes[1]


# ---- batches of all kinds --------------------------------------------------------------------------------------------


class Bytes(nn.Module):
    """Reads bytes under one name and classes under another."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.kind = Net(), nn.Embedding(4, 3)

    def forward(self, image: Tensor, kind: Tensor) -> Tensor:
        return self.net(image.float() / 255) + self.kind(kind)


def test_dicts_of_bytes_are_reviewed_as_floats_are() -> None:
    """`loss` is asked of the batch as the loader gives it; the last batch is shorter."""
    torch.manual_seed(0)
    model = Bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    source = torch.Generator().manual_seed(3)
    image = torch.randint(256, (45, 2, 5, 5), dtype=torch.uint8, generator=source)
    batches = [
        {
            "image": image[i : i + 16],
            "kind": torch.arange(len(image[i : i + 16])) % 4,
            "label": image[i : i + 16, 0, 0, 0].long() % 3,
        }
        for i in range(0, 45, 16)
    ]

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch["image"], batch["kind"]), batch["label"])

    engine = AutoWidth(
        model, optimizer, example_inputs={"image": image[:2], "kind": torch.zeros(2, dtype=torch.long)}, probe=batches,
        loss=loss, policy=Budget(macs=0.5, schedule=Schedule(count=2)), total_steps=6,
    )  # fmt: skip
    for step in range(6):
        optimizer.zero_grad()
        loss(model, batches[step % 3]).backward()
        optimizer.step()
        engine.step()
    assert engine.macs <= 0.5 * engine.macs_start
    assert len(engine.history) == 2
    seen = engine._reviewer.look()
    scoring, held_out = seen.scoring, seen.held_out
    assert sum(len(b["label"]) for b in [*scoring, *held_out]) <= 45
    assert all(len(b["image"]) == len(b["label"]) == len(b["kind"]) for b in [*scoring, *held_out])


def test_batches_that_are_no_pairs_need_a_loss_of_their_own() -> None:
    with pytest.raises(ProbeError, match=r"gives a tuple of 3.*pass loss="):
        made(probe=[(*pair, torch.zeros(8)) for pair in data()])
    with pytest.raises(AttachError, match="neither loss_fn nor loss"):
        made(loss_fn=None)
    with pytest.raises(AttachError, match="both loss_fn and loss"):
        made(loss=of_pairs(F.cross_entropy))


# ---- effort ----------------------------------------------------------------------------------------------------------


def test_effort_is_fitted_to_the_run_and_one_field_does_not_raise_the_others() -> None:
    _, _, engine = made(effort=None, total_steps=144, policy=Budget(macs=0.6))
    fitted = engine._reviewer.effort
    seen, reviews, groups = 144 * 8, 8, 3
    assert fitted == Effort().fitted(seen, reviews, groups=groups)
    _, _, engine = made(effort=Effort(audit_filters=9), total_steps=144, policy=Budget(macs=0.6))
    assert engine._reviewer.effort == Effort(
        probe_samples=fitted.probe_samples, audit_samples=fitted.audit_samples, audit_filters=9
    ).fitted(seen, reviews, groups=groups)
    _, _, engine = made(effort=None, total_steps=10_000, batch_size=512, policy=Budget(macs=0.6))
    assert engine._reviewer.effort.probe_samples > fitted.probe_samples


# ---- the length of the run -------------------------------------------------------------------------------------------


def test_a_run_that_ends_early_says_how_many_reviews_never_took_place(caplog: pytest.LogCaptureFixture) -> None:
    _, optimizer, engine = made(policy=Budget(macs=0.9, schedule=Schedule(count=4)), total_steps=100)
    for _ in range(50):
        optimizer.step()
        engine.step()
    with caplog.at_level(logging.WARNING, logger="autowidth"):
        del engine
    assert "ended after 50 steps of total_steps=100: 1 of 4 reviews never took place" in caplog.text


def test_a_run_that_was_broken_off_or_never_began_needs_no_mention(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="autowidth"):
        _, _, engine = made(total_steps=100)
        del engine
        _, _, engine = made(total_steps=100)
        engine.step()
        engine.abandon()
        del engine
        _, _, engine = made(policy=Never(), total_steps=100)
        engine.step()
        del engine
    assert not caplog.text


# ---- frozen parameters -----------------------------------------------------------------------------------------------


def test_groups_with_frozen_parameters_keep_their_widths_unless_asked_otherwise() -> None:
    def build(**how: Any) -> AutoWidth:
        torch.manual_seed(0)
        model = Net()
        model.one.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return AutoWidth(
            model, optimizer, example_inputs=torch.zeros(2, 2, 5, 5), probe=data(), loss_fn=F.cross_entropy,
            policy=Budget(macs=0.7, schedule=Schedule(count=1)), total_steps=1, effort=LITTLE, **how,
        )  # fmt: skip

    engine = build()
    assert engine.widths.keys() == {"two", "three"}
    assert any("do not train" in f.reason for f in engine.channel_map.frozen)
    engine.step()
    assert engine.model.one.out_channels == 6
    assert build(resize_frozen=True).widths.keys() == {"one", "two", "three"}


# ---- the door --------------------------------------------------------------------------------------------------------


def test_auto_finds_the_number_of_samples_in_the_probe() -> None:
    x, y = (torch.cat(part) for part in zip(*data(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    assert samples_of(loader) == samples_of(data()) == 40
    for probe in (loader, data()):
        _, _, engine = made(policy=None, probe=probe)
        assert isinstance(engine.policy, Auto)
        assert engine.review().notes

    class Endless:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(data())

    with pytest.raises(BudgetError, match=r"Auto\(samples=len\(dataset\)\)"):
        made(policy=Auto(), probe=Endless())
    made(policy=Auto(samples=40), probe=Endless())


def swapped_arguments() -> None:
    model = Net()
    AutoWidth(
        torch.optim.SGD(model.parameters(), lr=0.1), model, example_inputs=torch.zeros(2, 2, 5, 5), probe=data(),  # type: ignore[arg-type]
        loss_fn=F.cross_entropy, total_steps=5,
    )  # fmt: skip


def with_lbfgs() -> None:
    model = Net()
    AutoWidth(
        model, torch.optim.LBFGS(model.parameters()), example_inputs=torch.zeros(2, 2, 5, 5), probe=data(),
        loss_fn=F.cross_entropy, total_steps=5,
    )  # fmt: skip


DOOR: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "swapped arguments": (swapped_arguments, AttachError, "model is a SGD: pass the nn.Module first"),
    "an optimizer that is none": (
        lambda: AutoWidth(
            Net(), "sgd", example_inputs=torch.zeros(2, 2, 5, 5), probe=data(), loss_fn=F.cross_entropy, total_steps=5  # type: ignore[arg-type]
        ),
        AttachError, "optimizer is a str",
    ),
    "LBFGS": (with_lbfgs, UnsupportedOptimizerError, "LBFGS"),
    "a one-shot iterator": (lambda: made(probe=iter(data())), ProbeError, "only once"),
    "a generator": (lambda: made(probe=(pair for pair in data())), ProbeError, "only once"),
    "no loader": (lambda: made(probe=3), ProbeError, "probe is a int"),
    "an unknown policy": (lambda: made(policy=0.5), AttachError, "policy is a float without limits"),
    "a policy's class": (lambda: made(policy=Budget), AttachError, "policy is a class"),
    "steps that are no number": (lambda: made(total_steps="100"), AttachError, "total_steps=100"),
}  # fmt: skip


@pytest.mark.parametrize("name", DOOR)
def test_what_is_wrong_is_said_at_the_door(name: str) -> None:
    act, kind, sentence = DOOR[name]
    with pytest.raises(kind, match=sentence) as caught:
        act()
    assert isinstance(caught.value, autowidth.AutoWidthError)


def test_a_budget_that_is_missed_warns_loudly() -> None:
    """An importance that says nothing about any filter: nobody leaves, and the user is told."""

    def silent(model: nn.Module, channel_map: Any, batches: Any, loss: Any, *, generator: Any) -> dict[str, Tensor]:
        return {group.name: torch.full((group.width,), torch.nan) for group in channel_map.groups}

    model, _, engine = made(importance=silent)
    with pytest.warns(
        UserWarning, match=r"budget macs=0.6 is missed: the run ends at 100.0% .* nothing is known of 21"
    ):
        event = engine.step()
    assert event is not None and "missed" in event.notes[-1]
    assert len(engine.history) == 1
    assert model.training


def test_what_the_engine_says_of_itself_is_short() -> None:
    _, _, engine = made()
    engine.step()
    lines = repr(engine).splitlines()
    assert len(lines) == 4
    assert "Net, to 60% of the MACs: step 1 of 10, 1 of 1 reviews" in lines[0]
    assert all("->" in line for line in lines[1:])
    with quiet(engine.model) as trained:
        assert engine.model in trained


def test_no_review_reads_the_environment_of_the_caller() -> None:
    """Whatever the grad mode is when `step` is called, the review is the same."""
    outcomes = []
    for mode in (torch.enable_grad, torch.no_grad):
        _, _, engine = made()
        with mode():
            event = engine.step()
        outcomes.append((event.loss, event.predicted, event.measured, event.maps))
    assert outcomes[0] == outcomes[1]
    assert os.getcwd()
