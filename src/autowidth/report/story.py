"""From the record of a run to what its page says: frozen data, no marks and no pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from autowidth.history import Event, History
from autowidth.layers import Layer
from autowidth.report.progress import Epoch
from autowidth.report.record import Record
from autowidth.report.words import Moved, counted, decided, found_of, is_protected, reason_for_no_removal, why_group

MOST_WORTHS = 60_000
"""Worths of single filters that a page carries; of a longer run the last reviews, of a larger network a part."""

LEAST_KEPT = 24
"""Filters of a layer that are there at least where worths are thinned out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStory:
    """A layer over the run. widths: at the start and after every review; removed, inserted: at every review.

    group: its channel group, None where its filters are frozen. macs: of one sample, None where nobody knows them.
    """

    name: str
    group: str | None
    widths: tuple[int, ...]
    removed: tuple[int, ...]
    inserted: tuple[int, ...]
    macs_start: float | None
    macs: float | None
    frozen: str | None
    why: str

    @property
    def start(self) -> int:
        return self.widths[0]

    @property
    def now(self) -> int:
        return self.widths[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewStory:
    """A review: the event, when it was, what it decided in words."""

    number: int
    event: Event
    epoch: float | None
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Worths:
    """The worths of a channel group's filters at a review, the weakest first, nats, and who left then.

    total: how many filters there were; some are left out where a network has very many.
    """

    review: int
    group: str
    worth: tuple[float, ...]
    left: tuple[bool, ...]
    price: float | None
    interaction: float
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How well worths predicted: a sentence, and the mean rank correlation of the audits, None without any."""

    sentence: str
    spearman: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What a page says of a run."""

    name: str
    title: str
    state: str
    summary: str
    remarks: tuple[str, ...]
    accuracy: float | None
    accuracy_start: float | None
    part: str
    macs_start: int | None
    macs: int | None
    params_start: int | None
    params: int | None
    removed: int
    inserted: int
    alive: int
    seconds: float | None
    review_seconds: float
    latency: tuple[float, float] | None
    layers: tuple[LayerStory, ...]
    reviews: tuple[ReviewStory, ...]
    epochs: tuple[Epoch, ...]
    worths: tuple[Worths, ...]
    fidelity: Fidelity
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str | None
    typed: str | None


def story_of(record: Record) -> Story:
    """What the page of this record says. Raises ValueError where the index maps contradict each other."""
    history, course, result = record.history, record.course, record.result
    events, facts = history.events, course.facts if course else None
    epochs = course.epochs if course else ()
    reviews = tuple(
        ReviewStory(number=n, event=event, epoch=_epoch_of(event, record), words=decided(event))
        for n, event in enumerate(events, start=1)
    )
    last = events[-1] if events else None
    known = [epoch.accuracy for epoch in epochs if epoch.accuracy is not None]
    accuracy = result.get("accuracy", known[-1] if known else None)
    macs_start, params_start = _start(record)
    model, data = record.settings.get("model"), record.settings.get("data")
    ms = [result.get(name) for name in ("latency_ms_start", "latency_ms")]
    return Story(
        name=record.name, title=f"{model} on {data}, seed {record.settings.get('seed', 0)}" if model else record.name,
        state=_state(record, len(epochs), facts.epochs if facts else 0),
        summary=_summary(history), remarks=record.remarks, accuracy=accuracy,
        accuracy_start=result.get("accuracy_start") or (facts.accuracy_start if facts else None),
        part=str(result.get("part") or (facts.part if facts else "test")).replace("_", "-"),
        macs_start=macs_start, macs=result.get("macs") or (last.macs if last else macs_start),
        params_start=params_start, params=result.get("params") or (last.params if last else params_start),
        removed=history.removed_total, inserted=history.inserted_total, alive=history.inserted_alive,
        seconds=result.get("seconds") or (epochs[-1].seconds if epochs else None),
        review_seconds=sum(event.seconds_total for event in events),
        latency=(float(ms[0]), float(ms[1])) if ms[0] and ms[1] else None,
        layers=_layers(history, record.settings), reviews=reviews, epochs=epochs, worths=worths_of(history),
        fidelity=fidelity_of(events), settings=record.settings, versions=record.versions,
        command=_command(record), typed=facts.command if facts else None,
    )  # fmt: skip


def _start(record: Record) -> tuple[int | None, int | None]:
    """MACs and parameters of the starting network, None where nothing tells them."""
    result, facts = record.result, record.course.facts if record.course else None
    if "macs_start" in result and "params_start" in result:
        return result["macs_start"], result["params_start"]
    if facts is not None:
        return facts.macs_start, facts.params_start
    first = record.history.events[0] if len(record.history) else None
    return (first.macs_before, first.params_before) if first else (None, None)


def _epoch_of(event: Event, record: Record) -> float | None:
    """When a review was, in epochs; None where the length of an epoch is not known."""
    epochs = record.settings.get("epochs")
    return event.step / event.total_steps * epochs if isinstance(epochs, int) and event.total_steps else None


def _state(record: Record, done: int, epochs: int) -> str:
    """Whether the run is over, in a phrase."""
    if record.finished:
        return f"{'saved' if record.result else 'last written'} {record.written:%Y-%m-%d %H:%M} UTC"
    return f"not finished: {done} of {epochs} epochs, last written {record.written:%Y-%m-%d %H:%M:%S} UTC"


def _summary(history: History) -> str:
    """What happened to the widths, in a sentence or two."""
    if not history.events:
        return "No review took place: all widths are those that the network was brought with."
    start, now = history.widths_start, history.events[-1].widths
    narrower = sum(now.get(group, width) < width for group, width in start.items())
    wider = sum(now.get(group, width) > width for group, width in start.items())
    same = len(start) - narrower - wider
    kinds = ((narrower, "narrower"), (wider, "wider"), (same, "as wide as before"))
    found = [f"{n} {'is' if n == 1 else 'are'} {what}" for n, what in kinds if n]
    text = (
        f"In {counted(len(history), 'review')} {counted(history.removed_total, 'filter')} left and "
        f"{history.inserted_total:,} came ({history.inserted_alive:,} of them still there). Of "
        f"{counted(len(start), 'channel group')}, {', '.join(found)} now."
    )
    reason = reason_for_no_removal(history)
    return f"{text} Nothing was removed: {reason}." if reason else text


def _command(record: Record) -> str | None:
    """The command that repeats a run of the laboratory, from the settings that lie beside it; None for other runs."""
    if not record.settings or not record.finished or "epochs" not in record.result:
        return None
    return f"autowidth train --config settings.json --out {record.name}-again"


# ---- layers ----------------------------------------------------------------------------------------------------------


Counts: TypeAlias = Mapping[str, int]


def _layers(history: History, settings: Mapping[str, Any]) -> tuple[LayerStory, ...]:
    """All layers in the order of the forward pass; of a record without layers its channel groups."""
    start = history.widths_start
    layers = history.layers or tuple(
        Layer(name=group, shape=(width,), macs=0.0, axes={0: {group: 1}}) for group, width in start.items()
    )
    after = [start, *(start | event.widths for event in history.events)]
    moved = [(event.removed, event.inserted) for event in history.events]
    whys = _whys(history, settings, after[-1], moved)
    return tuple(_layer(layer, after, moved, whys) for layer in layers)


def _layer(
    layer: Layer, after: Sequence[Counts], moved: Sequence[tuple[Counts, Counts]], whys: Mapping[str, str]
) -> LayerStory:
    """A layer over the run.

    after: the widths of all channel groups at the start and after each review; moved: who left and who came at each.
    """
    start, copies = after[0], layer.axes.get(layer.out, {})
    why = " ".join(dict.fromkeys(whys[group] for group in copies))
    return LayerStory(
        name=layer.name, group=next(iter(copies), None),
        widths=tuple(layer.width(start, widths) for widths in after),
        removed=tuple(sum(n * left.get(g, 0) for g, n in copies.items()) for left, _ in moved),
        inserted=tuple(sum(n * came.get(g, 0) for g, n in copies.items()) for _, came in moved),
        macs_start=layer.macs or None, macs=layer.macs_at(start, after[-1]) if layer.macs else None,
        frozen=layer.frozen, why=why or f"Frozen at {layer.shape[layer.out]}: {layer.frozen or 'no channel group'}.",
    )  # fmt: skip


def _whys(
    history: History, settings: Mapping[str, Any], now: Counts, moved: Sequence[tuple[Counts, Counts]]
) -> dict[str, str]:
    """Channel group name -> why it is as wide as it is."""
    policy = settings.get("policy")
    limits = policy.get("limits") if isinstance(policy, dict) else None
    protect = tuple(limits.get("protect", ())) if isinstance(limits, dict) else ()
    found, alive = found_of(history), {group: len(m.inserted) for group, m in history.lineage().items()}
    left, came = Counter[str](), Counter[str]()
    for gone, fresh in moved:
        left.update(gone)
        came.update(fresh)
    return {
        group: why_group(
            Moved(start=width, now=now[group], left=left[group], came=came[group], alive=alive[group]),
            found.get(group), protected=is_protected(group, protect), reviewed=bool(history.events),
        )
        for group, width in history.widths_start.items()
    }  # fmt: skip


# ---- worths and predictions ------------------------------------------------------------------------------------------


def worths_of(history: History, most: int = MOST_WORTHS) -> tuple[Worths, ...]:
    """The worths of every filter at the last reviews, as many as are `most` filters; of one review at least."""
    found: list[list[Worths]] = []
    room = most
    for number, event in reversed([*enumerate(history.events, start=1)]):
        count = sum(map(len, event.filter_worths.values()))
        if not count:
            continue
        if found and count > room:
            break
        room -= count
        found.append([_sorted(number, event, group, min(1.0, most / count)) for group in event.filter_worths])
    return tuple(worths for review in reversed(found) for worths in review)


def _sorted(number: int, event: Event, group: str, share: float) -> Worths:
    """The worths of a group, the weakest first; about this share of them, evenly spread over the order."""
    worths, index_map = event.filter_worths[group], event.maps.get(group)
    gone = set(index_map.removed if index_map else ())
    order = sorted(range(len(worths)), key=lambda c: (worths[c], c))
    kept = min(len(order), max(LEAST_KEPT, round(share * len(order))))
    order = [order[round(n * (len(order) - 1) / max(kept - 1, 1))] for n in range(kept)]
    return Worths(
        review=number, group=group, worth=tuple(worths[c] for c in order), left=tuple(c in gone for c in order),
        price=_known(event.prices.get(group)), interaction=_known(event.interactions.get(group)) or 0.0,
        total=len(worths),
    )  # fmt: skip


def _known(number: float | None) -> float | None:
    """The number, None where it is none."""
    return number if number is not None and math.isfinite(number) else None


def fidelity_of(events: Sequence[Event]) -> Fidelity:
    """How well the worths ranked audited filters, and the predictions met what plans cost, in words."""
    ranks = [e.fidelity.spearman for e in events if e.fidelity and e.fidelity.spearman is not None]
    plans = [(e.predicted, e.measured) for e in events if e.predicted is not None and e.measured is not None]
    parts = []
    if ranks:
        mean = sum(ranks) / len(ranks)
        audited = sum(e.fidelity.count for e in events if e.fidelity)
        parts.append(
            f"{counted(audited, 'filter')} were taken away for real, to see: the worths had ranked them with a mean "
            f"Spearman correlation of {mean:.2f} (1 is the true order, 0 is chance)."
        )
    if plans:
        predicted, measured = (sum(column) for column in zip(*plans, strict=True))
        held = sum(m <= 2 * max(p, 0.0) + 0.1 for p, m in plans)
        parts.append(
            f"All {counted(len(plans), 'plan')} together were predicted to cost {predicted:.3g} nats and cost "
            f"{measured:.3g} when tried; {held} of {len(plans)} stayed within twice the prediction and 0.1 nats."
        )
    sentence = " ".join(parts) or "No prediction was checked: there was no audit and no plan."
    return Fidelity(sentence=sentence, spearman=sum(ranks) / len(ranks) if ranks else None)
