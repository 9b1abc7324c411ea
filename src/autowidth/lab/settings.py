"""The settings of a run: what they are, and how options, the environment and a file make them up."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import pydantic_settings as sources
from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, field_validator, model_validator

from autowidth.errors import AutoWidthError
from autowidth.lab.data import STREAM_ABOVE, Level
from autowidth.lab.fine_tuning import completed
from autowidth.lab.policies import PolicySettings, field_names, left_by
from autowidth.lab.scaling import AnyScaling
from autowidth.policy import POLICIES
from autowidth.review.effort import Effort

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "AUTOWIDTH_"
"""How variables of the environment that are settings begin: AUTOWIDTH_EPOCHS, AUTOWIDTH_POLICY__MACS."""

OPTIONS = "on the command line"
"""Where options stand, for people."""


class SettingsError(AutoWidthError, ValueError):
    """Settings that are misspelt, of the wrong kind or out of bounds, or a file of settings that cannot be read."""


class Settings(PolicySettings):
    """Everything that decides what a run does, apart from the version of torch and the machine.

    Raises pydantic.ValidationError; `settings_of` and `settings_from` say the same in one sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field("resnet20", description="a built-in model, or module:callable that returns an nn.Module")
    data: str = Field("digits", description="digits, cifar10:PATH, cifar100:PATH, folder:PATH or hf:NAME")
    weights: Path | None = Field(
        None, description="start from these weights: a file of safetensors or torch.save, or the folder of a run"
    )
    new_head: bool = Field(False, description="keep a fresh head where the weights are for another number of classes")
    normalize: Annotated[AnyScaling | None, sources.NoDecode] = Field(
        None,
        description="how pixels are scaled: imagenet, or means and deviations by channel; not given: as the training "
        "images need it",
    )
    width: float = Field(1.0, gt=0, le=64, description="factor on all widths of the starting network")
    effort: Effort | None = Field(
        None, description="how much a review looks at; what is not given: what takes a twenty-fifth of the run"
    )
    epochs: int = Field(120, ge=1, le=1_000_000, description="passes over the training images; 20 from given weights")
    batch_size: int = Field(64, ge=1, description="images per optimizer step")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd, with Nesterov momentum, or adamw")
    lr: float = Field(
        0.1, gt=0, description="peak of the learning rate; 0.001 for adamw; a fifth and a tenth from given weights"
    )
    schedule: Literal["one-cycle", "cosine"] = Field(
        "one-cycle",
        description="one-cycle: the learning rate rises, then falls; cosine: it falls from the start, which is what "
        "given weights get",
    )
    cycles: int = Field(1, ge=1, description="equal parts of the run, each with a learning rate cycle of its own")
    momentum: float = Field(0.9, gt=0, lt=1, description="momentum of sgd; of adamw the first beta")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay, not applied to norms and biases")
    warmup: float = Field(0.2, ge=0, lt=1, description="share of a one-cycle in which the learning rate rises")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing of the training loss")
    bf16: bool = Field(False, description="train under bfloat16 autocast")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="evaluate and save an exponential moving average of the weights: how much of it each step keeps, "
        "after n steps at most (1 + n) / (10 + n)",
    )
    compile: bool = Field(
        False,
        description="compile the forward pass and the loss, anew after every review that changes widths, where that "
        "wins more time than it takes",
    )
    compile_share: float = Field(
        0.1, ge=0, le=1, description="how much of the run compiling may take; 1: compile at any price"
    )
    channels_last: bool = Field(False, description="keep images and weights in the channels_last memory format")
    device: str = Field("auto", description="cpu, cuda, cuda:N, or auto: cuda where there is one")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; not given: 1 for images below 16 x 16, else torch decides"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="decides weights, order, augmentation and probe")
    holdout: float = Field(
        0.0, ge=0, lt=1, description="evaluate on this share of the training images, not on the test"
    )
    looks: int | None = Field(
        None, ge=1, description="how often to evaluate, evenly spaced; not given: after every epoch"
    )
    limit: int | None = Field(None, ge=1, description="keep this many training images")
    pool: int = Field(1, ge=1, description="average this many pixels by as many into one")
    size: int | None = Field(
        None,
        ge=1,
        description="side of the square to which images of a folder or of the hub are resized; not given: images of "
        "a folder stay as they are, or, where they differ or are large, get a side that is told",
    )
    augment: Level | None = Field(
        None,
        description="how training images are varied: none, light (moved by up to an eighth of a side), standard (half "
        "of them flipped as well, left to right); not given: as the data need it, standard for a folder",
    )
    skip_corrupt: bool = Field(False, description="leave out images that cannot be read, instead of refusing the data")
    stream_above: float = Field(
        STREAM_ABOVE, ge=0, description="MiB of decoded images above which a set is streamed from disk, not kept"
    )
    workers: int | None = Field(
        None, ge=0, le=1024, description="processes that decode streamed images; not given: one per core, at most 8"
    )
    keep: float | None = Field(
        None,
        ge=0,
        le=100,
        description="as small as costs no more than this many points of accuracy against the whole network; what "
        "happens, with 0.5, where no target is given",
    )
    keep_nats: float | None = Field(None, ge=0, description="the same in nats of loss, instead of points")
    keep_time: float = Field(
        1.3,
        ge=1,
        le=100,
        description="what that may take, as a multiple of the time that the whole network takes; one attempt is made "
        "for each 0.3 beyond 1",
    )
    out: Path | None = Field(None, description="folder that the run is written to")
    rank_timeout: float = Field(
        600.0, gt=0, description="seconds that a process of several waits for the others before it gives up"
    )
    save_every: float = Field(
        5.0,
        ge=0,
        description="minutes between two saves of the training as it stands; 0: only when it is interrupted and at the "
        "end",
    )
    saves: int = Field(
        2, ge=0, description="how many of these saves stay; 0 saves none, and what is interrupted is lost"
    )
    rescue: Path | None = Field(
        None, description="folder that is written to where out takes nothing; not given: a temporary one"
    )
    bad_steps: int = Field(
        10, ge=1, description="steps, or evaluations, in a row that are not finite after which the run ends"
    )

    @property
    def promises(self) -> bool:
        """Whether the run is to be as small as costs no more than was named, wherever its policy would lead."""
        return self.keep is not None or self.keep_nats is not None

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_text_that_ends_early(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds the character of number 0, which no name has")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _completed(cls, table: Any, handler: ModelWrapValidatorHandler[Settings]) -> Settings:
        """With what is not given where weights are, or another optimizer; that counts as not set."""
        if not isinstance(table, dict):
            return handler(table)
        found = handler(completed(table))
        found.model_fields_set.intersection_update(table)
        return found


def renamed(table: Any) -> Any:
    """The settings that a run has kept, with those that are called otherwise now: `saves` was `keep`."""
    if isinstance(table, dict) and "keep" in table and "saves" not in table:
        return {("saves" if name == "keep" else name): value for name, value in table.items()}
    return table


Table: TypeAlias = Mapping[str, Any]
"""Settings as they are given: values by name, tables nested."""


def settings_of(table: Table) -> Settings:
    """The settings in a table and nothing else: neither a file nor the environment. Raises SettingsError."""
    try:
        return Settings.model_validate(table)
    except ValidationError as error:
        raise _refusal(error, [(OPTIONS, table)]) from error


def settings_from(options: Table, *, config: Path | None = None) -> Settings:
    """The settings that options, the environment and the file `config` (TOML or JSON) make up, in this order.

    Tables are merged field by field, policies as `left_by` says. Raises SettingsError, which names the field and where
    it stands.
    """
    file = {} if config is None else _read(config)
    environment: Table = {}

    class Joined(Settings, sources.BaseSettings):
        model_config = sources.SettingsConfigDict(
            env_prefix=PREFIX, env_nested_delimiter="__", env_ignore_empty=True
        )  # fmt: skip

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[sources.BaseSettings], init_settings: sources.PydanticBaseSettingsSource,
            env_settings: sources.PydanticBaseSettingsSource, *others: object, **more: object,
        ) -> tuple[sources.PydanticBaseSettingsSource, ...]:  # fmt: skip
            nonlocal environment
            environment = env_settings()
            return init_settings, _Below(settings_cls, dict(environment)), _Below(settings_cls, file)

    _check_variables()
    try:
        joined = Joined(**options)
    except ValidationError as error:
        raise _refusal(
            error, [(OPTIONS, options), ("in the environment", environment), (f"in {config}", file)]
        ) from error
    return Settings.model_validate({name: getattr(joined, name) for name in joined.model_fields_set})


def names_a_policy(options: Table, *, config: Path | None = None) -> bool:
    """Whether options, the environment or the file `config` say by name which policy is wanted.

    Limits or a schedule alone choose none. Raises SettingsError where the file cannot be read.
    """
    file: Table = {} if config is None else _read(config)
    tables = [table.get("policy") for table in (options, file)]
    variables = (os.environ.get(f"{PREFIX}POLICY__NAME", ""), os.environ.get(f"{PREFIX}POLICY", ""))
    return any(isinstance(table, Mapping) and "name" in table for table in tables) or any(variables)


class _Below(sources.InitSettingsSource):
    """A table of settings without what the sources above it overrule."""

    def __call__(self) -> dict[str, Any]:
        return left_by(self.current_state, self.init_kwargs)


def _check_variables() -> None:
    """Raises SettingsError for a variable of the environment that looks like a setting and is none."""
    for variable in os.environ:
        name = variable[len(PREFIX) :].lower().partition("__")[0]
        if variable.upper().startswith(PREFIX) and name not in Settings.model_fields:
            raise SettingsError(f"the variable {variable} of the environment is no setting: {_nearest(name)}")


def _read(path: Path) -> dict[str, Any]:
    """The table in a TOML or JSON file. Raises SettingsError."""
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except OSError as error:
        raise SettingsError(
            f"cannot read the configuration {path}: {error.strerror}; name a TOML or JSON file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"the configuration {path} is no {kind}: {error}") from error
    if not isinstance(table, dict):
        raise SettingsError(f"the configuration {path} holds a {type(table).__name__}, expected names with values")
    return table


# ---- complaints ------------------------------------------------------------------------------------------------------


def _refusal(error: ValidationError, places: Sequence[tuple[str, Table]]) -> SettingsError:
    """Up to three of pydantic's errors in one sentence; `places` are what stands where, the highest one first."""
    return SettingsError("; ".join(_complaint(found, places) for found in error.errors()[:3]))


def _complaint(error: Any, places: Sequence[tuple[str, Table]]) -> str:
    """One of pydantic's errors for a person: the field, where it stands, what was wrong, what was got."""
    loc = [key for n, key in enumerate(error["loc"]) if n != 1 or error["loc"][0] != "policy" or key not in POLICIES]
    name, where = ".".join(map(str, loc)), _where(loc, places)
    if error["type"] == "union_tag_invalid":
        return f"setting 'policy.name'{where} is {error['ctx']['tag']!r}, allowed are {', '.join(POLICIES)}"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"no setting is named {name!r}{where}; {_nearest(name)}"
    if error["type"] == "value_error":
        return f"setting {name!r}{where}: {error['ctx']['error']}"
    message = str(error["msg"]).removeprefix("Input ")
    return f"setting {name!r}{where} {message}, got {error['input']!r}"


def _where(loc: Sequence[int | str], places: Sequence[tuple[str, Table]]) -> str:
    """Where a setting stands, with a blank in front: the highest of the places, all of them for a table.

    Nothing for an option that stands alone, which whoever gave it knows.
    """
    values = [(place, _at(table, loc)) for place, table in places]
    found = [(place, value) for place, value in values if value not in (None, {})]
    merged = bool(found) and isinstance(found[0][1], Mapping)
    names = [place for place, _ in (found if merged else found[:1])]
    return "" if names in ([], [OPTIONS]) else f" {' or '.join(reversed(names))}"


def _at(table: Any, loc: Sequence[int | str]) -> Any:
    """What stands at this place of a nested table, None where nothing does."""
    for key in loc:
        table = table.get(str(key)) if isinstance(table, Mapping) else None
    return table


def _nearest(name: str) -> str:
    """What a name that is no setting may have been meant for."""
    known = _names()
    leaf = name.rsplit(".", 1)[-1]
    close = [k for k in known if k.rsplit(".", 1)[-1] == leaf] or difflib.get_close_matches(name, known, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"allowed are {', '.join(known)}"


def _names() -> list[str]:
    """All settings, those of tables behind a dot."""
    own = [name for name in Settings.model_fields if name not in PolicySettings.model_fields and name != "effort"]
    return [*own, *field_names(), *(f"effort.{field.name}" for field in fields(Effort))]
