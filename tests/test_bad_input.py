"""What is wrong at the door is told in one sentence, before anything has changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth.channels import FRESH, IndexMap, ResizePlan, UnknownGroupError
from autowidth.engine import resize_
from autowidth.trace import TraceError, trace
from nets import conv, example

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PLAN: ResizePlan = {"conv1": IndexMap.removing([1], 4)}


class Patient(NamedTuple):
    """A model that is being trained, with the optimizer that has state."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def patient(name: str = "Plain") -> Patient:
    model = example(name).model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(X).sum().backward()
    optimizer.step()
    return Patient(model, optimizer)


def everything(who: Patient) -> list[Any]:
    """All of a patient that a surgery may touch, bit for bit and by identity."""
    found: list[Any] = [torch.get_rng_state().tolist()]
    for name, t in itertools.chain(who.model.named_parameters(), who.model.named_buffers()):
        grad = None if t.grad is None else t.grad.numpy().tobytes()
        found.append((name, id(t), t.shape, t.stride(), t._version, t.detach().numpy().tobytes(), grad))
    for state in who.optimizer.state.values():
        found += [(key, id(value), value.numpy().tobytes()) for key, value in state.items()]
    for path, module in who.model.named_modules():
        found += [(path, k, v) for k, v in vars(module).items() if isinstance(v, bool | int | float | tuple | str)]
    return found


def refused(who: Patient, plan: ResizePlan, inputs: Any, error: type[Exception], words: str) -> None:
    """A resize raises this, in one line, and has changed nothing."""
    before = everything(who)
    with pytest.raises(error, match=words) as caught:
        resize_(who.model, plan, example_inputs=inputs, optimizer=who.optimizer)
    assert "\n" not in str(caught.value)
    assert everything(who) == before


# ---- example inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(2, 4, 8, 8), r"does not run .*\(2, 4, 8, 8\).*nets.py:\d+.*pass inputs that the model accepts"),
        (torch.zeros(8), r"does not run .*\(8,\)"),
        (torch.zeros(2, 3, 8, 8).double(), "torch.float64, the model is torch.float32: convert the inputs"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "does not run"),
        (torch.zeros(2, 3, 8, 8, device="meta"), "are on meta, the model is on cpu: move them to cpu"),
        ((X, X), "does not run .*positional argument"),
        ({"image": X}, "does not run .*image"),
        ([], "hold no tensor"),
        ("a picture", "hold no tensor"),
    ],
    ids=["channels", "dims", "float64", "integers", "device", "too many", "unknown name", "none", "text"],
)
def test_inputs_that_the_model_does_not_accept(inputs: Any, words: str) -> None:
    refused(patient(), PLAN, inputs, TraceError, words)


def test_the_example_inputs_are_not_written_to() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.fc = conv(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # needs values, so it runs on the inputs themselves
                x.mul_(2)
            out: Tensor = self.fc(F.relu(self.conv1(x)).mean((2, 3)))
            return out

    x = torch.ones(2, 3, 8, 8)
    assert trace(Writes(), x).widths == {"conv1": 4}
    assert torch.equal(x, torch.ones(2, 3, 8, 8))


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "error", "words"),
    [
        ({"conv3": IndexMap.removing([0], 4)}, UnknownGroupError, "'conv3'; close names: conv"),
        ({"body.0": IndexMap.removing([0], 4)}, UnknownGroupError, "'body.0'; close names: conv1, conv2"),
        ({"fc": IndexMap.removing([0], 3)}, UnknownGroupError, "no channel group is named 'fc'"),
        ({**PLAN, "Conv2": IndexMap.removing([0], 5)}, UnknownGroupError, "'Conv2'; close names: conv2"),
        ({"conv1": IndexMap.removing([0], 5)}, ValueError, "written for width 5, but the group has width 4"),
        ({**PLAN, "conv2": IndexMap.removing([0], 4)}, ValueError, "'conv2' is written for width 4"),
    ],
    ids=["close", "far", "frozen", "one of two", "width", "width of one of two"],
)
def test_plans_that_do_not_fit(plan: ResizePlan, error: type[Exception], words: str) -> None:
    refused(patient(), plan, X, error, words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IndexMap((0, 4), 4), "source 4, allowed are -1 .fresh. and 0 to 3"),
        (lambda: IndexMap((0, -2), 4), "source -2, allowed"),
        (lambda: IndexMap((), 4), "width 4 keeps no channel"),
        (lambda: IndexMap.removing(range(4), 4), "keeps no channel"),
        (lambda: IndexMap.removing([4], 4), "cannot remove channel 4 of a group of width 4"),
    ],
    ids=["too high", "too low", "empty", "all removed", "removes what is not there"],
)
def test_index_maps_out_of_range_cannot_be_made(make: Callable[[], IndexMap], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_repeated_index_duplicates_the_channel() -> None:
    who = patient()
    old = who.model.get_submodule("conv1").weight.detach().clone()
    resize_(who.model, {"conv1": IndexMap((0, 0, 3, FRESH), 4)}, example_inputs=X, optimizer=who.optimizer)
    new = who.model.get_submodule("conv1").weight
    assert torch.equal(new[:3], old[[0, 0, 3]])


@pytest.mark.parametrize("name", ["Halves", "ShuffleUnit", "C2f"])
def test_groups_that_must_stay_alike_cannot_be_resized_apart(name: str) -> None:
    who = patient(name)
    loose = trace(who.model, X, rehearse=False)
    coupled = [g for g in loose.groups if g.name not in trace(who.model, X).widths]
    assert len(coupled) > 1
    plan = {g.name: IndexMap.identity(g.width).inserting(2 + i) for i, g in enumerate(coupled)}
    refused(who, plan, X, UnknownGroupError, f"no channel group is named '{coupled[0].name}'")
    refused(who, {coupled[-1].name: plan[coupled[-1].name]}, X, UnknownGroupError, "no channel group is named")


def test_narrow_halves_that_chunk_would_forgive_one_channel() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.left, self.right, self.fc = conv(3, 4), conv(2, 4), conv(2, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.conv1(x).relu().chunk(2, 1)
            out: Tensor = self.fc((self.left(left) + self.right(right)).mean((2, 3)))
            return out

    assert set(trace(Narrow(), X).widths) == {"left"}


def test_a_plan_without_effect_warns() -> None:
    who = patient()
    before = everything(who)
    with pytest.warns(UserWarning, match="changes nothing"):
        resize_(who.model, {"conv1": IndexMap.identity(4)}, example_inputs=X, optimizer=who.optimizer)
    assert everything(who) == before


# ---- models ----------------------------------------------------------------------------------------------------------


class Box:
    """Something that holds a tensor and says so to nobody."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Returns(nn.Module):
    """Returns what `wrap` makes of its features."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv1, self.conv2, self.wrap = conv(3, 4), conv(4, 5), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.conv2(F.relu(self.conv1(x))))


@pytest.mark.parametrize("wrap", [Box, lambda t: {"a": [Box(t)]}, lambda t: (t, Box(t)), lambda t: iter([t])])
def test_outputs_that_nobody_can_look_into(wrap: Callable[[Tensor], Any]) -> None:
    model = Returns(wrap)
    who = Patient(model, torch.optim.SGD(model.parameters(), lr=0.1))
    refused(who, PLAN, X, TraceError, r"returns a \w+, whose tensors cannot be found: return tensors, tuples")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {"a": {"b": [t]}},
        lambda t: (None, 3, "name", t.shape, t),
        lambda t: [[t], t.sum()],
    ],
)
def test_outputs_in_plain_containers_are_found(wrap: Callable[[Tensor], Any]) -> None:
    channel_map = trace(Returns(wrap), X)
    assert channel_map.widths == {"conv1": 4}
    assert ("conv2.weight", "model output") in {(f.axis.name, f.reason) for f in channel_map.frozen}


def test_where_values_decide_only_the_branch_taken_is_seen_and_it_is_said() -> None:
    model, x, _ = example("Branching")
    channel_map = trace(model, x)
    assert any("only the branch taken by the example inputs was followed" in note for note in channel_map.notes)
    assert not any(place.axis.name.startswith("other") for group in channel_map.groups for place in group.places)


def test_writes_into_views_name_the_line_and_leave_the_model_alone() -> None:
    who = patient("WrittenSlices")
    reasons = {f.reason for f in trace(who.model, X).frozen if f.axis.name in ("left.weight", "right.weight")}
    assert any("writes channels into a view of another tensor (nets.py:" in reason for reason in reasons)
    refused(who, {"left": IndexMap.removing([0], 2)}, X, UnknownGroupError, "no channel group is named 'left'")


def test_a_module_that_is_called_twice_is_resized_once() -> None:
    who = patient("CalledTwice")
    resize_(who.model, {"stem": IndexMap.removing([0], 4).inserting(3)}, example_inputs=X, optimizer=who.optimizer)
    assert who.model.get_submodule("body").weight.shape[:2] == (6, 6)
    assert who.model(X).shape == (2, 3)


def test_a_model_without_parameters_and_one_of_integers() -> None:
    with pytest.raises(TraceError, match="has no parameters, so it has no channels"):
        trace(nn.Sequential(nn.ReLU(), nn.Flatten()), X)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norms_of_the_old_kind_name_the_new_one() -> None:
    model = nn.Sequential(torch.nn.utils.weight_norm(conv(3, 4)), nn.ReLU(), conv(4, 5))
    with pytest.raises(TraceError, match=r"Sequential cannot be copied.*torch\.nn\.utils\.parametrizations") as caught:
        trace(model, X)
    assert "\n" not in str(caught.value)


def test_an_error_of_the_model_itself_is_handed_on() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = conv(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError("the user's own mistake")

    with pytest.raises(TraceError, match=r"the user's own mistake \(test_bad_input.py:\d+\)") as caught:
        trace(Broken(), X)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
