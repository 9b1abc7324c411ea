"""A trained network made smaller without training: where it ends, what norms hold, what is put back, the command."""

from __future__ import annotations

import copy
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from autowidth import Auto, Budget, Effort, Limits, Never, count_macs, shrink_
from autowidth.attach import NothingToResizeError
from autowidth.cli.shrink import _display as shrink_display
from autowidth.lab.data import load
from autowidth.lab.evaluating import evaluate_run
from autowidth.lab.loop_parts import cpu_threads, evaluate
from autowidth.lab.saved import open_run
from autowidth.lab.settings import settings_of
from autowidth.lab.shrinking import HoldoutError, Shrunk, shrink
from autowidth.lab.studies.batch_sizes import BATCHES
from autowidth.lab.studies.batch_sizes import main as batch_sizes
from autowidth.lab.studies.shrink_memory import MIB, Peak, activation_bytes
from autowidth.lab.studies.shrink_memory import main as shrink_memory
from autowidth.policy import BudgetError
from autowidth.review.batches import ProbeError, of_pairs
from autowidth.review.state import corrected_norms, norm_shifts
from autowidth.review.untrained import ShrinkError, reviews_for, untrained
from small_run import trained_on
from test_cli import called, program

PUBLISHED = os.environ.get("PUBLISHED_CIFAR10")
DIGITS = load("digits", holdout=0.2)
X = torch.zeros(2, 1, 8, 8)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A ResNet-8 of half the width that tells digits apart, in evaluation mode."""
    return trained_on(DIGITS, width=0.5, epochs=8).eval()


def accuracy(network: nn.Module) -> float:
    return evaluate(network, DIGITS.plain_batches("test", 500), torch.contiguous_format)[0]


def shrunk(network: nn.Module, **changes: Any) -> nn.Module:
    """A copy of the network, made smaller."""
    copied = copy.deepcopy(network)
    batches = DIGITS.training_batches(64, seed=0)
    shrink_(copied, **{"example_inputs": X, "batches": batches, "loss_fn": F.cross_entropy, "seed": 1, **changes})
    return copied


# ---- the library -----------------------------------------------------------------------------------------------------


def test_a_trained_network_ends_at_its_budget_and_still_tells_digits_apart(trained: nn.Module) -> None:
    before = count_macs(trained, X)
    network = shrunk(trained, policy=Budget(macs=0.75))
    assert count_macs(network, X) <= 0.75 * before
    assert not any(module.training for module in network.modules())
    assert accuracy(trained) > 0.9 and accuracy(network) > accuracy(trained) - 0.05
    random = copy.deepcopy(trained)
    with torch.no_grad():
        for parameter in random.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    assert accuracy(random) < 0.5, "the digits are too easy for this test"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(Budget(macs=0.9), 3), (Budget(macs=0.5), 5), (Budget(params=0.25), 8), (Budget(macs=10**6), 3), (Auto(), 3)],
)
def test_the_more_goes_the_more_reviews_it_takes(policy: Any, expected: int) -> None:
    assert reviews_for(policy) == expected == len(untrained(policy).reviews(1000))
    assert len(untrained(policy, 2).reviews(1000)) == 2


def test_the_history_says_what_was_done(trained: nn.Module) -> None:
    network = copy.deepcopy(trained)
    batches = DIGITS.training_batches(64, seed=0)
    history = shrink_(
        network, example_inputs=X, batches=batches, loss_fn=F.cross_entropy, policy=Budget(params=0.8), reviews=2
    )
    assert len(history) == 2 and history.inserted_total == 0 and history.removed_total > 0
    assert history.events[-1].params == sum(p.numel() for p in network.parameters())
    assert history.events[-1].params <= 0.8 * history.events[0].params_before


def test_the_same_seed_gives_the_same_network(trained: nn.Module) -> None:
    states = [shrunk(trained, policy=Budget(macs=0.8), reviews=1).state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_few_samples_are_divided(trained: nn.Module) -> None:
    x, y = next(iter(DIGITS.training_batches(50, seed=0)))
    network = shrunk(trained, batches=[(x, y)], reviews=1, policy=Budget(macs=0.8))
    assert count_macs(network, X) <= 0.8 * count_macs(trained, X)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"policy": Never()}, ShrinkError, "no schedule of reviews"),
    ({"policy": Budget(macs=0.0001)}, BudgetError, "below the least"),
    ({"policy": Budget(macs=1.5)}, BudgetError, "needs insertion"),
    ({"batches": []}, ProbeError, "no data"),
    ({"batches": iter([])}, ProbeError, "only once"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED)
def test_what_cannot_be_is_refused(
    trained: nn.Module, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        shrunk(trained, **changes)


def test_a_network_without_groups_is_refused() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(NothingToResizeError, match="no channel group"):
        shrunk(flat)


def test_nothing_is_inserted_whatever_the_policy_allows(trained: nn.Module) -> None:
    network = shrunk(trained, policy=Auto(limits=Limits(offer=0.5)), reviews=2)
    assert count_macs(network, X) <= count_macs(trained, X)


# ---- norms -----------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A norm behind a layer whose output can be moved and stretched."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = 1.0, 0.0
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x * self.gain + self.shift)
        return out


def test_corrected_statistics_move_as_the_batches_say_and_not_to_them() -> None:
    torch.manual_seed(0)
    model = Scaled()
    assert isinstance(model.norm.running_mean, Tensor) and isinstance(model.norm.running_var, Tensor)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    mean, var = model.norm.running_mean.clone(), model.norm.running_var.clone()
    batches = [(torch.randn(8, 3, 4, 4), torch.zeros(8)) for _ in range(3)]
    loss = of_pairs(lambda out, y: out.mean())
    shifts = norm_shifts(model, batches, loss, among=frozenset(model.modules()))
    with corrected_norms(model, batches, loss, shifts):
        torch.testing.assert_close(model.norm.running_mean, mean)  # nothing has changed, nothing is changed
        torch.testing.assert_close(model.norm.running_var, var)
    model.gain, model.shift = 2.0, 0.7
    pixels = torch.cat([x for x, _ in batches]).transpose(0, 1).flatten(1)
    with corrected_norms(model, batches, loss, shifts):
        torch.testing.assert_close(model.norm.running_mean, mean + pixels.mean(1) + 0.7)
        torch.testing.assert_close(model.norm.running_var, var * 4, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.norm.running_mean, mean) and torch.equal(model.norm.running_var, var)


def test_norms_keep_what_training_found_where_batches_are_of_something_else(trained: nn.Module) -> None:
    """The probe is brighter than anything that training saw: precise statistics follow, corrected ones do not."""
    batches = [(x * 2 + 2, y) for x, y in DIGITS.training_batches(64, seed=0)]
    found = {
        norms: accuracy(shrunk(trained, batches=batches, policy=Budget(macs=0.9), reviews=1, norms=norms))
        for norms in ("corrected", "precise")
    }
    assert found["corrected"] > found["precise"] + 0.05


def test_a_trial_measures_what_the_removal_leaves(trained: nn.Module) -> None:
    (scored, held_out), network = list(DIGITS.training_batches(256, seed=0))[:2], copy.deepcopy(trained)

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(network.eval()(held_out[0]), held_out[1]))

    before = loss()
    history = shrink_(
        network, example_inputs=X, batches=[scored, held_out], loss_fn=F.cross_entropy, policy=Budget(macs=0.8),
        reviews=1, effort=Effort(probe_samples=256, audit_samples=256),
    )  # fmt: skip
    (event,) = history
    assert event.measured is not None and event.removed
    assert event.measured == pytest.approx(loss() - before, abs=1e-4)


# ---- the command -----------------------------------------------------------------------------------------------------


def table(folder: Path, network: nn.Module, **changes: Any) -> dict[str, Any]:
    torch.save(network.state_dict(), folder / "w.pt")
    settings = {"model": "resnet8", "width": 0.5, "data": "digits", "weights": folder / "w.pt", "holdout": 0.2}
    return {**settings, "device": "cpu", "threads": 1, **changes}


def test_a_network_shrinks_to_a_target_and_is_a_run(trained: nn.Module, tmp_path: Path) -> None:
    told: list[Shrunk] = []
    settings = settings_of(table(tmp_path, trained, out=tmp_path / "run"))
    found = shrink(settings, policy=Budget(macs=0.75), reviews=2, report=told.append)
    assert [state.reviews for state in told] == [0, 1, 2] and told[0].accuracy == found.accuracy_start
    assert found.macs <= 0.75 * found.macs_start and found.widths != found.widths_start
    saved = evaluate_run(tmp_path / "run")
    assert (saved.params, saved.accuracy) == (found.params, accuracy(found.network))


def test_without_a_target_the_last_step_is_taken_back(trained: nn.Module, tmp_path: Path) -> None:
    told: list[Shrunk] = []
    found = shrink(settings_of(table(tmp_path, trained, out=tmp_path / "run")), tolerance=0.02, report=told.append)
    *most, last = told
    assert last.accuracy < found.accuracy_start - 0.02, "the end of all steps came first"
    assert all(state.accuracy >= found.accuracy_start - 0.02 - 1e-9 for state in most)
    assert (found.accuracy, found.macs, found.widths) == (most[-1].accuracy, most[-1].macs, most[-1].widths)
    assert found.macs == count_macs(found.network, X) and len(found.history) == found.reviews == len(most) - 1
    held_out = DIGITS.plain_batches("held_out", 500)
    assert evaluate(found.network, held_out, torch.contiguous_format)[0] == found.accuracy
    assert evaluate_run(tmp_path / "run").params == found.params


def test_small_images_take_one_thread(trained: nn.Module, tmp_path: Path) -> None:
    told: list[int] = []
    with cpu_threads(3):
        settings = settings_of(table(tmp_path, trained, threads=None))
        shrink(settings, policy=Budget(macs=0.9), reviews=1, report=lambda _: told.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 3
    assert told == [1, 1]


def test_images_are_held_out(trained: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(HoldoutError, match="give a share"):
        shrink(settings_of(table(tmp_path, trained, holdout=0.0)))


def test_the_command_shrinks(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    options = ["--weights", str(tmp_path / "w.pt"), "--width", "0.5", "--data", "digits", "--threads", "1"]
    found = program(
        "shrink", "resnet8", *options, "--macs", "0.8", "--reviews", "1", "--json", "--out", str(tmp_path / "run")
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert result["macs"] <= 0.8 * result["macs_start"]
    assert found.stderr.startswith("resnet8 on digits: held-out accuracy ") and "review 1: held-out" in found.stderr
    assert f"({result['accuracy_start']:.2%} before)" in found.stderr
    assert {f.name for f in (tmp_path / "run").iterdir()} == {
        "run.json", "model.safetensors", "history.jsonl", "widths.json",
    }  # fmt: skip
    for wrong, message in (
        (["--macs", "1.5"], "not below the network that is brought"),
        (["--macs", "0.5", "--params", "0.5"], "keep one of them"),
        (["--holdout", "0"], "give a share"),
    ):
        refused = program("shrink", "resnet8", *options, *wrong, "--out", str(tmp_path / "other"))
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1


def test_a_run_is_enough(
    trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_of(table(tmp_path, trained, out=tmp_path / "first", normalize="0.3/0.4"))
    shrink(settings, policy=Budget(macs=0.9), reviews=1)
    options = ("--reviews", "1", "--json", "--device", "cpu", "--threads", "1", "--holdout", "0.2")
    assert called("shrink", "first", "--macs", "0.9", *options, monkeypatch=monkeypatch) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["out"], result["model"], result["data"]) == ("runs/first-shrunk", "resnet8", "digits")
    assert result["params_start"] == evaluate_run(tmp_path / "first").params > result["params"]
    assert open_run("runs/first-shrunk").scaling.mean == (0.3,)
    for wrong, message in (
        (["first", "--width", "0.5"], "which brings its own"),
        (["."], "is a folder without run.json"),
        (["resnet8", "--data", "digits"], "--weights is missing"),
    ):
        capfd.readouterr()
        assert called("shrink", *wrong, monkeypatch=monkeypatch) == 2
        refused = capfd.readouterr().err
        assert message in refused and refused.count("\n") == 1


def test_every_batch_that_a_review_looks_at_is_told(trained: nn.Module, tmp_path: Path) -> None:
    told: list[int] = []
    settings = settings_of(table(tmp_path, trained))
    shrink(settings, policy=Budget(macs=0.9), reviews=1, pulse=lambda: told.append(1))
    assert len(told) > 10


def test_a_terminal_shows_a_bar_that_moves(trained: nn.Module, tmp_path: Path) -> None:
    console = Console(force_terminal=True, width=100, file=io.StringIO())
    with shrink_display(console, 1) as display:
        shrink(
            settings_of(table(tmp_path, trained)), policy=Budget(macs=0.9), reviews=1, report=display.show,
            pulse=display.pulse,
        )  # fmt: skip
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "batches looked at" in text and "reviews" in text and "review 1: held-out accuracy" in text
    assert "\x1b[?25h" in text  # the cursor is shown again


@pytest.mark.slow
@pytest.mark.skipif(PUBLISHED is None, reason="PUBLISHED_CIFAR10 names no folder")
def test_a_published_network_keeps_most_of_its_accuracy(tmp_path: Path) -> None:
    place = Path(PUBLISHED or "")
    settings = settings_of({
        "model": "resnet20-padding", "weights": place / "pretrained-cifar10" / "resnet20.safetensors",
        "data": f"cifar10:{place / 'cifar10-raw'}", "normalize": "imagenet", "holdout": 0.1, "out": tmp_path / "run",
    })  # fmt: skip
    shrink(settings, policy=Budget(macs=0.7))
    assert evaluate_run(tmp_path / "run").accuracy > 0.865


# ---- what it takes ---------------------------------------------------------------------------------------------------


def test_activations_are_what_a_backward_pass_keeps() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 64, 10))
    x, y = torch.randn(5, 1, 8, 8), torch.zeros(5, dtype=torch.long)
    mapped, scores = (
        5 * 3 * 64 * 4,
        5 * 10 * 4,
    )  # the input of the linear layer is what ReLU keeps; log-softmax keeps one
    other = 5 * 1 * 64 * 4 + 5 * 8 + 4  # images, labels, and the weight that the loss is divided by
    assert activation_bytes(network, x, y) == mapped + scores + other
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory as Linux tells it")
def test_the_peak_is_seen_though_it_is_gone_at_the_end() -> None:
    with Peak() as peak:
        much = torch.ones(64 * MIB // 4)
        time.sleep(0.1)
        del much
    assert peak.bytes - peak.before > 60 * MIB


def test_the_study_of_memory_says_what_shrinking_took(capsys: pytest.CaptureFixture[str]) -> None:
    shrink_memory(["--data", "digits", "--model", "resnet8", "--macs", "0.8", "--limit", "256", "--threads", "1"])
    rows = dict(line.strip("| ").split("|", 1) for line in capsys.readouterr().out.splitlines()[1:])
    found = {name.strip(): value.strip() for name, value in rows.items()}
    assert found["network"].endswith("MiB")
    assert found["activations of a batch of 256"].endswith("MiB")
    assert float(found["(peak - 3 networks) / activations"]) > -1
    assert {"of them probe", "of them audit", "of them surgery"} <= set(found)


def test_the_study_of_batch_sizes_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    batch_sizes(["--model", "resnet8", "--size", "8", "--images", "16"])
    rows = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(row[0]) for row in rows] == list(BATCHES)
    assert all(float(row[1]) > 0 for row in rows)
