"""Laws of the journal: all or nothing, whatever fails, whenever it is interrupted, whoever else writes through it."""

from __future__ import annotations

import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import autowidth.surgery
from autowidth.channels import FRESH, ChannelMap, IndexMap, ResizePlan
from autowidth.errors import AutoWidthError
from autowidth.surgery import Journal, UndoError, all_or_nothing, apply_, changes, operate
from autowidth.trace import trace
from nets import example, run

pytestmark = pytest.mark.filterwarnings("error")
SURGERY = str(Path(autowidth.surgery.__file__).parent) + os.sep


class InjectedError(Exception):
    pass


# ---- a live network and all that can be seen of it -------------------------------------------------------------------


@dataclass
class Live:
    """A network in training, with momentum, an average and a generator, and a plan that changes all of it."""

    model: nn.Module
    x: Any
    map: ChannelMap
    optimizer: torch.optim.Optimizer
    average: AveragedModel
    generator: torch.Generator
    plan: ResizePlan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = {g.name: IndexMap((1, FRESH, 0, 3, 3, FRESH), g.width) for g in self.map.groups}

    def apply(self) -> ChannelMap:
        return apply_(
            self.model,
            self.map,
            self.plan,
            optimizers=[self.optimizer],
            followers=[self.average],
            generator=self.generator,
        )

    def operate(self, journal: Journal) -> ChannelMap:
        return operate(
            journal,
            self.model,
            self.map,
            self.plan,
            optimizers=[self.optimizer],
            followers=[self.average],
            generator=self.generator,
        )

    def seen(self) -> list[object]:
        """Everything: objects, bits, strides, gradients, attributes, modes, random states."""
        states = [s for state in self.optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.average.parameters(), *states]
        gradients = [p.grad for p in self.model.parameters()]
        modules = [*self.model.modules(), *self.average.modules()]
        return [
            *((id(t), tuple(t.shape), t.stride(), t.requires_grad, t.detach().numpy().tobytes()) for t in tensors),
            *((id(g), None if g is None else g.tolist()) for g in gradients),
            *({k: v for k, v in vars(m).items() if isinstance(v, int | str | tuple)} for m in modules),
            self.generator.get_state().tolist(),
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        ]


def live(name: str = "Plain") -> Live:
    model, x, _ = example(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    average = AveragedModel(model)
    run(model.train(), x).square().mean().backward()
    optimizer.step()
    return Live(model, x, trace(model, x), optimizer, average, torch.Generator().manual_seed(3))


# ---- the journal alone -----------------------------------------------------------------------------------------------


def failed(
    body: Callable[[Journal], object], *generators: torch.Generator, error: BaseException | None = None
) -> BaseException:
    """What leaves a block that fails with this error after its body."""
    try:
        with all_or_nothing(*generators) as journal:
            body(journal)
            raise error or InjectedError
    except BaseException as caught:
        return caught


def entry(journal: Journal, said: list[str], name: str, *errors: BaseException) -> None:
    """Enters an act without effect, whose undo raises these errors, one a call, before it says its name."""
    coming = iter(errors)

    def undo() -> None:
        for error in coming:
            raise error
        said.append(name)

    journal.call(lambda: None, undo)


@pytest.mark.parametrize("error", [InjectedError(), KeyboardInterrupt(), SystemExit(), GeneratorExit()])
def test_a_block_that_fails_is_undone_last_first(error: BaseException) -> None:
    said: list[str] = []
    assert failed(lambda journal: [entry(journal, said, name) for name in "abc"], error=error) is error
    assert said == ["c", "b", "a"]


def test_a_block_that_succeeds_stays() -> None:
    said: list[str] = []
    tensor = torch.zeros(3)
    with all_or_nothing(torch.Generator()) as journal:
        journal.write_(tensor, torch.ones(3))
        entry(journal, said, "undone")
        assert journal.call(lambda: 7, undo=lambda: None) == 7
    assert tensor.tolist() == [1, 1, 1] and said == []


def test_a_block_that_succeeds_forgets_what_was_there() -> None:
    """The journal may live on in a variable of the caller; old weights must not."""

    class Old:
        def put_back(self) -> None: ...

    old = Old()
    alive = weakref.ref(old)
    with all_or_nothing() as journal:
        journal.call(lambda: None, old.put_back)
        del old
        assert alive() is not None
    assert journal is not None and alive() is None


def test_writes_are_in_place_and_undone() -> None:
    weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    view, stride = weight.detach()[0], weight.stride()

    def write(journal: Journal) -> None:
        journal.write_(weight, torch.ones(3, 2))
        journal.write_(weight, torch.full((3, 2), 2.0))
        assert view.tolist() == [2, 2]

    assert isinstance(failed(write), InjectedError)
    assert view.tolist() == [0, 3] and weight.tolist() == [[0, 3], [1, 4], [2, 5]] and weight.stride() == stride
    assert weight.requires_grad and weight.is_leaf


def test_content_of_another_shape_is_refused() -> None:
    tensor = torch.zeros(3)
    error = failed(lambda journal: journal.write_(tensor, torch.ones(1)))
    assert isinstance(error, ValueError)
    assert "shape (1,) cannot be written into a tensor of shape (3,)" in str(error)
    assert tensor.tolist() == [0, 0, 0]


def test_an_act_that_was_cut_short_is_undone() -> None:
    items = [1]

    def torn() -> None:
        items.append(2)
        raise ZeroDivisionError

    assert isinstance(failed(lambda journal: journal.call(torn, undo=lambda: items.remove(2))), ZeroDivisionError)
    assert items == [1]


def test_random_states_are_put_back_and_grad_mode_too() -> None:
    named, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    generators = (named, torch.default_generator, other)
    before = [generator.get_state() for generator in generators]

    def draw(_: Journal) -> None:
        for generator in generators:
            torch.rand(3, generator=generator)
        torch.set_grad_enabled(False)

    failed(draw, named, torch.default_generator)
    same = [torch.equal(state, g.get_state()) for state, g in zip(before, generators, strict=True)]
    assert same == [True, True, False]  # the one that was not named went on
    assert torch.is_grad_enabled()
    with torch.no_grad():
        failed(lambda _: torch.set_grad_enabled(True))
        assert not torch.is_grad_enabled()


# ---- undoing is interrupted, or fails --------------------------------------------------------------------------------


def test_interrupts_while_undoing_are_held_back() -> None:
    said: list[str] = []

    def impatient(journal: Journal) -> None:
        entry(journal, said, "a")
        entry(journal, said, "b", *(KeyboardInterrupt() for _ in range(20)))
        entry(journal, said, "c")

    error = failed(impatient)
    assert said == ["c", "b", "a"]
    assert isinstance(error, KeyboardInterrupt)
    assert isinstance(error.__context__, InjectedError | KeyboardInterrupt)


def test_an_undo_that_fails_once_is_tried_again() -> None:
    said: list[str] = []

    def body(journal: Journal) -> None:
        entry(journal, said, "a", ZeroDivisionError())
        entry(journal, said, "b", ZeroDivisionError(), ZeroDivisionError())

    assert isinstance(failed(body), InjectedError)
    assert said == ["b", "a"]


def test_an_undo_that_goes_on_failing_is_reported_and_the_others_are_done() -> None:
    said: list[str] = []

    def body(journal: Journal) -> None:
        entry(journal, said, "a")
        entry(journal, said, "b", *(OSError("the disk is gone") for _ in range(9)))
        entry(journal, said, "c")

    error = failed(body)
    assert said == ["c", "a"]
    assert isinstance(error, UndoError) and isinstance(error, AutoWidthError) and isinstance(error, RuntimeError)
    assert str(error).startswith("1 change could not be undone (the disk is gone): ")
    assert isinstance(error.__cause__, OSError)


# ---- one journal for everything --------------------------------------------------------------------------------------


@dataclass
class Engine:
    """What a caller changes besides the model."""

    channel_map: ChannelMap
    log: Path
    reviews: int = 0

    def review(self, net: Live, journal: Journal) -> None:
        """Content before surgery, surgery, statistics after it, a file, an attribute."""
        journal.write_(net.model.get_parameter("conv1.weight"), torch.ones(4, 3, 3, 3))
        resized = net.operate(journal)
        journal.write_(net.model.get_buffer("norm1.running_mean"), torch.full((6,), 0.25))
        length = self.log.stat().st_size
        journal.call(lambda: self.append("line\n"), lambda: os.truncate(self.log, length))
        before = vars(self).copy()
        journal.call(lambda: self.advance(resized), lambda: vars(self).update(before))

    def append(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(text)

    def advance(self, channel_map: ChannelMap) -> None:
        self.channel_map, self.reviews = channel_map, self.reviews + 1

    def seen(self) -> list[object]:
        return [self.channel_map, self.reviews, self.log.read_bytes()]


@pytest.fixture
def engine(tmp_path: Path) -> tuple[Live, Engine]:
    net = live()
    (tmp_path / "log").write_text("old\n")
    return net, Engine(net.map, tmp_path / "log")


def test_a_caller_and_surgery_share_one_journal(engine: tuple[Live, Engine]) -> None:
    net, caller = engine
    before = [*net.seen(), *caller.seen()]

    def review(journal: Journal) -> None:
        caller.review(net, journal)
        assert caller.reviews == 1

    assert isinstance(failed(review, net.generator), InjectedError)
    assert [*net.seen(), *caller.seen()] == before
    with all_or_nothing(net.generator) as journal:
        caller.review(net, journal)
    assert caller.reviews == 1 and caller.log.read_text() == "old\nline\n"
    assert caller.channel_map.widths == {"conv1": 6, "conv2": 6}
    assert net.model.get_buffer("norm1.running_mean").tolist() == [0.25] * 6
    assert run(net.model, net.x).shape == (2, 3)


def test_operate_does_what_apply_does() -> None:
    ours, theirs = live(), live()
    with all_or_nothing(ours.generator) as journal:
        resized = ours.operate(journal)
    assert resized == theirs.apply()
    bits = [[t.tolist() for t in (*n.model.state_dict().values(), *n.average.parameters())] for n in (ours, theirs)]
    assert bits[0] == bits[1]
    assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())


def test_operate_without_effect_says_nothing() -> None:
    net = live()
    with all_or_nothing() as journal:
        assert operate(journal, net.model, net.map, {"conv1": IndexMap.identity(4)}) is net.map


# ---- interrupts at any line ------------------------------------------------------------------------------------------


@dataclass
class Interrupt:
    """Raises KeyboardInterrupt before the `at`-th line of surgery that is run; counts them where it is None."""

    at: int | None = None
    lines: list[tuple[str, int]] = field(default_factory=list)
    fired: bool = False

    def enter(self, frame: FrameType, event: str, _: object) -> Any:
        return self.step if frame.f_code.co_filename.startswith(SURGERY) else None

    def step(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self.at:
                self.fired = True
                raise KeyboardInterrupt
        return self.step

    def watch(self, *suspended: FrameType) -> None:
        """Starts now, in these frames and in all that are being run too."""
        sys.settrace(self.enter)
        frame: FrameType | None = sys._getframe(1)
        stack = list(suspended)
        while frame is not None:
            stack.append(frame)
            frame = frame.f_back
        for one in stack:
            if one.f_code.co_filename.startswith(SURGERY):
                one.f_trace = self.step

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self.enter)
        try:
            yield
        finally:
            sys.settrace(before)


def moments(lines: list[tuple[str, int]], stride: int) -> list[int]:
    """Numbers of the lines at which to interrupt: every line of code the first and the last time, and every n-th."""
    first = {line: number for number, line in reversed(list(enumerate(lines, 1)))}
    last = {line: number for number, line in enumerate(lines, 1)}
    return sorted({*first.values(), *last.values(), *range(1, len(lines) + 1, stride)})


@pytest.mark.parametrize("stride", [401, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["Plain", "SpectralNorm"])
def test_an_interrupt_at_any_line_leaves_everything_as_it_was(name: str, stride: int) -> None:
    net, other, rehearsal = live(name), live(name), Interrupt()
    with rehearsal.watching():
        other.apply()
    before = net.seen()
    assert len({line for _, line in rehearsal.lines}) > 100
    for at in moments(rehearsal.lines, stride):
        interrupt = Interrupt(at)
        with interrupt.watching(), suppress(KeyboardInterrupt):
            net.apply()
        assert interrupt.fired, at
        assert net.seen() == before, rehearsal.lines[at - 1]
    net.apply()  # and uninterrupted it succeeds
    assert net.seen() != before


@pytest.mark.parametrize("stride", [101, pytest.param(3, marks=pytest.mark.slow)])
def test_a_second_interrupt_while_undoing_leaves_everything_as_it_was(
    stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first interrupt comes in the middle of a late write, the second at any line from there on."""
    net, real = live(), changes.set_data
    before, trace_before = net.seen(), sys.gettrace()

    def interrupted_twice(second: Interrupt) -> None:
        calls, block = [0], all_or_nothing(net.generator)

        def set_data(target: Tensor, data: Tensor) -> None:
            calls[0] += 1
            if calls[0] != 25:
                return real(target, data)
            target.data = torch.empty(0)
            second.watch(block.gen.gi_frame)  # type: ignore[attr-defined]
            raise KeyboardInterrupt

        monkeypatch.setattr(changes, "set_data", set_data)
        try:
            with suppress(KeyboardInterrupt), block as journal:
                net.operate(journal)
        finally:
            sys.settrace(trace_before)
        assert calls[0] > 25 + 20

    rehearsal = Interrupt()
    interrupted_twice(rehearsal)
    assert net.seen() == before
    where = {Path(file).name for file, _ in rehearsal.lines}
    assert {"journal.py", "changes.py", "contents.py"} <= where
    for at in moments(rehearsal.lines, stride):
        second = Interrupt(at)
        interrupted_twice(second)
        assert second.fired, at
        assert net.seen() == before, rehearsal.lines[at - 1]


def test_the_lines_that_catch_the_first_interrupt_are_among_those_of_the_second() -> None:
    """Or the test above would miss the moment between the failure and its undoing."""
    source = Path(SURGERY, "journal.py").read_text().splitlines()
    rehearsal, block, before = Interrupt(), all_or_nothing(), sys.gettrace()
    with suppress(InjectedError), block:
        rehearsal.watch(block.gen.gi_frame)  # type: ignore[attr-defined]
        raise InjectedError
    sys.settrace(before)
    texts = {source[line - 1].strip() for file, line in rehearsal.lines if file.endswith("journal.py")}
    assert {"except BaseException:", "journal._undo()", "raise"} <= texts


def test_a_real_interrupt_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals of the operating system, two of them: in the middle of surgery, and while it is undone."""
    net, real, calls = live(), changes.set_data, [0]
    before = net.seen()

    def signalled(target: Tensor, data: Tensor) -> None:
        calls[0] += 1
        if calls[0] in (20, 30):
            signal.raise_signal(signal.SIGINT)
        real(target, data)

    monkeypatch.setattr(changes, "set_data", signalled)
    with pytest.raises(KeyboardInterrupt):
        net.apply()
    assert calls[0] > 30
    assert net.seen() == before
