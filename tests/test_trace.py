"""Tracing: equal to brute force, independent of mode and memory format, harmless, honest about what it cannot do."""

from __future__ import annotations

import copy
import inspect
import random
import time
from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from autowidth.channels import ChannelGroup, ChannelMap, IndexMap, ResizePlan
from autowidth.engine import resize_
from autowidth.errors import AutoWidthError
from autowidth.lab import models
from autowidth.trace import TraceError, trace
from nets import NETS, Inputs, conv, example, run, settle
from oracles import brute_coupling, traced_coupling

every_net = pytest.mark.parametrize("name", NETS)


def lab_model(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A narrow network of the laboratory with an image of 8 x 8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LAB[name]()
        settle(model)
        return model.eval(), torch.randn(2, 3, 8, 8)


def inverted() -> nn.Module:
    """The parts of MobileNetV2, fewer of them."""
    block = models.InvertedResidual
    return nn.Sequential(
        models.conv_norm(3, 4, 3, activation=nn.ReLU6),
        block(4, 3, expansion=1, stride=1, adds_input=False),
        block(3, 5, expansion=4, stride=2, adds_input=False),
        block(5, 5, expansion=4, stride=1, adds_input=True),
        models.conv_norm(5, 8, 1, activation=nn.ReLU6),
        models.Head(8, 10),
    )


LAB: Mapping[str, Callable[[], nn.Module]] = {
    "resnet8": lambda: models.build("resnet8", width=0.25),
    "resnet8-padding": lambda: models.build("resnet8-padding", width=0.25),
    "vgg8": lambda: models.build("vgg8", width=0.0625),
    "densenet10": lambda: models.DenseNet(10, growth=4, width=0.75),
    "inverted": inverted,
    "resnet20": lambda: models.build("resnet20", width=0.25),
    "googlenet": lambda: models.build("googlenet", width=0.125),
    "mobilenetv2": lambda: models.build("mobilenetv2", width=0.1),
}
DEEP = ("resnet20", "googlenet", "mobilenetv2")
lab = [pytest.param(name, marks=pytest.mark.slow) if name in DEEP else name for name in LAB]


@cache
def map_of(name: str) -> ChannelMap:
    """The channel map of a net as `example` makes it, traced once."""
    return trace(*example(name)[:2])


@cache
def channels_of(name: str) -> ChannelMap:
    """The channel map of a net or of a lab model."""
    return map_of(name) if name in NETS else trace(*lab_model(name))


def same_map(a: ChannelMap, b: ChannelMap) -> bool:
    """Equal in all that surgery and costs are made from; notes and the reasons' wording may differ."""
    frozen = [{(f.axis, f.index) for f in m.frozen} for m in (a, b)]
    return a.groups == b.groups and frozen[0] == frozen[1] and a.shapes == b.shapes and a.uses == b.uses


def channels_last(tree: Any) -> Any:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tree_map_only(
        Tensor, lambda t: t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format)), tree
    )


# ---- what is found ---------------------------------------------------------------------------------------------------


@every_net
def test_nets_have_the_groups_that_a_person_reads_in_their_code(name: str) -> None:
    model, inputs, net = example(name)
    assert map_of(name).widths == dict(net.groups)
    before = net.groups if net.before is None else net.before
    assert trace(model, inputs, rehearse=False).widths == dict(before)


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if not net.unseen])
def test_coupling_equals_brute_force(name: str) -> None:
    model, inputs, _ = example(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = brute_coupling(model, inputs)
    assert traced_coupling(trace(model, inputs, rehearse=False)) == found


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.unseen])
def test_where_brute_force_does_not_apply_it_says_so_or_differs(name: str) -> None:
    # An exception that is none any more must leave the list.
    model, inputs, _ = example(name)
    try:
        found = brute_coupling(model, inputs)
    except ValueError as error:
        assert "single channel" in str(error)  # noqa: PT017
        return
    assert traced_coupling(trace(model, inputs, rehearse=False)) != found


@pytest.mark.parametrize("name", [name for name in lab if name != "resnet8-padding"])
def test_coupling_of_lab_models_equals_brute_force(name: str) -> None:
    model, x = lab_model(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = brute_coupling(model, x)
    assert traced_coupling(trace(model, x, rehearse=False)) == found


def test_padding_shortcut_differs_from_brute_force_in_padded_channels_only() -> None:
    model, x = lab_model("resnet8-padding")
    traced, brute = traced_coupling(trace(model, x)), brute_coupling(model, x)
    assert traced < brute
    padded = {("stages.1.0.second.conv.weight", 0, i) for i in range(4, 8)}
    padded |= {("stages.2.0.second.conv.weight", 0, i) for i in range(8, 16)}
    assert {slot for channel in brute - traced for slot in channel} >= padded
    assert all(channel & padded for channel in brute - traced)


def test_every_slot_is_in_one_place_only() -> None:
    for name in NETS:
        channel_map = map_of(name)
        slots = [slot for channel in traced_coupling(channel_map) for slot in channel]
        slots += [(f.axis.name, f.axis.dim, i) for f in channel_map.frozen for i in f.index]
        assert len(slots) == len(set(slots)), name


@every_net
def test_frozen_axes_say_why(name: str) -> None:
    reasons = {f.reason for f in map_of(name).frozen}
    for words in NETS[name].frozen:
        assert any(words in reason for reason in reasons), reasons
    assert "model input" in reasons
    assert "model output" in reasons
    if not NETS[name].frozen:
        assert reasons == {"model input", "model output"}


def test_reasons_name_the_line_of_the_users_code() -> None:
    source, first = inspect.getsourcelines(type(example("Constant").model).forward)
    line = first + next(i for i, text in enumerate(source) if ".view(" in text)
    reasons = {f.reason for f in trace(*example("Constant")[:2]).frozen}
    assert any(f"(nets.py:{line})" in reason for reason in reasons), reasons


def test_groups_are_named_after_the_layer_that_writes_them_first() -> None:
    names = [group.name for group in trace(*example("Projection")[:2]).groups]
    assert names == ["stem", "conv1", "conv2"]
    assert [group.name for group in trace(*example("Functional")[:2]).groups] == ["kernel", "matrix"]
    assert [group.name for group in trace(*example("WeightNorm")[:2]).groups] == ["conv1", "conv2"]
    for group in trace(*example("Projection")[:2]).groups:
        assert group.with_role("write")[0].axis.name == f"{group.name}.weight"


def test_channels_are_in_the_order_in_which_the_first_layer_writes_them() -> None:
    for name in NETS:
        for group in map_of(name).groups:
            first = group.with_role("write")[0].index
            assert list(first) == sorted(first), (name, group.name)


def test_untaken_branch_is_noted() -> None:
    assert any("only the branch taken" in note for note in trace(*example("Branching")[:2]).notes)
    assert trace(*example("Plain")[:2]).notes == ()


# ---- what must not matter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NETS, *lab])
def test_mode_and_memory_format_do_not_matter(name: str) -> None:
    model, inputs = example(name)[:2] if name in NETS else lab_model(name)
    expected = trace(model, inputs, rehearse=False)
    assert same_map(trace(model.train(), inputs, rehearse=False), expected)
    nested = copy.deepcopy(model)
    for p in chain(nested.parameters(), nested.buffers()):
        p.data = channels_last(p.data)
    assert same_map(trace(nested, channels_last(inputs), rehearse=False), expected)
    assert same_map(trace(model, channels_last(inputs), rehearse=False), expected)


class NeedsValues(nn.Module):
    """The same network, but its forward pass looks at a value first."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if any(float(t.sum()) > 1e9 for t in tree_leaves((args, kwargs))):
            raise ValueError("this never happens, but a trace without values cannot know it")
        return self.body(*args, **kwargs)


@pytest.mark.parametrize("name", [*NETS, *lab])
def test_tracing_with_values_equals_tracing_without(name: str) -> None:
    model, inputs = example(name)[:2] if name in NETS else lab_model(name)
    differs = name in NETS and bool(NETS[name].valued)  # then the two must agree in the end at least
    plain, valued = (trace(m, inputs, rehearse=differs) for m in (model, NeedsValues(model)))
    assert [g.name for g in valued.groups] == [f"body.{g.name}" for g in plain.groups]
    strip = {(s.removeprefix("body."), d, i) for c in traced_coupling(valued) for s, d, i in c}
    assert strip == {slot for channel in traced_coupling(plain) for slot in channel}
    assert differs or [(u.name.removeprefix("body."), u.macs_per_weight) for u in valued.uses] == [
        (u.name, u.macs_per_weight) for u in plain.uses
    ]
    assert valued.notes


def test_batch_does_not_matter() -> None:
    for name in ("Plain", "SqueezeExcite", "InstanceNorm", "ConvNext", "OneChannel"):
        model, x, _ = example(name)
        assert isinstance(x, Tensor)
        assert same_map(trace(model, x[:1]), trace(model, x)), name
        assert same_map(trace(model, x.repeat(3, 1, 1, 1)), trace(model, x)), name


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")])
def test_the_callers_context_does_not_matter(context: Callable[[], Any]) -> None:
    for name in ("Plain", "Dropout", "Branching", "OneD", "Functional"):
        model, inputs, _ = example(name)
        with context():
            assert same_map(trace(model, inputs), map_of(name)), name


def test_dtype_does_not_matter() -> None:
    model, x, _ = example("Concat")
    assert isinstance(x, Tensor)
    for dtype in (torch.float64, torch.bfloat16):
        assert same_map(trace(copy.deepcopy(model).to(dtype), x.to(dtype)), trace(model, x))


@pytest.mark.parametrize("name", ["Dropout", "InstanceNorm", "Auxiliary", "Branching", "WeightNorm", "InPlace"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_are_left_alone(name: str, training: bool) -> None:
    model, inputs, _ = example(name)
    model.train(training)
    next(iter(model.children())).train(not training)  # a mixture of modes is the user's right
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    before = {n: (id(t), t._version, t.detach().clone()) for n, t in tensors.items()}
    modes = [m.training for m in model.modules()]
    values = [t.clone() for t in tree_leaves(inputs)]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    trace(model, inputs)
    after = dict(chain(model.named_parameters(), model.named_buffers()))
    assert before.keys() == after.keys()
    for n, (identity, version, value) in before.items():
        assert (id(after[n]), after[n]._version) == (identity, version)
        assert torch.equal(after[n].detach(), value)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(values, tree_leaves(inputs), strict=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))


def test_random_states_of_python_and_numpy_are_left_alone() -> None:
    class Gambler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.fc = conv(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x) * random.random() * np.random.rand()
            out: Tensor = self.fc(x.mean((2, 3)))
            return out

    states = random.getstate(), str(np.random.get_state())
    trace(Gambler(), torch.zeros(2, 3, 8, 8))
    assert states == (random.getstate(), str(np.random.get_state()))


def test_hooks_and_gradients_survive() -> None:
    model, x, _ = example("Plain")
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    run(model, x).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    trace(model, x)
    assert len(gradients) == len(list(model.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True) if p.grad is not None)


def test_frozen_parameters_are_traced_too() -> None:
    model, x, _ = example("Plain")
    expected = trace(model, x)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert same_map(trace(model, x), expected)


# ---- the map is true: resizes really work ----------------------------------------------------------------------------


def leaves(result: Any) -> list[Tensor]:
    """All tensors that a model returned."""
    found = [vars(leaf) if hasattr(leaf, "__dataclass_fields__") else leaf for leaf in tree_leaves(result)]
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return leaves(run(model.eval(), inputs))


def doomed(group: ChannelGroup) -> list[int]:
    """About 30 % of a group's channels, at least one, never all."""
    count = min(max(1, round(0.3 * group.width)), group.width - 1)
    return list(range(group.width))[1 :: max(1, group.width // max(count, 1))][:count] or ([0] if count else [])


def resize_and_run(model: nn.Module, plan: ResizePlan, inputs: Inputs) -> list[Tensor]:
    """The outputs after the plan; the layers' own attributes must have followed."""
    expected = resize_(model, plan, example_inputs=inputs, generator=torch.Generator().manual_seed(1))
    seen = trace(model, inputs)
    assert seen.groups == expected.groups
    assert seen.shapes == expected.shapes
    result = leaves(run(model.train(), inputs))  # training mode: gradients flow, too
    sum(t.sum() for t in result).backward()  # type: ignore[union-attr]
    used = {place.axis.name for group in seen.groups for place in group.places}
    for name, parameter in model.named_parameters():
        assert name not in used or parameter.grad is not None or "aux" in name or parameter.numel() == 0
    return outputs(model, inputs)


RESIZABLE = [name for name, net in NETS.items() if net.groups]


@pytest.mark.parametrize("name", [*RESIZABLE, *lab])
def test_an_inserted_channel_in_every_group_keeps_the_function(name: str) -> None:
    model, inputs = example(name)[:2] if name in NETS else lab_model(name)
    before = outputs(model, inputs)
    probe = copy.deepcopy(model)
    plan = {g.name: IndexMap.identity(g.width).inserting(1) for g in channels_of(name).groups}
    resize_(probe, plan, example_inputs=inputs, generator=torch.Generator().manual_seed(1))
    after = outputs(probe, inputs)
    if name in NETS and NETS[name].mixes:
        assert [t.shape for t in after] == [t.shape for t in before]
        assert any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(after, before, strict=True))
        return
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*RESIZABLE, *lab])
def test_removing_channels_that_nobody_reads_keeps_the_function(name: str) -> None:
    model, inputs = example(name)[:2] if name in NETS else lab_model(name)
    channel_map, tensors = channels_of(name), dict(model.named_parameters())
    plan = {}
    for group in channel_map.groups:
        gone = doomed(group)
        if not gone:
            continue
        plan[group.name] = IndexMap.removing(gone, group.width)
        for place in group.with_role("read"):
            for position in (p for c in gone for p in place.index[c]):
                tensors[place.axis.name].data.select(place.axis.dim, position).zero_()
    assert plan
    before = outputs(model, inputs)
    resize_(model, plan, example_inputs=inputs)
    after = outputs(model, inputs)
    if name in NETS and NETS[name].mixes:
        assert [t.shape for t in after] == [t.shape for t in before]
        return
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*RESIZABLE, *lab])
def test_removal_and_insertion_at_once_leave_a_network_that_trains(name: str) -> None:
    model, inputs = example(name)[:2] if name in NETS else lab_model(name)
    shapes = [t.shape for t in outputs(model, inputs)]
    plan = {
        g.name: IndexMap.removing(doomed(g), g.width).inserting(1 + i % 2)
        for i, g in enumerate(channels_of(name).groups)
    }
    after = resize_and_run(model, plan, inputs)
    assert [t.shape for t in after] == shapes
    assert all(bool(t.isfinite().all()) for t in after)


@pytest.mark.parametrize("name", [name for name in RESIZABLE if len(NETS[name].groups) > 1])
def test_groups_can_be_resized_one_at_a_time(name: str) -> None:
    model, inputs, _ = example(name)
    for group in trace(model, inputs).groups:
        scratch = copy.deepcopy(model)
        resized = resize_(scratch, {group.name: IndexMap.identity(group.width).inserting(2)}, example_inputs=inputs)
        assert resized.widths[group.name] == group.width + 2
        assert all(bool(t.isfinite().all()) for t in outputs(scratch, inputs))


# ---- errors at the door ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(2, 4, 8, 8), r"Plain does not run .* shape \[\(2, 4, 8, 8\)\].*pass inputs"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), "float64, the model is torch.float32: convert"),
        (torch.zeros(2, 3, 8, 8, device="meta"), "are on meta, the model is on cpu: move them to cpu"),
        ((), "hold no tensor"),
        ({"x": 3}, "hold no tensor"),
        ({"y": torch.zeros(2, 3, 8, 8)}, "does not run"),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(inputs: Any, words: str) -> None:
    with pytest.raises(TraceError, match=words) as caught:
        trace(example("Plain").model, inputs)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, AutoWidthError) and isinstance(caught.value, ValueError)


def test_model_without_parameters_is_refused() -> None:
    with pytest.raises(TraceError, match="ReLU has no parameters"):
        trace(nn.ReLU(), torch.zeros(2, 3))


def test_outputs_that_cannot_be_found_are_refused() -> None:
    class Wrapped:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = conv(3, 4)

        def forward(self, x: Tensor) -> Any:
            return Wrapped(self.conv1(x))

    with pytest.raises(TraceError, match="returns a Wrapped"):
        trace(Model(), torch.zeros(2, 3, 8, 8))


def test_error_of_a_model_that_runs_in_one_mode_only_becomes_a_note() -> None:
    class EvalOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.fc = conv(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("needs targets in training")
            out: Tensor = self.fc(F.relu(self.conv1(x)).mean((2, 3)))
            return out

    channel_map = trace(EvalOnly(), torch.zeros(2, 3, 8, 8))
    assert channel_map.widths == {"conv1": 4}
    assert any("training mode was not followed: needs targets" in note for note in channel_map.notes)


# ---- time ------------------------------------------------------------------------------------------------------------


def seconds(depth: int, rehearse: bool) -> float:
    model = nn.Sequential(*[nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(depth)])
    x, best = torch.zeros(1, 4, 8, 8), float("inf")
    for _ in range(3):
        start = time.process_time()
        trace(model, x, rehearse=rehearse)
        best = min(best, time.process_time() - start)
    return best


@pytest.mark.parametrize("rehearse", [False, True])
def test_time_grows_about_linearly_with_depth(rehearse: bool) -> None:
    assert seconds(32, rehearse) < 8 * seconds(8, rehearse)  # 4 if linear, 16 if quadratic
