"""More published measures, and what published methods do in training, against hand-made numbers and slow references."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from autowidth.channels import ChannelMap, IndexMap
from autowidth.engine import resize_
from autowidth.lab.baselines import (
    IMPORTANCES,
    TRAINING_RULES,
    asymptotic,
    channel_lasso,
    hrel,
    nisp,
    slimming,
    soft,
    sparse_structure,
)
from autowidth.lab.baselines.calls import watched
from autowidth.lab.models import build
from autowidth.review.batches import of_pairs
from autowidth.trace import trace
from nets import Headed, conv, example, settle

CE = of_pairs(F.cross_entropy)

Batches = Sequence[tuple[Tensor, Tensor]]
Measure = Callable[..., dict[str, Tensor]]

FOUR: dict[str, Measure] = {
    "nisp": nisp.importance,
    "channel-lasso": channel_lasso.importance,
    "sparse-structure": sparse_structure.importance,
    "hrel": hrel.importance,
}
LABORATORY = ("resnet20", "vgg8", "densenet22", "googlenet")


def ask(
    measure: Measure, model: nn.Module, channel_map: ChannelMap, batches: Batches, seed: int = 0
) -> dict[str, Tensor]:
    return measure(model, channel_map, batches, CE, generator=torch.Generator().manual_seed(seed))


def tiny(name: str, count: int = 6) -> tuple[nn.Module, ChannelMap, Tensor, Tensor]:
    """A tiny net in double precision and evaluation mode, its map, and labelled images."""
    found = example(name)
    assert isinstance(found.inputs, Tensor)
    model = found.model.double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *found.inputs.shape[1:], dtype=torch.float64, generator=generator)
    return model, trace(model, found.inputs.double()), x, torch.randint(3, (count,), generator=generator)


def laboratory(name: str) -> tuple[nn.Module, ChannelMap, Tensor, Tensor]:
    """A narrow network of the laboratory, with norms that have seen something, and labelled images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name, width=0.125)
        x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
        settle(model)
        for _ in range(3):
            model(x)
    return model.eval(), trace(model, x[:2]), x, y


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("net", LABORATORY)
def test_the_networks_of_the_laboratory_are_ranked(net: str, name: str) -> None:
    model, channel_map, x, y = laboratory(net)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = ask(FOUR[name], model, channel_map, [(x[:5], y[:5]), (x[5:], y[5:])])
    assert {n: tuple(w.shape) for n, w in found.items()} == {n: (w,) for n, w in channel_map.widths.items()}
    assert all(torch.isfinite(w).all() and w.dtype == torch.float32 and not w.requires_grad for w in found.values())
    differ = [w.max() > w.min() for w in found.values() if len(w) > 1]
    assert sum(differ) > 0.9 * len(differ)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", FOUR)
def test_the_tables_have_a_row_for_each(name: str) -> None:
    assert IMPORTANCES[name].importance is FOUR[name]
    assert IMPORTANCES[name].unit is None


@pytest.mark.parametrize("name", TRAINING_RULES)
@pytest.mark.parametrize("net", LABORATORY)
def test_the_networks_of_the_laboratory_train_under_every_rule(net: str, name: str) -> None:
    model, channel_map, x, y = laboratory(net)
    plain = copy.deepcopy(model)
    rule = TRAINING_RULES[name].schedule(widths_left=0.5)
    for network, active in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
        for step in range(2):
            network.train()
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            if active:
                rule.after_backward(network, channel_map, step / 2)
            optimizer.step()
            if active:
                rule.after_step(network, channel_map, step / 2, 0.01)
        if active:
            rule.after_epoch(network, channel_map, 1.0)
    ours, theirs = (dict(m.named_parameters()) for m in (model, plain))
    assert all(torch.isfinite(p).all() for p in ours.values())
    assert any(not torch.equal(p, theirs[n]) for n, p in ours.items())


def test_every_run_has_a_rule_of_its_own() -> None:
    for published in TRAINING_RULES.values():
        assert published.schedule(widths_left=0.5) is not published.schedule(widths_left=0.5)


# ---- NISP ------------------------------------------------------------------------------------------------------------


def perceptron() -> nn.Sequential:
    """2 - 2 - 3 - 2, with weights that can be multiplied in the head."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
        model.get_parameter("2.weight").copy_(torch.tensor([[1.0, -1.0], [2.0, 0.0], [-3.0, 0.5]]))
    return model


def test_a_perceptron_by_hand() -> None:
    found = nisp.propagated(perceptron(), torch.zeros(1, 2).double(), torch.tensor([1.0, 2.0, 10.0]).double())
    assert found["4.weight"].tolist() == [1, 2, 10]
    assert found["2.weight"].tolist() == [1 * 1 + 2 * 2 + 3 * 10, 1 * 1 + 0 * 2 + 0.5 * 10]
    assert found["0.weight"].tolist() == [1 * 35 + 0.5 * 6, 2 * 35 + 3 * 6]


def test_worth_is_in_units_of_the_mean_of_the_layer() -> None:
    model = perceptron()
    channel_map = trace(model, torch.zeros(2, 2))
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    found = ask(nisp.importance, model, channel_map, [(x[:7], x), (x[7:], x)])
    scores = nisp.final_scores(model[:4](x).detach().numpy())
    last = torch.tensor(scores)
    first = last @ model.get_parameter("2.weight").abs().double()
    torch.testing.assert_close(found["2"], (last / last.mean()).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["0"], (first / first.mean()).float(), rtol=1e-4, atol=1e-5)


def test_final_scores_are_a_sum_over_paths() -> None:
    responses = np.random.default_rng(0).gamma(1.0, size=(15, 5)) * [1, 2, 1, 4, 3]
    responses[:, 2] = responses[:, 0] * 2 + 0.1 * responses[:, 2]
    responses[3:6, 1] = 0  # ties
    rho = spearmanr(responses).statistic
    spread = np.maximum.outer(responses.std(axis=0, ddof=1), responses.std(axis=0, ddof=1))
    spread = (spread - spread.min()) / (spread.max() - spread.min())
    edges = 0.5 * spread + 0.5 * (1 - np.abs(rho))
    step = 0.99 * edges / max(abs(np.linalg.eigvals(edges)))
    paths, power = np.zeros_like(edges), np.eye(5)
    for _ in range(5000):
        power = power @ step
        paths += power
    np.testing.assert_allclose(nisp.final_scores(responses), paths.sum(axis=1), rtol=1e-6)


def test_a_response_that_never_changes_says_nothing() -> None:
    responses = np.random.default_rng(0).normal(size=(10, 4))
    responses[:, 1] = 7.0
    found = nisp.final_scores(responses)
    assert found[1] == pytest.approx(0, abs=1e-12)
    assert found[[0, 2, 3]].min() > 1
    assert nisp.final_scores(np.full((6, 3), 2.0)).tolist() == [1, 1, 1]
    assert nisp.final_scores(np.ones((1, 3))).tolist() == [1, 1, 1]


def back(score: Tensor, model: nn.Module, name: str, padding: int = 1, groups: int = 1) -> Tensor:
    """The scores (1, o, H, W) of what a convolution wrote, carried to what it read."""
    weight = model.get_parameter(f"{name}.weight").detach().abs()
    return F.conv_transpose2d(score, weight, padding=padding, groups=groups)


def through_norm(score: Tensor, norm: nn.Module) -> Tensor:
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    factor = norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
    return score * factor[:, None, None]


def spread_out(final: Tensor, side: int) -> Tensor:
    """The scores in front of global average pooling."""
    return (final / side**2)[None, :, None, None].expand(1, -1, side, side).contiguous()


def sums(score: Tensor) -> Tensor:
    return score.sum((0, 2, 3))


def scored(net: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A net, the scores that come out, and the final scores that went in."""
    model, _, x, _ = tiny(net)
    final = torch.arange(1.0, model.get_submodule("fc").in_features + 1, dtype=torch.float64)
    return model, nisp.propagated(model, x[:1], final), final


def test_scores_go_back_through_convolutions_norms_and_pooling() -> None:
    model, found, final = scored("Plain")
    score = through_norm(spread_out(final, 4), model.get_submodule("norm2"))
    score = back(score, model, "conv2")
    torch.testing.assert_close(found["conv2.weight"], sums(score))
    score = score.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4  # maxima share evenly
    score = back(through_norm(score, model.get_submodule("norm1")), model, "conv1")
    torch.testing.assert_close(found["conv1.weight"], sums(score))


def test_scores_go_back_along_both_ways_of_a_residual_block() -> None:
    model, found, final = scored("Projection")
    stream = spread_out(final, 8)
    branch = back(through_norm(stream, model.get_submodule("norm")), model, "conv2")
    torch.testing.assert_close(found["conv2.weight"], sums(branch))
    inner, shortcut = back(branch, model, "conv1"), back(stream, model, "shortcut", padding=0)
    torch.testing.assert_close(found["conv1.weight"], sums(inner))
    torch.testing.assert_close(found["shortcut.weight"], sums(shortcut))
    torch.testing.assert_close(found["stem.weight"], sums(back(inner + shortcut, model, "stem")))


def test_on_a_stream_no_path_counts_twice_and_the_readers_add_up() -> None:
    model, channel_map, x, y = tiny("Projection")
    found = ask(nisp.importance, model, channel_map, [(x, y)])
    _, calls = watched(model, lambda: model(x))
    final = torch.tensor(nisp.final_scores(calls[-1].source.detach().numpy()))
    scores = nisp.propagated(model, x[:1], final)
    stem = scores["conv1.weight"] + scores["shortcut.weight"]
    torch.testing.assert_close(found["stem"], (stem / stem.mean()).float())
    torch.testing.assert_close(found["conv2"], (final / final.mean()).float())


def test_scores_go_back_through_concatenations() -> None:
    model, found, final = scored("Dense")
    last = spread_out(final, 8)
    into_second = back(last[:, 7:], model, "conv2")
    torch.testing.assert_close(found["conv2.weight"], sums(into_second))
    middle = last[:, :7] + into_second
    torch.testing.assert_close(found["conv1.weight"], sums(back(middle[:, 3:], model, "conv1")))


def test_a_layer_that_is_called_twice_gets_both_scores() -> None:
    model, found, final = scored("CalledTwice")
    second = back(through_norm(spread_out(final, 8), model.get_submodule("norm")), model, "body")
    first = back(through_norm(second, model.get_submodule("norm")), model, "body")
    torch.testing.assert_close(found["body.weight"], sums(first) + sums(second))


class Separable(Headed):
    """A depthwise layer between two others."""

    def __init__(self) -> None:
        super().__init__(5)
        self.first, self.second = conv(3, 4), conv(4, 6)
        self.depthwise, self.last = conv(6, 6, groups=6), conv(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(torch.sigmoid(self.depthwise(F.gelu(self.second(self.first(x).relu_()))))))


def test_scores_go_back_through_a_depthwise_layer_and_any_activation() -> None:
    torch.manual_seed(0)
    model = Separable().double().eval()
    final = torch.arange(1.0, 6.0, dtype=torch.float64)
    found = nisp.propagated(model, torch.zeros(1, 3, 8, 8).double(), final)
    score = back(spread_out(final, 8), model, "last", padding=0)
    torch.testing.assert_close(found["last.weight"], sums(score))
    score = back(back(score, model, "depthwise", groups=6), model, "second")
    torch.testing.assert_close(found["second.weight"], sums(score))


class Gates(Headed):
    """Overlapping maxima, gates, constant factors, differences, in place and not."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__(4)
        self.first, self.pool = conv(3, 4), pool
        self.gate, self.other, self.last = (conv(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.first(x))
        gated = -2 * x
        gated *= torch.sigmoid(self.gate(x))
        gated -= self.other(x)
        return self.head(gated - 0.5 * x * torch.tanh(self.last(x)))


def test_products_and_differences_give_both_sides_their_score_and_maxima_share() -> None:
    torch.manual_seed(0)
    model = Gates(nn.MaxPool2d(3, stride=2, padding=1)).double().eval()
    other = copy.deepcopy(model)
    other.pool = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
    final, image = torch.arange(1.0, 5.0, dtype=torch.float64), torch.zeros(1, 3, 8, 8).double()
    found, averaged = (nisp.propagated(m, image, final) for m in (model, other))
    for name, score in found.items():
        torch.testing.assert_close(score, averaged[name])
    for name in ("gate", "other", "last"):
        weight = model.get_parameter(f"{name}.weight").detach().abs()[:, :, 0, 0]
        torch.testing.assert_close(found[f"{name}.weight"], final @ weight)
    into = spread_out(final, 4)
    into = 2.5 * into + sum(back(into, model, name, padding=0) for name in ("gate", "other", "last"))
    shares = F.avg_pool2d(torch.eye(64).double().view(64, 1, 8, 8), 3, 2, 1, count_include_pad=False).flatten(1)
    score = (into.flatten(2) @ shares.T).view(1, 4, 8, 8)
    torch.testing.assert_close(found["first.weight"], sums(back(score, model, "first")))


# ---- LASSO -----------------------------------------------------------------------------------------------------------


def lasso(columns: np.ndarray, target: np.ndarray, penalty: float) -> np.ndarray:
    """argmin of 1/2 |target - columns b|^2 + penalty |b|_1, one coordinate at a time."""
    b = np.zeros(columns.shape[1])
    for _ in range(3000):
        for i in range(len(b)):
            rest = target - columns @ b + columns[:, i] * b[i]
            slope, curve = columns[:, i] @ rest, columns[:, i] @ columns[:, i]
            b[i] = np.sign(slope) * max(abs(slope) - penalty, 0) / curve
    return b


def test_a_channel_leaves_where_brute_force_sees_it_leave() -> None:
    random = np.random.default_rng(0)
    columns = random.normal(size=(30, 5)) * [1, 4, 2, 0.5, 3]
    columns[:, 1] -= 0.9 * columns[:, 4]  # at odds with another: the path is not that of single channels
    norms = np.array([1.0, 2.0, 0.5, 3.0, 1.5])
    found = channel_lasso.leaving(columns.T @ columns, norms)
    unit, target = columns / norms, columns.sum(axis=1)
    largest = np.abs(unit.T @ target).max()
    assert found.max() == pytest.approx(1)
    for i, at in enumerate(found):
        assert lasso(unit, target, 0.99 * at * largest)[i] != 0
        for above in (1.01, 1.3, 2.0, 5.0):
            assert lasso(unit, target, above * at * largest)[i] == 0
    assert sorted(found) != sorted(np.abs(unit.T @ target) / largest)


def test_a_channel_that_others_make_up_is_left_out() -> None:
    columns = np.random.default_rng(0).normal(size=(20, 4))
    columns[:, 3] = columns[:, 0]
    found = channel_lasso.leaving(columns.T @ columns, np.ones(4))
    assert sum(found == 0) == 1
    assert found[[0, 3]].min() == 0
    columns[:, 3] = 0
    assert channel_lasso.leaving(columns.T @ columns, np.array([1.0, 1.0, 1.0, 0.0]))[3] == 0
    assert channel_lasso.leaving(np.zeros((2, 2)), np.ones(2)).tolist() == [0, 0]


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (2, 4)),
    "linear on tokens": (nn.Linear(4, 3), (2, 5, 4)),
    "1d": (nn.Conv1d(4, 3, 3, stride=2, padding=1), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 3)), (2, 4, 7, 6)),
    "2d same": (nn.Conv2d(4, 3, (4, 3), padding="same", dilation=2), (2, 4, 7, 6)),
    "2d valid": (nn.Conv2d(4, 3, 3, padding="valid", bias=False), (2, 4, 5, 6)),
    "2d reflected": (nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 6)),
    "3d": (nn.Conv3d(4, 3, (1, 2, 3), padding=(0, 1, 1)), (2, 4, 3, 4, 5)),
    "transposed 1d": (nn.ConvTranspose1d(4, 3, 3, stride=2), (2, 4, 5)),
    "transposed 2d": (
        nn.ConvTranspose2d(4, 3, (3, 4), stride=(2, 3), padding=1, output_padding=(1, 0), dilation=(2, 1)),
        (2, 4, 5, 4),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", LAYERS)
def test_patches_times_weights_are_what_a_layer_writes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = LAYERS[kind]
    layer = copy.deepcopy(layer).double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (reading,) = channel_lasso._readings(layer, x)
    plain = reading.call.out.detach().movedim(reading.call.dim, -1)
    if "bias" in dict(layer.named_parameters()):
        plain = plain - layer.get_parameter("bias").detach()
    plain = plain.reshape(len(x), -1, 3)
    fractions = torch.rand(len(x), 10, generator=torch.Generator().manual_seed(0))
    count = plain.size(1)
    written = reading.patches(fractions).detach() @ reading.weight
    if count > channel_lasso._PATCHES:
        expected = torch.stack([plain[i][(fractions[i] * count).long()] for i in range(len(x))])
        torch.testing.assert_close(written, expected.flatten(0, 1))
        monkeypatch.setattr(channel_lasso, "_PATCHES", count)
        written = reading.patches(fractions).detach() @ reading.weight
    torch.testing.assert_close(written, plain.flatten(0, 1))


@pytest.mark.parametrize("net", ["Plain", "Projection", "Concat", "Dense", "Flatten", "Transposed", "OneD"])
def test_leaving_is_averaged_over_readers_that_are_run_channel_by_channel(
    net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_lasso, "_PATCHES", 10**6)
    monkeypatch.setattr(channel_lasso, "_VALUES", 100)  # several pieces
    model, channel_map, x, y = tiny(net)
    found = ask(channel_lasso.importance, model, channel_map, [(x[:4], y[:4]), (x[4:], y[4:])])
    came_in: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, i, n=name: came_in.update({n: i[0].detach()}))
    model(x)
    axes = {place.axis for group in channel_map.groups for place in group.with_role("read")}
    expected: dict[str, list[np.ndarray]] = {group.name: [] for group in channel_map.groups}
    for axis in axes:
        name = axis.name.removesuffix(".weight")
        layer, source = model.get_submodule(name), came_in[name]
        silent = layer(torch.zeros_like(source))
        on_axis = [(g.name, p) for g in channel_map.groups for p in g.with_role("read") if p.axis == axis]
        written, norms = [], []
        for _, place in on_axis:
            for positions in place.index:
                alone = torch.zeros_like(source)
                alone[:, list(positions)] = source[:, list(positions)]
                written.append((layer(alone) - silent).detach().flatten().numpy())
                weight = layer.get_parameter("weight").detach().movedim(axis.dim, 0)
                norms.append(weight[list(positions)].norm().item())
        columns = np.stack(written, axis=1)
        left = channel_lasso.leaving(columns.T @ columns, np.array(norms))
        for (group, _), part in zip(
            on_axis, np.split(left, np.cumsum([len(p.index) for _, p in on_axis])[:-1]), strict=True
        ):
            expected[group].append(part)
    for name, of_readers in expected.items():
        np.testing.assert_allclose(found[name].numpy(), np.mean(of_readers, axis=0), rtol=1e-4, atol=1e-6)


def test_the_seed_decides_which_patches_are_looked_at() -> None:
    model, channel_map, x, y = tiny("Projection")
    one, same, other = (ask(channel_lasso.importance, model, channel_map, [(x, y)], seed)["stem"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ---- relevance -------------------------------------------------------------------------------------------------------


def renyi(kernel: np.ndarray) -> float:
    eigenvalues = np.linalg.eigvals(kernel / np.trace(kernel)).real
    return math.log2(sum(v**1.01 for v in eigenvalues if v > 0)) / (1 - 1.01)


def bits_shared(rows: np.ndarray, labels: np.ndarray, width: float) -> float:
    """The mutual information of one filter's maps and the labels, entry by entry."""
    n = len(rows)
    own, label = np.empty((n, n)), np.empty((n, n))
    for i, j in itertools.product(range(n), repeat=2):
        own[i, j] = math.exp(-((rows[i] - rows[j]) ** 2).sum() / width**2)
        label[i, j] = math.exp(-(0.0 if labels[i] == labels[j] else 2.0) / 0.1**2)
    return renyi(own) + renyi(label) - renyi(own * label)


def layer_width(rows: np.ndarray, labels: np.ndarray) -> float:
    d = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows])
    same = (labels[:, None] == labels).astype(float)
    best, found = -1.0, 0.0
    for width in np.linspace(0.1 * d.mean(), 10 * d.mean(), 75):
        kernel = np.exp(-((d / width) ** 2))
        cosine = (kernel * same).sum() / np.linalg.norm(kernel) / np.linalg.norm(same)
        if cosine > best:
            best, found = cosine, width
    return found


@pytest.mark.parametrize("net", ["Plain", "Projection", "Transposed"])
def test_relevance_from_eigenvalues_of_kernels_written_out(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, channel_map, x, y = tiny(net, count=12)
    monkeypatch.setattr(hrel, "_SAMPLES", 6)
    found = ask(hrel.importance, model, channel_map, [(x[:5], y[:5]), (x[5:], y[5:])])
    written: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, n=name: written.update({n: o.detach()}))
    for group in channel_map.groups:
        expected = np.zeros(group.width)
        for place, half in itertools.product(group.with_role("write"), (slice(0, 6), slice(6, 12))):
            model(x[half])
            out, labels = written[place.axis.name.removesuffix(".weight")].numpy(), y[half].numpy()
            width = layer_width(out.reshape(6, -1), labels)
            shared = [bits_shared(out[:, c].reshape(6, -1), labels, width) for c in range(group.width)]
            expected += np.array(shared) / (2 * len(group.with_role("write")))
        np.testing.assert_allclose(found[group.name].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_map_that_tells_the_label_shares_all_of_it_and_a_constant_one_nothing() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    kernel = hrel.gaussian(hrel._distances(F.one_hot(labels).double()), 0.1)
    assert hrel.entropy(kernel).item() == pytest.approx(math.log2(3))
    telling, constant = kernel, torch.ones(6, 6, dtype=torch.float64)
    found = hrel.information(torch.stack([telling, constant]), kernel)
    assert found.tolist() == pytest.approx([math.log2(3), 0], abs=1e-9)
    unlike = torch.eye(6, dtype=torch.float64)
    assert hrel.entropy(unlike).item() == pytest.approx(math.log2(6))


def test_layers_that_write_nothing_new_have_a_kernel_too() -> None:
    same = torch.zeros(4, 4, dtype=torch.float64)
    assert hrel.best_width(same, torch.eye(4, dtype=torch.float64)) == 1


def test_numbers_for_targets_are_vectors_and_anything_else_says_nothing() -> None:
    model, channel_map, x, y = tiny("Plain")
    by_label = ask(hrel.importance, model, channel_map, [(x, y)])
    by_vector = ask(hrel.importance, model, channel_map, [(x, F.one_hot(y).double())])
    for name in by_label:
        torch.testing.assert_close(by_label[name], by_vector[name])
    pairs = [(x, (y, y))]
    assert all(torch.isnan(w).all() for w in ask(hrel.importance, model, channel_map, pairs).values())  # type: ignore[arg-type]


# ---- scales and factors ----------------------------------------------------------------------------------------------


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model.train()(x), y).backward()


def test_slimming_adds_the_slope_of_the_penalty() -> None:
    model, channel_map, x, y = tiny("Plain")
    model.get_parameter("norm1.weight").data[1] *= -1
    backward(model, x, y)
    rule = slimming.Slimming(strength=0.3)
    rule.after_backward(model, channel_map, 0.0)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    scales = [model.get_parameter(f"norm{i}.weight") for i in (1, 2)]
    (F.cross_entropy(model(x), y) + 0.3 * sum(s.abs().sum() for s in scales)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad)
    assert slimming.Slimming().strength == 1e-4


def test_channels_that_cannot_go_are_not_penalised() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), conv(3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    x, y = torch.randn(6, 3, 2, 2), torch.arange(6) % 2
    channel_map = trace(model, x)
    assert list(channel_map.widths) == ["1"]
    backward(model, x, y)
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    slimming.Slimming().after_backward(model, channel_map, 0.0)
    changed = [n for n, p in model.named_parameters() if p.grad is not None and not torch.equal(p.grad, before[n])]
    assert changed == ["2.weight"]
    rule = sparse_structure.SparseStructure()
    rule.after_backward(model, channel_map, 0.0)
    assert list(rule.known) == ["2.weight"]


class Factored(nn.Module):
    """Plain with factors of their own behind the norms."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain
        self.factors = nn.ParameterList(nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (4, 5))

    def forward(self, x: Tensor) -> Tensor:
        p, (first, second) = self.plain, (f[:, None, None] for f in self.factors)
        x = F.max_pool2d(F.relu(first * p.norm1(p.conv1(x))), 2)
        x = F.avg_pool2d(F.relu(second * p.norm2(p.conv2(x))), 2)
        out: Tensor = p.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


def test_factors_inside_the_norms_train_as_factors_behind_them() -> None:
    model, channel_map, x, y = tiny("Plain")
    explicit = Factored(copy.deepcopy(model))
    rule = sparse_structure.SparseStructure(strength=0.4)
    ours = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    theirs = torch.optim.SGD(explicit.plain.parameters(), 0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    velocity = [torch.zeros_like(f) for f in explicit.factors]
    for step in range(12):
        lr = 0.1 / (1 + step / 2)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = lr
        backward(model, x, y)
        rule.after_backward(model, channel_map, step / 12)
        ours.step()
        rule.after_step(model, channel_map, step / 12, lr)
        backward(explicit, x, y)
        theirs.step()
        for k, f in enumerate(explicit.factors):
            assert f.grad is not None
            z = F.softshrink(f.data - lr * f.grad, lr * 0.4)
            velocity[k] = z - f.data + 0.9 * velocity[k]
            f.data = (z + 0.9 * velocity[k]).clamp_min(0)
        for k, norm in enumerate(("norm1", "norm2")):
            for part in ("weight", "bias"):
                product = explicit.plain.get_parameter(f"{norm}.{part}") * explicit.factors[k]
                torch.testing.assert_close(model.get_parameter(f"{norm}.{part}"), product)
        torch.testing.assert_close(model.get_parameter("conv1.weight"), explicit.plain.get_parameter("conv1.weight"))
    factors = torch.cat([f.data for f in explicit.factors])
    assert factors.min() == 0 < factors.max()
    found = ask(sparse_structure.importance, model, channel_map, [])
    assert torch.equal(torch.cat([found["conv1"], found["conv2"]]) == 0, factors == 0)


def test_factors_start_anew_where_a_norm_was_resized() -> None:
    model, channel_map, x, y = tiny("Plain")
    rule = sparse_structure.SparseStructure()
    backward(model, x, y)
    rule.after_backward(model, channel_map, 0.0)
    rule.after_step(model, channel_map, 0.0, 0.1)
    channel_map = resize_(model, {"conv1": IndexMap.removing([0], 4)}, example_inputs=x)
    backward(model, x, y)
    rule.after_backward(model, channel_map, 0.5)
    rule.after_step(model, channel_map, 0.5, 0.1)
    assert {n: len(f.factor) for n, f in rule.known.items()} == {"norm1.weight": 3, "norm2.weight": 5}


def test_soft_thresholds_by_hand() -> None:
    values = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
    assert sparse_structure.soft(values, 1.0).tolist() == [-1, 0, 0, 0, 1]


def test_the_length_of_scale_and_bias() -> None:
    model, channel_map, _, _ = tiny("Plain")
    model.get_parameter("norm1.weight").data.copy_(torch.tensor([-3.0, 0.0, 1.0, 0.0]))
    model.get_parameter("norm1.bias").data.copy_(torch.tensor([4.0, 2.0, 0.0, 0.0]))
    assert ask(sparse_structure.importance, model, channel_map, [])["conv1"].tolist() == [5, 2, 1, 0]
    model, channel_map, _, _ = tiny("Flatten")
    assert all(torch.isnan(w).all() for w in ask(sparse_structure.importance, model, channel_map, []).values())


# ---- soft pruning ----------------------------------------------------------------------------------------------------

SILENCED = (
    "Plain", "Projection", "Identity", "Concat", "Dense", "Depthwise", "DepthwiseMultiplier", "Grouped", "Flatten",
    "Transposed", "CalledTwice", "InPlace", "Prelu",
)  # fmt: skip


def zeroed(model: nn.Module, channel_map: ChannelMap, group: str) -> set[int]:
    """The channels whose filters are zero in all layers that write them."""
    found = []
    for place in channel_map.group(group).with_role("write"):
        owner, parametrized, _ = place.axis.name.partition(".parametrizations.")
        weight = model.get_submodule(owner).weight if parametrized else model.get_parameter(place.axis.name)
        rows = weight.detach().movedim(place.axis.dim, 0).flatten(1)
        found.append({c for c, positions in enumerate(place.index) if not rows[list(positions)].any()})
    return set.intersection(*found)


def without_zeroed(model: nn.Module, channel_map: ChannelMap, x: Tensor) -> nn.Module:
    small = copy.deepcopy(model)
    plan = {g.name: IndexMap.removing(zeroed(model, channel_map, g.name), g.width) for g in channel_map.groups}
    resize_(small, plan, example_inputs=x)
    return small


@pytest.mark.parametrize("net", SILENCED)
def test_the_silenced_network_is_the_resized_one(net: str) -> None:
    model, channel_map, x, _ = tiny(net)
    before = model(x)
    soft.Soft(widths_left=0.5).after_epoch(model, channel_map, 1.0)
    for group in channel_map.groups:
        assert group.width - len(zeroed(model, channel_map, group.name)) == max(1, round(group.width * 0.5))
    small = without_zeroed(model, channel_map, x)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small(x), model(x))
    assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("net", LABORATORY)
def test_the_silenced_network_is_the_resized_one_in_the_laboratory(net: str) -> None:
    model, channel_map, x, _ = laboratory(net)
    soft.Soft(widths_left=0.5).after_epoch(model, channel_map, 1.0)
    torch.testing.assert_close(without_zeroed(model, channel_map, x[:2])(x), model(x), rtol=1e-3, atol=1e-4)


def test_under_weight_norm_a_filter_becomes_zero_by_its_size() -> None:
    """Its direction cannot be zero. (Without these channels the next layer would be normalised otherwise.)"""
    model, channel_map, x, _ = tiny("WeightNorm")
    for progress in (0.5, 1.0):
        soft.Soft(widths_left=0.5).after_epoch(model, channel_map, progress)
        assert {name: len(zeroed(model, channel_map, name)) for name in channel_map.widths} == {"conv1": 2, "conv2": 3}
        assert torch.isfinite(model(x)).all()


def test_the_weakest_filters_become_zero_and_all_else_stays() -> None:
    model, channel_map, _, _ = tiny("Projection")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    norms = {
        "stem": before["stem.weight"].flatten(1).norm(dim=1),
        "conv1": before["conv1.weight"].flatten(1).norm(dim=1),
        "conv2": before["conv2.weight"].flatten(1).norm(dim=1) + before["shortcut.weight"].flatten(1).norm(dim=1),
    }
    soft.Soft(widths_left=0.7).after_epoch(model, channel_map, 0.5)
    gone = {name: set(n.argsort()[: len(n) - round(0.7 * len(n))].tolist()) for name, n in norms.items()}
    assert gone == {name: zeroed(model, channel_map, name) for name in norms}
    writers = {"stem": "stem", "conv1": "conv1", "conv2": "conv2", "shortcut": "conv2"}
    for layer, group in writers.items():
        before[f"{layer}.weight"][list(gone[group])] = 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize(("progress", "trains"), [(0.5, True), (1.0, False)])
def test_a_zeroed_filter_gets_gradients_until_the_end(progress: float, trains: bool) -> None:
    """A norm with a scale of zero would let none through: the reason why it is left alone until then."""
    model, channel_map, x, y = tiny("Plain", count=20)
    soft.Soft(widths_left=0.5).after_epoch(model, channel_map, progress)
    gone = list(zeroed(model, channel_map, "conv1"))
    backward(model, x, y)
    gradient = model.get_parameter("conv1.weight").grad
    assert gradient is not None
    assert bool(gradient[gone].any()) == trains


def test_one_filter_of_every_layer_stays() -> None:
    model, channel_map, _, _ = tiny("Plain")
    soft.Soft(widths_left=0.01).after_epoch(model, channel_map, 1.0)
    assert {name: len(zeroed(model, channel_map, name)) for name in channel_map.widths} == {"conv1": 3, "conv2": 4}


def test_statistics_of_norms_are_left_alone() -> None:
    model, channel_map, _, _ = tiny("Plain")
    before = {n: b.clone() for n, b in model.named_buffers()}
    soft.Soft(widths_left=0.25).after_epoch(model, channel_map, 1.0)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="above 0, at most 1"):
        soft.Soft(widths_left=share)


def test_the_asymptotic_share_goes_through_the_points_of_the_paper() -> None:
    assert [asymptotic.reached(t) for t in (0.0, 1 / 8, 1.0)] == pytest.approx([0, 3 / 4, 1], abs=1e-9)
    rising = [asymptotic.reached(t / 20) for t in range(21)]
    assert rising == sorted(set(rising))
    # On a curve a exp(-k t) + b, steps of equal length shrink by the same factor.
    steps = np.diff(rising)
    np.testing.assert_allclose(steps[1:] / steps[:-1], math.exp(-asymptotic.RATE / 20))


def test_the_asymptotic_rule_zeroes_few_filters_at_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 40), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 2))
    channel_map = trace(model, torch.zeros(2, 3, 4, 4))
    counts = {}
    for name, progress in itertools.product(("soft", "asymptotic"), (0.02, 1 / 8, 1.0)):
        trained = copy.deepcopy(model)
        TRAINING_RULES[name].schedule(widths_left=0.4).after_epoch(trained, channel_map, progress)
        counts[name, progress] = len(zeroed(trained, channel_map, "0"))
    assert [counts["soft", p] for p in (0.02, 1 / 8, 1.0)] == [24, 24, 24]
    assert counts["asymptotic", 0.02] < 0.3 * 24
    assert [counts["asymptotic", p] for p in (1 / 8, 1.0)] == [18, 24]
