"""Passes that differ in a few weights: the same losses to the last bit, with less work, whatever a model does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autowidth.lab.models import build
from autowidth.review import replay
from autowidth.review.batches import mean_loss, of_pairs
from autowidth.review.replay import LostError, Recording, mean_losses
from autowidth.review.state import named_tensors, swapped

CE = of_pairs(F.cross_entropy)

FEW = 4
"""About so many weights of a network are changed in turn."""


def data(shape: tuple[int, ...] = (3, 8, 8), sizes: tuple[int, ...] = (5, 3)) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(0)
    return [(torch.randn(n, *shape, generator=source), torch.arange(n) % 10) for n in sizes]


def changed(model: nn.Module) -> list[dict[str, Tensor]]:
    """Nothing; every weight in turn, a tenth less of it; two weights at once."""
    weights = {name: p.detach() * 0.9 for name, p in model.named_parameters()}
    first, *_, last = weights
    return [
        {},
        *({name: content} for name, content in weights.items()),
        {name: weights[name] for name in (first, last)},
    ]


def slowly(model: nn.Module, batches: Any, others: list[dict[str, Tensor]]) -> list[float]:
    found = []
    for other in others:
        with swapped(model, other):
            found.append(mean_loss(model, batches, CE))
    return found


class Counting(TorchFunctionMode):
    """How many convolutions and linear layers are worked out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (F.conv2d, F.linear)
        return func(*args, **(kwargs or {}))


# ---- models that bear it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "training"),
    [("densenet22", True), ("googlenet", True), ("mobilenetv2", False), ("resnet20-padding", True), ("vgg8", False)],
)
def test_losses_are_those_of_plain_passes(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = build(name, width=0.25).train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
        if isinstance(module, nn.Dropout):
            module.eval()
    others = changed(model)
    before = copy.deepcopy(model.state_dict())
    assert mean_losses(model, data(), CE, others) == slowly(model, data(), others)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "num_batches" not in key)


def test_what_comes_before_a_change_is_not_worked_out_again() -> None:
    model = build("vgg8", width=0.25).eval()
    weights = [name for name, p in model.named_parameters() if p.dim() > 1]
    others = [{name: named_tensors(model)[name] * 0.5} for name in weights]
    with Counting() as counting:
        mean_losses(model, data(sizes=(4,)), CE, others)
    layers = len(weights)
    assert counting.count == 2 * layers + layers * (layers + 1) // 2  # plain, recorded, and from each layer to the last


class Odd(nn.Module):
    """Parts that a test puts together."""

    def __init__(self, forward: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 10)
        self.forwarded = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.forwarded(self, x).mean((2, 3)))  # type: ignore[no-any-return]


def in_place_by_keyword(model: Odd, x: Tensor) -> Tensor:
    return F.relu(model.b(F.relu(model.a(x), inplace=True)), inplace=True)


def in_place_sum(model: Odd, x: Tensor) -> Tensor:
    y = model.a(x)
    z = model.b(y)
    z += y
    z *= 2
    return z


def in_place_by_name(model: Odd, x: Tensor) -> Tensor:
    y = model.a(x)
    y.relu_()
    return model.b(y).clamp_(min=-1)


def written_by_index(model: Odd, x: Tensor) -> Tensor:
    y = model.a(x)
    y[:, 0] = 0
    return model.b(y)


def read_by_its_old_name(model: Odd, x: Tensor) -> Tensor:
    y = model.a(x)
    old = y
    y += 1
    return model.b(y) + old


def a_sum_thrown_away(model: Odd, x: Tensor) -> Tensor:
    y = model.a(x)
    y.add_(1)
    return model.b(y)


def another_way(model: Odd, x: Tensor) -> Tensor:
    y = model.a(x)
    return model.b(y) if y.sum() > 0 else model.b(model.b(y))


def the_input_written_to(model: Odd, x: Tensor) -> Tensor:
    return model.b(model.a(x.clone().sub_(0.5)))


def through_a_view(model: Odd, x: Tensor) -> Tensor:
    y = model.a(x)
    y.view(-1)[:3] = 7
    return model.b(y.flatten(2).unflatten(2, x.shape[2:]))


ODD = [
    in_place_by_keyword, in_place_sum, in_place_by_name, written_by_index, read_by_its_old_name, a_sum_thrown_away,
    another_way, the_input_written_to, through_a_view,
]  # fmt: skip


@pytest.mark.parametrize("forward", ODD, ids=[forward.__name__ for forward in ODD])
def test_whatever_a_model_does_the_losses_are_right(forward: Callable[[Odd, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Odd(forward).eval()
    others = changed(model)
    assert mean_losses(model, data(), CE, others) == slowly(model, data(), others)


@pytest.mark.parametrize("forward", [in_place_by_keyword, in_place_sum], ids=["keyword", "sum"])
def test_usual_ways_to_work_in_place_are_spared_too(forward: Callable[[Odd, Tensor], Tensor]) -> None:
    model = Odd(forward).eval()
    others = [{"c.bias": torch.ones(10) * n} for n in range(4)]
    with Counting() as counting:
        mean_losses(model, data(sizes=(4,)), CE, others)
    assert counting.count == 3 + 3 + 4


def test_a_model_that_does_not_bear_it_is_asked_plainly() -> None:
    model = Odd(read_by_its_old_name).eval()
    others = [{"c.bias": torch.ones(10) * n} for n in range(4)]
    with Counting() as counting:
        mean_losses(model, data(sizes=(4,)), CE, others)
    assert counting.count == 3 + 3 + 4 * 3


def test_a_shared_weight_is_seen_wherever_it_is_used() -> None:
    model = Odd(another_way).eval()
    model.b.weight.data *= 3
    others = [{"b.weight": model.b.weight.detach() * factor} for factor in (0.1, 0.5, -1.0, 2.0)]
    assert mean_losses(model, data(), CE, others) == slowly(model, data(), others)


def test_few_trials_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd(in_place_sum).eval()
    monkeypatch.setattr(replay, "Recording", None)
    others = [{}, {"a.bias": torch.ones(6)}, {"b.bias": torch.ones(6)}]
    assert mean_losses(model, data(), CE, others) == slowly(model, data(), others)


def recording(model: nn.Module, x: Tensor, trials: list[list[Tensor]]) -> Recording:
    """The pass of a model, recorded for trials that change these weights."""
    with torch.no_grad(), Recording(named_tensors(model).values(), trials) as recorded:
        model(x).sum().item()
    return recorded


def test_a_recording_repeats_what_it_returned_where_nothing_changed() -> None:
    model, ((x, _), *_) = Odd(in_place_sum).eval(), data()
    recorded = recording(model, x, [[]])
    with torch.no_grad(), recorded.again(0), Counting() as counting:
        again = model(x).sum().item()
    assert counting.count == 3 and not recorded.held  # the calls come by, and none of them is made
    assert again == model(x).sum().item()


def test_what_reads_an_attribute_is_the_recorded_call_too() -> None:
    model, ((x, _), *_) = Odd(lambda net, x: net.b(net.a(x).view(x.shape[0], -1, *x.shape[2:]))).eval(), data()
    recorded = recording(model, x, [[model.c.bias]])
    with torch.no_grad(), recorded.again(0), Counting() as counting:
        model(x).sum().item()
    network = build("resnet20-padding").eval()
    weights = [p for name, p in network.named_parameters() if name.endswith("second.conv.weight")]
    images = torch.randn(2, 3, 16, 16)
    again = recording(network, images, [[weight] for weight in weights])
    for trial in range(len(weights)):
        with torch.no_grad(), again.again(trial):
            network(images).sum().item()  # raises LostError where padding shortcuts ask for shapes
    assert counting.count == 3


def test_other_inputs_are_worked_out_anew() -> None:
    model, ((x, _), *_) = Odd(in_place_sum).eval(), data()
    recorded = recording(model, x, [[]])
    with torch.no_grad(), recorded.again(0):
        assert model(x * 2).sum().item() != model(x).sum().item()


def test_what_no_trial_reads_is_not_held() -> None:
    model, x = build("resnet20-padding").eval(), torch.randn(4, 3, 16, 16)
    weights = {name: p for name, p in model.named_parameters() if name.endswith("second.conv.weight")}
    everything = Held()
    with torch.no_grad(), everything:
        model(x)
    recorded = recording(model, x, [[weight] for weight in weights.values()])
    held = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t, _ in recorded.held.values()}
    assert 0 < sum(held.values()) < 0.4 * everything.bytes
    last = recording(model, x, [[weights[list(weights)[-1]]]])
    assert len(last.held) == 2  # the input of the last convolution, and the stream around it


class Held(TorchFunctionMode):
    """The bytes of everything that calls return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not isinstance(out, nn.Parameter):
            self.bytes += out.numel() * out.element_size()
        return out


def test_a_pass_that_wants_what_was_dropped_says_so() -> None:
    model, ((x, _), *_) = Odd(in_place_sum).eval(), data()
    recorded = recording(model, x, [[model.c.bias]])
    with torch.no_grad(), recorded.again(0), pytest.raises(LostError):
        (model.a(x) * 3).sum().item()


def test_what_is_held_is_not_returned_once_it_was_written_to() -> None:
    model, ((x, _), *_) = Odd(in_place_sum).eval(), data()
    recorded = recording(model, x, [[model.c.bias]])
    for tensor, _ in recorded.held.values():
        tensor.add_(1)
    with torch.no_grad(), recorded.again(0), pytest.raises(LostError):
        model(x).sum().item()


def test_a_pass_that_writes_in_place_cannot_be_taken_up() -> None:
    ((x, _), *_) = data()
    assert recording(Odd(written_by_index).eval(), x, [[]]).is_spoilt
    assert recording(Odd(through_a_view).eval(), x, [[]]).is_spoilt
    assert not recording(Odd(in_place_sum).eval(), x, [[]]).is_spoilt
