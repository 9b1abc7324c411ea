"""Answers of a network in place of labels: what is drawn, what the loss then measures, what is refused."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth import Budget, shrink_
from autowidth.lab.models import build
from autowidth.review.answers import TEMPERATURE, Answered, answers_loss
from autowidth.review.batches import ProbeError, samples_of


class Linear(nn.Module):
    """Scores (B, 3) of inputs (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(3 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Flat(nn.Linear):
    """One number a sample, without a dim of its own."""

    def __init__(self) -> None:
        super().__init__(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten()


def test_labels_are_drawn_as_often_as_the_network_thinks() -> None:
    model, x = Linear(), torch.randn(1, 4, generator=torch.Generator().manual_seed(1))
    ((_, labels),) = Answered([x.expand(60_000, 4)], model, seed=0)
    expected = (model(x) / TEMPERATURE).softmax(1)[0]
    assert torch.allclose(labels.bincount(minlength=3) / 60_000, expected, atol=0.01)


def test_the_same_labels_come_again_and_those_of_another_seed_do_not() -> None:
    model, batches = Linear(), [torch.randn(50, 4) for _ in range(3)]
    answered = Answered(batches, model, seed=0)
    first, again = ([labels for _, labels in answered] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = [labels for _, labels in Answered(batches, model, seed=1)]
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    with torch.no_grad():
        model.weight.zero_()  # the answers are those of the network as it was
    assert all(torch.equal(a, labels) for a, (_, labels) in zip(first, answered, strict=True))


def test_nothing_else_draws_otherwise_for_it() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(Answered([torch.zeros(5, 4)], Linear(), seed=0))
    assert torch.equal(torch.rand(3), expected)


def test_the_gradient_is_nothing_on_average_and_the_loss_rises_by_the_divergence() -> None:
    model = Linear()
    x = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(2))
    ((_, labels),) = Answered([x], model, seed=0)
    loss = answers_loss(model(x), labels)
    (gradient,) = torch.autograd.grad(loss, [model.weight])
    noise = TEMPERATURE / len(x) ** 0.5
    assert gradient.abs().max() < 5 * noise
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.weight.add_(0.5 * torch.randn(3, 4, generator=torch.Generator().manual_seed(3)))
        before, after = ((net(x) / TEMPERATURE).log_softmax(1) for net in (model, other))
        divergence = TEMPERATURE**2 * (before.exp() * (before - after)).sum(1).mean()
        rise = answers_loss(other(x), labels) - loss
    assert rise.item() == pytest.approx(divergence.item(), abs=10 * noise)


def test_scores_of_every_position_get_a_label() -> None:
    model = nn.Conv2d(3, 4, 1)
    ((inputs, labels),) = Answered([(torch.randn(2, 3, 5, 6), "whatever")], model, seed=0)
    assert labels.shape == (2, 5, 6) and labels.max() < 4
    assert answers_loss(model(inputs), labels).dim() == 0


@pytest.mark.parametrize(
    ("model", "batch", "said"),
    [
        (nn.Linear(4, 1), torch.zeros(2, 4), "shape \\(2, 1\\)"),
        (Flat(), torch.zeros(2, 4), "shape \\(2,\\)"),
        (nn.LSTM(4, 4), torch.zeros(2, 3, 4), "gives tuple"),
        (nn.Linear(4, 2), {"image": torch.zeros(2, 4)}, "gives a dict"),
    ],
)
def test_what_gives_no_scores_is_refused_with_the_remedy(model: nn.Module, batch: object, said: str) -> None:
    with pytest.raises(ProbeError, match=f"{said}.*loss=, a function of \\(model, batch\\)"):
        list(Answered([batch], model, seed=0))


def test_samples_are_counted_as_those_of_the_batches() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(7, 4), torch.zeros(7)), 3)
    assert samples_of(Answered(loader, Linear(), seed=0)) == 7
    assert samples_of(Answered([torch.zeros(3, 4), torch.zeros(2, 4)], Linear(), seed=0)) == 5
    assert samples_of(Answered((torch.zeros(3, 4) for _ in range(2)), Linear(), seed=0)) is None


# ---- what it is for --------------------------------------------------------------------------------------------------


ByHeart = tuple[nn.Module, list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def by_heart() -> ByHeart:
    """A network that knows its 200 training images by heart, those, and others."""
    from autowidth.lab.data import digits

    images = digits(limit=200)
    batches, others = (list(images.plain_batches(part, 100)) for part in ("train", "test"))
    torch.manual_seed(0)
    network = build("resnet8", in_channels=1, width=0.5)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for _ in range(60):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    x, y = (torch.cat(parts) for parts in zip(*others, strict=True))
    return network.eval(), batches, (x, y)


def test_labels_need_not_be_given(
    by_heart: ByHeart,
) -> None:
    network, batches, (x, _) = by_heart
    ends = []
    for given in (batches, [(x, torch.zeros(len(x))) for x, _ in batches], [x for x, _ in batches]):
        smaller = copy.deepcopy(network)
        shrink_(smaller, example_inputs=x[:2], batches=given, policy=Budget(macs=0.7), reviews=2)
        ends.append(smaller.state_dict())
    assert all(torch.equal(a[key], b[key]) for a, b in pairwise(ends) for key in a)


def test_a_network_that_knows_its_labels_by_heart_goes_on_answering_as_before(
    by_heart: ByHeart,
) -> None:
    network, batches, (x, _) = by_heart
    same = {}
    for name, given in {"answers": {}, "labels": {"loss_fn": F.cross_entropy}}.items():
        alike = []
        for seed in range(3):
            smaller = copy.deepcopy(network)
            shrink_(
                smaller, example_inputs=x[:2], batches=batches, policy=Budget(macs=0.5), seed=seed, norms="precise",
                **given,  # type: ignore[arg-type]
            )  # fmt: skip
            with torch.no_grad():
                alike.append((smaller(x).argmax(1) == network(x).argmax(1)).double().mean().item())
        same[name] = sum(alike) / 3
    assert same["answers"] > same["labels"]
