"""The page docs/coverage.md, from the rows alone."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from .subjects import BATCH, CONVOLUTIONAL, MIXED, SUBJECTS, TORCHVISION

if TYPE_CHECKING:
    from .coverage import Row

COMMAND = "make zoo"

_ABOUT = """
Every network is built with random weights and taken through the same steps: trace it with rehearsal; remove 30 % and
insert 10 % of the channels of every free channel group at once, after two training steps with AdamW, whose state is
carried; run it; train a third step; save it; load it into a fresh network; compare the outputs bit for bit.

- **free**: the share of all channels written by some layer that can be resized. Left out are the network's own outputs,
  and grouped convolutions, which carry channels that others have written.
- **seconds**: one trace with rehearsal, one surgery on model and optimizer, one training step at the same batch. One
  thread each, two networks at a time.
- **removal, insertion**: the largest change of any output over the largest output, float32. Removal: channels whose
  readers' weights are zero. Insertion: fresh channels with zero fan-out. So that every channel is felt, constant
  parameters (layer scales, zero-initialised branches) are made random and norms hold the statistics of the inputs.
  Promised is less than 1e-5, where no norm averages over the channels; those that do are listed below.
- **MACs, parameters**: of one sample, before and after. The MACs after surgery were foreseen by the cost model exactly,
  where the last column does not say otherwise.
- **memory, trace**: peak of the process while tracing over its peak during the network's own forward pass without
  gradients, the network itself in both. **Surgery**: peak while the network is resized, beyond the network itself, over
  the network. Both are the resident set that Linux counts, with an allocator that returns at once what is freed;
  promised are at most 2, and less than 1, above 8 MiB that Python's own objects may take.
- **holds**: yes, or the promises that do not.
"""

_HEAD = (
    "network", "pixels", "groups", "free", "trace s", "surgery s", "step s", "removal", "insertion",
    "MACs (M)", "parameters (M)", "saved", "memory, trace", "surgery", "holds",
)  # fmt: skip

_OTHER_TOOL = """
For comparison: on the same 23 networks of torchvision Torch-Pruning completes 20 (measured with torch-pruning 1.6.1,
torch 2.13).
"""


def page(rows: Mapping[str, Row], failures: Mapping[str, Sequence[str]], code: str) -> str:
    """The whole page in Markdown. `failures`: network -> promises that do not hold; `code` names today's sources."""
    parts = ["# Coverage", "", f"Made by `{COMMAND}`, which runs `python -m tests.zoo.coverage`.", ""]
    parts += [_versions(), "", *_totals(rows, failures), _ABOUT]
    stale = [name for name, row in rows.items() if row.code != code]
    if stale:
        parts += [f"Measured with other sources than today's: {len(stale)} of {len(rows)} networks.", ""]
    parts += ["## torchvision", "", *_table(rows, failures, TORCHVISION), _OTHER_TOOL]
    parts += ["## timm, convolutional families", "", *_table(rows, failures, _names(CONVOLUTIONAL)), ""]
    parts += ["## timm, families with attention or recurrence", "", *_table(rows, failures, _names(MIXED)), ""]
    parts += ["## What is frozen, and why", "", *_frozen(rows), ""]
    parts += ["## Norms across channels", "", *_crossing(rows)]
    return "\n".join(parts) + "\n"


def _names(families: Mapping[str, Sequence[str]]) -> list[str]:
    return [name for names in families.values() for name in names]


def _versions() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm"))
    return f"Python {platform.python_version()}, {libraries}; {os.cpu_count()} CPU cores; batch {BATCH}."


def _totals(rows: Mapping[str, Row], failures: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for title, families in (
        ("torchvision", {"": TORCHVISION}),
        ("timm's convolutional families", CONVOLUTIONAL),
        ("timm's other families", MIXED),
    ):
        seen = [name for name in _names(families) if name in rows]
        through = [name for name in seen if rows[name].error is None]
        whole = [name for name in through if name not in failures]
        of = f" of {len(families)} families" if len(families) > 1 else ""
        yield (
            f"- {title}: {len(seen)} networks{of}; {len(through)} came all the way, "
            f"{len(whole)} of them with every promise kept"
        )


# ---- the tables ------------------------------------------------------------------------------------------------------


def _table(rows: Mapping[str, Row], failures: Mapping[str, Sequence[str]], names: Iterable[str]) -> Iterator[str]:
    yield "| " + " | ".join(_HEAD) + " |"
    yield "|---" * len(_HEAD) + "|"
    for name in names:
        if name in rows:
            yield "| " + " | ".join(_cells(rows[name], failures.get(name, ()))) + " |"


def _cells(row: Row, failures: Sequence[str]) -> list[str]:
    return [
        _label(row.name),
        str(SUBJECTS[row.name].pixels),
        _number(row.groups, "d"),
        _number(row.share_free and 100 * row.share_free, ".0f", " %"),
        _number(row.trace_seconds, ".2f"),
        _number(row.resize_seconds, ".2f"),
        _number(row.step_seconds, ".2f"),
        _number(row.removal, ".0e"),
        _number(row.insertion, ".0e"),
        _pair(row.macs, 1e6, ".0f"),
        _pair(row.params, 1e6, ".1f"),
        "" if row.saved is None else "equal" if row.saved else "differs",
        _quotient(row.trace_memory),
        _quotient(row.surgery_memory),
        _cell("; ".join(failures)) or "yes",
    ]


def _label(name: str) -> str:
    """The network, at timm with the family in front where the name does not say it."""
    subject = SUBJECTS[name]
    bare = name.removesuffix(" (timm)")
    return bare if subject.library == "torchvision" or subject.family in name else f"{bare} ({subject.family})"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def _pair(values: tuple[int, int] | None, unit: float, form: str) -> str:
    return "" if values is None else " → ".join(format(value / unit, form) for value in values)


def _quotient(values: tuple[int, int] | None) -> str:
    return "" if values is None else format(values[0] / values[1], ".2f")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ---- the lists -------------------------------------------------------------------------------------------------------


def _frozen(rows: Mapping[str, Row]) -> Iterator[str]:
    """Network by network the reasons with the channels that they cost."""
    yield "Channels written by some layer that must keep their number, in brackets the param axes concerned. N stands"
    yield "for numbers, so that layers of one kind share a line. Networks that are not listed are free throughout."
    for name in SUBJECTS:
        if name in rows and (rows[name].frozen or rows[name].notes):
            yield from ("", f"**{_label(name)}**", "")
            for reason, channels, axes in rows[name].frozen:
                yield f"- {channels} ({axes}): {_cell(reason)}"
            for note in rows[name].notes:
                yield f"- note: {_cell(note)}"


def _crossing(rows: Mapping[str, Row]) -> Iterator[str]:
    """Which norms tie channels together in which networks, and what that does to the function."""
    yield "A norm across channels makes every channel depend on all others of its group, so that removing an unread"
    yield "channel, or inserting one, changes what the norm divides by. These channel groups are resized like all"
    yield "others, and left out of the columns *removal* and *insertion*; the figures here are with them."
    yield ""
    yield "| network | channel groups that pass such a norm | removal | insertion |"
    yield "|---|---|---|---|"
    for name in SUBJECTS:
        row = rows.get(name)
        if row is not None and row.crossing:
            kinds = ", ".join(f"{count} of {row.groups} ({kind})" for kind, count in row.crossing)
            changes = [_number(value, ".0e") for value in (row.removal_crossing, row.insertion_crossing)]
            yield f"| {_label(name)} | {kinds} | {' | '.join(changes)} |"
