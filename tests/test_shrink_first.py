"""A trained network made smaller before it is trained on: by its own answers, within the engine, and in a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autowidth as aw
from autowidth.boundaries import LoopError
from autowidth.history import Event
from autowidth.lab.data import load
from autowidth.lab.loop import train
from autowidth.lab.settings import settings_of
from autowidth.review.batches import ProbeError
from autowidth.review.untrained import ShrinkError
from small_run import trained_on

DIGITS = load("digits")
X = torch.zeros(2, 1, 8, 8)
AT_ONCE = aw.Budget(macs=0.6, schedule=aw.Schedule(count=0))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A ResNet-8 of a quarter of the width that tells digits apart."""
    return trained_on(DIGITS, width=0.25, epochs=6)


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    source = iter(DIGITS.training_batches(64, seed=1))
    return [next(source) for _ in range(count)]


def attached(network: nn.Module, **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer, aw.AutoWidth]:
    """A copy of the network with an engine on it."""
    network = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    settings = {"probe": batches(), "loss_fn": F.cross_entropy, "policy": AT_ONCE, "total_steps": 4, "seed": 3}
    return network, optimizer, aw.AutoWidth(network, optimizer, example_inputs=X, **{**settings, **changes})


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, engine: aw.AutoWidth, count: int) -> None:
    for x, y in batches(count):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        engine.step()


def alike(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ---- the engine ------------------------------------------------------------------------------------------------------


def test_it_ends_at_the_budget_and_training_goes_on_from_there(trained: nn.Module) -> None:
    network, optimizer, engine = attached(trained.train())
    told: list[Event] = []
    modes = [module.training for module in network.modules()]
    events = engine.shrink(report=told.append, reviews=4)
    assert list(events) == told == list(engine.history) and len(events) == 4
    assert {(event.step, event.total_steps) for event in events} == {(0, 4)}
    assert engine.macs <= 0.6 * engine.macs_start and aw.count_macs(network, X) == engine.macs
    assert modes == [module.training for module in network.modules()]
    assert events[-1].widths == engine.widths and engine.history.widths_start != engine.widths
    widths, before = engine.widths, copy.deepcopy(network)
    steps(network, optimizer, engine, 4)
    assert engine.widths == widths and len(engine.history) == 4 and not alike(network, before)
    assert "4 of 4 reviews" in repr(engine)


def test_a_backward_pass_through_a_graph_from_before_is_refused(trained: nn.Module) -> None:
    network, optimizer, engine = attached(trained.train())
    (x, y), *_ = batches(1)
    with torch.autocast("cpu", torch.bfloat16):  # its graph keeps copies of weights
        loss = F.cross_entropy(network(x), y)
    engine.shrink(reviews=1)
    with pytest.raises(LoopError, match="which has changed the widths"):
        loss.backward()
    steps(network, optimizer, engine, 1)


@pytest.mark.parametrize(("total_steps", "expected"), [(1, 2), (119, 2), (120, 3), (1000, 4)])
def test_a_short_run_has_few_reviews_before_it(trained: nn.Module, total_steps: int, expected: int) -> None:
    _, _, engine = attached(trained, total_steps=total_steps)
    assert len(engine.shrink()) == expected and engine.macs <= 0.6 * engine.macs_start


def test_labels_do_not_count(trained: nn.Module) -> None:
    found = []
    for shift in (0, 3):
        network, _, engine = attached(trained, probe=[(x, (y + shift) % 10) for x, y in batches()])
        engine.shrink()
        found.append(network)
    assert alike(*found)


def test_it_does_what_shrinking_does(trained: nn.Module) -> None:
    network, _, engine = attached(trained)
    engine.shrink(reviews=2)
    alone = copy.deepcopy(trained)
    aw.shrink_(alone, example_inputs=X, batches=batches(), policy=aw.Budget(macs=0.6), reviews=2, seed=3)
    assert alike(network, alone)


def test_followers_and_optimizers_come_along(trained: nn.Module) -> None:
    average = copy.deepcopy(trained)
    network = copy.deepcopy(trained)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    engine = aw.AutoWidth(
        network, optimizer, example_inputs=X, probe=batches(), loss_fn=F.cross_entropy, policy=AT_ONCE, total_steps=2,
        followers=[average],
    )  # fmt: skip
    engine.shrink(reviews=1)
    assert {n: p.shape for n, p in average.named_parameters()} == {n: p.shape for n, p in network.named_parameters()}
    steps(network, optimizer, engine, 2)


def test_what_judges_later_reviews_is_as_it_was(trained: nn.Module) -> None:
    policy = aw.Budget(macs=0.6, schedule=aw.Schedule(count=1, begin=0.5, end=1.0))
    _, _, engine = attached(trained, policy=policy)
    reviewer = engine._reviewer
    own = {name: getattr(reviewer, name) for name in ("policy", "probe", "loss", "effort", "norms", "calibration")}
    engine.shrink(reviews=1)
    assert all(getattr(reviewer, name) is value for name, value in own.items())


def test_a_state_taken_afterwards_goes_on_alike(trained: nn.Module, tmp_path: Path) -> None:
    network, optimizer, engine = attached(trained)
    engine.shrink(reviews=2)
    steps(network, optimizer, engine, 2)
    kept = copy.deepcopy((engine.state_dict(), network.state_dict(), optimizer.state_dict()))
    other, optimizer_2, engine_2 = attached(trained)
    engine_2.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    optimizer_2.load_state_dict(kept[2])
    assert (engine_2.widths, engine_2.macs_start) == (engine.widths, engine.macs_start)
    for found in ((network, optimizer, engine), (other, optimizer_2, engine_2)):
        steps(*found, 2)
    assert alike(network, other)


def test_an_interrupt_between_reviews_loses_no_event(trained: nn.Module) -> None:
    network, _, engine = attached(trained)

    def enough(event: Event) -> None:
        if len(engine.history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.shrink(report=enough)
    assert len(engine.history) == 2 and engine.history.events[-1].widths == engine.widths
    assert aw.count_macs(network, X) == engine.macs and engine.policy is AT_ONCE
    engine.shrink()
    assert engine.macs <= 0.6 * engine.macs_start


def test_a_review_that_fails_leaves_everything_as_it_was(
    trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    network, _, engine = attached(trained)
    reviewer, before = engine._reviewer, copy.deepcopy(network)
    loss, history = reviewer.loss, reviewer.history

    def fails(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(type(reviewer), "_resize", fails)
    with pytest.raises(OSError, match="no space"):
        engine.shrink()
    assert alike(network, before) and reviewer.loss is loss and reviewer.history is history and not len(history)


def test_after_the_first_step_it_is_refused(trained: nn.Module) -> None:
    network, optimizer, engine = attached(trained, policy=aw.Budget(macs=0.6))
    steps(network, optimizer, engine, 1)
    with pytest.raises(LoopError, match="at step 1"):
        engine.shrink()
    engine.abandon()


def test_what_it_cannot_do_is_told(trained: nn.Module) -> None:
    _, _, engine = attached(trained, policy=aw.Never())
    with pytest.raises(ShrinkError, match="no schedule"):
        engine.shrink()
    named = [{"image": x, "label": y} for x, y in batches()]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"])

    _, _, engine = attached(trained, probe=named, loss_fn=None, loss=loss)
    with pytest.raises(ProbeError):
        engine.shrink()


def test_a_budget_that_nobody_will_meet_is_told_at_the_first_step(trained: nn.Module) -> None:
    network, optimizer, engine = attached(trained)
    with pytest.warns(UserWarning, match=r"no review is planned: call engine\.shrink\(\)"):
        steps(network, optimizer, engine, 1)
    steps(network, optimizer, engine, 1)
    assert engine.review().macs <= 0.6 * engine.macs_start  # by hand, all at once


# ---- a run -----------------------------------------------------------------------------------------------------------


def short(**changes: Any) -> dict[str, Any]:
    """Settings of a run of seconds."""
    table = {"model": "resnet8", "width": 0.25, "data": "digits", "limit": 400, "epochs": 2, "batch_size": 32}
    return {**table, "policy": {"name": "budget", "macs": 0.6}, "threads": 1, "device": "cpu", **changes}


def test_a_run_from_weights_is_made_smaller_before_its_first_step(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    told: list[tuple[str, int, float]] = []
    found = train(
        settings_of(short(weights=tmp_path / "w.pt", out=tmp_path / "run", ema=0.9)),
        report=lambda p: told.append((p.moment, p.step, p.macs / p.macs_start)),
    )
    reviews = [(step, share) for moment, step, share in told if moment == "review"]
    assert len(reviews) == found.reviews == 2 and {step for step, _ in reviews} == {0}
    assert [share for _, share in reviews] == sorted((share for _, share in reviews), reverse=True)
    assert found.macs <= 0.6 * found.macs_start and found.accuracy_start is not None
    assert aw.read_run(tmp_path / "run").history().removed_total == found.removed > 0  # type: ignore[union-attr]


def test_fewer_images_than_a_batch_are_enough(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    found = train(settings_of(short(weights=tmp_path / "w.pt", limit=40)))
    assert found.macs <= 0.6 * found.macs_start and found.reviews == 2


def test_a_schedule_that_is_given_is_kept(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    policy = {"name": "budget", "macs": 0.6, "schedule": {"count": 2, "begin": 0.2, "end": 0.5}}
    settings = settings_of(short(weights=tmp_path / "w.pt", policy=policy))
    assert settings.policy.reviews(100) == (20, 50)
    assert settings_of(short(weights=tmp_path / "w.pt")).policy.reviews(100) == ()
    assert len(settings_of(short(weights=tmp_path / "w.pt", policy={"name": "auto"})).policy.reviews(100)) == 4
