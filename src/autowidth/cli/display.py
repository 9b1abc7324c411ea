"""What the command prints of a run: lines, in a terminal above a bar; a table and the result at its end."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from autowidth.cost import macs_cost
from autowidth.history import Event
from autowidth.lab.policies import reviewed, shrinks_first
from autowidth.lab.result import Kept, Progress, Result
from autowidth.lab.settings import Settings
from autowidth.report.words import decided, reason_for_no_removal
from autowidth.report.words import short as short  # other commands take it from here


def console_for(*, stderr: bool) -> Console:
    """A console that does not fold tables where nobody reads along in a terminal."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=int(os.environ.get("COLUMNS", 120)))


class Silence:
    """Shows nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, progress: Progress) -> None:
        """Nothing."""


class Lines(Silence):
    """One line per epoch, and two per review: its figures, and what it decided and why."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self.console = console
        self.settings = settings

    def show(self, progress: Progress) -> None:
        """Prints a line if an epoch or a review is over."""
        if (line := self._line(progress)) is not None:
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)
            self.console.file.flush()

    def _line(self, p: Progress) -> str | None:
        if p.notice is not None:
            return p.notice
        if p.moment == "start":
            return _opening(self.settings, p)
        if p.moment == "review" and p.event is not None:
            return f"  {_described(p.event, p.reviews)}; widths {_widths(p.widths)}\n    {decided(p.event)}"
        if p.moment == "epoch":
            accuracy = "      -" if p.accuracy is None else f"{p.accuracy:7.2%}"  # not evaluated after every epoch
            return (
                f"epoch {p.epoch:>{len(str(p.epochs))}}/{p.epochs}  loss {p.loss:.4f}  accuracy {accuracy}  "
                f"MACs {p.macs / p.macs_start:6.1%}  parameters {p.params / p.params_start:6.1%}  {p.seconds:.1f} s"
            )
        return None


class Screen(Lines):
    """The same lines in a terminal, above a bar that says where the run stands."""

    def __init__(self, console: Console, settings: Settings) -> None:
        super().__init__(console, settings)
        self.bar = Bar(
            TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.description}"), console=console, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=settings.epochs)

    def __enter__(self) -> None:
        self.bar.__enter__()

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(None, None, None)

    def show(self, progress: Progress) -> None:
        """Prints the line of an epoch or a review that is over, and moves the bar."""
        p = progress
        super().show(progress)
        if p.notice is not None:
            return
        loss = "" if p.loss is None else f"loss {p.loss:.4f}, "
        reviews = f"{p.reviews} reviews" if p.reviews != 1 else "1 review"
        now = f"{loss}MACs {p.macs / p.macs_start:.1%}, {reviews if reviewed(self.settings.policy) else 'no reviews'}"
        done = p.epochs * p.step // p.total_steps
        self.bar.update(self.task, completed=done, total=p.epochs, description=now)


def display_for(console: Console, settings: Settings, *, quiet: bool) -> Silence:
    """What shows a run: nothing, a live screen where the console is a terminal, or lines."""
    if quiet:
        return Silence()
    return Screen(console, settings) if console.is_terminal else Lines(console, settings)


def _opening(settings: Settings, p: Progress) -> str:
    """What is trained in a line, and on what images in another."""
    aim = aim_of(settings)
    start = f"{short(p.macs_start)} MACs, {short(p.params_start)} parameters"
    if p.accuracy_start is not None:
        start += f", {p.accuracy_start:.2%} with the weights of {settings.weights}"
    run = f"{settings.model} on {settings.data}, seed {settings.seed}: from {start}, {aim}, in {p.epochs} epochs"
    return "\n".join(filter(None, (run, _fine_tuning(settings), p.data)))


def aim_of(settings: Settings) -> str:
    """Where the run leads, for people."""
    if settings.keep_nats is not None:
        return f"as small as costs at most {settings.keep_nats:g} nats"
    if settings.keep is not None:
        return f"as small as costs at most {settings.keep:g} points"
    return str(settings.policy.aim)


def promise(kept: Kept) -> str:
    """What was promised, how the result stands beside the whole network, and how it is known, in two lines."""
    tolerated = f"{kept.points:g} points" if kept.nats is None else f"{kept.nats:g} nats"
    tried = len(kept.attempts)
    stayed = sum(attempt.stays for attempt in kept.attempts)
    known = f"{stayed} of {tried} attempt{'s' * (tried != 1)} stayed" if tried else "no attempt was worth its time"
    lines = [
        f"the whole network has {kept.accuracy:.2%}: {100 * kept.difference:+.2f} ± {100 * kept.standard_error:.2f} "
        f"points (standard error); at most {tolerated} were to be lost, and {known}"
    ]
    if not stayed:
        why = kept.attempts[-1].judged if tried else "its loss leaves nothing to give away in the time that there is"
        lines.append(f"the whole network is kept, nothing was removed: {why}")
    return "\n".join(lines)


def _fine_tuning(settings: Settings) -> str:
    """How given weights are trained on, in a line; nothing where they are fresh."""
    if settings.weights is None:
        return ""
    schedule, limits = getattr(settings.policy, "schedule", None), getattr(settings.policy, "limits", None)
    reviews = "no reviews"
    if shrinks_first(settings.policy):
        reviews = "made smaller before the first step"
    elif reviewed(settings.policy) and schedule is not None and limits is not None:
        inserted = "insertion allowed" if limits.offer else "nothing inserted"
        reviews = f"{schedule.count} reviews from {schedule.begin:.0%} to {schedule.end:.0%} of the run, {inserted}"
    rate = f"{settings.optimizer}, learning rate {settings.lr:g} ({settings.schedule})"
    return f"fine-tuning: {rate}, {settings.epochs} epochs, {reviews}"


def _described(event: Event, number: int) -> str:
    """A review in one line."""
    moved = f"-{sum(event.removed.values())} +{sum(event.inserted.values())} filters"
    when = f"at step {event.step}" if event.step else "before the first step"
    parts = [f"review {number} {when}: {moved}"]
    if event.predicted is not None and event.measured is not None:
        parts.append(f"loss {event.measured:+.4f} nats (predicted {event.predicted:+.4f})")
    if event.fidelity is not None and event.fidelity.spearman is not None:
        parts.append(f"audit agreed {event.fidelity.spearman:.2f}")
    return ", ".join(parts)


def _widths(widths: Mapping[str, int]) -> str:
    return " ".join(map(str, widths.values()))


def groups_table(result: Result) -> Table:
    """Every channel group: its widths, what one channel costs, what its filters were worth at the last review."""
    events = result.history.events
    worths = events[-1].worths if events else {}
    cost = macs_cost(result.channel_map)
    marginal = dict(zip(cost.names, cost.of_channel(result.widths).tolist(), strict=True))
    table = Table("channel group", title="What became of the widths", title_justify="left", box=None)
    for heading in ("before", "after", "MACs per channel", "worth of weakest", "of strongest (nats)"):
        table.add_column(heading, justify="right")
    for name, before in result.widths_start.items():
        weakest, _, strongest = worths.get(name, (None, None, None))
        span = ["-" if w is None else f"{w:.2e}" for w in (weakest, strongest)]
        table.add_row(escape(name), str(before), str(result.widths[name]), f"{marginal[name]:,.0f}", *span)
    return table


def closing(result: Result, *, written: str) -> str:
    """The result in a line, and where it lies in another; `written` names what lies there beside the run itself."""
    r = result
    what = "accuracy" if r.part == "test" else "held-out accuracy"
    share = f"{r.review_seconds / r.seconds:.1%} of it in {r.reviews} reviews" if r.reviews else "no reviews"
    timed = f", {r.latency_ms:.3g} ms an image instead of {r.latency_ms_start:.3g}" if r.latency_ms else ""
    reason = reason_for_no_removal(r.history) if r.reviews and not r.kept else None
    nothing = f"\nnothing was removed: {escape(reason)}" if reason else ""
    moved = f", {r.removed} filters removed, {r.inserted} inserted ({r.inserted_alive} alive)" if r.reviews else ""
    before = "" if r.accuracy_start is None else f" ({r.accuracy_start:.2%} before training)"
    kept = f"\n{promise(r.kept)}" if r.kept else ""
    return (
        f"[bold]{what} {r.accuracy:.2%}{before} with {r.macs / r.macs_start:.1%} of the MACs and "
        f"{r.params / r.params_start:.1%} of the parameters[/bold] of the starting network{timed}{moved}; "
        f"{r.seconds:.1f} s, {share}{nothing}{kept}\n"
        f"written to {escape(str(r.out))}: model.safetensors, run.json, history.jsonl{written}"
    )
