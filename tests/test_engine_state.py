"""The state of an engine: complete, plain, and refused where it does not fit."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from autowidth import history
from autowidth.channels import IndexMap
from autowidth.engine import AutoWidth, resize_
from autowidth.engine_state import StateError
from autowidth.history import History
from autowidth.lab.loop_parts import probe_batches
from autowidth.latency import LatencyMeter
from autowidth.plain_data import put_together, taken_apart
from autowidth.policy import Budget, Limits, Policy, Schedule
from autowidth.review.batches import DivergedProbeError
from nets import Shuffle
from test_engine import IMAGE, SMALL, Looks, Mixed, adamw, attached, bits, images, looked_at, sgd, state_bits, train

GROWING = Budget(macs=0.8, schedule=Schedule(count=6, begin=0.1, end=0.9), limits=Limits(grace=1, offer=0.2))


def made(
    policy: Policy = GROWING, steps: int = 30, *, latency: bool = False, optimize: Callable[..., Optimizer] = adamw
) -> AutoWidth:
    """An engine on a fresh model, with an average and a probe that is another one at every review."""
    torch.manual_seed(0)
    model = Mixed()
    optimizer = optimize(model)
    engine = attached(
        model, optimizer, policy, steps, probe=probe_batches(images(), 0, 64), followers=[AveragedModel(model)]
    )
    if latency:  # timed on this machine, so that no policy can decide by it the same way twice
        engine._reviewer.latency = LatencyMeter(model, engine.channel_map, IMAGE)
    return engine


def taken_over(engine: AutoWidth, old: AutoWidth, **options: Any) -> AutoWidth:
    """The engine with everything that the old one has come to, as a user loads it."""
    engine.load_state_dict(old.state_dict(), **options)
    engine.model.load_state_dict(old.model.state_dict())
    for mine, his in zip(engine.optimizers, old.optimizers, strict=True):
        mine.load_state_dict(copy.deepcopy(his.state_dict()))
    for mine, his in zip(engine.followers, old.followers, strict=True):
        mine.load_state_dict(his.state_dict())
    return engine


# ---- complete --------------------------------------------------------------------------------------------------------

_LEAVES = (str, int, float, bool, bytes, type(None), type)


def reached(  # noqa: C901  (a case for each kind of thing)
    thing: object, path: str, seen: set[int]
) -> Iterator[tuple[str, object]]:
    """(Path, content) of every number, text, tensor and generator that can be reached through attributes."""
    if isinstance(thing, _LEAVES):
        yield path, "nan" if isinstance(thing, float) and math.isnan(thing) else thing
        return
    if id(thing) in seen:
        return
    if not isinstance(thing, tuple):  # one that is equal may be another object
        seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield path, (thing.dtype, tuple(thing.shape), thing.stride(), thing.detach().numpy().tobytes())
    elif isinstance(thing, np.ndarray):
        yield path, (thing.shape, thing.tobytes())
    elif isinstance(thing, torch.Generator):
        yield path, thing.get_state().numpy().tobytes()
    elif isinstance(thing, np.random.Generator):
        yield path, repr(thing.bit_generator.state)
    elif isinstance(thing, dict):
        yield f"{path}.keys", sorted(k for k in thing if isinstance(k, str))
        for number, (key, value) in enumerate(thing.items()):
            yield from reached(value, f"{path}.{key if isinstance(key, str) else number}", seen)
    elif isinstance(thing, list | tuple):
        yield f"{path}.len", len(thing)
        for number, value in enumerate(thing):
            yield from reached(value, f"{path}.{number}", seen)
    elif isinstance(thing, set | frozenset):
        yield path, sorted(map(repr, thing))
    elif (hasattr(thing, "__dict__") and not callable(thing)) or isinstance(thing, nn.Module):
        yield from reached(vars(thing), path, seen)
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from reached(getattr(thing, field.name), f"{path}.{field.name}", seen)
    elif callable(thing):
        yield path, getattr(thing, "__qualname__", type(thing).__qualname__)
    else:
        yield path, type(thing)


def everything(engine: AutoWidth) -> dict[str, object]:
    """What an engine holds, without wall times, gradients, and the caches that Python and torch keep."""
    found = dict(reached(vars(engine), "engine", set()))
    return {k: v for k, v in found.items() if not any(p in k for p in (".seconds.", "_sizes", ".grad", "_goes_on"))}


@pytest.mark.parametrize("latency", [False, True])
def test_nothing_that_an_engine_holds_is_forgotten(latency: bool) -> None:
    """Every attribute that can be reached from the Reviewer and the engine is the same one after loading."""
    old = made(latency=latency)
    train(old, 20)
    before = everything(made(latency=latency))
    again = everything(taken_over(made(latency=latency), old))
    wanted = everything(old)
    moved = {key for key in wanted if before.get(key) != wanted[key]}
    for part in ("rng", "generator", "ages", "calibration", "history", "channel_map", "probe", "steps"):
        assert any(part in key for key in moved), f"{part} has not moved: the test would not see it forgotten"
    differing = [key for key in wanted.keys() | again.keys() if wanted.get(key) != again.get(key)]
    assert differing == []
    assert not latency or "engine._reviewer.latency.fit.measured" in moved


SLOW = [pytest.param(at, kind, marks=pytest.mark.slow) for at in (2, 29) for kind in (sgd, adamw)]


@pytest.mark.parametrize(("at", "optimize"), [(15, sgd), (16, adamw), *SLOW])
def test_a_run_goes_on_as_if_it_had_not_been_broken_off(at: int, optimize: Callable[..., Optimizer]) -> None:
    old = made(optimize=optimize)
    train(old, at)
    again = taken_over(made(optimize=optimize), old)
    ends = []
    for engine in (old, again):
        torch.manual_seed(at)  # dropout: the random state is the business of save_training
        train(engine, 30 - at)
        ends.append((bits(engine.model), bits(engine.followers[0]), state_bits(engine.optimizers[0]), engine.widths))
    assert ends[0] == ends[1]
    assert len(old.history) == 6
    assert everything(old) == everything(again)


def test_the_state_is_plain_data_for_torch_and_for_files_without_pickle(tmp_path: Path) -> None:
    old = made()
    train(old, 20)
    state = old.state_dict()
    torch.save(state, tmp_path / "state.pt")
    by_torch = torch.load(tmp_path / "state.pt", weights_only=True)
    tree, tensors = taken_apart(state, name="engine")
    by_files = put_together(json.loads(json.dumps(tree, allow_nan=False)), load(save(tensors)))
    wanted = everything(taken_over(made(), old))
    for read in (by_torch, by_files):
        engine = made()
        engine.load_state_dict(read)
        got = everything(engine)
        assert got["engine._reviewer.rng"] == wanted["engine._reviewer.rng"]
        assert [k for k in got if "_reviewer.model" not in k and "optimizers" not in k and "followers" not in k
                and "latency" not in k and got[k] != wanted[k]] == []  # fmt: skip


def test_positions_of_interleaved_channels_are_those_that_the_reviews_led_to() -> None:
    """Behind a shuffle it is not the widths alone that say where a channel stands."""
    plans = {0: {}, 1: {}}

    def engine(script: dict[int, dict[str, IndexMap]]) -> AutoWidth:
        torch.manual_seed(0)
        model = Shuffle()
        batches = [(torch.randn(16, 3, 8, 8), torch.randint(3, (16,))) for _ in range(4)]
        return AutoWidth(
            model, sgd(model), example_inputs=torch.zeros(2, 3, 8, 8), probe=batches, loss_fn=F.cross_entropy,
            policy=Looks(script), total_steps=8, effort=SMALL,
        )  # fmt: skip

    for name, width in engine({}).widths.items():
        plans[0][name] = IndexMap.removing([1], width)
        plans[1][name] = IndexMap((*range(1, width - 1), -1, 0), width - 1)
    old = engine(plans)
    for _ in range(4):
        old.step()
    assert len(old.history) == 2 and all(event.maps for event in old.history)
    again = engine(plans)
    again.load_state_dict(old.state_dict())
    assert again.channel_map == old.channel_map


def test_a_model_that_has_other_widths_is_resized_too() -> None:
    """One that was narrowed already, or is as wide as another run."""
    old = made()
    train(old, 20)
    torch.manual_seed(0)
    model = Mixed()
    resize_(model, {n: IndexMap.removing([0], w) for n, w in made().widths.items()}, example_inputs=IMAGE)
    other = attached(
        model, adamw(model), GROWING, 30, probe=probe_batches(images(), 0, 64), followers=[AveragedModel(model)]
    )
    taken_over(other, old)
    assert (other.widths, other.macs_start, other.params_start) == (old.widths, old.macs_start, old.params_start)
    assert other.history.events == old.history.events
    torch.manual_seed(1)
    train(old, 10)
    torch.manual_seed(1)
    train(other, 10)
    assert bits(old.model) == bits(other.model)


def test_an_attached_history_is_the_record_of_the_state_again(tmp_path: Path) -> None:
    """What a run wrote after the state was taken goes; nothing is doubled."""
    torch.manual_seed(0)
    model = Mixed()
    old = AutoWidth(
        model, sgd(model), example_inputs=IMAGE, probe=looked_at(), loss_fn=F.cross_entropy, policy=GROWING,
        total_steps=30, effort=SMALL, history=tmp_path / "h.jsonl",
    )  # fmt: skip
    train(old, 10)
    state = old.state_dict()
    train(old, 10)
    torch.manual_seed(0)
    model = Mixed()
    again = AutoWidth(
        model, sgd(model), example_inputs=IMAGE, probe=looked_at(), loss_fn=F.cross_entropy, policy=GROWING,
        total_steps=30, effort=SMALL,
    )  # fmt: skip
    again.load_state_dict(state)
    again.history.attach(tmp_path / "h.jsonl")
    taken = len(again.history)
    assert 0 < taken < len(old.history)
    train(again, 20)
    steps = [event.step for event in History.read(tmp_path / "h.jsonl")]
    assert steps == sorted(set(steps)) == [event.step for event in again.history]


# ---- reviews that wait -----------------------------------------------------------------------------------------------


def test_a_review_that_is_due_waits_for_a_step_that_is_finite_also_across_a_state() -> None:
    engine = made(Looks())
    assert engine.step() is None
    assert engine.step(finite=False) is None and engine.step(finite=False) is None
    again = taken_over(made(Looks()), engine)
    for one in (engine, again):
        event = one.step()
        assert event is not None and event.step == 4
        assert one.step() is None


def test_a_review_that_failed_is_made_after_the_next_step() -> None:
    broken = [True]

    def loss_fn(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target) * (math.nan if broken[0] else 1.0)

    torch.manual_seed(0)
    model = Mixed()
    broken[0] = False
    engine = attached(model, sgd(model), Looks(), 10, loss_fn=loss_fn)
    broken[0] = True
    engine.step()
    with pytest.raises(DivergedProbeError):
        engine.step()
    broken[0] = False
    event = engine.step()
    assert event is not None and event.step == 3
    assert len(engine.history) == 1


def test_an_interrupt_at_any_line_of_the_record_neither_loses_an_event_nor_doubles_one(tmp_path: Path) -> None:
    """Between the line in the file and the list in memory as well: what was undone is made again, once."""
    source, record = Path(history.__file__), {"append", "_cut", "_add", "_length"}

    class Interrupt:
        def __init__(self, at: int) -> None:
            self.at, self.count = at, 0

        def line(self, frame: FrameType, what: str, _: object) -> Any:
            if what == "line":
                self.count += 1
                if self.count == self.at:
                    raise KeyboardInterrupt
            return self.line

        def enter(self, frame: FrameType, what: str, _: object) -> Any:
            code = frame.f_code
            return self.line if code.co_filename == str(source) and code.co_name in record else None

    torch.manual_seed(0)
    model, path = Mixed(), tmp_path / "h.jsonl"
    engine = AutoWidth(
        model, sgd(model), example_inputs=IMAGE, probe=looked_at()[:2], loss_fn=F.cross_entropy, policy=Looks(),
        total_steps=200, effort=SMALL, history=path,
    )  # fmt: skip
    engine.step()
    at, fired = 0, 0
    while True:
        at += 1
        interrupt, before = Interrupt(at), sys.gettrace()
        sys.settrace(interrupt.enter)
        try:
            event = engine.step()
        except KeyboardInterrupt:
            fired += 1
            continue
        finally:
            sys.settrace(before)
            steps = [event.step for event in History.read(path)]
            assert steps == [event.step for event in engine.history], at
        assert event is not None and interrupt.count < at
        break
    assert fired > 15
    assert steps == [at + 1]  # one event, after all that was undone


# ---- loaders ---------------------------------------------------------------------------------------------------------


def test_a_probe_that_draws_from_a_generator_of_its_own_goes_on_with_it() -> None:
    data = TensorDataset(images().train.images.float() / 16, images().train.labels)

    def engine() -> AutoWidth:
        torch.manual_seed(0)
        model = Mixed()
        loader = DataLoader(data, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(5))
        return attached(model, sgd(model), Looks(), 20, probe=loader)

    old = engine()
    train(old, 6)
    again = taken_over(engine(), old)
    assert [old.review().loss, old.review().loss] == [again.review().loss, again.review().loss]


# ---- refused ---------------------------------------------------------------------------------------------------------


def spoilt(key: str, value: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {**state, key: value}


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "newer": (spoilt("schema", 2), "format 2, this version reads 1"),
    "no schema": (lambda state: {}, "format None"),
    "another group": (spoilt("widths", {"left": 3, "foreign": 3}), "another network: it has a channel group"),
    "ages of other widths": (lambda s: {**s, "ages": {k: v[:1] for k, v in s["ages"].items()}}, "ages"),
    "no history": (spoilt("history", None), "damaged"),
    "a history that is cut": (lambda s: {**s, "history": ["{"]}, "damaged"),
    "a generator of another kind": (spoilt("generator", torch.zeros(3)), "damaged"),
    "numpy's generator gone": (spoilt("rng", {}), "damaged"),
    "a calibration without its numbers": (spoilt("calibration", {"x": 1}), "damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_is_damaged_or_foreign_is_refused_and_nothing_has_changed(case: str) -> None:
    old = made()
    train(old, 20)
    spoil, message = REFUSED[case]
    engine = made()
    before = everything(engine)
    with pytest.raises(StateError, match=message):
        engine.load_state_dict(spoil(old.state_dict()))
    assert everything(engine) == before


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (lambda: made(steps=60), "total_steps"),
        (lambda: made(Budget(macs=0.7)), "policy"),
        (lambda: made(Looks()), "policy"),
    ],
)
def test_an_engine_that_was_built_otherwise_is_refused_unless_that_is_meant(
    other: Callable[[], AutoWidth], name: str
) -> None:
    old = made()
    train(old, 20)
    with pytest.raises(StateError, match=f"with {name} .*say differing=\\('{name}',\\)"):
        other().load_state_dict(old.state_dict())
    engine = taken_over(other(), old, differing=(name,))
    assert (engine.steps, engine.widths) == (20, old.widths)
    with pytest.raises(StateError, match="nothing that an engine is made with"):
        other().load_state_dict(old.state_dict(), differing=("speed",))


def test_a_run_that_is_longer_now_reviews_when_the_longer_one_would_have() -> None:
    old = made()
    train(old, 20)
    engine = taken_over(made(steps=60), old, differing=("total_steps",))
    _, events = train(engine, 40)
    assert [event.step for event in events] == [step for step in GROWING.reviews(60) if step > 20]
    with pytest.raises(StateError, match="step 20, and total_steps is 10"):
        made(steps=10).load_state_dict(old.state_dict(), differing=("total_steps",))
