"""Other people's networks keep the promises of the library, and the examination would see it if they did not."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth import IndexMap, load_, load_state_dict_, resize_, save, trace
from zoo.coverage import Row, broken, code, examine, examined, general, main, read_rows, write_rows
from zoo.memory import peak_during, resident, returning_memory
from zoo.subjects import CONVOLUTIONAL, KNOWN, SUBJECTS, TORCHVISION, Subject
from zoo.torchvision_schemas import import_timm, import_torchvision

SMALL = ("resnet18", "squeezenet1_1")


def needed(subject: Subject) -> None:
    """Skips the test where the library of the subject is not installed."""
    for library in ("torchvision", subject.library):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed: pip install -c constraints.txt -e '.[zoo]'")


# ---- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_small_network_keeps_every_promise(name: str) -> None:
    subject = replace(SUBJECTS[name], pixels=64)
    needed(subject)
    row = examine(subject.build, subject.inputs(), name=name)
    assert broken(row) == []
    assert row.share_free == 1 and row.frozen == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_network_keeps_every_promise(name: str) -> None:
    needed(SUBJECTS[name])
    found = broken(examined(name))
    if name in KNOWN:
        assert len(found) == 1
        assert KNOWN[name] in found[0]
    else:
        assert found == []


def test_the_networks_are_those_that_were_promised() -> None:
    assert len(TORCHVISION) == 23
    assert len(CONVOLUTIONAL) >= 40


# ---- the examination -------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Two convolutions and a head; `between` stands between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(F.relu(self.norm(self.first(x))))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


class Centred(Tiny):
    """A norm across channels that has no parameters to know it by."""

    def between(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Layered(Tiny):
    """A norm across channels with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.across = nn.GroupNorm(1, 8)

    def between(self, x: Tensor) -> Tensor:
        return self.across(x)


class Silent(Tiny):
    """A branch that is switched off as built, and mixes channels once it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(8, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        return x + self.scale * x.mean(1, keepdim=True)


class Untrainable(Tiny):
    """Has no finite loss in training."""

    def between(self, x: Tensor) -> Tensor:
        return x / 0 if self.training else x


class Forgetful(Tiny):
    """Holds something that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = float(torch.rand(()))

    def between(self, x: Tensor) -> Tensor:
        return x + self.offset


class Fixed(Tiny):
    """Has a constant in its code."""

    def between(self, x: Tensor) -> Tensor:
        return x.view(-1, 8, x.size(2), x.size(3))


def row_of(kind: type[Tiny]) -> Row:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return examine(kind, torch.randn(2, 3, 8, 8), name=kind.__name__)


def params(first: int, second: int) -> int:
    """The number of parameters of Tiny at these widths."""
    return (3 * 9 + 1) * first + 2 * first + (first * 9 + 1) * second + (second + 1) * 4


def test_a_plain_network_keeps_every_promise() -> None:
    row = row_of(Tiny)
    assert broken(row) == []
    assert (row.groups, row.share_free, row.crossing) == (2, 1.0, ())
    assert row.params == (params(8, 6), params(7, 6))  # of 8 go 2 and come 1, of 6 go 1 and come 1
    assert None not in [value for key, value in asdict(row).items() if key.split("_")[-1] not in UNUSUAL]


UNUSUAL = ("error", "exact", "crossing", "memory")
"""What is None where all is well, or outside of Linux."""


@pytest.mark.parametrize("kind", [Centred, Silent])
def test_a_changed_function_is_seen(kind: type[Tiny]) -> None:
    found = broken(row_of(kind))
    assert len(found) == 2
    assert found[0].startswith("removal changes") and found[1].startswith("insertion changes")


def test_a_norm_across_channels_is_set_apart_and_listed() -> None:
    row = row_of(Layered)
    assert broken(row) == []
    assert row.crossing == (("GroupNorm", 1),)
    assert row.removal_crossing is not None and row.removal_crossing > 1e-3


def test_a_failure_names_its_stage() -> None:
    row = row_of(Untrainable)
    assert row.error is not None and row.error.startswith("resized: ValueError: the loss is")
    assert broken(row) == [row.error]


def test_a_network_that_does_not_come_back_is_seen() -> None:
    assert broken(row_of(Forgetful)) == ["the loaded network's outputs differ"]


def test_what_is_frozen_is_counted_by_reason() -> None:
    row = row_of(Fixed)
    assert row.share_free == 6 / 14
    assert [channels for _, channels, _ in row.frozen] == [8]
    assert "test_zoo.py" in row.frozen[0][0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"groups": 0}, "no channel group"),
        ({"removal": 1e-4}, "removal"),
        ({"insertion": float("nan")}, "insertion"),
        ({"insertion": 1e-4, "insertion_exact": 1e-4}, "insertion"),
        ({"macs_foreseen": 5}, "foreseen"),
        ({"trace_memory": (300 << 20, 100 << 20)}, "tracing"),
        ({"surgery_memory": (300 << 20, 100 << 20)}, "surgery"),
    ],
)
def test_every_promise_can_be_broken(change: dict[str, Any], word: str) -> None:
    whole = Row(name="a", groups=1, removal=0.0, insertion=0.0, saved=True, macs=(8, 4), macs_foreseen=4)
    assert broken(whole) == []
    assert len(found := broken(replace(whole, **change))) == 1
    assert word in found[0]


def test_rounding_is_no_change_of_the_function() -> None:
    row = Row(name="a", groups=1, removal=1e-4, removal_exact=1e-14, insertion=0.0, saved=True)
    assert broken(row) == []


def test_layers_of_one_kind_share_a_reason() -> None:
    said = [f"shape '[2, 2, {n}, 7]' is invalid for {n * 28} numbers (net.py:33)" for n in (57, 115)]
    assert general(said[0]) == general(said[1])
    assert general(said[0]).endswith("(net.py:33)")


# ---- rows and page ---------------------------------------------------------------------------------------------------


def test_rows_come_back_and_make_a_page(tmp_path: Path) -> None:
    needed(SUBJECTS["resnet10t"])
    rows = {
        name: Row(name=name, code=code(), groups=1, removal=0.0, insertion=0.0, saved=True, frozen=(("why", 3, 1),))
        for name in SUBJECTS
    }
    rows["alexnet"] = Row(name="alexnet", code=code(), error="tracing: a | b")
    results, out = tmp_path / "rows.json", tmp_path / "page.md"
    write_rows(results, rows)
    assert read_rows(results) == rows
    assert main(["--results", str(results), "--out", str(out)]) == 1  # nothing is left to examine; one promise broken
    text = out.read_text()
    assert "a \\| b" in text
    assert all(f"| {name.removesuffix(' (timm)')} " in text for name in SUBJECTS)
    assert str(tmp_path) not in text and "other sources" not in text


# ---- instruments -----------------------------------------------------------------------------------------------------


def test_a_peak_is_seen_after_it_has_passed() -> None:
    if resident() is None or peak_during(lambda: None) is None:
        pytest.skip("this system does not tell the peak of a process")
    with returning_memory():
        before = resident()
        peak = peak_during(lambda: torch.ones(16 << 20).sum())
        after = resident()
    assert before is not None and peak is not None and after is not None
    assert 60 << 20 < peak - before < 100 << 20
    assert after - before < 10 << 20


def test_torchvision_is_imported_whatever_torch_is_installed() -> None:
    needed(SUBJECTS["alexnet"])
    assert import_torchvision().models.get_model("alexnet") is not None
    assert hasattr(torch.ops.torchvision, "nms")


def test_a_missing_library_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError):
        import_timm()


# ---- saved runs and state dicts --------------------------------------------------------------------------------------


def narrowed(subject: Subject) -> tuple[nn.Module, dict[str, int]]:
    """A network of which every channel group that can has lost a third of its channels, and its widths."""
    torch.manual_seed(0)
    model, inputs = subject.build(), subject.inputs()
    plan = {g.name: IndexMap.removing(range(g.width // 3), g.width) for g in trace(model, inputs).groups if g.width > 3}
    return model.eval(), resize_(model, plan, example_inputs=inputs).widths


def check_fresh(subject: Subject, folder: Path) -> None:
    """Fresh networks take the widths and the content of a saved run, and of a state dict."""
    model, widths = narrowed(subject)
    inputs = subject.inputs()
    save(folder, model)
    torch.manual_seed(1)
    for take in (
        lambda fresh: load_(fresh, folder, example_inputs=inputs),
        lambda fresh: load_state_dict_(fresh, model.state_dict(), example_inputs=inputs, widths=widths),
    ):
        fresh = subject.build().eval()
        assert take(fresh).widths == widths
        with torch.no_grad():
            assert torch.equal(fresh(inputs), model(inputs))


FRESH = ("squeezenet1_1", "resnet10t")
"""One network of each library, small."""


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_network_takes_over_a_saved_one(name: str, tmp_path: Path) -> None:
    needed(SUBJECTS[name])
    check_fresh(replace(SUBJECTS[name], pixels=64), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "densenet121", "googlenet", "mobilenet_v3_small", "shufflenet_v2_x1_0", "regnet_y_400mf", "mnasnet1_0",
     "cspresnet50", "dla46_c", "ghostnet_050", "mixnet_s", "hrnet_w18_small", "repghostnet_050", "ese_vovnet19b_dw"],
)  # fmt: skip
def test_fresh_networks_take_over_saved_ones(name: str, tmp_path: Path) -> None:
    needed(SUBJECTS[name])
    check_fresh(replace(SUBJECTS[name], pixels=64), tmp_path)
