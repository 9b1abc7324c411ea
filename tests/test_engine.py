"""Laws of the engine: honest report, training that goes on, nothing touched where nothing is decided."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from autowidth.attach import ForeignOptimizerError, NothingToResizeError
from autowidth.channels import IndexMap
from autowidth.cost import count_macs
from autowidth.engine import AutoWidth, resize_
from autowidth.history import Event
from autowidth.lab.data import ImageSet, digits
from autowidth.lab.models import build
from autowidth.policy import Budget, BudgetError, Decision, Limits, Never, Policy, Schedule, Situation, Start, Unit
from autowidth.review.batches import ProbeError, mean_loss, of_pairs
from autowidth.review.effort import Effort
from autowidth.review.state import batch_norms, precise_norms, quiet
from autowidth.trace import TraceError, trace

pytestmark = pytest.mark.filterwarnings("error")

Batches = list[tuple[Tensor, Tensor]]
SMALL = Effort(probe_samples=64, audit_samples=64, audit_filters=4)
IMAGE = torch.zeros(1, 1, 8, 8)
CE = of_pairs(F.cross_entropy)


# ------------------------------------------------------------------------------------------------- data, nets, policies


@functools.cache
def images() -> ImageSet:
    return digits(limit=640)


def looked_at() -> Batches:
    """What a policy may look at: four batches of 64."""
    return list(images().plain_batches("train", 64))[:4]


class Mixed(nn.Module):
    """Dropout, a norm, a concat, a weight norm, and pixels flattened into the head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Conv2d(1, 5, 1, stride=2)
        self.norm, self.drop = nn.BatchNorm2d(6), nn.Dropout(0.3)
        self.join = weight_norm(nn.Conv2d(11, 8, 3, stride=2, padding=1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.norm(self.left(x))), F.relu(self.right(x))], 1)
        return self.head(self.drop(F.relu(self.join(x))).flatten(1))


def resnet() -> nn.Module:
    return build("resnet8", in_channels=1, width=0.5)


def vgg() -> nn.Module:
    return build("vgg8", in_channels=1, width=0.125)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


@dataclass(frozen=True)
class Looks:
    """A policy that reviews every other step and follows a script of plans; without one it decides nothing."""

    plans: Mapping[int, Mapping[str, IndexMap]] = field(default_factory=dict)
    grace: int = 2
    trial_share: float = 0.0
    seen: list[Situation] = field(default_factory=list)
    unit: Unit = "macs"
    aim: str = "as a script says"

    @property
    def limits(self) -> Limits:
        return Limits(grace=self.grace, trial_share=self.trial_share)

    def check(self, start: Start) -> None:
        """Accepts everything."""

    def reviews(self, total_steps: int) -> tuple[int, ...]:
        return tuple(range(2, total_steps + 1, 2))

    def decide(self, situation: Situation) -> Decision:
        self.seen.append(situation)
        return Decision(plan=self.plans.get(len(self.seen) - 1, {}))


def attached(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    policy: Policy,
    total_steps: int,
    *,
    probe: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    followers: Sequence[nn.Module] = (),
    effort: Effort = SMALL,
    reconstruct: bool = True,
    seed: int = 0,
) -> AutoWidth:
    """An engine on digits with little effort."""
    return AutoWidth(
        model,
        optimizer,
        example_inputs=IMAGE,
        probe=looked_at() if probe is None else probe,
        loss_fn=loss_fn,
        policy=policy,
        total_steps=total_steps,
        followers=followers,
        effort=effort,
        reconstruct=reconstruct,
        seed=seed,
    )


def step(model: nn.Module, optimizers: Sequence[Optimizer], batch: tuple[Tensor, Tensor]) -> Tensor:
    """One training step; the loss is returned with its graph, as users who log it hold it."""
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss


def train(
    engine: AutoWidth, steps: int, after: Callable[[Event | None], None] = lambda event: None
) -> tuple[list[Tensor], list[Event]]:
    """Trains in the engine's own model. Returns all losses, graphs and all, and the events."""
    losses, events = [], []
    engine.model.train()
    stream = images().training_batches(32, seed=1)
    epochs = (batch for _ in range(steps) for batch in stream)
    for _, batch in zip(range(steps), epochs, strict=False):
        losses.append(step(engine.model, engine.optimizers, batch))
        event = engine.step()
        after(event)
        if event is not None:
            events.append(event)
    return losses, events


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def state_bits(optimizer: Optimizer) -> list[tuple[str, bytes]]:
    state = optimizer.state_dict()["state"]
    return [(f"{p}.{k}", torch.as_tensor(v).numpy().tobytes()) for p, entry in state.items() for k, v in entry.items()]


def assert_state_fits(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor) and key != "step":
                    assert value.shape == parameter.shape, key


# ----------------------------------------------------------------------------------------- the event, and real training


@pytest.mark.parametrize(
    ("make", "optimize", "macs"),
    [(resnet, sgd, 0.5), (resnet, adamw, 0.4), (resnet, sgd, 1.5), (vgg, adamw, 0.5), (Mixed, sgd, 0.6)],
)
def test_training_goes_on_and_the_event_tells_the_truth(
    make: Callable[[], nn.Module], optimize: Callable[[nn.Module], Optimizer], macs: float
) -> None:
    torch.manual_seed(0)
    model = make()
    full = count_macs(model, IMAGE)
    optimizer = optimize(model)
    engine = attached(model, optimizer, Budget(macs=macs, schedule=Schedule(count=5, begin=0.1, end=0.7)), 30)
    before = (full, engine.params)

    def check(event: Event | None) -> None:
        nonlocal before
        if event is None:
            return
        now = (count_macs(model, IMAGE), sum(p.numel() for p in model.parameters()))
        assert (event.macs_before, event.params_before) == before
        assert (event.macs, event.params) == (engine.macs, engine.params) == now
        assert event.widths == engine.widths == trace(model, IMAGE, rehearse=False).widths
        assert_state_fits(optimizer)
        before = now

    losses, events = train(engine, 30, check)
    assert len(losses) == 30
    assert [event.step for event in events] == list(engine.policy.reviews(30))
    assert all(torch.isfinite(loss) for loss in losses)
    assert float(losses[-1].detach()) < float(losses[0].detach())
    assert engine.macs <= macs * full
    assert engine.macs > 0.9 * macs * full
    assert any(event.maps for event in events)
    assert model.training


@pytest.mark.parametrize("optimize", [sgd, adamw])
def test_the_run_is_the_same_bit_for_bit_with_the_same_seed(optimize: Callable[[nn.Module], Optimizer]) -> None:
    def run(seed: int) -> tuple[dict[str, bytes], list[float], list[dict[str, IndexMap]]]:
        torch.manual_seed(0)
        model = Mixed()
        engine = attached(
            model,
            optimize(model),
            Budget(macs=0.9, schedule=Schedule(count=4, begin=0.1), limits=Limits(offer=0.2)),
            14,
            seed=seed,
        )
        losses, events = train(engine, 14)
        assert engine.history.inserted_total
        return bits(model), [float(loss.detach()) for loss in losses], [event.maps for event in events]

    assert run(0) == run(0)
    assert run(0)[0] != run(1)[0]


def test_replay_and_lineage_lead_from_the_first_network_to_the_last() -> None:
    """At a learning rate of zero every surviving filter of the stem still is the one it descends from."""
    torch.manual_seed(0)
    model = resnet()
    first = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = attached(
        model, optimizer, Budget(macs=0.8, schedule=Schedule(count=5, begin=0.1), limits=Limits(offer=0.2)), 12
    )
    start = engine.widths
    _, events = train(engine, 12)
    assert engine.history.widths_start == start
    assert [widths for _, widths in engine.history.replay()] == [event.widths for event in events]
    assert engine.history.inserted_total
    assert engine.history.removed_total
    lineage = engine.history.lineage()
    assert {name: index_map.width for name, index_map in lineage.items()} == engine.widths
    checked = 0
    for group in trace(first, IMAGE).groups:
        place = group.with_role("write")[0]
        new, old = (net.get_parameter(place.axis.name).detach() for net in (model, first))
        if old.size(1) == 1:  # reads the image, whose channel is never resized
            for now, then in enumerate(lineage[group.name].source):
                if then >= 0:
                    assert torch.equal(new[now], old[then])
                    checked += 1
    assert checked


def test_reviews_take_place_when_the_policy_says() -> None:
    model = Mixed()
    engine = attached(model, sgd(model), Budget(macs=0.8, schedule=Schedule(count=3, begin=0.2, end=0.8)), 10)
    events = [engine.step() for _ in range(10)]
    with pytest.warns(UserWarning, match="step 11 of a run of total_steps=10"):
        events.append(engine.step())
    events.append(engine.step())  # said once
    assert [number for number, event in enumerate(events, 1) if event is not None] == [2, 5, 8]
    assert engine.steps == 12
    assert [event for event in events if event is not None] == list(engine.history.events)
    assert engine.review_seconds == pytest.approx(sum(sum(event.seconds.values()) for event in engine.history))
    assert engine.review_seconds > 0


def with_norms_of(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in evaluation mode, its norms with the statistics of these images."""
    twin = copy.deepcopy(model).eval()
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        twin(x)
    return twin.eval()


def test_losses_in_the_event_are_those_of_its_data() -> None:
    """loss: on the scoring part, before; measured: the change on the held-out part. Dropout off, norms precise."""
    torch.manual_seed(0)
    model = Mixed()
    engine = attached(model, sgd(model), Looks(plans={}), 10)
    train(engine, 1)
    engine.policy.plans[0] = {"join": IndexMap.removing([0, 5], 8)}
    scoring, held_out = looked_at()[:1], looked_at()[1:2]
    old = with_norms_of(model, scoring[0][0])
    event = engine.review()
    new = with_norms_of(model, scoring[0][0])
    assert event.loss == pytest.approx(mean_loss(old, scoring, CE), rel=1e-5)
    change = mean_loss(new, held_out, CE) - mean_loss(old, held_out, CE)
    assert event.measured == pytest.approx(change, abs=1e-6)
    assert event.fidelity is not None
    assert event.fidelity.count == SMALL.audit_filters
    for low, middle, high in event.worths.values():
        assert math.isfinite(low)
        assert low <= middle <= high
    assert event.worths.keys() == event.widths.keys()


# ------------------------------------------------------------------------------------ nothing decided, nothing done


def global_draws() -> tuple[float, float, float]:
    """The next number of each global random state."""
    return float(torch.rand(())), float(np.random.rand()), random.random()


def shuffled() -> DataLoader[tuple[Tensor, ...]]:
    """A loader that draws from the global random state whenever it is iterated."""
    x, y = (torch.cat(part) for part in zip(*looked_at(), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)


@pytest.mark.parametrize(
    "policy", [Looks(), Budget(macs=1.0, schedule=Schedule(count=4), limits=Limits(offer=0.0)), Never(), None]
)
def test_without_a_decision_training_is_what_it_would_have_been(policy: Policy | None) -> None:
    """Bit for bit: weights, buffers, optimizer state, losses, random states. None stands for plain training, twice."""

    def run(watched: Policy | None) -> tuple[object, ...]:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        model = Mixed()
        optimizer = adamw(model)
        engine = None if watched is None else attached(model, optimizer, watched, 8, probe=shuffled())
        model.train()
        losses = []
        for batch in list(images().training_batches(32, seed=1))[:8]:
            losses.append(float(step(model, [optimizer], batch).detach()))
            if engine is not None:
                engine.step()
        if isinstance(watched, Looks):
            assert len(watched.seen) == 4
            assert engine is not None
            assert len(engine.history) == 4
        return bits(model), state_bits(optimizer), losses, global_draws()

    run(None)  # the first optimizer step of a process imports parts of torch, which may draw from `random`
    assert run(policy) == run(None)


def test_a_review_that_fails_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    model = Mixed()
    ruined = False

    def loss_fn(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target) * (math.nan if ruined else 1.0)

    engine = attached(model, sgd(model), Budget(macs=0.5, schedule=Schedule(count=2)), 10, loss_fn=loss_fn)
    train(engine, 4)
    before, state = bits(model), torch.get_rng_state()
    ruined = True
    widths, count = engine.widths, len(engine.history)
    with pytest.raises(FloatingPointError, match="diverged"):
        engine.review()
    assert bits(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert engine.widths == widths
    assert len(engine.history) == count
    ruined = False
    assert engine.review().macs == engine.macs


# ----------------------------------------------------------------------------------------- gradients, graphs, followers


def test_gradients_are_dropped_only_where_shapes_change() -> None:
    torch.manual_seed(0)
    model = resnet()
    plan = {"stem.conv": IndexMap.removing([1], 8)}
    engine = attached(model, sgd(model), Looks(plans={0: plan}), 10)
    assert "stem.conv" in engine.widths, engine.widths
    F.cross_entropy(model(looked_at()[0][0]), looked_at()[0][1]).backward()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    engine.review()
    dropped = {name for name, p in model.named_parameters() if p.grad is None}
    assert dropped == {name for name, p in model.named_parameters() if p.shape != shapes[name]}
    assert dropped
    for name, parameter in model.named_parameters():
        if name not in dropped:
            assert parameter.grad is gradients[name]


def test_a_loss_that_is_still_held_does_no_harm() -> None:
    """The graph of the step before keeps the old gradient accumulators alive."""
    torch.manual_seed(0)
    model = Mixed()
    optimizer = sgd(model)
    engine = attached(model, optimizer, Looks(plans={0: {"join": IndexMap.removing([0, 3], 8).inserting(1)}}), 10)
    engine.model.train()
    held = step(model, [optimizer], looked_at()[0])
    assert engine.step() is None
    held = step(model, [optimizer], looked_at()[1])
    assert engine.step() is not None
    again = step(model, [optimizer], looked_at()[2])
    assert math.isfinite(float(again.detach()))
    assert math.isfinite(float(held.detach()))


def test_an_average_of_the_weights_stays_in_step() -> None:
    """Followers take the same index maps; what survives keeps its averaged content, and averaging goes on."""
    torch.manual_seed(0)
    model = Mixed()
    optimizer = sgd(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    engine = attached(
        model,
        optimizer,
        Budget(macs=0.7, schedule=Schedule(count=3, begin=0.2), limits=Limits(offer=0.15)),
        12,
        followers=[average],
    )
    model.train()
    for batch in list(images().training_batches(32, seed=1))[:12]:
        step(model, [optimizer], batch)
        average.update_parameters(model)
        old = {name: tensor.clone() for name, tensor in average.module.state_dict().items()}
        old_map = engine.channel_map
        event = engine.step()
        if event is None:
            continue
        gathers = old_map.gathers(event.maps)
        thinned = [old_map.group(name) for name, index_map in event.maps.items() if index_map.removed]
        readers = {place.axis.name for group in thinned for place in group.with_role("read")}
        biases = {name.removesuffix("weight") + "bias" for name in readers}
        for name, tensor in average.module.state_dict().items():
            assert tensor.shape == model.state_dict()[name].shape
            if name in readers | biases:  # here the peers of what was removed have taken it over
                continue
            expected, kept = old[name], tensor
            for axis, source in gathers.items():
                if axis.name == name:
                    old_side = torch.as_tensor(source)
                    expected = expected.index_select(axis.dim, old_side[old_side >= 0])
                    kept = kept.index_select(axis.dim, torch.nonzero(old_side >= 0)[:, 0])
            assert torch.equal(kept, expected), name
    assert engine.history.removed_total
    assert torch.isfinite(average(looked_at()[0][0])).all()


def test_several_optimizers_and_a_plan_that_touches_only_one_of_them() -> None:
    """The bias of the head is never resized: its optimizer has nothing to do in any surgery."""
    torch.manual_seed(0)
    model = Mixed()
    rest = [p for p in model.parameters() if p is not model.head.bias]
    optimizers = [torch.optim.SGD(rest, lr=0.05, momentum=0.9), torch.optim.AdamW([model.head.bias], lr=1e-3)]
    engine = attached(model, optimizers, Budget(macs=0.5, schedule=Schedule(count=2, begin=0.2)), 8)
    losses, events = train(engine, 8)
    assert any(event.maps for event in events)
    assert all(torch.isfinite(loss) for loss in losses)
    for optimizer in optimizers:
        assert_state_fits(optimizer)


# ----------------------------------------------------------------------------------------------------------- newborns


def test_newborns_have_grace_until_their_reviews_are_over_wherever_they_move() -> None:
    plans = {
        0: {"join": IndexMap.identity(8).inserting(2)},
        1: {"join": IndexMap.removing([0, 1, 2], 10)},
        2: {"join": IndexMap.identity(7).inserting(1)},
    }
    model = Mixed()
    policy = Looks(plans=plans, grace=3)
    engine = attached(model, sgd(model), policy, 20)
    for _ in range(6):
        engine.review()
    seen = [next(report for report in situation.groups if report.name == "join") for situation in policy.seen]
    assert [report.width_start for report in seen] == [8] * 6
    assert [len(report.worth) for report in seen] == [8, 10, 7, 8, 8, 8]
    old, born = (False,), (True,)
    assert seen[0].grace == old * 8
    assert seen[1].grace == old * 8 + born * 2
    assert seen[2].grace == old * 5 + born * 2, "they moved up when others left"
    assert seen[3].grace == old * 7 + born, "those have grown up, another one is born"
    assert seen[4].grace == old * 7 + born
    assert seen[5].grace == old * 8


def test_fresh_channels_do_not_change_the_function() -> None:
    torch.manual_seed(0)
    model = Mixed()
    x = looked_at()[0][0]
    before = model.eval()(x).detach()
    engine = attached(model, sgd(model), Looks(plans={0: {"left": IndexMap.identity(6).inserting(3)}}), 4)
    event = engine.review()
    assert event.inserted == {"left": 3}
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert event.measured == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------------ precise norms


def test_precise_norms_hold_plain_averages_and_go_back_afterwards() -> None:
    """Mean of the batches' means and unbiased variances, as of a norm that has seen these batches alone."""
    torch.manual_seed(0)
    model = Mixed()
    train(attached(model, sgd(model), Never(), 3), 3)
    model.eval()
    before, modes = bits(model), [module.training for module in model.modules()]
    batches = looked_at()[:3]
    read = [model.left(x).detach().movedim(1, 0).flatten(1) for x, _ in batches]
    with precise_norms(model, batches, CE, among=set(model.modules())):
        torch.testing.assert_close(model.norm.running_mean, torch.stack([r.mean(1) for r in read]).mean(0))
        torch.testing.assert_close(model.norm.running_var, torch.stack([r.var(1) for r in read]).mean(0))
        assert not model.norm.training
    assert bits(model) == before
    assert [module.training for module in model.modules()] == modes
    assert model.norm.momentum == 0.1


def test_a_norm_that_the_user_keeps_in_evaluation_mode_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    kept = model[1].running_mean.clone()
    with precise_norms(
        model, [(torch.randn(8, 1, 8, 8) + 3, torch.zeros(8))], lambda net, batch: net(batch[0]).sum(), among={model[3]}
    ):
        assert torch.equal(model[1].running_mean, kept)
        assert not torch.equal(model[3].running_mean, kept)


def test_precise_norms_go_back_after_an_error() -> None:
    model = Mixed().eval()
    before = bits(model)
    with (
        pytest.raises(RuntimeError),
        precise_norms(model, [(torch.zeros(2, 3, 8, 8), torch.zeros(2))], CE, among=set(model.modules())),
    ):
        pass
    assert bits(model) == before
    assert model.norm.momentum == 0.1
    assert not model.norm.training


@pytest.mark.parametrize("lengths", [[5, 1], [1, 1]])
def test_a_norm_over_the_batch_survives_a_batch_of_one(lengths: list[int]) -> None:
    """As the last batch of a loader often is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    x, y = looked_at()[0]
    count = sum(lengths)
    probe = list(zip(x[:count].split(lengths), y[:count].split(lengths), strict=True))
    engine = attached(model, sgd(model), Budget(macs=0.5, schedule=Schedule(count=1)), 4, probe=probe)
    event = engine.step()
    assert event is not None
    assert event.loss is not None


# -------------------------------------------------------------------------------------------------------------- effort


def test_without_an_audit_the_criterion_stays_as_it_is() -> None:
    model = Mixed()
    for effort in (Effort(probe_samples=64, audit_samples=0), Effort(probe_samples=64, audit_filters=0)):
        engine = attached(model, sgd(model), Looks(), 4, effort=effort)
        untaught = engine.calibration
        event = engine.review()
        assert event.fidelity is None
        assert engine.calibration == untaught
        assert (event.measured is None) == (effort.audit_samples == 0)


def test_a_probe_too_short_for_an_audit_is_used_for_scoring() -> None:
    model = Mixed()
    event = attached(model, sgd(model), Budget(macs=0.5, schedule=Schedule(count=1)), 4, probe=looked_at()[:1]).step()
    assert event is not None
    assert event.loss is not None
    assert event.fidelity is None
    assert event.maps


@pytest.mark.parametrize(("probed", "audited"), [(64, 64), (100, 40), (128, 1), (30, 100)])
def test_a_review_looks_at_as_many_samples_as_its_effort_says(probed: int, audited: int) -> None:
    model = Mixed()
    engine = attached(model, sgd(model), Looks(), 4, effort=Effort(probe_samples=probed, audit_samples=audited))
    seen = engine._reviewer.look()
    scoring, held_out = seen.scoring, seen.held_out
    assert [sum(len(x) for x, _ in part) for part in (scoring, held_out)] == [probed, audited]
    assert all(len(x) == len(y) for x, y in scoring + held_out)
    scored, audited_on = ({bytes(x.numpy()) for batch, _ in part for x in batch} for part in (scoring, held_out))
    assert scored and audited_on and not scored & audited_on


def test_batches_that_cannot_be_cut_are_taken_whole() -> None:
    """A target that is not one tensor, as detectors have it."""
    model = Mixed()
    whole = [(x, {"label": y}) for x, y in looked_at()]
    engine = attached(
        model, sgd(model), Looks(), 4, probe=whole, loss_fn=lambda out, y: F.cross_entropy(out, y["label"]),
        effort=Effort(probe_samples=70, audit_samples=10, audit_filters=2),
    )  # fmt: skip
    seen = engine._reviewer.look()
    assert (len(seen.scoring), len(seen.held_out)) == (2, 1)
    assert engine.review().fidelity is not None


def test_the_policy_is_told_how_well_the_last_three_audits_were_foretold() -> None:
    torch.manual_seed(0)
    model = Mixed()
    policy = Looks()
    _, events = train(attached(model, sgd(model), policy, 10), 10)
    found = [event.fidelity.spearman for event in events if event.fidelity]
    assert len(found) == len(policy.seen) == 5 and None not in found
    for number, situation in enumerate(policy.seen):
        assert situation.agreement == pytest.approx(np.mean(found[max(number - 2, 0) : number + 1]))


def test_the_policy_is_told_the_loss_on_all_samples_of_the_review() -> None:
    torch.manual_seed(0)
    model, policy = Mixed(), Looks()
    engine = attached(model, sgd(model), policy, 10, effort=Effort(probe_samples=96, audit_samples=40, audit_filters=2))
    seen = engine._reviewer.look()
    scoring, held_out = seen.scoring, seen.held_out
    with quiet(model) as trained, precise_norms(model, scoring, CE, among=trained):
        expected = mean_loss(model, [*scoring, *held_out], CE)
    engine.review()
    assert policy.seen[0].loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("setting", [{"probe_samples": 0}, {"audit_samples": -1}, {"audit_filters": -1}])
def test_effort_out_of_range_is_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        Effort(**setting)


# -------------------------------------------------------------------------------------------------- errors at the door


def test_a_model_without_channel_groups_is_refused_with_the_reasons() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.only(x)

    model = Alone()
    with pytest.raises(NothingToResizeError, match=r"Alone has no channel group .*model output"):
        attached(model, sgd(model), Budget(macs=0.5), 10)


def test_a_foreign_optimizer_is_refused() -> None:
    model, other = Mixed(), Mixed()
    with pytest.raises(ForeignOptimizerError, match="SGD holds none"):
        attached(model, sgd(other), Budget(macs=0.5), 10)
    with pytest.raises(ForeignOptimizerError, match="no optimizer holds none"):
        attached(model, [], Budget(macs=0.5), 10)
    with pytest.raises(ForeignOptimizerError, match="AdamW"):
        attached(model, [sgd(model), adamw(other)], Budget(macs=0.5), 10)
    fixed = torch.optim.SGD([model.head.bias], lr=0.1)
    with pytest.raises(ForeignOptimizerError, match="would be resized"):
        attached(model, fixed, Budget(macs=0.5), 10)


def test_a_probe_without_data_is_refused() -> None:
    model = Mixed()
    with pytest.raises(ProbeError, match="no data"):
        attached(model, sgd(model), Budget(macs=0.5), 10, probe=[])
    attached(model, sgd(model), Never(), 10, probe=[])


@pytest.mark.parametrize("macs", [1e-4, 1e-3])
def test_an_impossible_budget_is_refused(macs: float) -> None:
    model = resnet()
    with pytest.raises(BudgetError, match="min_width"):
        attached(model, sgd(model), Budget(macs=macs), 10)


@pytest.mark.parametrize("total", [0, -5])
def test_a_run_without_steps_is_refused(total: int) -> None:
    model = Mixed()
    with pytest.raises(ValueError, match=f"total_steps={total}"):
        attached(model, sgd(model), Budget(macs=0.5), total)


def test_example_inputs_that_do_not_fit_are_refused() -> None:
    model = Mixed()
    with pytest.raises(TraceError, match="does not run on the example inputs"):
        AutoWidth(
            model,
            sgd(model),
            example_inputs=torch.zeros(1, 3, 8, 8),
            probe=looked_at(),
            loss_fn=F.cross_entropy,
            policy=Budget(macs=0.5),
            total_steps=10,
        )


@pytest.mark.parametrize("bad", ["optimizer", "budget", "probe"])
def test_a_refusal_leaves_the_model_as_it_was(bad: str) -> None:
    torch.manual_seed(0)
    model, other = Mixed(), Mixed()
    model.norm.eval()
    before, modes, state = bits(model), [m.training for m in model.modules()], torch.get_rng_state()
    with pytest.raises(ValueError):
        attached(
            model,
            sgd(other if bad == "optimizer" else model),
            Budget(macs=1e-4 if bad == "budget" else 0.5),
            10,
            probe=[] if bad == "probe" else shuffled(),
        )
    assert bits(model) == before
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------------- resize_


def test_resize_takes_one_optimizer_or_several_and_returns_the_new_map() -> None:
    for several in (False, True):
        model = Mixed()
        optimizer = sgd(model)
        step(model.train(), [optimizer], looked_at()[0])
        found = resize_(
            model,
            {"join": IndexMap.removing([2], 8), "left": IndexMap.identity(6).inserting(1)},
            example_inputs=IMAGE,
            optimizer=[optimizer] if several else optimizer,
        )
        assert found.widths == trace(model, IMAGE).widths == {"left": 7, "right": 5, "join": 7}
        assert_state_fits(optimizer)


def test_resize_without_effect_warns() -> None:
    with pytest.warns(UserWarning, match="changes nothing"):
        resize_(Mixed(), {"join": IndexMap.identity(8)}, example_inputs=IMAGE)


# ------------------------------------------------------------------------------------------------- plans that cost much


@dataclass(frozen=True)
class Timid(Looks):
    """Bears nothing: every plan that raises the loss at all is carried out by half."""

    def decide(self, situation: Situation) -> Decision:
        return replace(Looks.decide(self, situation), max_rise=-math.inf)


def test_a_plan_that_costs_too_much_is_carried_out_by_half_and_the_event_says_so() -> None:
    torch.manual_seed(0)
    model = Mixed()
    width = attached(model, sgd(model), Never(), 8).widths["left"]
    plan = {"left": IndexMap.removing(range(4), width).inserting(1)}
    engine = attached(model, sgd(model), Timid(plans={0: plan}), 8)
    _, events = train(engine, 2)
    assert engine.widths["left"] == width - 2
    assert events[-1].removed == {"left": 2}
    assert "half of it was made" in events[-1].notes[0]


def test_what_is_measured_before_surgery_is_what_surgery_does() -> None:
    """The trial by stand-in weights and the network after surgery give the same loss on the audit samples."""
    torch.manual_seed(0)
    model = Mixed().train()
    width = attached(model, sgd(model), Never(), 8).widths["left"]
    engine = attached(model, sgd(model), Looks(plans={0: {"left": IndexMap.removing([1, 3], width)}}), 8)
    seen = engine._reviewer.look()
    scoring, held_out = seen.scoring, seen.held_out
    old = copy.deepcopy(model)
    event = engine.review()

    def settled_loss(network: nn.Module) -> float:
        with quiet(network) as trained, precise_norms(network, scoring, CE, among=trained):
            return mean_loss(network, held_out, CE)

    assert event.measured == pytest.approx(settled_loss(model) - settled_loss(old), abs=1e-6)
    assert abs(event.measured) > 1e-4
    with quiet(model):  # after surgery the settled statistics stay
        assert mean_loss(model, held_out, CE) == pytest.approx(settled_loss(model), rel=1e-6)


# ------------------------------------------------------------------------------------------------- leaving together


def test_the_policy_is_told_what_the_weakest_filters_of_each_group_cost_together() -> None:
    """Against removal by hand on a copy in training mode, whose norms take the statistics of the batch."""
    torch.manual_seed(0)
    model = Mixed()
    engine = attached(model, sgd(model), Looks(trial_share=0.5), 10, reconstruct=False)
    train(engine, 1)
    before = copy.deepcopy(model.state_dict())
    engine.review()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), (
        "a trial leaves no trace"
    )
    (inputs, target) = looked_at()[1]
    (situation,) = engine.policy.seen  # type: ignore[attr-defined]
    for report in situation.groups:
        count, rise = report.together
        assert count == round(0.5 * len(report.worth))
        assert report.judged[:count] == tuple(int(c) for c in np.argsort(report.worth, kind="stable")[:count])
        cut = copy.deepcopy(model)
        for module in cut.modules():
            module.training = isinstance(module, nn.BatchNorm2d)
        with torch.no_grad():
            whole = F.cross_entropy(cut(inputs), target)
            weights = {**dict(cut.named_parameters()), **dict(cut.named_buffers())}
            for place in engine.channel_map.group(report.name).with_role("read"):
                for channel in report.judged[:count]:
                    for position in place.index[channel]:
                        weights[place.axis.name].select(place.axis.dim, position).zero_()
            assert rise == pytest.approx(float(F.cross_entropy(cut(inputs), target) - whole), abs=1e-5)


def test_norms_under_batch_statistics_keep_their_own() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model.eval()
    x = torch.randn(8, 1, 5, 5) * 3 + 1
    before = copy.deepcopy(model.state_dict())
    with batch_norms(model, among=[model[1]]):
        y = model[1](model[0](x))
        assert y.mean().item() == pytest.approx(0, abs=1e-5)
        assert y.std().item() == pytest.approx(1, abs=0.05)
        assert not model[2].training, "a norm that is not trained is left alone"
        model(x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model[1].training and model[1].momentum == 0.1
