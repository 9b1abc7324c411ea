"""As small as costs nothing: what is promised is kept, what is killed goes on, and test images decide nothing."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from autowidth.checkpoint import load_, read_run, read_tensors, save
from autowidth.cli import app
from autowidth.cli.display import promise
from autowidth.cost import count_macs
from autowidth.engine import AutoWidth
from autowidth.lab import attempts
from autowidth.lab.attempts import EACH, epochs_for, train_kept
from autowidth.lab.data import ImageSet, digits
from autowidth.lab.guessing import FIRST, HEALING, SMALLEST, WON_BACK, first_share, healed_share, may_be_won_back
from autowidth.lab.judging import Judge, Seen, difference, pairs, parted, seen, varied
from autowidth.lab.keeping import TRAINING, Interrupted
from autowidth.lab.loop import train
from autowidth.lab.loop_parts import Lesson
from autowidth.lab.models import build, resolve
from autowidth.lab.prepare import load_images
from autowidth.lab.result import Progress, Result
from autowidth.lab.resuming import ResumeError, settings_to_resume, unfinished_at
from autowidth.lab.saved import open_run
from autowidth.lab.settings import Settings, renamed, settings_of
from autowidth.policy import Never
from autowidth.trace import trace

SMALL = settings_of(
    {
        "model": "resnet8", "width": 0.5, "epochs": 6, "limit": 400, "batch_size": 32, "threads": 1, "device": "cpu",
        "keep": 100.0, "effort": {"probe_samples": 64, "audit_samples": 64, "audit_filters": 2},
    }
)  # fmt: skip
"""A run that keeps whatever it finds: a hundred points may be lost."""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What a run has saved of its network."""
    return read_tensors(read_run(folder))


def small(**changes: Any) -> Settings:
    return SMALL.model_copy(update=changes)


@pytest.fixture
def whole() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet8", num_classes=10, in_channels=1, width=0.5).eval()


# ---- how far, and for how long ---------------------------------------------------------------------------------------


@given(st.floats(0, 10), st.floats(0, 1), st.floats(0, 1))
def test_more_may_go_where_more_may_be_lost_and_less_is_at_stake(loss: float, allowed: float, more: float) -> None:
    assert SMALLEST <= first_share(loss, allowed + more) <= first_share(loss, allowed) <= FIRST
    assert first_share(loss, allowed) <= first_share(loss + more, allowed)


@given(st.floats(0.05, 1), st.integers(1, 500), st.floats(0.01, 2))
def test_an_attempt_takes_no_longer_than_it_may(share: float, epochs: int, time: float) -> None:
    found = epochs_for(share, time, epochs)
    each = attempts.FIXED + (1 - attempts.FIXED) * share + attempts.TEACHER
    assert 0 <= found <= max(1, round(attempts.MOST * epochs))
    assert found == 0 or (found - 1) / epochs * each + attempts.REVIEWS <= time + 1e-9


def test_few_steps_make_up_for_a_small_removal_only() -> None:
    assert healed_share(0) == 1 and healed_share(HEALING) == 0.5
    assert healed_share(10**6) < 0.001


def test_what_may_be_won_back_is_a_multiple_of_what_may_be_lost() -> None:
    assert may_be_won_back(WON_BACK * 0.01, 0.01) and not may_be_won_back(WON_BACK * 0.0101, 0.01)
    assert may_be_won_back(0.0, 0.0) and may_be_won_back(-1.0, 0.0)


# ---- the judgement ---------------------------------------------------------------------------------------------------


def test_a_network_is_as_good_as_itself_and_a_ruined_one_is_not(whole: nn.Module) -> None:
    trained = train(small(keep=None, policy=Never())).network
    ruined = copy.deepcopy(trained)
    nn.init.zeros_(list(ruined.parameters())[-2])
    for images in (digits(limit=400), digits(limit=400, holdout=0.25)):
        judge = Judge(images, points=0.5, nats=None)
        reference = judge.seen(trained)
        assert judge.verdict(judge.seen(trained), reference).holds
        verdict = judge.verdict(judge.seen(ruined), reference)
        assert not verdict.holds and "tolerated" in verdict.words
        assert ("held-out" in verdict.words) == (images.held_out is not None)
        nats = Judge(images, points=None, nats=100.0)
        assert nats.verdict(nats.seen(ruined), nats.seen(trained)).holds


def test_what_is_tolerated_may_be_lost_and_no_more() -> None:
    """On both sides of the line: points of accuracy where they are named, nats where those are."""
    before = Seen(right=torch.ones(1000, dtype=torch.bool), losses=torch.ones(1000))
    now = {
        lost: Seen(right=torch.arange(1000) >= lost, losses=torch.ones(1000) + lost / 1000) for lost in (0, 9, 10, 11)
    }
    for points, nats in ((1.0, None), (None, 0.01)):
        judge = Judge(digits(limit=100), points=points, nats=nats)
        assert [judge.verdict(seen, before).holds for seen in now.values()] == [True, True, True, False]
    assert "-1.10 ± 0.33 points" in Judge(digits(limit=100), points=1.0, nats=None).verdict(now[11], before).words


def test_a_judgement_looks_at_the_same_pictures_every_time_and_never_at_test_images(whole: nn.Module) -> None:
    images = digits(limit=401)
    hidden = replace(images, test=None)  # type: ignore[arg-type]
    judge = Judge(hidden, points=0.5, nats=None, at_once=64)
    before, state = judge.seen(whole), torch.get_rng_state()
    again = judge.seen(whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(before.losses, again.losses)
    assert len(before.losses) == 2 * 401


def test_pictures_of_a_judgement_are_of_training_images_and_none_is_one() -> None:
    images = digits(limit=300)
    known = torch.cat([x for x, _ in images.plain_batches("train", 300)])
    made = list(Judge(images, points=0.5, nats=None, at_once=50)._made())
    pictures, labels = torch.cat([x for x, _ in made]), torch.cat([y for _, y in made])
    assert pictures.shape == (600, *images.image_shape)
    assert torch.equal(labels.bincount(), 2 * images.train.labels.bincount())
    assert torch.cdist(pictures.flatten(1), known.flatten(1)).min() > 0.1
    mixtures = torch.cat([x for x, _ in made[::2]])
    assert mixtures.flatten(1).std() < known.flatten(1).std()  # a mean of two varies less than one


@pytest.mark.parametrize("count", [1, 7, 40])
def test_pairs_are_of_one_class_and_of_two_pictures(count: int) -> None:
    labels = torch.tensor([3] * 20 + [0] * 2 + [5] * 18)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    source = torch.Generator().manual_seed(1)
    met = set()
    for _ in range(100):
        first, second = pairs(labels, count, source)
        assert len(first) == len(second) == count and len(set(first.tolist())) == count
        assert torch.equal(labels[first], labels[second]) and not (first == second).any()
        met |= set(zip(first.tolist(), second.tolist(), strict=True))
    if count == 40:  # each with every other of its class
        assert len(met) > 0.9 * (20 * 19 + 2 * 1 + 18 * 17)
    alone = torch.tensor([0, 1, 1, 2])
    first, second = pairs(alone, 4, source)
    assert {(0, 0), (1, 2), (2, 1), (3, 3)} == set(zip(first.tolist(), second.tolist(), strict=True))


def test_the_error_of_a_difference_is_that_of_pairs(whole: nn.Module) -> None:
    images = digits(limit=400)
    other = build("resnet8", num_classes=10, in_channels=1, width=0.5).eval()
    first, second = (seen(net, images.plain_batches("train", 100)) for net in (whole, other))
    found = difference(first, second)
    pairs = first.right.double() - second.right.double()
    assert found.accuracy == pytest.approx(first.accuracy - second.accuracy)
    assert found.accuracy_error == pytest.approx(pairs.std().item() / 20)
    assert difference(first, first).accuracy_error == 0


def test_pictures_are_varied_a_little_and_never_the_same_way() -> None:
    pictures = torch.zeros(200, 1, 33, 33)
    pictures[:, :, 16, 16] = 1.0
    moved = varied(pictures, torch.Generator().manual_seed(0))
    assert moved.shape == pictures.shape and torch.isfinite(moved).all()
    places = moved.flatten(1).argmax(1)
    down, right = places // 33 - 16, places % 33 - 16
    assert down.abs().max() <= 4 and right.abs().max() <= 4 and len(set(places.tolist())) > 20


# ---- what a run does -------------------------------------------------------------------------------------------------


def test_the_whole_network_is_that_of_plain_training_and_the_result_is_smaller(tmp_path: Path) -> None:
    told: list[Progress] = []
    result = train_kept(small(out=tmp_path / "run"), report=told.append)
    plain = train(small(keep=None, policy=Never(), out=tmp_path / "plain"))
    assert tensors(tmp_path / "run" / "whole") == Equal(tensors(tmp_path / "plain"))
    kept = result.kept
    assert kept is not None and kept.accuracy == plain.accuracy
    assert result.accuracy - plain.accuracy == pytest.approx(kept.difference)
    assert [attempt.stays for attempt in kept.attempts] == [True]
    assert result.macs == count_macs(result.network, torch.zeros(2, 1, 8, 8)) < result.macs_start == plain.macs
    assert list(result.history.replay())[-1][1] == result.widths and result.widths_start == plain.widths
    assert result.epochs == 6 + kept.attempts[0].epochs
    assert json.loads(json.dumps(result.as_json()))["kept"]["attempts"][0]["stays"] is True
    opened = open_run(tmp_path / "run")
    assert opened.channel_map.widths == result.widths and opened.settings.keep == 100
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["whole"]
    epochs = [p for p in told if p.moment == "epoch"]
    assert [p.epoch for p in epochs] == list(range(1, result.epochs + 1))
    assert [p.step for p in epochs] == [12 * p.epoch for p in epochs]
    assert epochs[-1].macs == result.macs and all(p.macs_start == result.macs_start for p in told)
    assert {event.step for event in result.history.events} == {72}  # before the first step of the attempt


class Equal(dict[str, torch.Tensor]):
    """Tensors by name, equal bit for bit."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and self.keys() == other.keys() and all(
            torch.equal(self[name], other[name]) for name in self
        )  # fmt: skip

    __hash__ = None  # type: ignore[assignment]


def test_what_costs_too_much_is_taken_back_and_nothing_is_gone(tmp_path: Path) -> None:
    result = train_kept(small(keep=None, keep_nats=0.0, out=tmp_path / "run"), report=lambda progress: None)
    assert result.kept is not None and [attempt.stays for attempt in result.kept.attempts] == [False]
    assert (result.macs, result.widths) == (result.macs_start, result.widths_start) and len(result.history) == 0
    assert result.kept.difference == 0 and result.removed == 0
    assert tensors(tmp_path / "run") == Equal(tensors(tmp_path / "run" / "whole"))
    said = promise(result.kept)
    assert "nothing was removed" in said and "+0.00 ± 0.00" in said and "0 of 1 attempt stayed" in said


def test_judgements_take_as_many_threads_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = torch.get_num_threads(), list[int]()

    def seen_with(self: Judge, network: nn.Module) -> Seen:
        found.append(torch.get_num_threads())
        return judged(self, network)

    judged = Judge.seen
    monkeypatch.setattr(Judge, "seen", seen_with)
    train_kept(small(threads=before + 1))
    assert found == [before + 1] * 2 and torch.get_num_threads() == before


def test_without_time_there_is_no_attempt() -> None:
    result = train_kept(small(keep_time=1.0))
    assert result.kept is not None and result.kept.attempts == () and result.macs == result.macs_start
    assert "no attempt" in promise(result.kept)


def test_with_time_there_are_more_attempts_each_from_what_stayed() -> None:
    result = train_kept(small(keep_time=1 + 2 * EACH))
    assert result.kept is not None and len(result.kept.attempts) == 2
    first, second = result.kept.attempts
    assert second.macs < first.macs < 1 and result.macs == pytest.approx(second.macs * result.macs_start)
    assert list(result.history.replay())[-1][1] == result.widths


def test_a_network_that_is_brought_is_the_reference(tmp_path: Path) -> None:
    brought = train(small(keep=None, policy=Never(), out=tmp_path / "brought"))
    given = {**small().model_dump(exclude_unset=True), "weights": tmp_path / "brought", "epochs": 2, "lr": 0.02}
    result = train_kept(settings_of({**given, "out": tmp_path / "run"}))
    assert result.kept is not None and result.kept.accuracy == brought.accuracy == result.accuracy_start
    assert result.epochs == 2 and result.macs < brought.macs
    assert not (tmp_path / "run" / "whole").exists()


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a whole network."""
    out = tmp_path_factory.mktemp("runs") / "brought"
    train(small(keep=None, policy=Never(), out=out))
    return out


def from_weights(brought: Path, **changes: Any) -> Settings:
    given = {**SMALL.model_dump(exclude_unset=True), "weights": brought, "epochs": 2, "lr": 0.02}
    return settings_of({**given, **changes})


def test_from_weights_those_judge_that_attempts_do_not_train_on(brought: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, judges = list[ImageSet](), list[ImageSet]()

    def followed(settings: Settings, **more: Any) -> Result:
        trained.append(more["images"])
        return train(settings, **more)

    def judge(images: ImageSet, **more: Any) -> Judge:
        judges.append(images)
        return Judge(images, **more)

    monkeypatch.setattr(attempts, "train", followed)
    monkeypatch.setattr(attempts, "Judge", judge)
    settings = from_weights(brought)
    result, every = train_kept(settings), load_images(settings).train
    (mine,), (theirs,) = trained, judges
    assert len(mine.train) + len(theirs.train) == len(every)
    assert len(theirs.train) == pytest.approx(0.2 * len(every), abs=5)
    both = torch.cat([mine.train.images, theirs.train.images]).flatten(1)
    assert torch.equal(both.unique(dim=0), every.images.flatten(1).unique(dim=0))
    assert result.kept is not None
    assert f"made of {len(theirs.train)} images set apart" in result.kept.attempts[-1].judged


def test_images_are_parted_the_same_way_each_time_and_not_where_they_are_too_few() -> None:
    images = digits(0)
    (mine, theirs), (again, _), (other, _) = parted(images, 0), parted(images, 0), parted(images, 1)
    assert torch.equal(mine.train.images, again.train.images)
    assert not torch.equal(mine.train.images, other.train.images)
    assert torch.equal(mine.test.images, theirs.test.images)
    few = replace(images, train=images.train.take(torch.arange(2)))
    assert parted(few, 0) == (few, few)


def test_what_narrowing_alone_may_do_needs_no_training(brought: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train_kept(from_weights(brought, keep_time=1.0, out=out))
    assert result.kept is not None and result.epochs == 0 and result.reviews > 0
    (attempt,) = result.kept.attempts
    assert attempt.stays and attempt.epochs == 0 and result.macs == attempt.macs * result.macs_start
    assert list(result.history.replay())[-1][1] == result.widths
    fresh = resolve("resnet8", num_classes=10, in_channels=1, width=0.5)
    load_(fresh, out, example_inputs=torch.zeros(2, 1, 8, 8))
    assert all(
        torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in (fresh, result.network)), strict=True)
    )


def test_an_attempt_that_fails_leaves_what_narrowing_alone_could_do(brought: Path) -> None:
    result = train_kept(from_weights(brought, keep=None, keep_nats=0.3, lr=1.0))  # a rate that ruins the network
    assert result.kept is not None
    alone, trained = result.kept.attempts
    assert (alone.stays, trained.stays) == (True, False) and trained.epochs == 2
    assert result.macs == alone.macs * result.macs_start and result.removed == sum(
        sum(event.removed.values()) for event in result.history
    )


def test_of_a_network_that_loses_by_the_first_step_nothing_is_narrowed_without_training(brought: Path) -> None:
    result = train_kept(from_weights(brought, keep=None, keep_nats=0.0, keep_time=1.0))
    assert result.kept is not None and not result.kept.attempts[0].stays
    assert result.macs == result.macs_start and result.removed == 0 and len(result.history) == 0
    assert "nothing was removed" in promise(result.kept)


def test_the_limits_of_a_policy_hold_in_attempts() -> None:
    policy = {"name": "auto", "limits": {"multiple": 4}}
    result = train_kept(settings_of({**SMALL.model_dump(exclude_unset=True), "policy": policy}))
    changed = [width for name, width in result.widths.items() if width != result.widths_start[name]]
    assert changed and all(width % 4 == 0 for width in changed)


def test_a_lesson_is_the_loss_of_the_labels_where_teacher_and_pupil_agree() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    lesson = Lesson(net, nn.functional.cross_entropy)
    expected = (1 - Lesson.SHARE) * nn.functional.cross_entropy(net(x), y)
    assert lesson(net(x), x, y).item() == pytest.approx(expected.item(), abs=1e-6)
    other = net(x) + torch.tensor([0.0, 1.0, 0.0])
    told = lesson(other, x, y) - (1 - Lesson.SHARE) * nn.functional.cross_entropy(other, y)
    warm = Lesson.WARMTH
    p, q = (scores.div(warm).softmax(1) for scores in (net(x), other))
    divergence = (p * (p / q).log()).sum(1).mean()
    assert told.item() == pytest.approx(Lesson.SHARE * warm**2 * divergence.item(), rel=1e-4)


# ---- what is stopped goes on -----------------------------------------------------------------------------------------


def stopping_at(step: int, *, in_attempt: bool) -> Callable[[AutoWidth], None]:
    """Sends Ctrl-C after this step of the whole network, or of the attempt."""

    def watch(engine: AutoWidth) -> None:
        if engine.steps == step and (len(engine.history) > 0) == in_attempt:
            signal.raise_signal(signal.SIGINT)

    return watch


@pytest.mark.parametrize(
    ("step", "in_attempt"), [(30, False), (7, True)], ids=["in the whole network", "in an attempt"]
)
def test_a_run_that_is_stopped_ends_as_if_it_had_not_been(tmp_path: Path, step: int, in_attempt: bool) -> None:
    undisturbed = train_kept(small(out=tmp_path / "undisturbed"))
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"--resume {out}$"):
        train_kept(small(out=out), watch=stopping_at(step, in_attempt=in_attempt))
    found = unfinished_at(out)
    assert found is not None and found.is_row and not found.finished
    with pytest.raises(ResumeError, match="broken off"):
        train_kept(small(out=out))
    with pytest.raises(ResumeError, match="epochs"):
        settings_to_resume(out, settings_of({"epochs": 9}))
    resumed = train_kept(settings_to_resume(out, settings_of({})), resume=out)
    assert same(resumed, undisturbed)
    assert tensors(out) == Equal(tensors(tmp_path / "undisturbed"))
    assert not (out / TRAINING).exists() and unfinished_at(out) is None


def same(one: Result, other: Result) -> bool:
    """Whether two runs ended alike, but for the time that they took."""
    timed = ("seconds", "cpu_seconds", "review_seconds", "out", "kept", "history", "threads")
    first, second = ({k: v for k, v in r.as_json().items() if k not in timed} for r in (one, other))
    return first == second and [e.maps for e in one.history.events] == [e.maps for e in other.history.events]


def test_a_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train_kept(small(out=tmp_path / "run"), watch=lambda engine: print(1 / 0))
    assert list(tmp_path.iterdir()) == []


# ---- the command -----------------------------------------------------------------------------------------------------


LINE = ["train", "--model", "resnet8", "--width", "0.5", "--epochs", "8", "--limit", "300", "--batch-size", "32"]


def test_the_command_keeps_half_a_point_and_says_how_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*LINE, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kept"]["points"] == 0.5 and result["kept"]["attempts"]
    assert "as small as costs at most 0.5 points" in done.stderr
    assert "the whole network has" in done.stderr and "standard error" in done.stderr
    assert "attempt 1: to" in done.stderr
    assert read_run(Path(result["out"])).extra["settings"]["keep"] == 0.5
    assert (Path(result["out"]) / "report.html").exists()


@pytest.mark.parametrize(
    ("more", "kept"),
    [([], 0.5), (["--set", "policy.limits.multiple=8"], 0.5), (["--config", "named.toml"], None), (["--auto"], None),
     (["--config", "limits.toml", "--keep", "3"], 3.0), (["--policy", "never"], None)],
)  # fmt: skip
def test_who_names_no_policy_gets_the_promise(
    tmp_path: Path, more: list[str], kept: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named.toml").write_text('policy = {name = "auto"}')
    (tmp_path / "limits.toml").write_text("policy = {limits = {multiple = 4}}")
    found: list[Settings] = []

    def stop(settings: Settings, *others: object, **more: object) -> None:
        found.append(settings)

    monkeypatch.setattr("autowidth.cli.train._run", stop)
    assert CliRunner().invoke(app, ["train", *more]).exit_code == 0
    assert [settings.keep for settings in found] == [kept]


@pytest.mark.parametrize("more", [["--keep", "1", "--macs", "0.5"], ["--keep", "1", "--keep-nats", "0.1"],
                                  ["--keep", "1", "--no-edit"], ["--keep", "-1"]])  # fmt: skip
def test_what_excludes_a_promise_is_refused(tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*LINE, *more])
    assert done.exit_code == 2 and "keep" in done.stderr and list(tmp_path.iterdir()) == []


def test_settings_of_older_runs_mean_the_saves_that_stay() -> None:
    old = small().model_dump(mode="json") | {"keep": 2}
    del old["saves"]
    found = settings_of(renamed(old))
    assert found.saves == 2 and found.keep is None
    assert settings_of(renamed(small().model_dump(mode="json"))).keep == 100


def test_the_result_can_be_loaded_like_any_run(tmp_path: Path) -> None:
    result = train_kept(small(out=tmp_path / "run"))
    fresh = build("resnet8", num_classes=10, in_channels=1, width=0.5)
    channel_map = load_(fresh, tmp_path / "run", example_inputs=torch.zeros(2, 1, 8, 8))
    assert channel_map.widths == result.widths
    save(tmp_path / "again", fresh, channel_map=trace(fresh, torch.zeros(2, 1, 8, 8)))
