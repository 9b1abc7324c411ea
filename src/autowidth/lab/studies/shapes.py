"""How much the shape of a network wins at equal cost: shapes that are trained, a model of them, its best ones.

    python -m autowidth.lab.studies.shapes --data cifar10:PATH --setting resnet20-mini --out results

A study trains many shapes (widths per channel group) of one network, all within one percent of the dense MACs, by one
recipe, and measures them on training images that are held out (settings: `shape_settings.py`):

    the first shapes: uniform width, shapes that our runs found, structured and random directions around them
    rounds: a model of accuracy over log widths is fitted to all that was trained; it proposes the next `ROUND` shapes
    the end: the best five by the model, uniform width and ours, on three seeds, on held-out and on test images

Every training is a unit of the suite `shapes` of lab/bench.py: one file when it has ended, so that the command goes on
where it was killed. What a model proposed is kept in OUT/shapes/plans/SETTING.json, so that it is asked once.

The seed of weights and order rotates over 0, 1, 2 from shape to shape. Each shape is trained once, so the noise of a
seed stays in its accuracy; were all trained with one seed, what this seed's order of images happens to favour would
look like a property of shapes. Rotated, it is noise like any other, and the model averages it out over neighbours.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autowidth.engine import AutoWidth
from autowidth.lab.bench import BenchError, Outcome, Record, Suite, Unit, bench, logged, nameless, write_whole
from autowidth.lab.fine_tuning import AT_ONCE, LIMITS, LOOKED_AT
from autowidth.lab.loop import Method
from autowidth.lab.loop_parts import evaluate, evaluated_at_once
from autowidth.lab.methods import Task, fresh_network
from autowidth.lab.prepare import load_images
from autowidth.lab.result import Result
from autowidth.lab.shrinking import reviewed
from autowidth.lab.studies.published import ToShape, as_published, published_resnet
from autowidth.lab.studies.shape_settings import SETTINGS, Setting, is_ours, space_of, training_of, uniform_shape
from autowidth.lab.studies.shapes_report import draw, table
from autowidth.lab.studies.surrogate import Surrogate, proposals
from autowidth.lab.studies.widths import Shape, Space, log_widths, random_direction, structured
from autowidth.policy import Budget, Limits, Never, Policy, Schedule
from autowidth.review.review import Importance
from autowidth.review.untrained import STEPS, review_, reviews_for, untrained

ROUND = 15
"""Shapes that the model proposes at a time."""

SEEDS = (0, 1, 2)

GLIMPSED = 2048
"""Held-out images on which a training is looked at before its end."""

OWN = "own-run"
"""The origin of a run in which our engine chooses the widths; its record stays out of the model of shapes."""

FINALISTS = 5
"""Shapes, best by the model, that are repeated on all seeds at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A shape to train from a seed; no widths: our engine chooses them.

    origin: where the shape comes from in a word; source: the run that found it, or how it was made; parts: the images
    that it is measured on.
    """

    widths: Shape
    seed: int
    origin: str
    source: str = ""
    parts: tuple[str, ...] = ("held_out",)


# ---- the first shapes ------------------------------------------------------------------------------------------------


def first_trials(name: str, found: Sequence[tuple[str, Shape]]) -> list[Trial]:
    """What is trained before there is a model; `found` are shapes of our runs, with the names of the runs.

    The same list whenever it is called with the same arguments; all widths differ but those of the uniform network,
    which is trained on every seed: its spread is the noise.
    """
    space, uniform = space_of(name), uniform_shape(name)
    trials = [Trial(widths=uniform, seed=seed, origin="uniform") for seed in SEEDS]
    kept = [(run, shape if space.admits(shape) else space.nearest(log_widths(shape))) for run, shape in found]
    ours = [shape for run, shape in kept if shape is not None and is_ours(name, run)][: len(SEEDS)]
    if SETTINGS[name].published:  # the comparison has no runs from published weights
        trials += [Trial(widths=(), seed=s, origin=OWN, source=_own_name(name, s)) for s in SEEDS]
    made = [
        *(("found" if shape in dict(found).values() else "found-scaled", run, shape) for run, shape in kept),
        *(("structured", what, space.nearest(log_widths(uniform) + by)) for what, by in structured(space.cost.names)),
        *_between(space, uniform, ours),
        *_around(space, [uniform], "around-uniform", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 3),
        *_around(space, ours, "around-found", [0.1, 0.2, 0.3, 0.45], 2),
    ]
    seen, by_origin = {uniform}, dict[str, list[Trial]]()
    for origin, source, shape in made:
        if shape is not None and shape not in seen:
            seen.add(shape)
            same = by_origin.setdefault(origin, [])
            same.append(Trial(widths=shape, seed=SEEDS[len(same) % len(SEEDS)], origin=origin, source=source))
    turns = zip_longest(*by_origin.values())  # so that a study that is cut short has seen something of everything
    return trials + [trial for turn in turns for trial in turn if trial is not None]


def _own_name(name: str, seed: int) -> str:
    return f"autowidth-seed{seed}-macs{SETTINGS[name].macs:g}-start1"


def _between(space: Space, uniform: Shape, ours: Sequence[Shape]) -> list[tuple[str, str, Shape | None]]:
    """Shapes on the way from uniform width to ours, and beyond."""
    start = log_widths(uniform)
    return [
        ("between", f"{part:g} of the way to ours", space.nearest(start + part * (log_widths(shape) - start)))
        for part in (0.33, 0.67, 1.25)
        for shape in ours
    ]


def _around(
    space: Space, bases: Sequence[Shape], origin: str, radii: Sequence[float], each: int
) -> list[tuple[str, str, Shape | None]]:
    """`each` shapes in random directions at every radius around every base."""
    generator = np.random.default_rng([len(bases), len(radii)])
    return [
        (
            origin,
            f"radius {radius:g}",
            space.nearest(log_widths(base) + random_direction(len(base), radius, generator)),
        )
        for _ in range(each)
        for radius in radii
        for base in bases
    ]


def found_shapes(folder: Path, model: str) -> list[tuple[str, Shape]]:
    """(Run, widths) of all our runs on this model in a folder of the comparison, random ranks left out.

    A run is named as its file, without the model.
    """
    found: dict[Shape, str] = {}
    files = folder.glob(f"autowidth*-{model}-seed*.json")
    for file in sorted(files, key=lambda f: (not f.name.startswith(f"autowidth-{model}"), f.name)):  # ours name first
        for record in json.loads(file.read_text(encoding="utf-8"))["records"]:
            if record["model"] == model and record["method"] != "autowidth-random":
                found.setdefault(tuple(record["widths"]), file.stem.replace(f"-{model}", ""))
    return [(run, shape) for shape, run in found.items()]


# ---- plans -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Plan:
    """What is to be trained of one setting, in order; it grows when all of it is there."""

    name: str
    file: Path
    count: int
    trials: list[Trial] = field(default_factory=list)

    @classmethod
    def opened(cls, name: str, out: Path, *, count: int, found: Sequence[tuple[str, Shape]]) -> Plan:
        """The plan as it was left in `out`, or a new one with the first shapes."""
        plan = cls(name=name, file=out / "shapes" / "plans" / f"{name}.json", count=count)
        if plan.file.exists():
            kept = json.loads(plan.file.read_text(encoding="utf-8"))
            plan.trials = [Trial(**{**t, "widths": tuple(t["widths"]), "parts": tuple(t["parts"])}) for t in kept]
        else:
            plan.add(first_trials(name, found)[: count + len(SEEDS) - 1])
        return plan

    def add(self, trials: Sequence[Trial]) -> None:
        """Appends to the plan, on disk at once."""
        self.trials += trials
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(asdict(trial)) for trial in self.trials)
        write_whole(self.file, f"[\n{lines}\n]\n")

    def extended(self, records: Sequence[Record]) -> bool:
        """Appends what comes next, given all records so far; False where nothing does."""
        mine = [r for r in records if r["setting"] == self.name and r["part"] == "held_out" and r["origin"] != OWN]
        shapes = [tuple(r["widths"]) for r in mine]
        surrogate = Surrogate.fitted(shapes, [r["accuracy"] for r in mine])
        distinct = list(dict.fromkeys(shapes))
        wanted = min(ROUND, self.count - len(distinct))
        if new := self._retrained([r for r in records if r["setting"] == self.name and r["origin"] == OWN]):
            more = new
        elif wanted > 0:
            near = proposals(space_of(self.name), surrogate, distinct, wanted, seed=len(self.trials))
            more = [
                Trial(widths=w, seed=SEEDS[(len(self.trials) + n) % len(SEEDS)], origin="model")
                for n, w in enumerate(near)
            ]
        else:
            more = self._finals(distinct, surrogate)
        self.add(more)
        return bool(more)

    def _retrained(self, own: Sequence[Record]) -> list[Trial]:
        """The shapes that our engine chose and that are not planned yet, to be trained as all others."""
        space, more = space_of(self.name), list[Trial]()
        for record in own:
            shape = tuple(record["widths"])
            kept = shape if space.admits(shape) else space.nearest(log_widths(shape))
            if kept is not None and all(trial.widths != kept for trial in (*self.trials, *more)):
                origin = "found" if kept == shape else "found-scaled"
                more.append(Trial(widths=kept, seed=record["seed"], origin=origin, source=record["source"]))
        return more

    def _finals(self, shapes: Sequence[Shape], surrogate: Surrogate) -> list[Trial]:
        """Repeats that are not planned yet: the best by the model, uniform, ours; on all seeds, on test images too."""
        if any("test" in trial.parts for trial in self.trials):
            return []
        ranked = [shapes[n] for n in np.argsort(-surrogate.smoothed(shapes))]
        first = {trial.widths: trial for trial in reversed(self.trials) if trial.widths}
        ours = [shape for shape, trial in first.items() if is_ours(self.name, trial.source)]
        picked = dict.fromkeys([uniform_shape(self.name), *ours, *ranked[:FINALISTS]])
        done = {(trial.widths, trial.seed) for trial in self.trials}
        return [
            Trial(
                widths=shape, seed=seed, origin=first[shape].origin, source=first[shape].source,
                parts=("test",) if (shape, seed) in done else ("held_out", "test"),
            )
            for seed in SEEDS
            for shape in picked
        ]  # fmt: skip


# ---- trainings -------------------------------------------------------------------------------------------------------


def suite_of(plans: Sequence[Plan], unit: Callable[[str, Trial], Unit]) -> Suite:
    """All trials of the plans as units, in turn."""
    turns = zip_longest(*([unit(plan.name, trial) for trial in plan.trials] for plan in plans))
    units = tuple(found for turn in turns for found in turn if found is not None)
    return _suite(units)


def _suite(units: tuple[Unit, ...]) -> Suite:
    apart = frozenset({"setting", "widths", "seed", "origin", "source", "parts", "epochs", "data", "weights", "train"})
    return Suite(name="shapes", units=units, run=measure, table=table, apart=apart, draw=draw)


def unit_of(name: str, trial: Trial, data: str, *, epochs: int | None = None, weights: Path | None = None) -> Unit:
    """A training as a unit."""
    widths = ",".join(map(str, trial.widths)) or "autowidth"
    settings: dict[str, Any] = {
        "data": data, "setting": name, "widths": list(trial.widths), "seed": trial.seed, "origin": trial.origin,
        "source": trial.source, "parts": list(trial.parts), "epochs": epochs or SETTINGS[name].train["epochs"],
        "train": {key: value for key, value in SETTINGS[name].train.items() if key != "epochs"},
        "weights": None if weights is None else f"file:{weights}",
    }  # fmt: skip
    command = (
        f"python -m autowidth.lab.studies.shapes --data {nameless(data)} --setting {name} --widths {widths} "
        f"--seed {trial.seed}" + (" --weights PATH" if weights else "")
    )
    kind = "-test" if "test" in trial.parts else ""
    return Unit(name=f"{name}-{widths.replace(',', '-')}-seed{trial.seed}{kind}", settings=settings, command=command)


def measure(settings: Mapping[str, Any]) -> Outcome:
    """Trains one shape: the work of one unit. A record for every part that it is measured on."""
    name = settings["setting"]
    task = task_of(name, settings["data"], settings["seed"], settings["epochs"])
    widths = dict(zip(space_of(name).cost.names, settings["widths"], strict=bool(settings["widths"])))
    policy: Policy = Never()
    if SETTINGS[name].published:
        network = published_resnet(Path(settings["weights"].partition(":")[2]))
        if widths:
            cut(network, widths, task)
        else:
            policy = _by_default(task.macs)
    else:
        network = fresh_network(task, lambda _: widths)
    result, early = glimpsed(name, task, Method(policy=policy), network)
    return Outcome(
        records=[{**_record(settings, task, result, part), "early": early} for part in settings["parts"]], raw=[]
    )


def task_of(name: str, data: str, seed: int, epochs: int | None = None) -> Task:
    """The training of a setting, with its images loaded."""
    training = training_of(name, data, seed, epochs)
    images = load_images(training)
    images = as_published(images) if SETTINGS[name].published else images
    return Task(settings=training, macs=SETTINGS[name].macs, images=images)


def glimpsed(name: str, task: Task, method: Method, network: nn.Module) -> tuple[Result, list[dict[str, float]]]:
    """Trains the network, and what `Glimpses` saw of it, first before the first step."""
    glimpses = Glimpses(SETTINGS[name], task)
    glimpses.look(network, 0)
    return task.trained(method=method, network=network, watch=glimpses), glimpses.seen


def _by_default(macs: float) -> Budget:
    """The budget that a run from given weights has by default."""
    return Budget(macs=macs, schedule=Schedule(**AT_ONCE), limits=Limits(**LIMITS))


def cut(
    network: nn.Module, widths: Mapping[str, int], task: Task, *, importance: Importance | None = None,
    reconstruct: bool = True,
) -> None:  # fmt: skip
    """Brings the network to these widths as a run by default would: in as many steps, by what it answers."""
    policy = untrained(ToShape(widths=widths), reviews_for(_by_default(task.macs)))
    reviewer = reviewed(network, task.settings.model_copy(update={"effort": LOOKED_AT}), task.images, [policy])
    reviewer.importance, reviewer.reconstruct = importance, reconstruct
    for step in reviewer.policy.reviews(STEPS):
        review_(reviewer, step)


class Glimpses:
    """What looks at a training before its end: the loss on the first held-out images, as it is then.

    seen: a dictionary for every look, with `step`, 0 before the first one, and `loss`, nats per image.
    """

    def __init__(self, setting: Setting, task: Task) -> None:
        self.setting, self.task, self.seen = setting, task, list[dict[str, float]]()

    def __call__(self, engine: AutoWidth) -> None:
        """Looks, where this step is one of those that the setting names."""
        if engine.steps in self.setting.early(engine.total_steps):
            self.look(engine.model, engine.steps)

    def look(self, network: nn.Module, step: int) -> None:
        """Notes the loss of the network at this step."""
        batches = islice(self.task.images.plain_batches("held_out", GLIMPSED // 4), 4)
        _, loss = evaluate(network, batches, _layout(self.task))
        self.seen.append({"step": step, "loss": loss})


def _layout(task: Task) -> torch.memory_format:
    return torch.channels_last if task.settings.channels_last else torch.contiguous_format


def _record(settings: Mapping[str, Any], task: Task, result: Result, part: str) -> Record:
    accuracy, loss = result.accuracy, result.loss
    if part == "test":
        batches = task.images.plain_batches("test", evaluated_at_once(task.settings, task.images))
        accuracy, loss = evaluate(result.network, batches, _layout(task))
    space = space_of(settings["setting"])
    return {
        "setting": settings["setting"], "widths": list(result.widths.values()), "macs": result.macs,
        "macs_dense": round(space.macs_dense), "params": result.params,
        "accuracy": accuracy, "loss": loss, "seed": result.seed, "part": part, "epochs": result.epochs,
        "seconds": round(result.cpu_seconds, 2), "origin": settings["origin"], "source": settings["source"],
    }  # fmt: skip


# ---- the study -------------------------------------------------------------------------------------------------------


def study(
    names: Sequence[str], data: str, out: Path, *, processes: int = 1, count: int = 150, found: Path | None = None,
    epochs: int | None = None, weights: Path | None = None,
) -> list[Record]:  # fmt: skip
    """Trains, models and proposes until `count` shapes of each setting and the repeats of the best are there.

    found: a folder of the comparison's units, from which our shapes are taken; weights: the file of published ones.
    Returns all records in `out`. Raises BenchError where weights are missing, and as `bench` does.
    """
    if weights is None and any(SETTINGS[name].published for name in names):
        raise BenchError("a setting with published weights needs their file: pass --weights PATH")
    unit = partial(unit_of, data=data, epochs=epochs, weights=weights)
    shapes = {name: found_shapes(found, SETTINGS[name].model) if found else [] for name in names}
    plans = [Plan.opened(name, out, count=count, found=shapes[name]) for name in names]
    while True:
        suite = suite_of(plans, unit)
        records = bench(suite, out, processes=processes, report=logged)
        extended = [plan.extended(records) for plan in plans]  # all of them, so that settings go on in turn
        if not any(extended):
            return records


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m autowidth.lab.studies.shapes", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="cifar10:PATH, or digits for resnet8-digits")
    parser.add_argument("--setting", action="append", required=True, choices=list(SETTINGS), help="may be repeated")
    parser.add_argument("--out", type=Path, default=Path("results"), help="the folder that holds shapes/")
    parser.add_argument("--found", type=Path, default=Path("results/mini"), help="units of the comparison `mini`")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, one CPU thread each")
    parser.add_argument("--count", type=int, default=150, help="different shapes per setting")
    parser.add_argument("--epochs", type=int, help="epochs of a training; not given: those of the recipe")
    parser.add_argument("--weights", type=Path, help="file of published weights, for settings that start from them")
    parser.add_argument("--widths", help="train this one shape: widths with commas, or autowidth (published)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the one shape")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if asked.widths is None:
        study(
            asked.setting, asked.data, asked.out, processes=asked.processes, count=asked.count, found=asked.found,
            epochs=asked.epochs, weights=asked.weights,
        )  # fmt: skip
        return
    widths = () if asked.widths == "autowidth" else tuple(map(int, asked.widths.split(",")))
    trial = Trial(widths=widths, seed=asked.seed, origin="asked" if widths else OWN)
    units = tuple(
        unit_of(name, trial, asked.data, epochs=asked.epochs, weights=asked.weights) for name in asked.setting
    )
    bench(_suite(units), asked.out)


if __name__ == "__main__":
    main()
