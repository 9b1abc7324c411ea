"""How an attempt is best laid out, and whether a judgement on made pictures tells what held-out ones lose; a table.

    python -m autowidth.lab.studies.attempt_layouts --case digits --layouts "aim=0.15 count=2 end=0.03; aim=0.15"

trains the whole network of a case of the suite `default` once, with a part of the training images held out, and makes
one attempt for each layout, whatever its judgement. Layouts are given as settings apart from those of `LAYOUT`. With
`--part` attempts know only this share of the training images, as those from brought weights may, and pictures made of
the others are asked as well. Test images are never looked at.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import typer

from autowidth.lab.data import ImageSet
from autowidth.lab.data.splits import set_apart
from autowidth.lab.judging import Difference, Judge, Seen, difference, seen
from autowidth.lab.loop import Method, train
from autowidth.lab.loop_parts import Lesson
from autowidth.lab.result import Result
from autowidth.lab.settings import Settings, settings_of
from autowidth.lab.suites.default import CASES, Case, images_for
from autowidth.lab.tables import markdown
from autowidth.policy import Budget, Limits, Never, Schedule
from autowidth.review.effort import Effort

HELD_OUT = 5000
"""Images that are held out where there are many; of few, a fifth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """An attempt.

    aim: the share of the MACs that it ends at. count, end: its reviews, and the share of it by which they are over; no
    reviews: it is made smaller before its first step, as attempts are.
    epochs, rate: as shares of those of the whole network. probe, audit: samples that a review looks at. taught: the
    share of the teacher in the loss. diminishing: as in `Limits`.
    """

    aim: float = 0.5
    count: int = 6
    end: float = 0.3
    epochs: float = 0.3
    rate: float = 0.4
    probe: int = 512
    audit: int = 256
    taught: float = Lesson.SHARE
    diminishing: float = 0.0


LAYOUT = Layout()

UNHINDERED = 1e9
"""Nats that a plan may cost beyond what was foretold: the judgement at the end decides, no review before it."""


def layouts(text: str) -> list[Layout]:
    """The layouts in a text such as "aim=0.15 count=2; aim=0.1". Raises ValueError."""
    found = []
    for part in text.split(";"):
        given = dict(word.split("=", 1) for word in part.split())
        if unknown := given.keys() - asdict(LAYOUT).keys():
            raise ValueError(f"a layout has no {min(unknown)}; it has {', '.join(asdict(LAYOUT))}")
        kinds = {name: type(value) for name, value in asdict(LAYOUT).items()}
        changes: dict[str, Any] = {name: kinds[name](value) for name, value in given.items()}
        found.append(replace(LAYOUT, **changes))
    return found


def settings_for(name: str, data: str, seed: int, epochs: int | None = None) -> Settings:
    """The settings of the case's whole network, with images held out beside as many as it has otherwise."""
    case = CASES[name]
    own = dict(case.train)
    limit = own.get("limit")
    own["holdout"] = 0.2 if limit is None else HELD_OUT / (limit + HELD_OUT)
    if limit is not None:
        own["limit"] = limit + HELD_OUT
    if epochs is not None:
        own["epochs"] = epochs
    return settings_of({"model": case.model, "data": data, "seed": seed, "threads": 1, "looks": 1, **own})


class Study:
    """The whole network of a case, and attempts from it, which know `part` of its training images.

    judge: goes by pictures made of these; strangers: one that goes by pictures made of the others, if there are any.
    """

    def __init__(self, case: Case, settings: Settings, part: float = 1.0) -> None:
        self.settings = settings
        images: ImageSet = images_for(settings, case)
        self.whole = train(settings, images=images, method=Method(policy=Never()))
        self.images, *others = _parts(images, part)
        self.judge, *self.strangers = [
            Judge(replace(found, held_out=None), points=0.5, nats=None) for found in (self.images, *others)
        ]
        self.references = [judge.seen(self.whole.network) for judge in (self.judge, *self.strangers)]
        self.held_out, self.known = self._held_out(self.whole), self._known(self.whole)

    def _known(self, result: Result) -> Seen:
        """What becomes of training images as they are."""
        return seen(result.network, self.images.plain_batches("train", 500))

    def _held_out(self, result: Result) -> Seen:
        """What becomes of images that were held out."""
        return seen(result.network, self.images.plain_batches("held_out", 500))

    def row(self, layout: Layout) -> list[str]:
        """The attempt of a layout: what held-out images lose, and what training images tell of it."""
        settings, limits = self.settings, Limits(offer=0.0, max_move=1.0, tolerance=UNHINDERED)
        schedule = Schedule(count=layout.count, begin=0.0, end=layout.end)
        policy = Budget(
            macs=layout.aim, schedule=schedule, limits=replace(limits, diminishing=layout.diminishing)
        )  # fmt: skip
        changes = {
            "policy": policy, "epochs": max(1, round(layout.epochs * settings.epochs)), "schedule": "cosine",
            "lr": layout.rate * settings.lr,
            "effort": Effort(probe_samples=layout.probe, audit_samples=layout.audit),
        }  # fmt: skip
        method = Method(policy=policy, teacher=self.whole.network if layout.taught else None, taught=layout.taught)
        network = copy.deepcopy(self.whole.network)
        result = train(settings.model_copy(update=changes), images=self.images, network=network, method=method)
        lost, known = difference(self._held_out(result), self.held_out), difference(self._known(result), self.known)
        now = [judge.seen(result.network) for judge in (self.judge, *self.strangers)]
        made = [difference(*both) for both in zip(now, self.references, strict=True)]
        return [
            " ".join(f"{name}={value:g}" for name, value in asdict(layout).items() if value != getattr(LAYOUT, name)),
            f"{result.macs / self.whole.macs:.1%}", f"{result.seconds / self.whole.seconds:.2f}",
            *_cells(lost), *(cell for found in made for cell in _cells(found)), f"{100 * known.accuracy:+.2f}",
            "stays" if self.judge.verdict(now[-1], self.references[-1]).holds else "taken back",
        ]  # fmt: skip


def _parts(images: ImageSet, part: float) -> list[ImageSet]:
    """The images with this share of the training images, and with the others, if there are any."""
    if part == 1:
        return [images]
    known, others = set_apart(images.train.labels, 1 - part, torch.Generator().manual_seed(0))
    return [replace(images, train=images.train.take(index)) for index in (known, others)]


def _cells(found: Difference) -> tuple[str, str]:
    """A difference in points, with its standard error, and in nats."""
    return f"{100 * found.accuracy:+.2f} ± {100 * found.accuracy_error:.2f}", f"{found.loss:+.4f}"


def headings(part: float) -> tuple[str, ...]:
    """What `Study.row` says of an attempt that knows this share of the training images."""
    made = ("made, points", "nats", *(("of others, points", "nats") if part < 1 else ()))
    return ("layout", "MACs", "time", "held-out, points", "nats", *made, "training, points", "judged")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study, and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[name for name, case in CASES.items() if case.weights is None], required=True)
    parser.add_argument("--data", default="digits", help="digits, or cifar10:PATH; default digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="of the whole network; default: the case's")
    parser.add_argument("--layouts", default="aim=0.5", help="settings of each, between semicolons")
    parser.add_argument("--part", type=float, default=1.0, help="of the training images that attempts know; default 1")
    asked = parser.parse_args(arguments)
    if not 0 < asked.part <= 1:
        parser.error(f"--part {asked.part:g}: allowed are shares above 0, up to 1")
    torch.set_num_threads(1)
    study = Study(CASES[asked.case], settings_for(asked.case, asked.data, asked.seed, asked.epochs), asked.part)
    rows = [study.row(layout) for layout in layouts(asked.layouts)]
    typer.echo(f"whole network: {study.held_out.accuracy:.2%} of {len(study.held_out.right):,} held-out images")
    typer.echo(markdown(headings(asked.part), rows))


if __name__ == "__main__":
    main()
