"""Saved runs: a fresh network takes the shapes of the file, and no crash loses a run."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from autowidth import checkpoint
from autowidth.channels import ChannelGroup, ChannelMap, IndexMap, ParamAxis, Place
from autowidth.checkpoint import CheckpointError, Run, WriteError, load_, read_run, read_tensors, save
from autowidth.checkpoint.fitting import Shown, solve
from autowidth.history import Event, History
from autowidth.surgery import apply_
from autowidth.trace import trace

INPUT = torch.linspace(-2, 2, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


def block(inputs: int, outputs: int, **options: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Plain(nn.Module):
    def __init__(self, first: int = 6, second: int = 5) -> None:
        super().__init__()
        self.a, self.b = block(3, first), block(first, second)
        self.head = nn.Linear(second, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = block(3, 6), block(6, 5), block(5, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.outer(self.inner(x))).mean((2, 3)))


class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 5), block(5, 4)
        self.head = nn.Linear(4 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.avg_pool2d(self.b(self.a(x)), 2).flatten(1))


class Concat(nn.Module):
    """Two channel groups share the input axis of `join`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 5), block(3, 4)
        self.join = block(9, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.join(torch.cat([self.a(x), self.b(x)], dim=1)).mean((2, 3)))


class Split(nn.Module):
    """One layer writes two channel groups, which are read in different places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 8)
        self.b, self.c = block(4, 5), block(4, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        left = self.b[0].weight.shape[1]
        x = self.a(x)
        return self.head((self.b(x[:, :left]) + self.c(x[:, left:])).mean((2, 3)))


class Tied(nn.Module):
    """One convolution is used under two names, and a weight is shared by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = block(3, 6), block(6, 6)
        self.again = self.twice
        self.head, self.twin = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        self.twin.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.twice(self.stem(x))).mean((2, 3))
        return self.head(x) + self.twin(x)


class Grouped(nn.Module):
    """A depthwise convolution between two pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depthwise, self.b = block(3, 6), block(6, 6, groups=6), block(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.depthwise(self.a(x))).mean((2, 3)))


NETS = (Plain, Residual, Flatten, Concat, Split, Tied, Grouped)
ACTS: dict[str, Callable[[int], IndexMap]] = {
    "smaller": lambda width: IndexMap.removing({0, width - 1}, width),
    "larger": lambda width: IndexMap.identity(width).inserting(3),
    "both": lambda width: IndexMap.removing({1}, width).inserting(2),
    "as it was": IndexMap.identity,
}


def fresh(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def lived_in(make: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    """A network whose norms have seen data."""
    model = fresh(make, seed)
    model.train()(INPUT)
    return model


def resized(make: Callable[[], nn.Module], act: Callable[[int], IndexMap]) -> tuple[nn.Module, object]:
    """A network after the act, with some more channels in every second group, so that widths differ."""
    model = lived_in(make)
    channel_map = trace(model, INPUT)
    assert channel_map.groups
    plan = {
        group.name: act(group.width).inserting(number if number % 2 and act != IndexMap.identity else 0)
        for number, group in enumerate(channel_map.groups)
    }
    if all(index_map.is_identity for index_map in plan.values()):
        return model, channel_map
    return model, apply_(model, channel_map, plan, generator=torch.Generator().manual_seed(5))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(INPUT)


def everything(model: nn.Module) -> dict[str, object]:
    """What a failed load must not change: content, objects, attributes of the modules."""
    tensors = {n: (id(t), t.clone()) for n, t in (*model.named_parameters(), *model.named_buffers())}
    return tensors | {f"repr {name}": repr(module) for name, module in model.named_modules()}


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    now = everything(model)
    assert now.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, tuple):
            assert now[name][0] == value[0]
            assert torch.equal(now[name][1], value[1])
        else:
            assert now[name] == value


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("with_map", [True, False])
def test_a_fresh_network_gives_the_outputs_of_the_saved_one(tmp_path: Path, make, act: str, with_map: bool) -> None:
    model, channel_map = resized(make, ACTS[act])
    save(tmp_path / "run", model, channel_map=channel_map if with_map else None)
    other = fresh(make)
    objects = {name: id(p) for name, p in other.named_parameters()}
    state = torch.get_rng_state()
    loaded = load_(other, tmp_path / "run", example_inputs=INPUT)
    assert torch.equal(outputs(other), outputs(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: id(p) for name, p in other.named_parameters()} == objects
    assert {n: tuple(t.shape) for n, t in other.state_dict().items()} == read_run(tmp_path / "run").shapes
    assert loaded.widths == channel_map.widths
    assert set(loaded.groups) == set(trace(other, INPUT).groups)


def test_the_tensors_are_equal_and_training_goes_on(tmp_path: Path) -> None:
    model, _ = resized(Residual, ACTS["both"])
    save(tmp_path, model)
    other = fresh(Residual)
    load_(other, tmp_path, example_inputs=INPUT)
    for left, right in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert left[0] == right[0]
        assert torch.equal(left[1], right[1])
    for net in (model, other):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net.train()(INPUT).square().sum().backward()
        optimizer.step()
    assert torch.equal(outputs(model), outputs(other))


def test_a_starting_network_of_another_width_will_do(tmp_path: Path) -> None:
    model = lived_in(lambda: Plain(9, 3))
    save(tmp_path, model)
    other = fresh(lambda: Plain(2, 7))
    assert load_(other, tmp_path, example_inputs=INPUT).widths == trace(model, INPUT).widths
    assert torch.equal(outputs(other), outputs(model))


def test_other_dtypes_and_memory_formats(tmp_path: Path) -> None:
    for number, change in enumerate(
        (lambda m: m.to(torch.bfloat16), lambda m: m.to(memory_format=torch.channels_last))
    ):
        model = change(lived_in(Plain))
        save(tmp_path / str(number), model)
        other = change(fresh(Plain))
        inputs = INPUT.to(next(model.parameters()).dtype)
        load_(other, tmp_path / str(number), example_inputs=inputs)
        with torch.no_grad():
            assert torch.equal(other.eval()(inputs), model.eval()(inputs))


def test_views_of_one_storage_are_saved_as_what_they_show(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    whole = torch.arange(9.0)
    model.weight.data, model.bias.data = whole[:6].view(3, 2), whole[4:7]
    save(tmp_path, model)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["weight"], model.weight)
    assert torch.equal(stored["bias"], model.bias)


class Versioned(Plain):
    """Asks for the version of its state, as MNASNet of torchvision does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_a_network_that_asks_for_the_version_of_its_state_is_told(tmp_path: Path) -> None:
    model = lived_in(Versioned)
    save(tmp_path, model)
    loaded = fresh(Versioned)
    load_(loaded, tmp_path, example_inputs=INPUT)
    assert torch.equal(outputs(loaded), outputs(model))


def test_a_tied_tensor_is_stored_once(tmp_path: Path) -> None:
    save(tmp_path, fresh(Tied))
    stored = load_file(tmp_path / "model.safetensors")
    assert "head.weight" in stored
    assert "twin.weight" not in stored
    assert read_run(tmp_path).tied["twin.weight"] == "head.weight"


# ---- widths from shapes ----------------------------------------------------------------------------------------------


WEAVE = {"p": ("a", "c"), "q": ("a", "d"), "r": ("b", "c"), "s": ("b", "d")}
"""Channel group -> the weights it lives on: a and b write two groups each, c and d read one of each."""


def woven(**widths: int) -> ChannelMap:
    starts: dict[str, int] = {}
    groups = []
    for name, weights in WEAVE.items():
        places = []
        for weight in weights:
            start = starts.get(weight, 0)
            starts[weight] = start + widths[name]
            index = tuple((p,) for p in range(start, starts[weight]))
            places.append(Place(ParamAxis(weight, 0), "carry", index))
        groups.append(ChannelGroup(name, tuple(places)))
    return ChannelMap(groups=tuple(groups), frozen=(), uses=(), shapes={n: (size,) for n, size in starts.items()})


def woven_run(widths: dict[str, int] | None, there: ChannelMap) -> Run:
    return Run(folder=Path("run"), torch_version="", shapes=dict(there.shapes), widths=widths, extra={}, tied={},
               events=None, token="0" * 16)  # fmt: skip


def solved(run: Run, channel_map: ChannelMap) -> dict[str, int]:
    shown = Shown(what=f"run {run.folder}", shapes=run.shapes, widths=run.widths or {})
    return solve(shown, channel_map)


def test_where_shapes_leave_a_choice_the_recorded_widths_decide() -> None:
    here, there = woven(p=4, q=4, r=4, s=4), woven(p=2, q=5, r=6, s=3)
    assert solved(woven_run(there.widths, there), here) == there.widths
    with pytest.raises(CheckpointError, match="leave the width of 'p' open: save with channel_map="):
        solved(woven_run(None, there), here)
    assert solved(woven_run(None, here), here) == here.widths


@given(st.fixed_dictionaries({name: st.integers(1, 9) for name in WEAVE}), st.sampled_from(list(WEAVE)))
def test_widths_that_do_not_fit_are_refused(widths: dict[str, int], name: str) -> None:
    here, there = woven(p=4, q=4, r=4, s=4), woven(**widths)
    run = woven_run(there.widths, there)
    assert solved(run, here) == widths
    weight = WEAVE[name][0]
    longer = replace(run, shapes=run.shapes | {weight: (run.shapes[weight][0] + 1,)})
    with pytest.raises(CheckpointError, match="is of another network"):
        solved(longer, here)


# ---- run.json and the history ----------------------------------------------------------------------------------------


def event(step: int) -> Event:
    return Event(step=step, total_steps=9, macs_before=1, macs=1, params_before=1, params=1, widths={"a.0": 6})


def test_run_json_gives_back_what_was_saved(tmp_path: Path) -> None:
    model = fresh(Plain)
    channel_map = trace(model, INPUT)
    extra = {"epoch": 3, "policy": {"macs": 0.5, "names": ["a", None, True]}}
    history = History(channel_map.widths)
    history.append(event(1))
    save(tmp_path, model, history=history, channel_map=channel_map, extra=extra)
    run = read_run(tmp_path)
    assert (run.extra, run.widths, run.torch_version) == (extra, channel_map.widths, torch.__version__)
    assert run.history().events == history.events
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.jsonl", "model.safetensors", "run.json"]
    save(tmp_path / "bare", model)
    bare = read_run(tmp_path / "bare")
    assert (bare.extra, bare.widths, bare.history()) == ({}, None, None)


def test_a_history_that_has_gone_on_is_cut_at_the_save(tmp_path: Path) -> None:
    model = fresh(Plain)
    history = History({"a.0": 6}, path=tmp_path / "history.jsonl")
    history.append(event(1))
    save(tmp_path, model, history=history)
    history.append(event(2))
    assert History.read(tmp_path / "history.jsonl").events == history.events
    assert [e.step for e in read_run(tmp_path).history()] == [1]
    (tmp_path / "history.jsonl").write_text((tmp_path / "history.jsonl").read_text().splitlines()[0])
    with pytest.raises(CheckpointError, match="holds 0 events, but the run was saved after 1"):
        read_run(tmp_path).history()
    (tmp_path / "history.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"has no history\.jsonl"):
        read_run(tmp_path).history()


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    for _ in range(2):
        save(tmp_path, fresh(Plain))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "report.html", "run.json"]


def test_the_files_have_the_usual_permissions(tmp_path: Path) -> None:
    save(tmp_path, fresh(Plain))
    (tmp_path / "usual").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


# ---- crashes ---------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone: nothing that comes after it has an effect."""


WRITE = os.write


class Disk:
    """Lets the first `alive` effects on the disk happen; then the process is gone.

    That is before the next effect, or after it; where that effect is a write, after one half of it too.
    """

    def __init__(self, alive: int, *, after: bool, half: bool = False) -> None:
        self.alive, self.after, self.half, self.dead = alive, after, half, False

    def guard(self, effect: Callable[..., object]) -> Callable[..., object]:
        def guarded(*args: object, **kwargs: object) -> object:
            if self.dead:
                raise Crash
            self.alive -= 1
            if self.alive >= 0:
                return effect(*args, **kwargs)
            self.dead = True
            if self.half and effect is WRITE:
                effect(args[0], args[1][: len(args[1]) // 2])
            elif self.after:
                effect(*args, **kwargs)
            raise Crash

        return guarded


def crashed_save(
    monkeypatch: pytest.MonkeyPatch, disk: Disk, folder: Path, model: nn.Module, history: History, extra: dict
) -> bool:
    """Saves on this disk; whether the process lived to the end."""
    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "unlink", "mkdir", "write", "open", "close"):
            patch.setattr(os, name, disk.guard(getattr(os, name)))
        try:
            save(folder, model, history=history, extra=extra)
        except Crash:
            return False
    return True


def states(folder: Path, seen: dict[bytes, Tensor] | None = None) -> tuple[Tensor, int, int]:
    """What one finds in the folder after a crash, in a fresh process: outputs, number and events of the run.

    A network is built and loaded once for each content of the files that `seen` does not know yet.
    """
    seen = {} if seen is None else seen
    run = read_run(folder)
    content = pickle.dumps([(name, tensor.tolist()) for name, tensor in sorted(read_tensors(run).items())])
    if content not in seen:
        model = fresh(Plain)
        load_(model, folder, example_inputs=INPUT)
        seen[content] = outputs(model)
    return seen[content], run.extra["number"], len(run.history())


@pytest.fixture
def two_runs() -> tuple[tuple[nn.Module, History], tuple[nn.Module, History]]:
    old, new = History({"a.0": 6}), History({"a.0": 6})
    old.append(event(1))
    for step in (1, 2, 3):
        new.append(event(step))
    return (resized(Plain, ACTS["smaller"])[0], old), (resized(Plain, ACTS["larger"])[0], new)


MODES = ("before", "half", "after")
"""When the process is gone: before an effect, after half of it if it is a write, after it."""


def moments(monkeypatch: pytest.MonkeyPatch, folder: Path, runs) -> Iterator[tuple[int, str, int]]:
    """Crashes a second save at every effect. Yields (effect, mode, number of the run that must be there)."""
    (old, old_history), (new, new_history) = runs
    expected, seen = [outputs(old), outputs(new)], {}
    save(folder / "old", old, history=old_history, extra={"number": 0})
    for mode in MODES:
        for alive in range(1000):
            place = Path(shutil.copytree(folder / "old", folder / f"{alive}-{mode}"))
            disk = Disk(alive, after=mode == "after", half=mode == "half")
            lived = crashed_save(monkeypatch, disk, place, new, new_history, {"number": 1})
            outputs_there, number, events = states(place, seen)
            assert torch.equal(outputs_there, expected[number])
            assert events == len((old_history, new_history)[number])
            yield alive, mode, number
            if lived:
                break
        else:
            pytest.fail("the save never ends")


def test_a_crash_at_any_moment_leaves_one_of_the_two_runs(monkeypatch, tmp_path: Path, two_runs) -> None:
    seen = list(moments(monkeypatch, tmp_path, two_runs))
    for mode in MODES:
        numbers = [number for _, m, number in seen if m == mode]
        assert len(numbers) > 10
        assert numbers == sorted(numbers)
        assert set(numbers) == {0, 1}


def test_the_save_after_a_crash_completes_or_clears_what_was_left(monkeypatch, tmp_path: Path, two_runs) -> None:
    (_, _), (new, new_history) = two_runs
    expected, seen = outputs(new), {}
    for alive, mode, _ in moments(monkeypatch, tmp_path, two_runs):
        place = tmp_path / f"{alive}-{mode}"
        # The next save may crash in its turn, in the middle of clearing up, before one gets through.
        crashed_save(monkeypatch, Disk(1 + alive % 9, after=True), place, new, new_history, {"number": 1})
        states(place, seen)
        save(place, new, history=new_history, extra={"number": 1})
        assert torch.equal(states(place, seen)[0], expected)
        assert sorted(p.name for p in place.iterdir()) == ["history.jsonl", "model.safetensors", "run.json"]


class Fault(Disk):
    """Refuses the effect after the first `alive`, as a full disk does, and all later ones of its kind if it lasts."""

    def __init__(self, alive: int, *, lasts: bool) -> None:
        super().__init__(alive, after=False)
        self.lasts, self.kind = lasts, None

    def guard(self, effect: Callable[..., object]) -> Callable[..., object]:
        def guarded(*args: object, **kwargs: object) -> object:
            self.alive -= 1
            if self.alive == -1:
                self.kind = effect
            if self.alive == -1 or (self.lasts and effect is self.kind):
                raise OSError(errno.ENOSPC, "No space left on device")
            return effect(*args, **kwargs)

        return guarded


@pytest.mark.parametrize("lasts", [False, True])
def test_a_fault_at_any_effect_leaves_one_of_the_two_runs(monkeypatch, tmp_path: Path, two_runs, lasts: bool) -> None:
    (old, old_history), (new, new_history) = two_runs
    expected, seen, found, said = [outputs(old), outputs(new)], {}, [], []
    save(tmp_path / "old", old, history=old_history, extra={"number": 0})
    for alive in range(1000):
        place = Path(shutil.copytree(tmp_path / "old", tmp_path / str(alive)))
        disk = Fault(alive, lasts=lasts)
        try:
            crashed_save(monkeypatch, disk, place, new, new_history, {"number": 1})
        except WriteError as error:
            said.append((error.errno, str(error).replace(str(place), "FOLDER")))
        there, number, events = states(place, seen)
        assert torch.equal(there, expected[number])
        assert events == len((old_history, new_history)[number])
        if number == 0 and not lasts:  # nothing of a save that failed takes room on a full disk
            assert sorted(p.name for p in place.iterdir()) == ["history.jsonl", "model.safetensors", "run.json"]
        found.append(number)
        if disk.kind is None:
            break
    assert len(found) > 30
    assert set(found) == {0, 1}
    sentence = "cannot save a run to FOLDER: No space left on device; make room there, or name another folder"
    assert set(said) == {(errno.ENOSPC, sentence)}


def test_a_save_that_fails_leaves_nothing_behind(monkeypatch, tmp_path: Path) -> None:
    save(tmp_path, fresh(Plain), extra={"number": 0})

    def refuse(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, fresh(Plain), history=History({}), extra={"number": 1})
    assert read_run(tmp_path).extra == {"number": 0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "run.json"]


KILLED = """
import os, signal, sys
import torch
from test_checkpoint import Plain, lived_in
from autowidth.checkpoint import save
model = lived_in(lambda: Plain(9, 9))
real, left = os.replace, int(sys.argv[2])
def replace(*args):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    real(*args)
os.replace = replace
save(sys.argv[1], model, extra={"number": 1})
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_process_killed_between_two_renames(tmp_path: Path, renames: int) -> None:
    old = lived_in(Plain)
    save(tmp_path / "run", old, extra={"number": 0})
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    program = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(renames)]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = read_run(tmp_path / "run")
    assert run.extra["number"] == renames
    model = fresh(Plain)
    load_(model, tmp_path / "run", example_inputs=INPUT)
    assert model.a[0].out_channels == (6, 9)[renames]
    assert torch.equal(outputs(model), outputs((old, lived_in(lambda: Plain(9, 9)))[renames]))


# ---- refusals --------------------------------------------------------------------------------------------------------


class WithExtraState(Plain):
    def get_extra_state(self) -> object:
        return {"a": 1}

    def set_extra_state(self, state: object) -> None: ...


class HiddenBuffer(Plain):
    """A per-channel buffer that the state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.rand(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x) * self.hidden[:, None, None]).mean((2, 3)))


class Untied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.twin.weight = nn.Parameter(self.twin.weight.detach() + 1)


class FixedView(nn.Module):
    """A network with a constant in its code: its inner width is frozen."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a, self.width = nn.Conv2d(3, width, 3, padding=1), width
        self.head = nn.Linear(width * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).view(-1, self.width * 36))


class Picky(Plain):
    """Refuses to load, at the last moment and from inside."""

    def __init__(self) -> None:
        super().__init__()
        self.b.register_load_state_dict_post_hook(self._refuse)

    @staticmethod
    def _refuse(module: nn.Module, keys: object) -> None:
        raise RuntimeError("not today")


def damage_json(folder: Path, **fields: object) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | fields))


def mix(folder: Path) -> None:
    save(folder / "other", lived_in(Plain))
    os.replace(folder / "other" / "model.safetensors", folder / "model.safetensors")


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no run.json": (lambda f: (f / "run.json").unlink(), r"no run at .*has no run\.json"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "cut tensors": (lambda f: cut(f / "model.safetensors", 500), "damaged: not a whole safetensors file"),
    "empty tensors": (lambda f: cut(f / "model.safetensors", 0), "damaged: not a whole safetensors file"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4000), "damaged: not a whole safetensors"),
    "cut run.json": (lambda f: cut(f / "run.json", 40), r"run\.json is damaged"),
    "a list": (lambda f: (f / "run.json").write_text("[]"), r"run\.json is damaged"),
    "a field is missing": (lambda f: (f / "run.json").write_text('{"schema": 1}'), r"run\.json is damaged"),
    "a token that is a path": (lambda f: damage_json(f, token="../../elsewhere"), "its token is"),
    "no schema": (lambda f: damage_json(f, schema="x"), r"run\.json is damaged"),
    "a newer format": (lambda f: damage_json(f, schema=checkpoint.SCHEMA + 1), "install a newer autowidth"),
    "files of two runs": (mix, r"does not belong to the run\.json beside it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_in_one_sentence(tmp_path: Path, damage: str) -> None:
    save(tmp_path, lived_in(lambda: Plain(9, 9)))
    act, message = DAMAGES[damage]
    act(tmp_path)
    model = fresh(Plain)
    before = everything(model)
    with pytest.raises(CheckpointError, match=message):
        load_(model, tmp_path, example_inputs=INPUT)
    assert_untouched(model, before)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run at .*nowhere: it is no folder"):
        load_(fresh(Plain), tmp_path / "nowhere", example_inputs=INPUT)


FOREIGN: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "other names": (Residual, Plain, "the run has .* tensors that Plain lacks"),
    "missing names": (nn.Sequential, Plain, "Plain has .* tensors that the run lacks"),
    "other classes": (
        Plain,
        lambda: _with(Plain(), "head", nn.Linear(5, 3)),
        r"'head\.(weight|bias)' has shape \((4|4, 5),?\)",
    ),
    "other kernel": (
        Plain,
        lambda: _with(Plain(), "a", nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())),
        r"'a\.0\.weight' has shape \(6, 3, 3, 3\) in the file and \(6, 3, 1, 1\) in the model",
    ),
    "other dims": (Plain, lambda: _with(Plain(), "head", _FlatHead()), r"'head\.bias' has 1 dims"),
    "other dtype": (lambda: Plain().double(), Plain, r"is torch\.float64 in run .*\.to\(torch\.float64\)"),
    "frozen width": (lambda: FixedView(5), FixedView, r"'(a|head).* has shape .*\(frozen there: .*\)"),
    "hidden content": (lambda: _wide(HiddenBuffer), HiddenBuffer, "does not hold the content of 'hidden'"),
    "not tied": (Untied, Tied, "are tied in Tied, but have different content"),
    "refusing": (lambda: Plain(9, 9), Picky, "does not fit Picky: not today"),
}


class _FlatHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(4, 5)), nn.Parameter(torch.rand(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + self.bias


def _with(model: nn.Module, name: str, child: nn.Module) -> nn.Module:
    setattr(model, name, child)
    return model


def _wide(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    apply_(model, (channel_map := trace(model, INPUT)), {"a.0": IndexMap.identity(6).inserting(2)})
    assert channel_map.group("a.0")
    return model


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_run_is_refused_and_nothing_is_changed(tmp_path: Path, case: str) -> None:
    theirs, ours, message = FOREIGN[case]
    save(tmp_path, fresh(theirs))
    model = fresh(ours, seed=3)
    before = everything(model)
    with pytest.raises(CheckpointError, match=message):
        load_(model, tmp_path, example_inputs=INPUT)
    assert_untouched(model, before)


def test_a_hidden_buffer_of_the_usual_width_is_no_obstacle(tmp_path: Path) -> None:
    model = fresh(HiddenBuffer)
    save(tmp_path, model)
    other = fresh(HiddenBuffer, seed=3)
    load_(other, tmp_path, example_inputs=INPUT)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), (1, 2), {1: 2}, torch.ones(1), {"deep": [object()]}])
def test_what_json_does_not_give_back_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"extra\['mine'\] cannot be kept in JSON"):
        save(tmp_path / "run", fresh(Plain), extra={"mine": value})
    assert not (tmp_path / "run").exists()


def test_states_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'_extra_state' of WithExtraState is a dict"):
        save(tmp_path / "run", WithExtraState())
    with pytest.raises(CheckpointError, match="on meta"):
        save(tmp_path / "run", Plain().to("meta"))
    assert not (tmp_path / "run").exists()


def test_a_channel_map_of_another_moment_is_refused(tmp_path: Path) -> None:
    model = fresh(Plain)
    channel_map = trace(model, INPUT)
    apply_(model, channel_map, {"a.0": IndexMap.removing([0], 6)})
    with pytest.raises(CheckpointError, match="save with the map that the last resize returned"):
        save(tmp_path / "run", model, channel_map=channel_map)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointError, match="it is a file; name a folder"):
        save(tmp_path / "run", fresh(Plain))
