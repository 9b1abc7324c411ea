"""Fidelity: how well importance measures predict what a filter is worth, against true ablation."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from autowidth.channels import ChannelMap
from autowidth.engine import AutoWidth
from autowidth.lab.baselines import IMPORTANCES
from autowidth.lab.bench import BenchError, Outcome, Record, Suite, Unit, nameless
from autowidth.lab.data import Batches, ImageSet
from autowidth.lab.loop import Method, train
from autowidth.lab.loop_parts import probe_batches
from autowidth.lab.models import spec
from autowidth.lab.plots import fidelity_plot
from autowidth.lab.policies import Watching
from autowidth.lab.prepare import find_device, load_images
from autowidth.lab.result import Result
from autowidth.lab.settings import Settings, settings_of
from autowidth.lab.suites.registry import suite
from autowidth.lab.tables import markdown
from autowidth.review.batches import Batches as AnyBatches
from autowidth.review.batches import of_pairs
from autowidth.review.effort import FULL_AUDIT, FULL_PROBE, Effort
from autowidth.review.profit import combined, profits
from autowidth.review.reconstruct import Reconstruction
from autowidth.review.state import precise_norms, quiet
from autowidth.review.statistics import probe
from autowidth.review.trial import Subject

Array: TypeAlias = NDArray[np.float64]


SHARES = (0.1, 0.3, 0.6, 1.0)
"""When in the run measures are compared, as shares of its steps."""

OURS = ("autowidth", "autowidth-next", "autowidth-own")
"""Our worth as the engine uses it, and its two parts alone; all in nats."""

TRUTHS = ("removed", "compensated")
"""What a measure is compared with: the loss change when a filter is taken from its readers, and the same when these are
reconstructed from its co-channels, as they are when the engine removes filters. The names are those of the records."""

LOSS = of_pairs(F.cross_entropy)

LEAST = 6
"""Sampled filters that a channel group needs before their ranks within it are compared."""

BLOCKS = 10
"""Parts of the truth images; an even number. What is measured on each says how far the truth can be trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much of a data set the fidelity suite uses: training images, images for the truth, images for a measure."""

    models: tuple[str, ...]
    limit: int
    truth: int
    probe: int
    batch_size: int
    pool: int


SCALES: Mapping[str, Scale] = {
    "digits": Scale(models=("resnet20", "vgg8"), limit=1000, truth=400, probe=512, batch_size=64, pool=1),
    "cifar10": Scale(
        models=("resnet20", "vgg8", "densenet22"), limit=20_000, truth=2000, probe=2048, batch_size=128, pool=2
    ),
}
"""The data sets of the fidelity suite, by the first word of the text that names them."""


@suite("fidelity")
def fidelity(
    *,
    data: str | None = None,
    models: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    epochs: int | None = None,
    filters: int = 120,
    limit: int | None = None,
    truth: int | None = None,
    probe_samples: int | None = None,
    width: float = 1.0,
) -> Suite:
    """The suite that compares importance measures with true ablation, at four moments of a run without resizing.

    data: digits (default) or cifar10:PATH, pooled to 16 x 16; models: a unit for each and each of the seeds;
    epochs: 12 if not given; filters: how many are ablated at each moment, at least six of every channel group;
    limit: training images; truth: images on which filters are ablated, from the training file, seen neither by
    training nor by any measure; probe_samples: training images that each measure looks at; width: factor on all
    widths. What is not given is as `SCALES` says. Raises BenchError, UnknownModelError, SettingsError.
    """
    data = data or "digits"
    kind = data.partition(":")[0]
    if kind not in SCALES:
        raise BenchError(f"the suite fidelity does not know the data {data!r}; allowed are digits and cifar10:PATH")
    scale = SCALES[kind]
    chosen = replace(
        scale, limit=limit or scale.limit, truth=truth or scale.truth, probe=probe_samples or scale.probe
    )  # fmt: skip
    for model in models:
        if ":" not in model:
            spec(model)
    units = tuple(
        _unit(chosen, {"model": model, "data": data, "width": width, "epochs": epochs or 12, "seed": seed}, filters)
        for model in models or scale.models
        for seed in seeds
    )
    apart = frozenset({"model", "seed"})
    return Suite(
        name="fidelity", units=units, run=measure_fidelity, table=fidelity_table, apart=apart, draw=fidelity_plot
    )


def _unit(scale: Scale, asked: Mapping[str, Any], filters: int) -> Unit:
    """The unit of one network and one seed. Raises SettingsError."""
    images = scale.limit + scale.truth
    training = settings_of({
        **asked, "batch_size": scale.batch_size, "pool": scale.pool, "threads": 1, "limit": images,
        "holdout": scale.truth / images,
    })  # fmt: skip
    data, model, seed = asked["data"], training.model, training.seed
    settings: dict[str, Any] = {
        "data": data, "model": model, "seed": seed, "filters": filters, "probe_samples": scale.probe,
        "shares": list(SHARES), "training": training.model_dump(mode="json", exclude={"data", "model", "seed", "out"}),
    }  # fmt: skip
    command = f"autowidth bench fidelity --data {nameless(data)} --models {model} --seeds {seed}"
    return Unit(name=f"{model}-seed{seed}", settings=settings, command=f"{command} --epochs {training.epochs}")


def measure_fidelity(settings: Mapping[str, Any]) -> Outcome:
    """Trains a network and compares all measures with true ablation on the way: the work of one unit.

    A record per moment, truth and measure: see `judged`. Raw, per moment: the sampled filters, what was measured on
    each block of the truth images, and what each measure predicted.
    """
    named = {name: settings[name] for name in ("data", "model", "seed")}
    training = Settings.model_validate({**settings["training"], **named})
    images = load_images(training).to(find_device(training.device))
    scoring = _scoring(images, training.seed, settings["probe_samples"])
    blocks = _blocks(images)
    records: list[Record] = []
    raw: list[dict[str, Any]] = []

    def look(share: float, engine: AutoWidth) -> None:
        rng = np.random.default_rng((training.seed, len(raw)))
        found = look_at(engine, scoring, blocks, filters=settings["filters"], rng=rng)
        about = {"model": training.model, "data": images.name, "seed": training.seed, "moment": share}
        samples = {"probe_samples": sum(len(x) for x, _ in scoring), "truth_samples": found.truth_samples}
        records.extend({**about, **record, **samples} for record in judged(found))
        raw.append({"moment": share, "step": engine.steps, "total_steps": engine.total_steps, **_columns(found)})

    watched_run(training, images, settings["shares"], look)
    return Outcome(records=records, raw=raw)


# ---- its effects: training, measures, ablation


WHOLE = Effort(probe_samples=FULL_PROBE, audit_samples=FULL_AUDIT, audit_filters=12)
"""What a review looks at here, however short the run is, where the settings name no effort."""


def watched_run(
    settings: Settings, images: ImageSet, shares: Sequence[float], look: Callable[[float, AutoWidth], None]
) -> Result:
    """Trains by all of these settings but those of the policy: reviews take place, and resize nothing.

    After each of the `shares` of the steps, `look` is called with the share and the engine, of which it must leave the
    network as it was.
    """

    def watch(engine: AutoWidth) -> None:
        for share in shares:
            if engine.steps == max(1, round(share * engine.total_steps)):
                look(share, engine)

    looked = settings.model_copy(update={"effort": settings.effort or WHOLE})
    return train(looked, images=images, watch=watch, method=Method(policy=Watching()))


_SCORING_EPOCH = 2**20
"""An epoch of the probe's order that no review reaches."""


def _scoring(images: ImageSet, seed: int, samples: int) -> list[tuple[Tensor, Tensor]]:
    """Training images for the measures, `samples` of them, not augmented."""
    taken, left = [], min(samples, len(images.train))
    for x, y in probe_batches(images, seed).at(_SCORING_EPOCH):
        taken.append((x[:left], y[:left]))
        left -= len(taken[-1][0])
        if not left:
            break
    return taken


def _blocks(images: ImageSet) -> list[list[tuple[Tensor, Tensor]]]:
    """The held-out images in `BLOCKS` parts of one extent, every tenth image each, in batches."""
    held_out = images.part("held_out")
    count = len(held_out) - len(held_out) % BLOCKS
    order = torch.arange(count, device=held_out.labels.device)
    parts = [held_out.take(order[first::BLOCKS]) for first in range(BLOCKS)]
    return [list(Batches(p, batch_size=500, mean=images.mean, std=images.std, shuffle=False)) for p in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What is known of the sampled filters at one moment: m filters, the truths on b blocks, the predictions.

    group, channel: which filters, m of each; blocks: for each of `TRUTHS` the loss change by ablation on each block of
    images, (b, m), nats per sample; predictions
    and units by measure, (m,) each, NaN where a measure says nothing; seconds: of the measure for all filters;
    coefficients: of (next-layer, own-layer) as the engine had learnt them by then.
    """

    group: tuple[str, ...]
    channel: tuple[int, ...]
    blocks: Mapping[str, Array]
    predictions: Mapping[str, Array]
    units: Mapping[str, str | None]
    seconds: Mapping[str, float]
    coefficients: tuple[float, ...]
    truth_samples: int


def look_at(
    engine: AutoWidth,
    scoring: Sequence[tuple[Tensor, Tensor]],
    blocks: Sequence[Sequence[tuple[Tensor, Tensor]]],
    *,
    filters: int,
    rng: np.random.Generator,
) -> Look:
    """Asks all measures about a random sample of filters, then takes each of these away for real.

    All under norm statistics that are precise for the scoring images, as in a review. The network is left as it was.
    """
    network, channel_map = engine.model, engine.channel_map
    picks = stratified(channel_map.widths, filters, rng)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    with quiet(network) as trained, precise_norms(network, scoring, LOSS, among=trained):
        began = time.perf_counter()
        worths, known = _ours(network, channel_map, scoring, engine.calibration.coefficients)
        seconds = dict.fromkeys(OURS, time.perf_counter() - began)
        for name, published in IMPORTANCES.items():
            began = time.perf_counter()
            worths[name] = published.importance(network, channel_map, scoring, LOSS, generator=generator)
            seconds[name] = time.perf_counter() - began
        measured = {
            truth: np.array([_ablated(network, channel_map, block, how, picks) for block in blocks])
            for truth, how in zip(TRUTHS, ({}, known), strict=True)
        }
    return Look(
        group=tuple(name for name, _ in picks),
        channel=tuple(channel for _, channel in picks),
        blocks=measured,
        predictions={key: np.array([float(w[name][c]) for name, c in picks]) for key, w in worths.items()},
        units={**dict.fromkeys(OURS, "nats"), **{name: published.unit for name, published in IMPORTANCES.items()}},
        seconds=seconds,
        coefficients=engine.calibration.coefficients,
        truth_samples=sum(len(x) for block in blocks for x, _ in block),
    )


def _ours(
    network: nn.Module, channel_map: ChannelMap, scoring: AnyBatches, coefficients: Sequence[float]
) -> tuple[dict[str, Mapping[str, Tensor]], Reconstruction]:
    """The worths by `OURS` and channel group, and the reconstruction of readers, from one probe."""
    found = probe(network, channel_map, scoring, LOSS)
    features = profits(found.sums, channel_map)
    weighed = {"autowidth": tuple(coefficients), "autowidth-next": (1.0, 0.0), "autowidth-own": (0.0, 1.0)}
    worths: dict[str, Mapping[str, Tensor]] = {
        key: {name: combined(f.cpu(), torch.tensor(weights, dtype=torch.float32)) for name, f in features.items()}
        for key, weights in weighed.items()
    }
    return worths, found.known


def _ablated(
    network: nn.Module, channel_map: ChannelMap, block: AnyBatches, known: Reconstruction,
    picks: Sequence[tuple[str, int]],
) -> list[float]:  # fmt: skip
    """The loss change on a block of images, nats per sample, of taking each of these filters away by itself."""
    subject = Subject(
        model=network, channel_map=channel_map, loss=LOSS, scoring=block, held_out=block, trained=frozenset(),
        known=known,
    )  # fmt: skip
    whole = subject.loss_without({})
    return [subject.loss_without({name: [channel]}) - whole for name, channel in picks]


def stratified(widths: Mapping[str, int], count: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """A random sample of (group, channel), as even over the groups as their widths allow, each filter at most once.

    Of every group at least `LEAST` are taken, or all that it has; so there can be more than `count`.
    """
    shares = {name: min(width, max(count // len(widths), LEAST)) for name, width in widths.items()}
    while sum(shares.values()) < min(count, sum(widths.values())):
        open_to = [name for name, width in widths.items() if shares[name] < width]
        least = min(shares[name] for name in open_to)
        shares[str(rng.choice([name for name in open_to if shares[name] == least]))] += 1
    return [
        (name, int(channel))
        for name, width in widths.items()
        for channel in np.sort(rng.choice(width, shares[name], replace=False))
    ]


# ---- its numbers: pure


def judged(look: Look) -> list[Record]:
    """How well each measure predicted each truth at one moment, one record for every pair.

    spearman: rank correlation with the true loss change over all sampled filters of all layers. spearman_within: the
    mean of the rank correlations inside each channel group, see `within`. ceiling_within: what a perfect measure
    could be expected to reach there, see `ceiling`. ratio: median of true / predicted where the measure predicts a
    loss change, else None. count: filters about which the measure says something. seconds: its time for all filters.
    """
    records = []
    for kind, blocks in look.blocks.items():
        truth, best = blocks.mean(axis=0), ceiling(look.group, blocks)
        for name, predicted in _expected(look, kind).items():
            records.append(
                {
                    "truth": kind,
                    "criterion": name,
                    "unit": look.units[name],
                    "spearman": rank_correlation(predicted, truth),
                    "spearman_within": within(look.group, predicted, truth),
                    "ceiling_within": best,
                    "ratio": _ratio(truth, predicted) if look.units[name] == "nats" else None,
                    "count": int(np.isfinite(predicted).sum()),
                    "seconds": round(look.seconds[name], 3),
                }
            )
    return records


def _expected(look: Look, kind: str) -> dict[str, Array]:
    """The predictions of one of `TRUTHS`.

    Without reconstruction our own-layer profit is the next-layer profit (autowidth.probe with no co-channels known),
    and our worth weighs that one alone, with both coefficients.
    """
    predictions = dict(look.predictions)
    if kind == "removed" and "autowidth" in predictions:
        predictions["autowidth"] = sum(look.coefficients) * predictions["autowidth-next"]
    return predictions


def rank_correlation(predicted: Array, truth: Array) -> float | None:
    """Spearman's rank correlation over the filters about which the measure says something.

    Zero where it says the same of all of them: it then ranks no better than chance. None where fewer than three
    filters are left, or the truth is the same for all.
    """
    usable = np.isfinite(predicted) & np.isfinite(truth)
    p, t = predicted[usable], truth[usable]
    if len(p) < 3 or np.ptp(t) == 0:
        return None
    return 0.0 if np.ptp(p) == 0 else float(np.corrcoef(rankdata(p), rankdata(t))[0, 1])


def within(group: Sequence[str], predicted: Array, truth: Array) -> float | None:
    """The mean over channel groups of the rank correlation within each, weighted by its number of filters.

    Groups with fewer than `LEAST` usable filters do not count; None where none is left.
    """
    names, usable = np.array(group), np.isfinite(predicted) & np.isfinite(truth)
    total, weight = 0.0, 0
    for name in dict.fromkeys(group):
        here = usable & (names == name)
        found = rank_correlation(predicted[here], truth[here]) if here.sum() >= LEAST else None
        if found is not None:
            total, weight = total + found * int(here.sum()), weight + int(here.sum())
    return total / weight if weight else None


def ceiling(group: Sequence[str], blocks: Array) -> float | None:
    """What a measure that knows the expected loss change could be expected to reach within groups.

    The truth is measured on finitely many images, in an even number of blocks (b, m). The means over two halves of the
    blocks correlate within groups with r, averaged over all ways to halve them. By Spearman and Brown (1910) the mean
    of all blocks then has the reliability R = 2 r / (1 + r), and its correlation with what it measures is the square
    root of R (Spearman 1904, attenuation). The formulas are for Pearson's correlation and for halves that are alike;
    for ranks they are an approximation, and a poor one where few images make up most of the loss: measures can then
    lie above. Zero where halves do not agree, None where r is not defined.
    """
    numbers = range(len(blocks))
    found = []
    for half in itertools.combinations(numbers, len(blocks) // 2):
        if 0 in half:
            other = [n for n in numbers if n not in half]
            found.append(within(group, blocks[list(half)].mean(axis=0), blocks[other].mean(axis=0)))
    r = _mean(found)
    return None if r is None else math.sqrt(2 * r / (1 + r)) if r > 0 else 0.0


def _ratio(truth: Array, predicted: Array) -> float | None:
    usable = np.isfinite(predicted) & (predicted != 0)
    return float(np.median(truth[usable] / predicted[usable])) if usable.any() else None


def _columns(look: Look) -> dict[str, Any]:
    """A look in what JSON can hold, None for NaN."""
    return {
        "coefficients": list(look.coefficients),
        "group": list(look.group),
        "channel": list(look.channel),
        "truth_blocks": {kind: blocks.tolist() for kind, blocks in look.blocks.items()},
        "predictions": {
            name: [None if math.isnan(p) else p for p in predicted.tolist()]
            for name, predicted in look.predictions.items()
        },
    }


def fidelity_table(records: Sequence[Record]) -> str:
    """The records as Markdown: a table per data set, model and truth, a row per measure, a column per moment."""
    text = [
        "# How well importance measures predict what a filter is worth\n",
        "Cells: Spearman's rank correlation with true ablation over all layers / its mean within channel groups / "
        "median of true to predicted loss change (measures in nats only). Means over seeds. The ceiling is what a "
        "perfect measure could reach within groups, given how many images the truth was measured on.\n\n"
        "Truth: the loss change when a filter is removed from its readers, or when these are reconstructed from its "
        "co-channels by least squares (compensated), as they are when the engine removes it. Ours, autowidth, knows "
        "which.\n",
    ]
    for data, model, truth in dict.fromkeys((r["data"], r["model"], r["truth"]) for r in records):
        mine = [r for r in records if (r["data"], r["model"], r["truth"]) == (data, model, truth)]
        moments = sorted({r["moment"] for r in mine})
        seeds = sorted({r["seed"] for r in mine})
        sampled = ", ".join(map(str, sorted({r["count"] for r in mine})))
        text.append(
            f"## {model} on {data}, filters {truth}\n\n"
            f"Seeds {', '.join(map(str, seeds))}; {sampled} filters at each moment; "
            f"{mine[0]['probe_samples']} samples for each measure, {mine[0]['truth_samples']} for the truth.\n"
        )
        best = [_mean([r["ceiling_within"] for r in mine if r["moment"] == m]) for m in moments]
        rows = [_row(name, [r for r in mine if r["criterion"] == name], moments) for name in _order(mine)]
        rows.append(["ceiling", *(f"/ {_two(b)}" for b in best), ""])
        text.append(markdown(["importance", *(f"{m:.0%} of the run" for m in moments), "seconds"], rows) + "\n")
    return "\n".join(text)


def _order(records: Sequence[Record]) -> list[str]:
    """The measures, best mean rank correlation over all moments first."""
    names = dict.fromkeys(r["criterion"] for r in records)
    means = {name: _mean([r["spearman"] for r in records if r["criterion"] == name]) for name in names}
    return sorted(names, key=lambda name: -(means[name] if means[name] is not None else -2.0))  # type: ignore[operator]


def _row(name: str, records: Sequence[Record], moments: Sequence[float]) -> list[str]:
    cells = [name]
    for moment in moments:
        here = [r for r in records if r["moment"] == moment]
        figures = [_mean([r[key] for r in here]) for key in ("spearman", "spearman_within", "ratio")]
        shown = figures if any(r["unit"] == "nats" for r in here) else figures[:2]
        cells.append(" / ".join(map(_two, shown)))
    return [*cells, _two(_mean([r["seconds"] for r in records]))]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
