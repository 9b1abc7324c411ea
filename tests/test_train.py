"""The training loop of the laboratory: plain training when nothing is edited, honest figures, a clean door."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from autowidth.channels import IndexMap
from autowidth.checkpoint import load_, read_run
from autowidth.cost import count_macs
from autowidth.engine import Effort
from autowidth.lab.data import CorruptImageError, digits
from autowidth.lab.loop import Method, train
from autowidth.lab.loop_parts import at_once, compiled, decayed_and_not, evaluate, one_cycle, probe_batches
from autowidth.lab.models import build, resolve
from autowidth.lab.prepare import ModelError
from autowidth.lab.result import Progress
from autowidth.lab.settings import Settings, settings_from
from autowidth.policy import Budget, Decision, Never, Situation
from composed import composed

SHORT = Settings(
    model="resnet8",
    width=0.5,
    epochs=2,
    limit=192,
    batch_size=32,
    policy=composed(Budget(macs=0.6), count=3, begin=0.2, end=0.8, grace=1),
    effort=Effort(probe_samples=64, audit_samples=64, audit_filters=4),
    device="cpu",
)


def short(**changes: Any) -> Settings:
    return SHORT.model_copy(update=changes)


class Dropping(nn.Module):
    """A hazard: its training draws from the global generator at every step."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.first(x)).relu(), 0.3, self.training)
        return self.head(self.second(x).relu().mean((2, 3)))


class Flat(nn.Module):
    """A hazard: nothing in it can be resized."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def broken() -> nn.Module:
    raise RuntimeError("no such luck")


@dataclass(frozen=True)
class Watching(Never):
    """Reviews after every third step, and decides nothing."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        return tuple(range(3, total_steps + 1, 3))

    def decide(self, situation: Situation) -> Decision:
        return Decision(plan={})


@dataclass(frozen=True)
class Shuffling(Watching):
    """Reviews, and puts the channels of every group into another order."""

    def decide(self, situation: Situation) -> Decision:
        widths = situation.widths
        return Decision(plan={name: IndexMap(tuple(range(w))[::-1], w) for name, w in widths.items()})


def plain_loop(settings: Settings) -> nn.Module:
    """The same run as anybody would write it, without any code of the training file."""
    images = digits(limit=settings.limit)
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    network = resolve(settings.model, in_channels=1, **({} if ":" in settings.model else {"width": settings.width}))
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    decay = settings.weight_decay
    groups = [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=True)
    batches = images.training_batches(settings.batch_size, seed=settings.seed)
    total, step = settings.epochs * len(batches), 0
    for _ in range(settings.epochs):
        network.train()
        for x, y in batches:
            step += 1
            done = step / (total + 1)
            if settings.schedule == "cosine":
                share = (1 + math.cos(math.pi * done)) / 2
            elif done < settings.warmup:
                share = done / settings.warmup
            else:
                share = (1 + math.cos(math.pi * (done - settings.warmup) / (1 - settings.warmup))) / 2
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * share
            loss = F.cross_entropy(network(x), y, label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether all weights and buffers are equal, bit for bit."""
    here, there = a.state_dict(), b.state_dict()
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


RUNS = {
    "residual": short(seed=3, label_smoothing=0.1),
    "cosine": short(seed=2, schedule="cosine"),
    "draws": short(model=f"{__name__}:Dropping", width=1.0, seed=1),
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_without_reviews_the_run_is_the_plain_loop_bit_for_bit(settings: Settings) -> None:
    assert same(train(settings.model_copy(update={"policy": Never()})).network, plain_loop(settings))


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_reviews_that_decide_nothing_leave_the_run_as_it_is_bit_for_bit(settings: Settings) -> None:
    watched = train(settings, method=Method(policy=Watching()))
    assert watched.reviews == 4
    assert same(watched.network, plain_loop(settings))
    assert watched.review_seconds > 0


def test_a_policy_that_does_something_would_be_seen() -> None:
    assert not same(train(SHORT, method=Method(policy=Shuffling())).network, plain_loop(SHORT))


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    one, two, other = train(SHORT), train(SHORT), train(short(seed=1))
    assert one.widths == two.widths
    assert same(one.network, two.network)
    assert not torch.equal(one.network.head.linear.bias, other.network.head.linear.bias)


def test_a_run_meets_its_budget_and_its_figures_are_true(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    result = train(short(out=out))
    start = resolve("resnet8", in_channels=1, width=0.5)
    example = torch.zeros(1, 1, 8, 8)
    assert result.macs_start == count_macs(start, example)
    assert result.params_start == sum(p.numel() for p in start.parameters())
    assert result.macs == count_macs(result.network, example) <= 0.6 * result.macs_start
    assert result.params == sum(p.numel() for p in result.network.parameters())
    assert result.widths == result.channel_map.widths
    moved = sum(result.widths.values()) - sum(result.widths_start.values())
    assert moved == result.inserted - result.removed
    assert result.reviews == len(result.history) == 3
    assert 0 < result.review_seconds < result.seconds
    test = digits(limit=192).plain_batches("test", 7)
    accuracy, loss = slow_evaluation(result.network, test)
    assert (result.accuracy, result.part) == (accuracy, "test")
    assert result.loss == pytest.approx(loss, rel=1e-5)

    fresh = resolve("resnet8", in_channels=1, width=0.5)
    load_(fresh, out, example_inputs=example)
    assert same(fresh, result.network)
    run = read_run(out)
    assert run.widths == result.widths
    assert run.extra["result"] == json.loads(json.dumps(result.as_json()))
    assert Settings.model_validate(run.extra["settings"]) == short(out=out)
    assert run.history() is not None
    assert sorted(p.name for p in out.iterdir()) == [
        "history.jsonl", "model.safetensors", "run.json", "training", "widths.json",
    ]  # fmt: skip


def slow_evaluation(network: nn.Module, batches: Any) -> tuple[float, float]:
    """Image by image."""
    network.eval()
    pairs = [(x[None], int(label)) for images, labels in batches for x, label in zip(images, labels, strict=True)]
    with torch.no_grad():
        scores = [network(x)[0].log_softmax(0) for x, _ in pairs]
    right = sum(int(s.argmax()) == y for s, (_, y) in zip(scores, pairs, strict=True))
    return right / len(pairs), -sum(float(s[y]) for s, (_, y) in zip(scores, pairs, strict=True)) / len(pairs)


def test_evaluation_touches_neither_weights_nor_statistics() -> None:
    network = build("resnet8", in_channels=1, width=0.5)
    before = copy.deepcopy(network.state_dict())
    accuracy, loss = evaluate(network, digits().plain_batches("test", 50), torch.contiguous_format)
    assert (accuracy, pytest.approx(loss, rel=1e-5)) == slow_evaluation(network, digits().plain_batches("test", 50))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("side", "most", "expected"), [(8, 1000, 1000), (16, 1000, 512), (32, 256, 128), (224, 256, 16)]
)
def test_fewer_large_images_are_worked_on_at_once(side: int, most: int, expected: int) -> None:
    images = digits(limit=4)
    train_split = replace(images.train, images=images.train.images[:, :, :1, :1].repeat(1, 1, side, side))
    assert at_once(replace(images, train=train_split), most) == expected


def test_a_held_out_share_keeps_the_test_images_out_of_it() -> None:
    result = train(short(holdout=0.25, policy=Never(), epochs=1))
    images = digits(limit=192, holdout=0.25)
    assert result.part == "held_out"
    assert result.accuracy == slow_evaluation(result.network, images.plain_batches("held_out", 64))[0]


def test_a_network_that_starts_narrow_has_filters_inserted() -> None:
    result = train(
        short(width=0.25, policy=composed(Budget(macs=1.5), count=2, begin=0.2, end=0.8, grace=0, offer=0.4))
    )
    assert result.inserted > 0
    assert result.macs_start < result.macs <= 1.5 * result.macs_start
    assert result.inserted_alive == sum(len(m.inserted) for m in result.history.lineage().values())


def test_the_report_tells_every_epoch_and_every_review_in_order() -> None:
    told: list[Progress] = []
    result = train(SHORT, report=told.append)
    assert told[0].moment == "start"
    assert (told[0].step, told[0].loss, told[0].accuracy, told[0].event) == (0, None, None, None)
    assert [p.step for p in told] == sorted(p.step for p in told)
    assert [p.epoch for p in told if p.moment == "epoch"] == [1, 2]
    assert [p.event for p in told if p.moment == "review"] == list(result.history.events)
    assert [p.widths for p in told if p.moment == "review"] == [w for _, w in result.history.replay()]
    last = told[-1]
    assert (last.accuracy, last.macs, last.params, last.step) == (
        result.accuracy,
        result.macs,
        result.params,
        last.total_steps,
    )
    assert all(p.seconds <= q.seconds for p, q in itertools.pairwise(told))


def test_bfloat16_and_channels_last_go_through_surgery() -> None:
    result = train(short(bf16=True, channels_last=True, model="resnet8-padding"))
    assert result.removed > 0
    weights = [p for p in result.network.parameters() if p.dim() == 4]
    assert all(p.dtype == torch.float32 and p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_a_cosine_is_no_one_cycle() -> None:
    assert not same(plain_loop(RUNS["cosine"]), plain_loop(short(seed=2)))


# ---- the averaged copy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_an_average_leaves_the_training_as_it_is_and_is_what_comes_out(settings: Settings) -> None:
    torch.manual_seed(5)
    network = resolve(settings.model, in_channels=1, **({} if ":" in settings.model else {"width": settings.width}))
    beside = copy.deepcopy(network)
    plain = train(settings.model_copy(update={"policy": Never()}), network=network)
    averaged = train(settings.model_copy(update={"policy": Never(), "ema": 0.9}), network=beside)
    assert plain.network is network
    assert same(network, beside)
    assert averaged.network is not beside
    assert not same(averaged.network, beside)
    images = digits(limit=settings.limit).plain_batches("test", 50)
    assert averaged.accuracy == slow_evaluation(averaged.network, images)[0]
    assert averaged.loss == pytest.approx(slow_evaluation(averaged.network, images)[1], rel=1e-5)


def test_the_average_is_what_the_formula_says() -> None:
    settings = short(policy=Never(), ema=0.6)  # reached after 13 of 24 steps, until then less is kept
    network = build("resnet8", in_channels=1, width=0.5)
    states: list[dict[str, Tensor]] = []

    class Watch:
        def after_backward(self, *_: Any) -> None: ...
        def after_epoch(self, *_: Any) -> None: ...
        def after_step(self, model: nn.Module, *_: Any) -> None:
            states.append(copy.deepcopy(model.state_dict()))

    result = train(settings.model_copy(update={"epochs": 4}), network=network, method=Method(rule=Watch()))
    assert len(states) == 24
    expected = {name: value.double() for name, value in states[0].items()}
    for n, state in enumerate(states[1:], 1):
        kept = min(0.6, (1 + n) / (10 + n))
        expected = {name: kept * expected[name] + (1 - kept) * value.double() for name, value in state.items()}
    for name, value in result.network.state_dict().items():
        if "num_batches_tracked" in name:
            assert value == states[-1][name] == 24
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "budget",
    [SHORT.policy, composed(Budget(macs=1.5), count=2, begin=0.2, end=0.8, grace=0, offer=0.4)],
    ids=["less", "more"],
)
def test_the_average_goes_through_surgery_with_the_network(tmp_path: Path, budget: Budget) -> None:
    network = build("resnet8", in_channels=1, width=0.5)
    result = train(short(ema=0.5, policy=budget, out=tmp_path / "run"), network=network)
    assert result.removed + result.inserted > 0
    assert result.widths != result.widths_start
    assert not same(result.network, network)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    assert {name: value.shape for name, value in result.network.state_dict().items()} == shapes
    assert result.macs == count_macs(result.network, torch.zeros(1, 1, 8, 8))
    assert result.accuracy == slow_evaluation(result.network, digits(limit=192).plain_batches("test", 50))[0]
    fresh = build("resnet8", in_channels=1, width=0.5)
    load_(fresh, tmp_path / "run", example_inputs=torch.zeros(1, 1, 8, 8))
    assert same(fresh, result.network)


def test_an_average_that_keeps_nothing_is_the_network_even_after_surgery() -> None:
    network = build("resnet8", in_channels=1, width=0.5)
    result = train(short(ema=1e-9), network=network)
    assert result.removed > 0
    for name, value in network.state_dict().items():
        torch.testing.assert_close(result.network.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_who_watches_sees_the_engine_after_every_step_and_its_reviews() -> None:
    seen: list[tuple[int, int]] = []
    result = train(SHORT, watch=lambda engine: seen.append((engine.steps, len(engine.history))))
    steps = [event.step for event in result.history]
    assert seen == [(n, sum(step <= n for step in steps)) for n in range(1, 13)]
    assert len(steps) == 3


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 20 small images, and a file that is none."""
    for number in range(40):
        place = tmp_path / "photos" / ("dark" if number % 2 else "light")
        place.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 100, (12, 12, 3)) + 100 * (1 - number % 2)
        Image.fromarray(noise.astype(np.uint8)).save(place / f"{number}.png")
    (tmp_path / "photos" / "dark" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create:UserWarning")
def test_a_streamed_run_is_the_run_in_memory_and_tells_what_was_left_out(tmp_path: Path, photos: Path) -> None:
    config = tmp_path / "run.json"
    table = {
        "model": "resnet8",
        "width": 0.25,
        "epochs": 2,
        "size": 8,
        "batch_size": 8,
        "policy": {"name": "never"},
        "device": "cpu",
    }
    config.write_text(json.dumps({"data": f"folder:{photos}", "skip_corrupt": True, **table}))
    told: list[Progress] = []
    kept = train(settings_from({}, config=config))
    streamed = train(settings_from({"stream_above": 0, "workers": 2}, config=config), report=told.append)
    assert same(streamed.network, kept.network)
    assert (streamed.accuracy, streamed.loss) == (kept.accuracy, pytest.approx(kept.loss, rel=1e-5))
    assert streamed.skipped == kept.skipped == 1
    assert "; 1 unreadable left out, the first is " in told[0].data
    assert told[0].data.endswith("notes.txt")
    with pytest.raises(CorruptImageError, match=r"notes.txt: .*skip_corrupt"):
        train(settings_from({"skip_corrupt": False}, config=config))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create:UserWarning")
def test_reviews_go_on_with_a_stream_in_batches_that_are_no_larger_than_those_of_training(photos: Path) -> None:
    (photos / "dark" / "notes.txt").unlink()
    effort = Effort(probe_samples=16, audit_samples=16, audit_filters=3)
    network = build("resnet8", width=0.5, num_classes=2)
    seen: set[int] = set()
    network.register_forward_hook(lambda module, inputs, output: seen.add(len(inputs[0])))
    settings = {"size": 8, "limit": None, "batch_size": 4, "stream_above": 0, "workers": 2, "effort": effort}
    result = train(short(data=f"folder:{photos}", **settings), network=network)
    assert max(seen) == 4
    assert result.reviews == 3
    assert result.removed > 0


# ---- compiled --------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Small enough to be compiled in seconds."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
def test_a_compiled_run_is_the_eager_run_through_surgery() -> None:
    from torch._dynamo.utils import counters

    budget = composed(Budget(macs=0.6), count=2, begin=0.2, end=0.8, grace=1)
    settings = short(model=f"{__name__}:Tiny", width=1.0, lr=0.05, policy=budget, ema=0.5)
    losses: dict[bool, list[float]] = {}
    results = {}
    for quickly in (False, True):
        torch.compiler.reset()
        counters.clear()
        told: list[Progress] = []
        results[quickly] = train(
            settings.model_copy(update={"compile": quickly, "compile_share": 1.0}), report=told.append
        )
        losses[quickly] = [p.loss for p in told if p.loss is not None] + [results[quickly].loss]
        assert (counters["stats"]["unique_graphs"] > 0) == quickly
    assert results[True].removed > 0
    assert results[True].widths == results[False].widths
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
    resized = [e for e in results[True].history if e.maps]
    assert counters["stats"]["unique_graphs"] == 1 + len(resized)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_what_cannot_be_compiled_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch.compiler.reset()
    with pytest.raises(ModelError, match=r"torch cannot compile my_net here: .*; train with compile = false"):
        compiled(lambda x, y: (x.sin() * y).sum(), "my_net")(torch.ones(7, requires_grad=True), torch.ones(7))


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    assert train(short(policy=Never(), epochs=1, limit=32, threads=before + 1)).threads == before + 1
    assert torch.get_num_threads() == before


# ---- its parts -------------------------------------------------------------------------------------------------------


@given(st.floats(0, 0.9), st.lists(st.floats(0, 1), min_size=2))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(warmup: float, shares: list[float]) -> None:
    rise = sorted(s for s in shares if s < warmup)
    fall = sorted(s for s in shares if s >= warmup)
    rates = [one_cycle(s, warmup) for s in rise + fall]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[: len(rise)] == sorted(rates[: len(rise)])
    assert rates[len(rise) :] == sorted(rates[len(rise) :], reverse=True)
    assert one_cycle(warmup, warmup) == 1
    assert one_cycle(1.0, warmup) == pytest.approx(0, abs=1e-12)


def test_every_parameter_is_optimized_once_and_norms_and_biases_do_not_decay() -> None:
    network = build("mobilenetv2", width=0.1)
    network.head.linear.bias.requires_grad_(False)
    groups = decayed_and_not(network, 0.01)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    for group in groups:
        assert all((p.dim() > 1) == (group["weight_decay"] == 0.01) for p in group["params"])


def test_the_probe_is_training_images_as_they_are_in_an_order_of_its_own() -> None:
    images = digits()
    undisturbed = [y.tolist() for _, y in images.training_batches(64, seed=0)]
    batches, probe = images.training_batches(64, seed=0), probe_batches(images, seed=0)
    seen, orders = [], []
    for _, y in batches:
        seen.append(y.tolist())
        orders.append(next(iter(probe))[1].tolist())
    assert seen == undisturbed
    assert orders[0] != orders[1]
    mean, std = images.mean[0], images.std[0]
    known = {tuple(((x - mean) / std).flatten().round(decimals=4).tolist()) for x in images.train.images}
    assert all(tuple(x.flatten().round(decimals=4).tolist()) in known for xs, _ in probe for x in xs)
