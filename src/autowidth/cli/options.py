"""Options of the command line, made out of the fields of the settings: names, kinds, bounds and help are theirs."""

from __future__ import annotations

import enum
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Optional, get_args, get_origin

import typer

from autowidth.cli.door import UsageError
from autowidth.lab.policies import field_names
from autowidth.lab.settings import Settings
from autowidth.review.effort import Effort

Command = Callable[..., None]

BASIC = ("model", "data", "weights", "epochs", "batch_size", "lr", "seed", "keep", "out")
"""Settings that stand first in the help, beside a command's own options."""

PANELS: Mapping[str, tuple[str, ...]] = {
    "Pictures": ("size", "augment", "normalize", "holdout", "limit", "pool", "skip_corrupt", "stream_above", "workers"),
    "Starting network": ("width", "new_head"),
    "As small as costs nothing": ("keep_nats", "keep_time"),
    "Training": (
        "optimizer", "schedule", "warmup", "cycles", "momentum", "weight_decay", "label_smoothing", "ema", "looks",
    ),
    "Saving": ("save_every", "saves", "rescue", "bad_steps"),
    "Machine": ("device", "threads", "bf16", "compile", "compile_share", "channels_last"),
}  # fmt: skip
"""Settings by the heading that they stand under in the help."""

REST = "Further settings"
"""The heading of a setting that stands under none of `PANELS`."""

DEFAULTS: Mapping[str, str] = {"out": "runs/MODEL-DATA-SEED, or the next free name behind it"}
"""What a command does where a setting is not given and the setting itself has no default."""

TABLES = ("policy", "effort")
"""Settings that are tables: `--set` fills them. It takes all others as well: `--set bf16=false` switches something off
that a file switches on."""

NESTED = (*field_names(), *(f"effort.{field.name}" for field in fields(Effort)))
"""What `--set` takes: the fields of tables, behind a dot."""

SIMPLE = (bool, int, float, str, Path)
"""Kinds of settings that an option has too; everything else is given as text, which the settings read."""


def settings_options(*names: str) -> Callable[[Command], Command]:
    """Gives a command an option for each of these settings; it gets them as keywords, None for what is not given.

    They take the place of the command's `**` parameter.
    """

    def completed(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [
            row.replace(kind=row.KEYWORD_ONLY)
            for row in signature.parameters.values()
            if row.kind is not row.VAR_KEYWORD
        ]
        made = {name: _parameter(name) for name in names}
        basic = [row for name, row in made.items() if name in BASIC]
        rows = [*basic, *own, *(row for name, row in made.items() if name not in BASIC)]
        command.__signature__ = signature.replace(parameters=rows)  # type: ignore[attr-defined]
        command.__annotations__ = {row.name: row.annotation for row in rows} | {"return": None}
        return command

    return completed


def all_settings() -> tuple[str, ...]:
    """The settings that are no tables, in the order of the help."""
    known = [name for name in Settings.model_fields if name not in TABLES]
    placed = [*BASIC, *(name for names in PANELS.values() for name in names)]
    return tuple([name for name in placed if name in known] + [name for name in known if name not in placed])


def option(setting: str, *names: str, **changes: Any) -> Any:
    """An option that fills this setting; its help and its default are the setting's, unless changed."""
    field = Settings.model_fields[setting]
    told = DEFAULTS.get(setting, None if field.default is None else _shown(field.default))
    default = "" if told is None else f"; default {told}"
    return typer.Option(*names, **{"help": f"{field.description}{default}", **changes})


def _parameter(setting: str) -> inspect.Parameter:
    """The option of a setting as a parameter of a command."""
    kind = _kind(Settings.model_fields[setting].annotation)
    panel = next((title for title, names in PANELS.items() if setting in names), REST)
    heading = None if setting in BASIC else panel
    metavar = "<choice>" if isinstance(kind, type) and issubclass(kind, enum.Enum) else None
    flag = f"--{setting.replace('_', '-')}"
    choice = option(setting, None, flag, rich_help_panel=heading, metavar=metavar)  # type: ignore[arg-type]
    return inspect.Parameter(setting, inspect.Parameter.KEYWORD_ONLY, default=choice, annotation=Optional[kind])  # noqa: UP045


def _kind(annotation: Any) -> Any:
    """What an option of this kind takes: a simple kind, an enumeration of texts, or any text."""
    if get_origin(annotation) is Literal:
        return enum.Enum("Choice", {text: text for text in get_args(annotation)})
    if annotation in SIMPLE:
        return annotation
    inner = [part for part in get_args(annotation) if part is not NoneType]
    return _kind(inner[0]) if len(inner) == 1 else str


def _shown(value: Any) -> str:
    """A default for people: off for what is switched."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def given(options: Mapping[str, Any], pairs: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that options stand for, by name; `pairs` are texts such as policy.limits.multiple=8.

    Raises UsageError for a pair that is none.
    """
    table: dict[str, Any] = {
        name: value.value if isinstance(value, enum.Enum) else value
        for name, value in options.items()
        if value is not None
    }
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set {pair!r} sets nothing: give NAME=VALUE, such as policy.limits.multiple=8")
        *outer, last = name.strip().split(".")
        place = table
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = _value(text)
    return table


def merged(table: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """One table out of two, tables inside them as well; where both say something, the second holds."""
    inner = {
        name: merged(table[name], value)
        for name, value in more.items()
        if isinstance(value, Mapping) and isinstance(table.get(name), Mapping)
    }
    return {**table, **more, **inner}


def _value(text: str) -> Any:
    """A number, truth value or list where the text is one in JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
