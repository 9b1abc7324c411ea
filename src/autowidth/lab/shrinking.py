"""A trained network made smaller on an image set: to a target, or as far as held-out accuracy allows."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autowidth.errors import AutoWidthError
from autowidth.lab.data import ImageSet
from autowidth.lab.loop_parts import augmented_batches, cpu_threads, evaluate, evaluated_at_once, threads_of
from autowidth.lab.prepare import build_network, check_folder, find_device, load_images
from autowidth.lab.result import Resized
from autowidth.lab.saved import save_run
from autowidth.lab.settings import Settings
from autowidth.policy import Budget, BudgetError, Limits, Policy
from autowidth.review.answers import answers_loss
from autowidth.review.batches import of_pairs
from autowidth.review.review import Reviewer
from autowidth.review.untrained import STEPS, review_, untrained
from autowidth.shrink import answered, reviewer_of

STEP = 0.9
"""Share of the MACs that a step leaves where no target is given."""

MOST = 20
"""Steps where no target is given: at most down to an eighth of the MACs."""


class HoldoutError(AutoWidthError, ValueError):
    """No images are held out, on which it could be seen how far to go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk(Resized):
    """How a network stands while it is made smaller, and what came out. Accuracy is a share, on held-out images."""

    model: str
    data: str
    images: int
    reviews: int
    accuracy_start: float
    accuracy: float
    macs_start: int
    macs: int
    params_start: int
    params: int
    widths_start: dict[str, int]
    widths: dict[str, int]
    seconds: float
    out: str | None


def _nobody(shrunk: Shrunk) -> None:
    """Tells nobody."""


def _still() -> None:
    """Tells nobody."""


def shrink(
    settings: Settings,
    *,
    policy: Policy | None = None,
    reviews: int | None = None,
    tolerance: float = 0.005,
    report: Callable[[Shrunk], None] = _nobody,
    pulse: Callable[[], None] = _still,
) -> Shrunk:
    """Makes the network of the settings, with their weights, smaller; with `out` set, writes it there as a run.

    With a policy it ends where that says, in so many reviews, None for as many as it takes. Without one it goes on in
    steps of a tenth of the MACs while held-out accuracy is at most `tolerance` below that of the start, and takes the
    last step back. `report` is called at the start and after every step, `pulse` after every batch that a review looks
    at. Held-out images are set apart from the reviews, not from whoever trained the network: of a network that knows
    its training images by heart they say little.

    Raises HoldoutError, what `train` raises before training, and what `autowidth.shrink_` raises.
    """
    if not settings.holdout:
        raise HoldoutError("holdout is 0, and held-out images say how far to go: give a share, such as 0.1")
    if settings.out is not None:
        check_folder(settings.out)
    device = find_device(settings.device)
    images = load_images(settings).to(device)
    torch.manual_seed(settings.seed)
    network = build_network(settings, images).to(device).eval()
    with cpu_threads(threads_of(settings, images)):
        work = _Work(settings, images, network, None if policy is None else untrained(policy, reviews), pulse)
        result = work.until(None if policy is not None else tolerance, report)
    if settings.out is not None:
        save_run(settings.out, settings, images, result)
    return result


def reviewed(
    network: nn.Module, settings: Settings, images: ImageSet, policies: Iterable[Policy],
    loss: Callable[[Tensor, Tensor], Tensor] = answers_loss,
) -> Reviewer:  # fmt: skip
    """What reviews the network by its own answers, to training images as training sees them.

    By the first policy that its least widths allow, else the last one says why not. Raises as `shrink_` does.
    """
    batches = answered(network, augmented_batches(images, settings.seed), settings.seed)
    *first, last = policies

    def by(policy: Policy) -> Reviewer:
        return reviewer_of(
            network, example_inputs=torch.zeros(2, *images.image_shape, device=images.train.labels.device),
            batches=batches, loss=of_pairs(loss), policy=policy, effort=settings.effort, norms="corrected",
            seed=settings.seed,
        )  # fmt: skip

    for policy in first:
        with contextlib.suppress(BudgetError):
            return by(policy)
    return by(last)


def in_steps(limits: Limits | None = None) -> list[Policy]:
    """Policies in steps of `STEP` of the MACs, `MOST` steps first, then ever fewer."""
    allowed = limits or Limits()
    return [untrained(Budget(macs=STEP**count, limits=allowed), count) for count in range(MOST, 0, -1)]


class _Work:
    """The network that is made smaller, and what it was."""

    def __init__(
        self, settings: Settings, images: ImageSet, network: nn.Module, policy: Policy | None, pulse: Callable[[], None]
    ) -> None:
        self.settings, self.images, self.began, self.pulse = settings, images, time.perf_counter(), pulse
        policies = in_steps() if policy is None else [policy]
        self.reviewer = reviewed(network, settings, images, policies, loss=self._loss)
        self.macs_start, self.params_start = self.reviewer.macs, self.reviewer.params
        self.accuracy_start = self.accuracy()

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """What a batch tells of the network's own answers, of which somebody is told."""
        self.pulse()
        return answers_loss(scores, labels)

    def until(self, tolerance: float | None, report: Callable[[Shrunk], None]) -> Shrunk:
        """All reviews, or those that cost at most this much held-out accuracy."""
        last = self.result(self.accuracy_start)
        report(last)
        for step in self.reviewer.policy.reviews(STEPS):
            if tolerance is not None:
                before = copy.deepcopy(self.reviewer.model)
            review_(self.reviewer, step)
            now = self.result(self.accuracy())
            report(now)
            if tolerance is not None and self.accuracy_start - now.accuracy > tolerance + 1e-9:
                self.reviewer.history.retract(self.reviewer.history.events[-1])
                return self._with(last, before)
            last = now
        return last

    def _with(self, last: Shrunk, network: nn.Module) -> Shrunk:
        """The state before the last step."""
        return replace(last, network=network, seconds=time.perf_counter() - self.began)

    def accuracy(self) -> float:
        """The share of held-out images that are classified rightly."""
        batches = self.images.plain_batches("held_out", evaluated_at_once(self.settings, self.images))
        return evaluate(self.reviewer.model, batches, torch.contiguous_format)[0]

    def result(self, accuracy: float) -> Shrunk:
        """How the network stands now."""
        settings, reviewer = self.settings, self.reviewer
        return Shrunk(
            model=settings.model, data=self.images.name, images=len(self.images.part("held_out")),
            reviews=len(reviewer.history), accuracy_start=self.accuracy_start, accuracy=accuracy,
            macs_start=self.macs_start, macs=reviewer.macs, params_start=self.params_start, params=reviewer.params,
            widths_start=reviewer.history.widths_start, widths=reviewer.channel_map.widths,
            seconds=time.perf_counter() - self.began, out=None if settings.out is None else str(settings.out),
            network=reviewer.model, channel_map=reviewer.channel_map, history=reviewer.history,
        )  # fmt: skip
