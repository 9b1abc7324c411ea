"""The suite `published` in parts of a few minutes each, in order; later parts take what earlier ones found best.

    python -m autowidth.lab.studies.published_parts --data cifar10:PATH --weights FOLDER --device cuda
    python -m autowidth.lab.studies.published_parts ... --list        # the commands of the parts, nothing is run
    python -m autowidth.lab.studies.published_parts ... --part 3      # one part alone

Every part is a call of `autowidth bench published`, so that parts can be run one by one, broken off, and go on; all of
them write into one folder, and the last one that ends leaves the tables of all. Which methods are best is told by their
accuracy on held-out images, never on test images.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autowidth.lab.bench import bench, logged
from autowidth.lab.removing import METHODS, SCORES
from autowidth.lab.suites import find_suite

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

OURS, DENSE, MERGING = "autowidth", "dense", "neuron-merging"
TOOLS = tuple(name for name in METHODS if name.startswith("torch-pruning"))
PLAIN = (OURS, DENSE, MERGING, *TOOLS, *SCORES)
"""What table 1 compares, without the combinations with our reconstruction."""

EVERY, TWO = (0.9, 0.8, 0.7, 0.6, 0.5), (0.7, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some units of the suite. `methods` are asked for when the part begins, of the records that are there then."""

    about: str
    table: str
    model: str
    targets: tuple[float, ...]
    methods: Callable[[Sequence[Record]], tuple[str, ...]]
    seeds: tuple[int, ...] = (0,)


def best(records: Sequence[Record], count: int, *, among: Sequence[str], model: str = "resnet20") -> tuple[str, ...]:
    """The methods of most held-out accuracy without training, mean over all that a network has of them, best first.

    Only targets count that all of them have. Where nothing is known yet, the first of them.
    """
    mine = [r for r in records if r["table"] == "no-training" and r["model"] == model and r["method"] in among]
    known = list(dict.fromkeys(r["method"] for r in mine))
    if not known:
        return tuple(among[:count])
    shared = set.intersection(*({r["target"] for r in mine if r["method"] == method} for method in known))
    means = {
        method: statistics.mean(
            [r["accuracy_held_out"] for r in mine if r["method"] == method and r["target"] in shared] or [0.0]
        )
        for method in known
    }
    return tuple(sorted(known, key=lambda method: -means[method])[:count])


def _all(records: Sequence[Record]) -> tuple[str, ...]:
    return PLAIN


def _best_repaired(records: Sequence[Record]) -> tuple[str, ...]:
    """The best three measures with our reconstruction."""
    return tuple(f"{name}-reconstructed" for name in best(records, 3, among=SCORES))


def _ours_and_best(count: int) -> Callable[[Sequence[Record]], tuple[str, ...]]:
    others = tuple(name for name in PLAIN if name not in (OURS, DENSE))
    return lambda records: (OURS, *best(records, count, among=others))


def _tuned(records: Sequence[Record]) -> tuple[str, ...]:
    """What table 2 compares."""
    controls = (DENSE, OURS, "autowidth-on-the-way", "retrained", "uniform")
    return (*controls, *best(records, 2, among=TOOLS), *best(records, 3, among=SCORES))


def _tuned_short(records: Sequence[Record]) -> tuple[str, ...]:
    return (DENSE, OURS, *best(records, 1, among=TOOLS))


PARTS: tuple[Part, ...] = (
    *(
        Part(
            about=f"table 1: all methods, ResNet-20 at {t:.0%}", table="no-training", model="resnet20", targets=(t,),
            methods=_all,
        )
        for t in (0.7, 0.5, 0.8, 0.6, 0.9)
    ),
    Part(
        about="table 1: the best three measures with our reconstruction", table="no-training", model="resnet20",
        targets=EVERY, methods=_best_repaired,
    ),
    Part(
        about="table 1: further seeds of ours and the best three", table="no-training", model="resnet20",
        targets=EVERY, methods=_ours_and_best(3), seeds=(1, 2),
    ),
    *(
        Part(
            about=f"table 1: all methods, ResNet-56 at {t:.0%}", table="no-training", model="resnet56", targets=(t,),
            methods=_all,
        )
        for t in (0.8, 0.7, 0.5, 0.9, 0.6)
    ),
    Part(
        about="table 1: further seeds of ours and the best three", table="no-training", model="resnet56",
        targets=EVERY, methods=_ours_and_best(3), seeds=(1, 2),
    ),
    *(
        Part(
            about="table 1: ours and the best five", table="no-training", model=model, targets=TWO,
            methods=_ours_and_best(5), seeds=(0, 1, 2),
        )
        for model in ("resnet32", "resnet44")
    ),
    *(
        Part(
            about=f"table 2: ResNet-20 at {t:.0%}, seed {seed}", table="fine-tuned", model="resnet20", targets=(t,),
            methods=_tuned, seeds=(seed,),
        )
        for seed in (0, 1, 2)
        for t in (0.5, 0.3)
    ),
    *(
        Part(
            about=f"table 2: ResNet-56, seed {seed}", table="fine-tuned", model="resnet56", targets=(0.5,),
            methods=_tuned_short, seeds=(seed,),
        )
        for seed in (0, 1, 2)
    ),
)  # fmt: skip
"""The parts in their order."""


def command_of(part: Part, methods: Sequence[str], asked: argparse.Namespace) -> str:
    """The command line that runs a part alone."""
    targets, seeds = ",".join(f"{t:g}" for t in part.targets), ",".join(map(str, part.seeds))
    more = "".join(f" --{n} {v}" for n in ("epochs", "limit") if (v := getattr(asked, n)) is not None)
    return (
        f"autowidth bench published --data {asked.data} --weights {asked.weights} --tables {part.table} "
        f"--models {part.model} --methods {','.join(methods)} --budgets {targets} --seeds {seeds} "
        f"--device {asked.device} --processes {asked.processes} --out {asked.out}{more}"
    )


def run(part: Part, asked: argparse.Namespace) -> None:
    """Runs what of a part is not there yet."""
    given = {name: value for name in ("epochs", "limit") if (value := getattr(asked, name)) is not None}
    suite = find_suite(
        "published", data=asked.data, weights=str(asked.weights), tables=(part.table,), models=(part.model,),
        methods=part.methods(records_in(asked.out)), budgets=part.targets, seeds=part.seeds, device=asked.device,
        **given,
    )  # fmt: skip
    bench(suite, asked.out, processes=asked.processes, report=logged)


def records_in(out: Path) -> list[Record]:
    """The records that are there."""
    file = out / "published.json"
    found: list[Record] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return found


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m autowidth.lab.studies.published_parts", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", required=True, help="cifar10:PATH")
    parser.add_argument("--weights", type=Path, required=True, help="the folder with resnet20.safetensors and its like")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--part", type=int, action="append", help="the number of a part; not given: all in order")
    parser.add_argument("--epochs", type=int, help="epochs of table 2; not given: the suite's own")
    parser.add_argument("--limit", type=int, help="training images; not given: the suite's own")
    parser.add_argument("--processes", type=int, default=1, help="units at a time")
    parser.add_argument("--out", type=Path, default=Path("results"), help="the folder that holds published/")
    parser.add_argument("--list", action="store_true", help="print the commands, and run nothing")
    asked = parser.parse_args(arguments)
    if unknown := [n for n in asked.part or () if not 1 <= n <= len(PARTS)]:
        parser.error(f"there is no part {unknown[0]}: give 1 to {len(PARTS)}")
    return asked


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    asked = _read(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for number in asked.part or range(1, len(PARTS) + 1):
        part = PARTS[number - 1]
        logger.info("part %d of %d: %s", number, len(PARTS), part.about)
        if asked.list:
            logger.info("%s", command_of(part, part.methods(records_in(asked.out)), asked))
        else:
            run(part, asked)


if __name__ == "__main__":
    main()
