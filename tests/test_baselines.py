"""Published importance measures against numbers worked out by hand and against slow references written another way."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import qr
from scipy.stats import norm
from torch import Tensor, nn

from autowidth.channels import ChannelMap, IndexMap, ParamAxis, Place
from autowidth.engine import resize_
from autowidth.lab.baselines import (
    IMPORTANCES,
    TRAINING_RULES,
    bn_scale,
    entropy,
    fpgm,
    hrank,
    linear_dependency,
    obd,
    registry,
    taylor_gate,
)
from autowidth.lab.baselines.calls import watched
from autowidth.lab.models import DenseNet
from autowidth.review.batches import of_pairs
from autowidth.trace import trace
from nets import Headed, conv, example

CE = of_pairs(F.cross_entropy)

NETS = ("Plain", "Projection", "Dense", "Depthwise", "Flatten", "Transposed", "CalledTwice", "InPlace", "WeightNorm")
DATA_FREE = ("l1", "l2", "bn-scale", "fpgm", "entropy", "sparse-structure", "random")
OF_NORMS = ("bn-scale", "sparse-structure")
PER_BATCH = ("taylor",)

Batches = Sequence[tuple[Tensor, Tensor]]


class Case:
    """A tiny net in double precision where asked for, its channel map, and labelled images."""

    def __init__(self, name: str, *, count: int = 6, dtype: torch.dtype = torch.float32) -> None:
        found = example(name)
        assert isinstance(found.inputs, Tensor)
        self.model = found.model.to(dtype)
        self.channel_map = trace(self.model, found.inputs.to(dtype))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.x = torch.randn(count, *found.inputs.shape[1:], dtype=dtype)
            self.y = torch.randint(found.model.eval()(self.x).size(1), (count,))

    @property
    def batches(self) -> Batches:
        return [(self.x[:4], self.y[:4]), (self.x[4:], self.y[4:])]


def worths(name: str, model: nn.Module, channel_map: ChannelMap, batches: Batches, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return IMPORTANCES[name].importance(model, channel_map, batches, CE, generator=generator)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


# ---- laws of all of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("net", "measure"), [(n, c) for n in NETS for c in IMPORTANCES])
def test_every_filter_gets_a_number_and_the_model_stays_as_it_was(net: str, measure: str) -> None:
    case = Case(net)
    before = bits(case.model)
    found = worths(measure, case.model, case.channel_map, case.batches)
    assert {name: tuple(w.shape) for name, w in found.items()} == {n: (w,) for n, w in case.channel_map.widths.items()}
    for w in found.values():
        assert w.dtype == torch.float32
        assert not w.requires_grad
        assert torch.isfinite(w).all() or (measure in OF_NORMS and torch.isnan(w).all())
    assert bits(case.model) == before
    assert all(p.grad is None for p in case.model.parameters())
    assert not case.model.training


@pytest.mark.parametrize("measure", [c for c in IMPORTANCES if c != "random"])
@pytest.mark.parametrize("net", ["Plain", "Projection", "Dense", "Flatten"])
def test_the_order_of_channels_does_not_matter(net: str, measure: str) -> None:
    case = Case(net)
    before = worths(measure, case.model, case.channel_map, case.batches)
    other = copy.deepcopy(case.model)
    orders = {name: tuple(reversed(range(width))) for name, width in case.channel_map.widths.items()}
    plan = {name: IndexMap(order, len(order)) for name, order in orders.items()}
    after = worths(measure, other, resize_(other, plan, example_inputs=case.x), case.batches)
    for name, order in orders.items():
        torch.testing.assert_close(after[name], before[name][list(order)], rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("measure", [c for c in IMPORTANCES if c not in PER_BATCH])
def test_how_the_data_are_cut_into_batches_does_not_matter(measure: str) -> None:
    case = Case("Projection")
    whole = worths(measure, case.model, case.channel_map, [(case.x, case.y)])
    parts = worths(measure, case.model, case.channel_map, case.batches)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("measure", IMPORTANCES)
def test_data_count_where_they_should(measure: str) -> None:
    case = Case("Projection")
    found = worths(measure, case.model, case.channel_map, [(case.x, case.y)])
    other = worths(measure, case.model, case.channel_map, [(case.x.flip(0) * 2 + case.x, case.y)])
    changed = any(not torch.equal(found[name].nan_to_num(), other[name].nan_to_num()) for name in found)
    assert changed == (measure not in DATA_FREE)


def test_only_measures_that_predict_a_loss_change_have_a_unit() -> None:
    """Twice the loss is twice the worth for these (squared for gradients squared), and nothing to the others."""
    case = Case("Projection")
    powers = {}
    for name, published in IMPORTANCES.items():
        generator = torch.Generator().manual_seed(0)
        twice = published.importance(
            case.model,
            case.channel_map,
            case.batches,
            of_pairs(lambda p, t: 2 * F.cross_entropy(p, t)),
            generator=generator,
        )
        once = worths(name, case.model, case.channel_map, case.batches)
        ratio = torch.cat([twice[n] / once[n] for n in once]).nanmedian().item()
        powers[name] = round(np.log2(ratio))
    # The Fisher information stands for a Hessian, which is linear in the loss; its estimate from gradients is not.
    assert powers == dict.fromkeys(IMPORTANCES, 0) | {"taylor-gate": 1, "obd": 2, "obd-kron": 2, "taylor": 2}
    assert {n for n, c in IMPORTANCES.items() if c.unit == "nats"} == {"taylor-gate", "obd", "obd-kron"}


@dataclass(frozen=True)
class Row:
    """What is to be known of a measure: its unit, whether it ranks layers or the network, its source."""

    unit: str | None
    scope: str
    source: str


MEASURES = {
    "bn-scale": Row(None, "network", "1708.06519"),
    "channel-lasso": Row(None, "layer", "1707.06168"),
    "entropy": Row(None, "layer", "Hur and Kang 2018"),
    "fpgm": Row(None, "layer", "1811.00250"),
    "hrank": Row(None, "layer", "2002.10179"),
    "hrel": Row(None, "layer", "2202.10716"),
    "l1": Row(None, "layer", "1608.08710"),
    "l2": Row(None, "layer", "1608.08710"),
    "linear-dependency": Row(None, "layer", "ICASSP"),
    "nisp": Row(None, "layer", "1711.05908"),
    "obd": Row("nats", "network", "LeCun"),
    "obd-kron": Row("nats", "network", "1905.05934"),
    "random": Row(None, "layer", "chance"),
    "sparse-structure": Row(None, "network", "1707.01213"),
    "taylor": Row(None, "network", "1906.10771"),
    "taylor-gate": Row("nats", "network", "1906.10771"),
}
RULES = {"asymptotic": "l2", "slimming": "bn-scale", "soft": "l2", "sparse-structure": "sparse-structure"}
"""The measure that removes what a training rule has prepared."""


def test_the_registry_holds_what_the_table_says() -> None:
    assert {name: (p.name, p.unit, p.scope) for name, p in IMPORTANCES.items()} == {
        name: (name, row.unit, row.scope) for name, row in MEASURES.items()
    }
    assert [name for name, row in MEASURES.items() if row.source not in IMPORTANCES[name].source] == []
    assert {name: p.importance for name, p in TRAINING_RULES.items()} == RULES
    assert set(RULES.values()) <= set(IMPORTANCES)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="two importance measures are named 'l1'"):
        registry.importance(name="l1", unit=None, scope="layer", source="")(bn_scale.importance)
    with pytest.raises(ValueError, match="two training rules are named 'soft'"):
        registry.training_rule(name="soft", importance="l2", source="")(TRAINING_RULES["soft"].schedule)
    assert len(IMPORTANCES) == len(MEASURES)


# ---- weights alone ---------------------------------------------------------------------------------------------------


def test_norms_of_filters_are_those_of_their_weights() -> None:
    case = Case("Plain")
    for c in range(4):
        filter_ = case.model.get_parameter("conv1.weight")[c].flatten().tolist()
        l1, l2 = (worths(n, case.model, case.channel_map, [])["conv1"][c].item() for n in ("l1", "l2"))
        assert l1 == pytest.approx(sum(abs(w) for w in filter_))
        assert l2 == pytest.approx(sum(w * w for w in filter_) ** 0.5)


@pytest.mark.parametrize("measure", ["l1", "l2", "fpgm", "entropy"])
def test_on_a_residual_stream_the_writers_add_up(measure: str) -> None:
    case = Case("Identity")
    group = max(case.channel_map.groups, key=lambda g: len(g.with_role("write")))
    writers = group.with_role("write")
    assert len(writers) > 1
    total = worths(measure, case.model, case.channel_map, [])[group.name]
    single = torch.zeros_like(total)
    for place in writers:
        alone = copy.deepcopy(case.model)
        for other in writers:
            if other != place:  # equal filters are at no distance, have no norm, and as much information as any
                alone.get_parameter(other.axis.name).data.zero_()
        single += worths(measure, alone, case.channel_map, [])[group.name]
    silent = (len(writers) - 1) * len(writers) * (-0.5 if measure == "entropy" else 0.0)
    torch.testing.assert_close(single, total + silent)


def test_a_norms_scales_are_taken_without_sign_and_added_along_a_stream() -> None:
    """In a dense block a channel passes through the norm of every later layer."""
    torch.manual_seed(0)
    model = DenseNet(10, growth=2).eval()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for number, module in enumerate(norms.values()):
        module.weight.data.normal_().mul_(10**number)
    channel_map = trace(model, torch.zeros(1, 3, 8, 8))
    found = worths("bn-scale", model, channel_map, [])
    scales = [module.weight.detach().abs() for module in norms.values()]
    stem = sum(scale[:4] for scale in scales[:3])  # two layers of the block, then the transition
    first = sum(scale[4:6] for scale in scales[1:3])
    torch.testing.assert_close(found["stem"], stem)
    torch.testing.assert_close(found["stages.0.0.body.conv"], first)


def test_without_a_norm_its_scale_says_nothing() -> None:
    case = Case("Flatten")
    found = bn_scale.importance(case.model, case.channel_map, [], CE, generator=torch.Generator())
    assert all(torch.isnan(w).all() for w in found.values())


def test_distances_by_hand() -> None:
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
    assert fpgm.distances(corners).tolist() == [3 + 5, 3 + 4, 4 + 5]


def test_the_filter_nearest_to_the_geometric_median_goes_first() -> None:
    model, channel_map = first_layer(torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [2.0, 2.0]])[:, :, None, None])
    found = worths("fpgm", model, channel_map, [])["first"]
    assert int(found.argmin()) == 3


def first_layer(weight: Tensor) -> tuple[nn.Module, ChannelMap]:
    """A net whose first convolution has this weight and no bias, and which reads its channels through a ReLU."""
    o, c, k, _ = weight.shape
    model = nn.Sequential()
    model.add_module("first", nn.Conv2d(c, o, k, padding=k // 2, bias=False))
    model.add_module("act", nn.ReLU())
    model.add_module("second", nn.Conv2d(o, 3, 1))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.get_parameter("first.weight").data.copy_(weight)
    return model.eval(), trace(model, torch.zeros(1, c, 8, 8))


def test_information_is_that_of_a_gaussian() -> None:
    filters = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) * 3 + 1
    values = filters.numpy().astype(np.float64)
    gaussian = norm(values.mean(), values.std())
    expected = -gaussian.logpdf(values).mean(axis=1) - gaussian.entropy()
    np.testing.assert_allclose(entropy.surplus(filters).numpy(), expected, rtol=1e-4, atol=1e-6)
    assert entropy.surplus(filters).mean().item() == pytest.approx(0, abs=1e-6)


def test_equal_weights_carry_the_same_information() -> None:
    assert entropy.surplus(torch.ones(3, 4)).tolist() == [-0.5] * 3


def test_chance_is_repeated_by_its_seed_alone() -> None:
    case = Case("Plain")
    one, same, other = (worths("random", case.model, case.channel_map, [], seed)["conv1"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ---- gradients -------------------------------------------------------------------------------------------------------

STEP = 1e-5


def loss_of(case: Case, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(case.model(x), y).item()


def slope(case: Case, places: Sequence[Place], channel: int, x: Tensor, y: Tensor) -> float:
    """How the loss changes with a factor on all these slices of one channel, by central differences."""
    losses = []
    for factor in (1 + STEP, 1 - STEP):
        saved = {}
        for place in places:
            weight = case.model.get_parameter(place.axis.name).data
            saved.setdefault(place.axis.name, weight.clone())
            for position in place.index[channel]:
                weight.select(place.axis.dim, position).mul_(factor)
        losses.append(loss_of(case, x, y))
        for name, content in saved.items():
            case.model.get_parameter(name).data.copy_(content)
    return (losses[0] - losses[1]) / (2 * STEP)


@pytest.mark.parametrize("net", ["Plain", "Projection", "Transposed", "CalledTwice"])
def test_taylor_on_weights_is_the_squared_slope_along_the_filter(net: str) -> None:
    case = Case(net, dtype=torch.float64)
    found = worths("taylor", case.model, case.channel_map, case.batches)
    for group in case.channel_map.groups:
        for c in range(group.width):
            slopes = [[slope(case, [p], c, *batch) for p in group.with_role("write")] for batch in case.batches]
            expected = np.mean([sum(s * s for s in of_batch) for of_batch in slopes])
            assert found[group.name][c].item() == pytest.approx(expected, rel=1e-3, abs=1e-10)


@pytest.mark.parametrize("net", ["Plain", "Projection", "Dense", "Flatten", "CalledTwice"])
def test_taylor_on_gates_is_the_mean_size_of_the_slope_along_the_readers(net: str) -> None:
    case = Case(net, dtype=torch.float64)
    found = worths("taylor-gate", case.model, case.channel_map, case.batches)
    for group in case.channel_map.groups:
        for c in range(group.width):
            readers = group.with_role("read")
            slopes = [slope(case, readers, c, case.x[i : i + 1], case.y[i : i + 1]) for i in range(len(case.x))]
            assert found[group.name][c].item() == pytest.approx(np.mean(np.abs(slopes)), rel=1e-4, abs=1e-9)


def test_a_gate_in_front_of_all_readers_is_minus_the_first_order_of_removal() -> None:
    case = Case("Projection", dtype=torch.float64)
    signed = taylor_gate.gates(case.model, case.channel_map, case.x, case.y, CE)
    for group in case.channel_map.groups:
        slopes = [slope(case, group.with_role("read"), c, case.x, case.y) for c in range(group.width)]
        np.testing.assert_allclose(signed[group.name].mean(0).numpy(), slopes, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("net", ["Plain", "Projection", "Transposed"])
def test_brain_damage_from_gradients_of_one_sample_at_a_time(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(net)
    monkeypatch.setattr(obd, "_VALUES", 500)  # several pieces per batch
    found = worths("obd", case.model, case.channel_map, case.batches)
    squares: dict[str, Tensor] = {}
    for i in range(len(case.x)):
        case.model.zero_grad()
        F.cross_entropy(case.model(case.x[i : i + 1]), case.y[i : i + 1]).backward()
        for name, p in case.model.named_parameters():
            assert p.grad is not None
            squares[name] = squares.get(name, torch.zeros_like(p)) + p.grad**2 / len(case.x)
    for group in case.channel_map.groups:
        for c in range(group.width):
            expected = 0.0
            for place in group.with_role("write"):
                w, h = case.model.get_parameter(place.axis.name), squares[place.axis.name]
                expected += (w**2 * h / 2).select(place.axis.dim, place.index[c][0]).sum().item()
            assert found[group.name][c].item() == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_kronecker_factors_written_out() -> None:
    """1/2 S_oo w' A w with the matrices A and S built from patches, and the bias as a weight of a constant input."""
    case = Case("Plain", dtype=torch.float64)
    found = worths("obd-kron", case.model, case.channel_map, case.batches)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("conv1", "conv2"):
        case.model.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: seen.update({n: (i[0], o)}))
    output = case.model(case.x)
    losses = F.cross_entropy(output, case.y, reduction="sum")  # so that each gradient is that of a sample's own loss
    for name in ("conv1", "conv2"):
        layer, (source, out) = case.model.get_submodule(name), seen[name]
        (g,) = torch.autograd.grad(losses, out, retain_graph=True)
        patches = F.unfold(source.detach(), 3, padding=1).transpose(1, 2).flatten(0, 1)
        weight = layer.get_parameter("weight").detach().flatten(1)
        if "bias" in dict(layer.named_parameters()):
            patches = torch.cat([patches, torch.ones(len(patches), 1)], dim=1)
            weight = torch.cat([weight, layer.get_parameter("bias").detach()[:, None]], dim=1)
        a = patches.T @ patches / len(patches)
        gradients = g.movedim(1, -1).flatten(0, 2)
        positions = len(gradients) / len(case.x)
        s = positions * gradients.T @ gradients / len(gradients)
        expected = s.diagonal() * (weight @ a @ weight.T).diagonal() / 2
        np.testing.assert_allclose(found[name].numpy(), expected.numpy(), rtol=1e-4)


# ---- feature maps ----------------------------------------------------------------------------------------------------


def test_ranks_by_hand() -> None:
    """Two images through filters that pass one channel on: of rank 0 and 1, 3 and 1, 8 and 0."""
    model, channel_map = first_layer(torch.eye(3)[:, :, None, None])
    x = torch.zeros(2, 3, 8, 8)
    x[1, 0] = x[1, 1] = torch.ones(8, 8)
    x[0, 1, :3, :3] = torch.eye(3)
    x[0, 2] = torch.eye(8)
    x[1, 2] = -torch.eye(8)  # stopped by the activation
    found = hrank.importance(model, channel_map, [(x, torch.zeros(2))], CE, generator=torch.Generator())
    assert found["first"].tolist() == [0.5, 2.0, 4.0]


def test_a_map_is_looked_at_before_it_is_pooled() -> None:
    """In Plain the last maps are 2 x 2 when global pooling takes them."""
    case = Case("Plain")
    maps: list[Tensor] = []
    case.model.get_submodule("norm2").register_forward_hook(lambda m, i, o: maps.append(F.avg_pool2d(o.relu(), 2)))
    case.model(case.x)
    expected = torch.tensor(np.linalg.matrix_rank(maps[0].detach().numpy()).mean(axis=0), dtype=torch.float32)
    torch.testing.assert_close(worths("hrank", case.model, case.channel_map, case.batches)["conv2"], expected)
    assert expected.max() > 1


@pytest.mark.parametrize("net", ["Flatten", "FlattenPermuted"])
def test_a_flattened_map_is_found_again_where_its_channels_stay_together(net: str) -> None:
    case = Case(net)
    group = case.channel_map.groups[0]
    (place,) = group.with_role("read")
    seen: list[Tensor] = []
    case.model.get_submodule("conv1").register_forward_hook(lambda m, i, o: seen.append(o))
    _, calls = watched(case.model, lambda: case.model(case.x))
    call = next(c for c in calls if c.weight == place.axis.name)
    maps = call.maps(place)
    if net == "Flatten":
        assert maps.dim() == 4
        assert min(maps.shape[2:]) > 1
    else:
        assert maps.shape[2] == 1
    taken = call.read()[:, torch.tensor(place.index)]
    torch.testing.assert_close(maps.flatten(2), taken)


def test_a_ranks_mean_over_readers() -> None:
    case = Case("Projection")
    found = worths("hrank", case.model, case.channel_map, [(case.x, case.y)])
    _, calls = watched(case.model, lambda: case.model(case.x))
    for group in case.channel_map.groups:
        ranks = []
        for place in group.with_role("read"):
            for call in calls:
                if call.weight == place.axis.name:
                    maps = call.maps(place).detach().numpy()
                    ranks.append(np.linalg.matrix_rank(maps).mean(axis=0))
        np.testing.assert_allclose(found[group.name].numpy(), np.mean(ranks, axis=0), rtol=1e-6)


def test_pivots_are_those_of_a_decomposition_of_the_matrix_itself() -> None:
    columns = np.random.default_rng(0).normal(size=(40, 6)) * [1, 5, 2, 9, 3, 4]
    columns[:, 5] = columns[:, 0] + columns[:, 1]  # dependent: it, or one of the two, is left with nothing
    _, r, order = qr(columns, mode="economic", pivoting=True)
    expected = np.empty(6)
    expected[order] = np.abs(np.diag(r))
    found = linear_dependency.pivots(torch.tensor(columns.T @ columns)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
    assert sorted(found)[0] < 1e-5 < sorted(found)[1]


def test_dependency_of_maps_from_the_matrix_of_all_maps() -> None:
    case = Case("Plain", dtype=torch.float64)
    maps: list[Tensor] = []
    case.model.get_submodule("conv2").register_forward_pre_hook(lambda m, i: maps.append(i[0]))
    case.model(case.x)
    columns = maps[0].detach().transpose(0, 1).flatten(1).T.numpy()
    _, r, order = qr(columns, mode="economic", pivoting=True)
    expected = np.empty(4)
    expected[order] = np.abs(np.diag(r))
    found = worths("linear-dependency", case.model, case.channel_map, case.batches)["conv1"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("net", ["Projection", "Dense"])
def test_dependency_is_averaged_over_readers_and_judged_among_all_that_a_reader_gets(net: str) -> None:
    case = Case(net, dtype=torch.float64)
    found = worths("linear-dependency", case.model, case.channel_map, case.batches)
    _, calls = watched(case.model, lambda: case.model(case.x))
    sizes: dict[str, list[list[float]]] = {group.name: [] for group in case.channel_map.groups}
    for call in calls:
        readers = [(g, p) for g in case.channel_map.groups for p in g.with_role("read") if p.axis.name == call.weight]
        if not readers:
            continue
        maps = torch.cat([call.maps(p) for _, p in readers], dim=1).detach()
        _, r, order = qr(maps.transpose(0, 1).flatten(1).T.numpy(), mode="economic", pivoting=True)
        size = dict(zip(order.tolist(), np.abs(np.diag(r)).tolist(), strict=False))
        starts = np.cumsum([0, *(g.width for g, _ in readers)])
        for (group, _), start in zip(readers, starts, strict=False):
            sizes[group.name].append([size.get(int(start) + c, 0.0) for c in range(group.width)])
    assert max(map(len, sizes.values())) > 1
    for name, of_readers in sizes.items():
        np.testing.assert_allclose(found[name].numpy(), np.mean(of_readers, axis=0), rtol=1e-4, atol=1e-4)


def test_a_copied_filter_depends_on_its_twin() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[3] = weight[1]
    model, channel_map = first_layer(weight)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = worths("linear-dependency", model, channel_map, [(x, torch.zeros(5))])["first"]
    low, *others = found.sort().values.tolist()
    assert low < 1e-4 * others[0]
    assert int(found.argmin()) in (1, 3)


# ---- watching calls --------------------------------------------------------------------------------------------------


class Overwritten(Headed):
    """What a convolution writes is overwritten at once."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv1 = conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv1(x).relu_())


def test_a_call_remembers_what_was_written_even_if_it_is_overwritten() -> None:
    torch.manual_seed(0)
    model, x = Overwritten().eval(), torch.randn(2, 3, 8, 8)
    plain = model(x)
    result, calls = watched(model, lambda: model(x))
    assert torch.equal(result, plain)
    assert [c.weight for c in calls] == ["conv1.weight", "fc.weight"]
    assert torch.equal(calls[0].out, model.conv1(x))
    (g,) = torch.autograd.grad(result.sum(), calls[0].out)
    assert torch.equal(g == 0, calls[0].out <= 0)


def test_each_call_has_a_source_of_its_own() -> None:
    """Of a tensor that two layers read, each call's gradient is what goes through that call alone."""
    case = Case("Projection")
    image = case.x.clone().requires_grad_()
    loss, calls = watched(case.model, lambda: F.cross_entropy(case.model(image), case.y))
    shared = [c for c in calls if c.source._base is not None and c.source.requires_grad]
    gradients = torch.autograd.grad(loss, [c.source for c in shared], retain_graph=True)
    by_base: dict[int, list[int]] = {}
    for number, call in enumerate(shared):
        by_base.setdefault(id(call.source._base), []).append(number)
    twice = next(numbers for numbers in by_base.values() if len(numbers) == 2)
    base = shared[twice[0]].source._base
    assert base is not None
    (whole,) = torch.autograd.grad(loss, base)
    torch.testing.assert_close(gradients[twice[0]] + gradients[twice[1]], whole)


def test_only_axes_of_the_model_are_watched() -> None:
    model, x = Overwritten().eval(), torch.randn(1, 3, 8, 8)
    foreign = torch.randn(2, 3, 1, 1)
    _, calls = watched(model, lambda: (F.conv2d(x, foreign), model(x)))
    assert [c.weight for c in calls] == ["conv1.weight", "fc.weight"]
    assert ParamAxis("conv1.weight", 0) in {a for g in trace(model, x).groups for a in g.axes}
