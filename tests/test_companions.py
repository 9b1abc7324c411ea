"""What lives beside a model while it is resized: followers, scalers, schedulers, hooks, other optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autowidth import Effort
from autowidth.channels import FRESH, IndexMap
from autowidth.engine import AutoWidth, resize_
from autowidth.policy import Budget
from autowidth.trace import trace
from nets import conv, example

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
X, Y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
WILD = IndexMap((2, 0, FRESH, 3, 3), 4)


def plain() -> nn.Module:
    """The net `Plain` in training mode: groups conv1 of 4 and conv2 of 5 channels."""
    return example("Plain").model.train()


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Tensor:
    """One training step; the loss, with its graph."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = F.cross_entropy(model(X), Y)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss


def fits(model: nn.Module, *optimizers: torch.optim.Optimizer) -> bool:
    """Whether every state tensor that is no scalar has its parameter's shape."""
    states = [(p, s) for o in optimizers for p, state in o.state.items() for s in state.values()]
    return all(s.shape == p.shape for p, s in states if isinstance(s, Tensor) and s.dim() > 0)


# ---- averages of the weights -----------------------------------------------------------------------------------------


def test_an_average_follows_the_engine_through_its_reviews() -> None:
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    engine = AutoWidth(
        model, optimizer, example_inputs=X, probe=[(X, Y)] * 4, loss_fn=F.cross_entropy, policy=Budget(macs=0.6),
        total_steps=60, followers=[ema], effort=Effort(probe_samples=16, audit_samples=8, audit_filters=2),
    )  # fmt: skip
    before = engine.macs
    resized = 0
    for _ in range(60):
        last = step(model, optimizer)  # held while the widths change
        ema.update_parameters(model)
        event = engine.step()
        if event is not None and any(not m.is_identity for m in event.maps.values()):
            resized += 1
            fixed = {n: t.clone() for n, t in ema.module.state_dict().items()}
            assert {n: t.shape for n, t in fixed.items()} == {n: t.shape for n, t in model.state_dict().items()}
            with torch.no_grad():
                assert ema.eval()(X).isfinite().all()
        assert last.isfinite()
    assert resized > 0
    assert engine.macs < before
    assert fits(model, optimizer)
    # An average that had been left behind could not be updated; one that is followed converges to a model that rests.
    for _ in range(40):
        ema.update_parameters(model)
    for (name, mine), theirs in zip(model.named_parameters(), ema.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


# ---- scalers, schedulers, hooks --------------------------------------------------------------------------------------


def test_a_gradient_scaler_goes_on() -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)

    def scaled(inputs: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), Y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    scaled(X)
    resize_(model, {"conv1": WILD}, example_inputs=X, optimizer=optimizer)
    weights = [p.detach().clone() for p in model.parameters()]
    old = scaled(X)
    assert scaler.get_scale() == 2.0**17
    assert all(not torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True) if p.dim() > 1)
    weights = [p.detach().clone() for p in model.parameters()]
    scaled(X * torch.inf)  # an overflow skips the step, in resized parameters too
    assert scaler.get_scale() == 2.0**16
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert old.isfinite()


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=10),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [3]
        ),
    ],
)
def test_schedules_are_those_of_a_run_without_surgery(make: Callable[[Any], Any]) -> None:
    rates = []
    for surgery in (True, False):
        model = plain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = make(optimizer)
        rates.append([])
        for i in range(8):
            if i == 4 and surgery:
                resize_(model, {"conv1": WILD}, example_inputs=X, optimizer=optimizer)
            step(model, optimizer)
            scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
            rates[-1].append([group["lr"] for group in optimizer.param_groups])
    assert rates[0] == rates[1]
    assert rates[0][0] != rates[0][-1]


def test_forward_and_backward_hooks_see_the_new_widths() -> None:
    model = plain()
    seen: dict[str, list[int]] = {"pre": [], "out": [], "back": []}
    layer = model.get_submodule("conv2")
    layer.register_forward_pre_hook(lambda _, args: seen["pre"].append(args[0].size(1)))
    layer.register_forward_hook(lambda _, args, out: seen["out"].append(out.size(1)))
    layer.register_full_backward_hook(lambda _, before, after: seen["back"].append(before[0].size(1)))
    step(model)
    calls = {key: len(values) for key, values in seen.items()}
    resize_(model, {"conv1": WILD, "conv2": IndexMap.removing([1], 5)}, example_inputs=X)
    assert calls == {"pre": 1, "out": 1, "back": 1}
    step(model)
    assert {key: values[-1] for key, values in seen.items()} == {"pre": 5, "out": 4, "back": 5}


def test_hooks_that_look_at_the_model_do_not_disturb_a_trace() -> None:
    model = plain()
    norms: list[float] = []
    model.get_submodule("conv1").register_forward_hook(lambda _, args, out: norms.append(float(out.norm())))
    assert trace(model, X).widths == {"conv1": 4, "conv2": 5}


# ---- parameters and optimizers of all kinds --------------------------------------------------------------------------


def test_frozen_parameters_are_resized_and_stay_frozen() -> None:
    model = plain()
    for p in model.get_submodule("conv1").parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    step(model, optimizer)
    resize_(model, {"conv1": WILD}, example_inputs=X, optimizer=optimizer)
    kept = model.get_submodule("conv1").weight.detach().clone()
    step(model, optimizer)
    assert kept.shape[0] == 5
    assert torch.equal(model.get_submodule("conv1").weight, kept)
    assert not model.get_submodule("conv1").weight.requires_grad
    assert model.get_submodule("conv1").weight.grad is None
    assert fits(model, optimizer)


def test_every_optimizer_of_several_and_every_group_of_one_follows() -> None:
    model = plain()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    first = torch.optim.SGD(
        [{"params": matrices[:1]}, {"params": matrices[1:], "lr": 0.01}], lr=0.1, momentum=0.9, nesterov=True
    )
    second = torch.optim.RMSprop(vectors, lr=0.01, centered=True, momentum=0.9)
    step(model, first, second)
    groups = [[id(p) for p in g["params"]] for o in (first, second) for g in o.param_groups]
    resize_(model, {"conv1": WILD, "conv2": IndexMap.removing([0], 5)}, example_inputs=X, optimizer=[first, second])
    assert groups == [[id(p) for p in g["params"]] for o in (first, second) for g in o.param_groups]
    assert fits(model, first, second)
    weights = [p.detach().clone() for p in model.parameters()]
    step(model, first, second)
    assert all(not torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


KINDS: dict[str, Make] = {
    "foreach adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "fused adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True, amsgrad=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "fused adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "rmsprop, one by one": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=False),
    "sgd without momentum": lambda p: torch.optim.SGD(p, lr=0.01),
    "adam that maximizes": lambda p: torch.optim.Adam(p, lr=0.001, maximize=True),
    "adam with a tensor as rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_variants_of_optimizers_step_like_the_plain_one_after_surgery(kind: str) -> None:
    """Resized between two steps, a variant ends where the same optimizer with loops over single tensors ends."""
    ends = []
    for variant in (True, False):
        model = plain()
        optimizer = KINDS[kind](list(model.parameters()))
        if not variant:
            for group in optimizer.param_groups:
                group["foreach"], group["fused"] = False, None
        step(model, optimizer)
        resize_(
            model, {"conv1": WILD}, example_inputs=X, optimizer=optimizer, generator=torch.Generator().manual_seed(1)
        )
        assert fits(model, optimizer)
        step(model, optimizer)
        # the gradient of a bias before a norm is noise around zero
        ends.append({n: p.detach().clone() for n, p in model.named_parameters() if n != "conv2.bias"})
    for name, a in ends[0].items():
        torch.testing.assert_close(a, ends[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_capturable_is_for_accelerators_and_its_step_count_stays() -> None:
    model = plain()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step(model, optimizer)
    for group in optimizer.param_groups:
        group["capturable"] = True  # torch itself refuses to step with it on a CPU
    resize_(model, {"conv1": WILD}, example_inputs=X, optimizer=optimizer)
    assert all(float(state["step"]) == 1.0 for state in optimizer.state.values())
    for group in optimizer.param_groups:
        group["capturable"] = False
    step(model, optimizer)


def test_state_that_is_missing_for_some_parameters_is_no_obstacle() -> None:
    model = plain()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    model.get_submodule("conv2")(torch.randn(2, 4, 8, 8)).sum().backward()  # only this layer has gradients
    optimizer.step()
    assert len(optimizer.state) == 2
    resize_(model, {"conv1": WILD, "conv2": IndexMap.removing([0], 5)}, example_inputs=X, optimizer=optimizer)
    assert len(optimizer.state) == 2
    assert fits(model, optimizer)
    step(model, optimizer)
    assert len(optimizer.state) == len(list(model.parameters()))


def test_a_loaded_state_follows() -> None:
    model = plain()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = torch.optim.Adam(model.parameters(), lr=0.01)
    fresh.load_state_dict(saved)
    resize_(model, {"conv1": WILD}, example_inputs=X, optimizer=fresh)
    assert fits(model, fresh)
    assert not fits(model, optimizer)  # nobody told the other one


def test_tied_layers_in_two_groups_of_an_optimizer_step_as_one() -> None:
    model = example("SharedWeight").model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step(model, optimizer)
    resize_(model, {"conv1": IndexMap.removing([1], 5).inserting(2)}, example_inputs=X, optimizer=optimizer)
    assert model.get_submodule("conv1").weight is model.get_submodule("conv2").weight
    assert model.get_submodule("conv1").out_channels == model.get_submodule("conv2").out_channels == 6
    step(model, optimizer)
    assert fits(model, optimizer)


def test_the_vectors_of_a_spectral_norm_follow_their_channels() -> None:
    """Channels that are zero on both sides are no part of the norm: without them the function is the same."""
    model, x, _ = example("SpectralNorm")
    first, second = (model.get_submodule(name) for name in ("conv1", "conv2"))
    gone = [1, 2]
    with torch.no_grad():
        for layer, dim in ((first, 0), (second, 1)):
            layer.parametrizations.weight.original.index_fill_(dim, torch.tensor(gone), 0.0)
        first.bias[gone] = 0.0
        first.parametrizations.weight[0]._u[gone] = 0.0
        second.parametrizations.weight[0]._v.view(4, 9)[gone] = 0.0
        before = model.eval()(x)
        resize_(model, {"conv1": IndexMap.removing(gone, 4)}, example_inputs=x)
        torch.testing.assert_close(model.eval()(x), before)
    assert conv(3, 2).weight.shape == first.weight.shape
