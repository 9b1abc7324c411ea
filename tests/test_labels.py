"""Label tensors and the ledger: little memory, every pair once, nobody mixed up."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch

from autowidth.channels import ParamAxis
from autowidth.rules import (
    NEUTRAL,
    Ledger,
    lies_along,
    merged,
    shrunk,
    spread,
    tidy,
)
from autowidth.rules.movement import reshaped


def test_labels_take_no_memory_where_they_are_constant() -> None:
    label = spread(torch.arange(4), (2, 4, 1000, 1000), 1)
    assert lies_along(label) == {1}
    assert label.untyped_storage().nbytes() == 4 * 8
    assert shrunk(label).shape == (1, 4, 1, 1)
    thick = label[:, :, :3, :3].contiguous()
    clean = tidy(thick)
    assert clean is not None
    assert lies_along(clean) == {1}
    assert torch.equal(clean, thick)


def test_tidy_drops_what_has_no_identity() -> None:
    assert tidy(torch.full((2, 3), NEUTRAL)) is None
    assert tidy(torch.zeros(0, 3, dtype=torch.int64)) is None
    assert tidy(torch.tensor([[NEUTRAL, 4]])) is not None


def test_merged_keeps_labels_of_different_dims_apart() -> None:
    ledger = Ledger(batch=1)
    rows, columns = spread(ledger.slots("a", 0, 2), (2, 3), 0), spread(ledger.slots("b", 0, 3), (2, 3), 1)
    assert [sorted(lies_along(d)) for d in merged(ledger, [(rows,), (columns,)], (2, 3))] == [[0], [1]]
    assert ledger.edges == []


@pytest.mark.parametrize("seed", range(40))
def test_reshaped_labels_are_those_of_a_plain_reshape(seed: int) -> None:
    random = Random(seed)
    factors = [random.choice([1, 2, 2, 3]) for _ in range(random.randint(1, 6))]

    def shape() -> list[int]:
        cuts = sorted(random.sample(range(1, len(factors)), random.randint(0, len(factors) - 1)))
        parts = [factors[a:b] for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]
        return [math.prod(part) for part in parts] + [1] * random.randint(0, 2)

    old, new = shape(), shape()
    varying = [n if random.random() < 0.5 else 1 for n in old]
    label = torch.arange(math.prod(varying)).view(varying).expand(old)
    moved = reshaped(label, new)
    assert torch.equal(moved, label.reshape(new))
    assert moved.untyped_storage().nbytes() <= label.reshape(new).untyped_storage().nbytes()


def test_folding_a_weight_takes_no_memory_for_its_filters() -> None:
    label = spread(torch.arange(300), (500, 300, 3, 3), 1)
    assert reshaped(label, (1, 500, 2700)).untyped_storage().nbytes() == 2700 * 8


def test_pairs_are_kept_once() -> None:
    ledger = Ledger(batch=1)
    a, b = ledger.slots("a", 0, 3), ledger.slots("b", 0, 3)
    ledger.unite(a.repeat(10_000), b.repeat(10_000))
    assert [(x.tolist(), y.tolist()) for x, y in ledger.edges] == [([0, 1, 2], [3, 4, 5])]


def test_frozen_channels_stay_channels_apart() -> None:
    ledger = Ledger(batch=1)
    label = spread(ledger.slots("a", 0, 4), (2, 4, 3), 1)
    ledger.freeze((label,), "because")
    ledger.freeze((label,), "again")
    ((_, first), (_, second)) = ledger.edges
    assert len({*first.tolist(), *second.tolist()}) == 8
    assert sorted(ledger.marks.values()) == ["again"] * 4 + ["because"] * 4


def test_rank_of_labels() -> None:
    ledger = Ledger(batch=1)
    played, alike, plain = ledger.slots("a", 0, 2), ledger.slots("b", 2, 2), ledger.slots("c", 1, 2)
    window, mark = ledger.slots("d", 3, 2), ledger.mark("because", 2)
    ledger.unite(alike, played)
    ledger.play(played, "write")
    assert [ledger.rank(label) for label in (played, alike, plain, window, mark)] == [2, 2, 1, 0, 0]


def test_a_weight_mixed_from_others_is_no_use_of_them() -> None:
    ledger = Ledger(batch=2)
    slots = ledger.slots("a", 0, 4)
    ledger.slots("a", 1, 3)
    ledger.use(torch.zeros(3, 4), slots, 8.0)
    ledger.use(torch.zeros(6, 4), slots, 8.0)
    assert [(u.name, u.macs_per_weight) for u in ledger.uses] == [("a", 4.0)]


def test_axis_of_a_label() -> None:
    ledger = Ledger(batch=1)
    ledger.slots("a", 0, 2)
    ledger.slots("b", 1, 3)
    mark = int(ledger.mark("because"))
    assert [ledger.axis_of(i) for i in (0, 1, 2, 4)] == [ParamAxis("a", 0)] * 2 + [ParamAxis("b", 1)] * 2
    assert ledger.axis_of(NEUTRAL) is None
    assert ledger.axis_of(mark) is None
