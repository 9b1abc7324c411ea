"""Settings: what is refused, and who overrules whom among options, the environment and a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from autowidth.engine import Effort
from autowidth.lab.policies import TargetError, from_options
from autowidth.lab.settings import PREFIX, Settings, SettingsError, settings_from, settings_of
from autowidth.policy import Auto, Budget, Price


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting in the environment."""
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


# ---- what is refused -------------------------------------------------------------------------------------------------

WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 0}, r"'epochs'.*greater than or equal to 1, got 0"),
    ({"epochs": "many"}, r"'epochs'.*integer.*'many'"),
    ({"epochz": 3}, r"no setting is named 'epochz'.*did you mean epochs"),
    ({"macs": 0.3}, r"no setting is named 'macs'.*did you mean budget\.macs"),
    ({"budget": {"mcas": 0.3}}, r"no setting is named 'budget\.mcas'.*did you mean budget\.macs"),
    ({"budget": {"macs": 0}}, r"'budget'.*macs=0 is impossible"),
    ({"budget": 3}, r"'budget'"),
    ({"effort": {"probe_samples": 0}}, r"'effort'.*probe_samples >= 1"),
    ({"lr": float("nan")}, r"'lr'.*finite"),
    ({"width": -1}, r"'width'.*greater than 0, got -1"),
    ({"ema": 1}, r"'ema'.*less than 1, got 1"),
    ({"schedule": "linear"}, r"'schedule'.*'one-cycle' or 'cosine', got 'linear'"),
    ({"qwertz": 3}, r"allowed are model, data, .*effort\.audit_filters"),
]


@pytest.mark.parametrize(("given_settings", "message"), WRONG_SETTINGS)
def test_a_wrong_setting_is_named(given_settings: dict[str, Any], message: str) -> None:
    for read in (settings_from, settings_of):
        with pytest.raises(SettingsError, match=message):
            read(given_settings)


CONFIGURATIONS = {
    "run.json": '{"epochs": 7, "lr": 0.05, "budget": {"macs": 0.4, "count": 8}}',
    "run.toml": "epochs = 7\nlr = 0.05\n[budget]\nmacs = 0.4\ncount = 8\n",
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_file_fills_the_settings_and_is_overruled_field_by_field(tmp_path: Path, name: str) -> None:
    config = tmp_path / name
    config.write_text(CONFIGURATIONS[name])
    assert settings_from({}, config=config) == Settings(epochs=7, lr=0.05, budget=Budget(macs=0.4, count=8))
    overruled = settings_from({"epochs": 9, "budget": {"macs": 0.3}}, config=config)
    assert overruled == Settings(epochs=9, lr=0.05, budget=Budget(macs=0.3, count=8))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.toml", None, "cannot read"),
        ("bad.toml", "a = = 3", "no TOML"),
        ("bad.json", "{", "no JSON"),
        ("list.json", "[1]", "holds a list"),
        ("field.toml", "epochs = 1.5", r"'epochs' in .*field\.toml"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    config = tmp_path / name
    if text is not None:
        config.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        settings_from({}, config=config)
    assert name in str(caught.value)


# ---- who overrules whom ----------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    """A configuration file with this text."""
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def test_an_option_overrules_the_environment_which_overrules_the_file_which_overrules_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written(tmp_path, "epochs = 1\nlr = 0.1\nseed = 1\nwidth = 0.5\n[effort]\nprobe_samples = 64\n")
    monkeypatch.setenv("AUTOWIDTH_EPOCHS", "2")
    monkeypatch.setenv("AUTOWIDTH_LR", "0.2")
    monkeypatch.setenv("AUTOWIDTH_EFFORT__AUDIT_SAMPLES", "65")
    found = settings_from({"epochs": 3, "effort": {"audit_filters": 5}}, config=config)
    assert found == Settings(
        epochs=3, lr=0.2, seed=1, width=0.5, effort=Effort(probe_samples=64, audit_samples=65, audit_filters=5)
    )
    assert found.momentum == Settings().momentum
    assert type(found) is Settings


ENVIRONMENTS: list[tuple[str, str, dict[str, Any]]] = [
    ("AUTOWIDTH_MODEL", "vgg8", {"model": "vgg8"}),
    ("AUTOWIDTH_EDIT", "false", {"edit": False}),
    ("AUTOWIDTH_BUDGET__MACS", "0.3", {"budget": Budget(macs=0.3)}),
    ("AUTOWIDTH_BUDGET", '{"macs": 0.3, "protect": ["stem*"]}', {"budget": Budget(macs=0.3, protect=("stem*",))}),
    ("AUTOWIDTH_OUT", "runs/x", {"out": Path("runs/x")}),
    ("AUTOWIDTH_LOOKS", "", {}),
]


@pytest.mark.parametrize(("variable", "text", "expected"), ENVIRONMENTS, ids=[e[0] + e[1][:3] for e in ENVIRONMENTS])
def test_a_variable_of_the_environment_is_a_setting(
    variable: str, text: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    assert settings_from({}) == Settings(**expected)
    assert settings_of({}) == Settings()  # what is written down to be repeated depends on nobody's environment


POLICIES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # file, option, what comes out
    ("budget = {macs = 0.4, count = 4}", {"macs": 0.3}, {"budget": Budget(macs=0.3, count=4)}),
    ("budget = {macs = 0.4, count = 4}", {"params": 0.3}, {"budget": Budget(params=0.3, count=4)}),
    ("budget = {macs = 0.4, count = 4}", {"latency_ms": 3}, {"budget": Budget(latency_ms=3, count=4)}),
    ("budget = {macs = 0.4, count = 4}", {"price": 0.2}, {"price": Price(nats_per_model=0.2, count=4)}),
    ("budget = {macs = 0.4, count = 4}", {"auto": True}, {"auto": Auto(count=4)}),
    ("price = {nats_per_model = 0.4, offer = 0.1}", {"macs": 0.3}, {"budget": Budget(macs=0.3, offer=0.1)}),
    ("price = {nats_per_model = 0.4, pace = 0.3}", {"price": 0.2}, {"price": Price(nats_per_model=0.2, pace=0.3)}),
    ("auto = {nats_per_parameter = 0.4, pace = 0.3}", {"auto": True}, {"auto": Auto(nats_per_parameter=0.4, pace=0.3)}),
    ("auto = {nats_per_parameter = 0.4, pace = 0.3}", {"price": 0.2}, {"price": Price(nats_per_model=0.2, pace=0.3)}),
    ("budget = {count = 4}", {"macs": 0.3}, {"budget": Budget(macs=0.3, count=4)}),
    ("edit = false", {"macs": 0.3}, {"budget": Budget(macs=0.3)}),
    ("budget = {macs = 0.4}", {"edit": False}, {"budget": Budget(macs=0.4), "edit": False}),
]


@pytest.mark.parametrize(("file", "option", "expected"), POLICIES, ids=[f"{f}-{o}" for f, o, _ in POLICIES])
def test_the_target_of_an_option_holds_whole(
    tmp_path: Path, file: str, option: dict[str, Any], expected: dict[str, Any]
) -> None:
    bounds = {name: option.get(name) for name in ("macs", "params", "latency", "latency_ms")}
    options = from_options(
        bounds, price=option.get("price"), auto=option.get("auto", False), edit=option.get("edit")
    )  # fmt: skip
    assert settings_from(options, config=written(tmp_path, file)) == Settings(**expected)


def test_the_target_of_the_environment_stands_between_option_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written(tmp_path, "budget = {macs = 0.4, count = 4, grace = 1}")
    monkeypatch.setenv("AUTOWIDTH_BUDGET__PARAMS", "0.5")
    monkeypatch.setenv("AUTOWIDTH_BUDGET__COUNT", "5")
    assert settings_from({}, config=config).budget == Budget(params=0.5, count=5, grace=1)
    assert settings_from({"budget": {"macs": 0.3}}, config=config).budget == Budget(macs=0.3, count=5, grace=1)


def test_no_target_and_a_target_exclude_each_other() -> None:
    with pytest.raises(TargetError, match="--auto finds the target itself"):
        from_options({"macs": 0.5}, price=None, auto=True, edit=None)
    with pytest.raises(TargetError, match="leave out"):
        from_options({"macs": None}, price=0.5, auto=True, edit=None)


# ---- where the mistake is --------------------------------------------------------------------------------------------

PLACES: list[tuple[str, dict[str, str], dict[str, Any], str]] = [
    ("epochs = 0", {}, {}, r"^setting 'epochs' in \S*run.toml should be greater .* got 0$"),
    ("epochs = 0", {"EPOCHS": "x"}, {}, r"^setting 'epochs' in the environment should be .* got 'x'$"),
    ("epochs = 0", {"EPOCHS": "x"}, {"epochs": -1}, r"^setting 'epochs' should be greater .* got -1$"),
    ("budget = {mcas = 1}", {}, {"budget": {"params": 0.5}}, r"'budget.mcas' in \S*run.toml; did you mean budget.macs"),
    (
        "budget = {count = 0}",
        {},
        {"budget": {"params": 0.5}},
        r"'budget' in \S*run.toml or on the command line: count",
    ),
    ("", {"BUDGET__COUNT": "x"}, {}, r"'budget.count' in the environment should be a valid integer.* got 'x'"),
    ("", {"BUDGET": "{"}, {}, r"^setting 'budget' in the environment should be .* got '{'$"),
    (
        "",
        {"EPOCHZ": "1"},
        {},
        r"^the variable AUTOWIDTH_EPOCHZ of the environment is no setting: .* mean epochs\?$",
    ),
    ("price = {pace = 1}\nbudget = {macs = 0.5}", {}, {}, r"in \S*run.toml: budget and price are given: keep one of"),
]


@pytest.mark.parametrize(("file", "variables", "options", "message"), PLACES)
def test_a_mistake_is_named_with_its_place(
    tmp_path: Path, file: str, variables: dict[str, str], options: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, text in variables.items():
        monkeypatch.setenv(PREFIX + name, text)
    with pytest.raises(SettingsError, match=message) as caught:
        settings_from(options, config=written(tmp_path, file))
    assert "\n" not in str(caught.value)
