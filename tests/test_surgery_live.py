"""Surgery on what is alive: optimizer state, hooks, references, graphs, followers, memory formats."""

from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autowidth.channels import FRESH, ChannelGroup, ChannelMap, IndexMap
from autowidth.surgery import apply_
from surgery_nets import (
    Build,
    Net,
    adam,
    any_net,
    any_optimizer,
    attributes,
    carried,
    chain,
    contents,
    depthwise,
    grouped,
    make,
    net,
    perceptron,
    place,
    shapes_of,
    tensors_of,
    train,
    transposed,
    wild_plan,
)

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------- optimizer state


FIRST_MOMENTS = {"momentum_buffer", "exp_avg", "grad_avg", "prev"}
COUNTERS = {"step", "eta", "mu", "mu_product"}


@any_optimizer
def test_fresh_state_rests_or_has_its_siblings_mean(kind: str) -> None:
    net = chain(4, 5)
    optimizer = make(kind, net.model)
    train(net, optimizer, 3)
    weight = net.model.conv1.weight
    old = {k: torch.as_tensor(v).clone() for k, v in optimizer.state[weight].items()}
    apply_(net.model, net.map, {"a": IndexMap((0, FRESH, 1, 3), 4)}, optimizers=[optimizer])
    for key, value in optimizer.state[weight].items():
        if key in COUNTERS:
            assert torch.equal(torch.as_tensor(value), old[key])
            continue
        assert torch.equal(value[[0, 2, 3]], old[key][[0, 1, 3]])
        if key in FIRST_MOMENTS:
            assert value[1].eq(0).all()
        elif key == "ax":
            assert torch.equal(value[1], weight[1])
        else:
            torch.testing.assert_close(value[1], old[key][[0, 1, 3]].mean(0))
    train(net, optimizer, 2)
    assert all(np.isfinite(v).all() for v in contents(net.model, optimizer).values())


def test_first_update_of_a_newborn_does_not_explode() -> None:
    """With zeros as second moments it would be about sqrt(1 / (1 - beta2)) = 30 times that of its siblings."""
    net = chain(4, 5)
    optimizer = torch.optim.Adam(net.model.parameters(), lr=1e-3)
    train(net, optimizer, 200)
    apply_(net.model, net.map, {"a": IndexMap.identity(4).inserting(1)}, optimizers=[optimizer])
    fan_out = net.model.conv2.weight[:, 4]
    train(net, optimizer, 1)
    assert 0 < fan_out.abs().max() < 3e-3


def test_factored_state_of_adafactor_is_not_moved_along_what_it_averages() -> None:
    net = perceptron(4, 5)
    optimizer = torch.optim.Adafactor(net.model.parameters())
    train(net, optimizer, 2)
    state = optimizer.state[net.model.fc2.weight]
    rows, cols = state["row_var"].clone(), state["col_var"].clone()
    apply_(net.model, net.map, {"a": IndexMap((3, 1), 4), "b": IndexMap((4, 0, 2), 5)}, optimizers=[optimizer])
    state = optimizer.state[net.model.fc2.weight]
    assert torch.equal(state["row_var"], rows[[4, 0, 2]]) and torch.equal(state["col_var"], cols[:, [3, 1]])
    train(net, optimizer, 2)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is there since torch 2.9")
def test_muon_trains_on() -> None:
    net = perceptron(4, 5)
    matrices = [p for p in net.model.parameters() if p.dim() == 2]
    vectors = [p for p in net.model.parameters() if p.dim() == 1]
    muon, sgd = torch.optim.Muon(matrices, lr=0.01), torch.optim.SGD(vectors, lr=0.01, momentum=0.9)
    train(net, muon, 2)
    momentum = muon.state[net.model.fc2.weight]["momentum_buffer"]
    old = momentum.clone()
    apply_(net.model, net.map, {"a": IndexMap((0, 3, FRESH), 4)}, optimizers=[muon, sgd])
    assert torch.equal(momentum[:, :2], old[:, [0, 3]]) and momentum[:, 2].eq(0).all()
    train(net, muon, 2)


def test_sparse_adam_trains_on() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 3)).double()
    places = (place("0.weight", 1, "write", 4), place("1.weight", 1, "read", 4))
    groups = (ChannelGroup("g", places),)
    net = Net(model, ChannelMap(groups=groups, frozen=(), uses=(), shapes=shapes_of(model)), torch.arange(6))
    sparse = torch.optim.SparseAdam(model[0].parameters())

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(net.x), net.x % 3).backward()
        sparse.step()

    step()
    old = sparse.state[model[0].weight]["exp_avg"].clone()
    apply_(model, net.map, {"g": IndexMap((1, 2, FRESH), 4)}, optimizers=[sparse])
    assert torch.equal(sparse.state[model[0].weight]["exp_avg"][:, :2], old[:, [1, 2]])
    step()
    assert sparse.state[model[0].weight]["step"] == 2


# ------------------------------------------------------------------------------------------------------ live objects


@any_net
def test_objects_hooks_and_weak_references_survive(build: Build) -> None:
    net = build(4, 5)
    optimizer = adam(net.model)
    train(net, optimizer, 1)
    objects = {name: id(t) for name, t in tensors_of(net.model).items()}
    refs = [weakref.ref(p) for p in net.model.parameters()]
    seen: list[tuple[torch.Size, torch.Size]] = []
    accumulated: list[torch.Size] = []
    for p in net.model.parameters():
        p.register_hook(lambda grad, p=p: seen.append((grad.shape, p.shape)))
        p.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.shape))
    apply_(net.model, net.map, wild_plan(net), optimizers=[optimizer])
    touched = {axis.name for group in net.map.groups for axis in group.axes}
    assert all((p.grad is None) == (name in touched) for name, p in net.model.named_parameters())
    train(net, optimizer, 1)
    assert objects == {name: id(t) for name, t in tensors_of(net.model).items()}
    assert len(seen) == len(refs) == len(accumulated) and all(grad == p for grad, p in seen)
    assert all(ref() is p for ref, p in zip(refs, net.model.parameters(), strict=True))


@any_net
def test_old_loss_still_held_does_no_harm(build: Build) -> None:
    net = build(4, 5)
    optimizer = adam(net.model)
    train(net, optimizer, 1)
    old_loss = net.model(net.x).sum()
    new_map = apply_(net.model, net.map, wild_plan(net), optimizers=[optimizer])
    train(net, optimizer, 1)  # with the old graph alive
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"size|inplace"):  # its weights are gone: it says so, leaves no gradient
        old_loss.backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in net.model.parameters())
    train(net, optimizer, 1)
    for name, p in net.model.named_parameters():
        assert tuple(p.grad.shape) == tuple(p.shape) == new_map.shapes[name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradient_accumulator_of_the_old_shape_is_forgotten(dtype: torch.dtype) -> None:
    net = perceptron(4, 5)
    net.model.to(dtype)
    x = net.x.to(dtype)
    old_loss = net.model(x).sum()
    apply_(net.model, net.map, wild_plan(net))
    net.model(x).sum().backward()
    assert old_loss.grad_fn is not None
    assert all(p.grad.shape == p.shape for p in net.model.parameters())


def test_scheduler_and_param_groups_go_on() -> None:
    net = chain(4, 5)
    decayed = [p for p in net.model.parameters() if p.dim() > 1]
    others = [p for p in net.model.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(net, optimizer, 1)
    scheduler.step()
    apply_(net.model, net.map, wild_plan(net), optimizers=[optimizer])
    train(net, optimizer, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], decayed, strict=True))


def test_optimizer_named_twice_is_resized_once() -> None:
    net = chain(4, 5)
    optimizer = adam(net.model)
    train(net, optimizer, 1)
    old = optimizer.state[net.model.conv1.weight]["exp_avg"].clone()
    apply_(net.model, net.map, {"a": IndexMap((3, 2, 1, 0), 4)}, optimizers=[optimizer, optimizer])
    assert torch.equal(optimizer.state[net.model.conv1.weight]["exp_avg"], old.flip(0))


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.again, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
            self.again.weight = self.enter.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.enter(x)) + F.relu(self.again(x)))

    places = [place("enter.weight", 0, "write", 6), place("head.weight", 1, "read", 6)]
    places += carried("enter", "bias", 6) + carried("again", "bias", 6)
    net_ = net(Tied(), torch.randn(5, 4), g=places)
    apply_(net_.model, net_.map, {"g": IndexMap.removing([2], 6)})
    assert net_.model.again.weight is net_.model.enter.weight and net_.model.again.out_features == 5
    assert net_.model(net_.x).shape == (5, 3)


@any_net
def test_followers_share_the_fresh_content_and_keep_their_own(build: Build) -> None:
    net = build(4, 5)
    optimizer = adam(net.model)
    train(net, optimizer, 1)
    ema = AveragedModel(net.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    plain = copy.deepcopy(net.model)
    train(net, optimizer, 2)
    ema.update_parameters(net.model)
    alone = copy.deepcopy(ema.module)
    plan, seed = wild_plan(net), torch.Generator().manual_seed(3)
    apply_(net.model, net.map, plan, optimizers=[optimizer], followers=[ema, plain], generator=seed)
    apply_(alone, net.map, plan)
    fresh = {name: t.clone() for name, t in tensors_of(net.model).items()}
    gathers = net.map.gathers(plan)
    for name, t in tensors_of(ema.module).items():
        mask = torch.zeros(t.shape, dtype=torch.bool)
        for axis, source in gathers.items():
            if axis.name == name:
                mask.index_fill_(axis.dim, torch.tensor(np.flatnonzero(source < 0)), True)
        assert torch.equal(t[mask], fresh[name][mask]), name
        assert torch.equal(t[~mask], tensors_of(alone)[name][~mask]), name
    assert attributes(ema.module) == attributes(net.model) == attributes(plain)
    train(net, optimizer, 1)
    ema.update_parameters(net.model)
    assert ema.eval()(net.x).shape == plain.eval()(net.x).shape == (8, 3)


@pytest.mark.parametrize("build", [chain, depthwise, grouped, transposed])
def test_memory_format_stays(build: Build) -> None:
    net = build(4, 5)
    net.model.to(memory_format=torch.channels_last)
    optimizer = adam(net.model)
    train(net, optimizer, 1)
    before = {k: id(v) for k, v in optimizer.state.items()}
    wild = wild_plan(net)
    wanted = build(6, 6).model.to(memory_format=torch.channels_last)
    apply_(net.model, net.map, wild, optimizers=[optimizer])
    for (name, p), q in zip(net.model.named_parameters(), wanted.parameters(), strict=True):
        assert p.stride() == q.stride(), name
        assert optimizer.state[p]["exp_avg"].stride() == q.stride(), name
    assert before == {k: id(v) for k, v in optimizer.state.items()}


@any_net
def test_plain_memory_format_stays(build: Build) -> None:
    net = build(4, 5)
    apply_(net.model, net.map, wild_plan(net))
    assert all(t.stride() == torch.empty(t.shape).stride() for t in tensors_of(net.model).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_requires_grad_stay(dtype: torch.dtype) -> None:
    net = chain(4, 5)
    net.model.to(dtype)
    net.model.conv1.weight.requires_grad_(False)
    before = {name: (t.dtype, t.requires_grad) for name, t in tensors_of(net.model).items()}
    apply_(net.model, net.map, wild_plan(net))
    assert before == {name: (t.dtype, t.requires_grad) for name, t in tensors_of(net.model).items()}
    assert all(t.isfinite().all() for t in tensors_of(net.model).values())


@any_net
def test_meta_tensors_can_be_resized(build: Build) -> None:
    net = build(4, 5)
    net.model.to("meta")
    random_state = torch.get_rng_state()
    new_map = apply_(net.model, net.map, wild_plan(net))
    assert torch.equal(random_state, torch.get_rng_state())  # a rehearsal costs the run no random number
    assert shapes_of(net.model) == new_map.shapes == shapes_of(build(6, 6).model)
    assert all(t.is_meta for t in tensors_of(net.model).values())
    assert net.model.eval()(net.x.to("meta")).shape == (8, 3)


def test_looking_at_a_spectral_norm_does_not_change_it() -> None:
    """Its weight is computed by a power iteration, which in training mode writes its buffers at every look."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), spectral_norm(nn.Linear(6, 3))).double().train()
    places = [place("0.weight", 0, "write", 6), *carried("0", "bias", 6)]
    places += [place("2.parametrizations.weight.original", 1, "read", 6)]
    places += [place("2.parametrizations.weight.0._v", 0, "carry", 6)]
    net_ = ChannelMap(groups=(ChannelGroup("g", tuple(places)),), frozen=(), uses=(), shapes=shapes_of(model))
    u, v = (b.clone() for _, b in sorted(model.named_buffers()))
    apply_(model, net_, {"g": IndexMap.removing([4], 6)})
    buffers = dict(model.named_buffers())
    assert torch.equal(buffers["2.parametrizations.weight.0._u"], u)
    assert torch.equal(buffers["2.parametrizations.weight.0._v"], v[[0, 1, 2, 3, 5]])
    assert model[2].in_features == 5 and model[2].parametrizations.weight.training


def test_masks_of_torch_prune_follow() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    places = [place(f"0.{n}", 0, "write", 6) for n in ("weight_orig", "weight_mask", "bias")]
    places += [place("2.weight", 1, "read", 6)]
    net_ = ChannelMap(groups=(ChannelGroup("g", tuple(places)),), frozen=(), uses=(), shapes=shapes_of(model))
    apply_(model, net_, {"g": IndexMap.removing([0], 6)})
    assert model[0].out_features == 5 and model(torch.randn(2, 4).double()).shape == (2, 3)
