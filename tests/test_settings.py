"""Settings: what is refused, and who overrules whom among options, the environment and a file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autowidth.engine import Effort
from autowidth.lab.policies import TargetError, from_options
from autowidth.lab.settings import PREFIX, Settings, SettingsError, settings_from, settings_of
from autowidth.policy import Auto, Budget, Limits, Never, Price
from composed import composed


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
    ({"macs": 0.3}, r"no setting is named 'macs'.*did you mean policy\.macs"),
    ({"policy": {"name": "budget", "mcas": 0.3}}, r"no setting is named 'policy\.mcas'.*did you mean policy\.macs"),
    ({"policy": {"name": "budget", "macs": 0}}, r"'policy'.*macs=0 is impossible"),
    ({"policy": {"name": "budget", "limits": {"multiple": 0}}}, r"'policy\.limits'.*multiple=0"),
    (
        {"policy": {"name": "budget", "limits": {"multipel": 8}}},
        r"'policy\.limits\.multipel'.*policy\.limits\.multiple",
    ),
    ({"policy": {"name": "auto", "nats_per_model": -5}}, r"no setting is named 'policy\.nats_per_model'"),
    ({"policy": {"name": "budgte"}}, r"'policy.name' is 'budgte', allowed are never, budget, price, auto"),
    ({"policy": 3}, r"'policy.name' is '3'"),
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
    "run.json": '{"epochs": 7, "lr": 0.05, "policy": {"name": "budget", "macs": 0.4, "schedule": {"count": 8}}}',
    "run.toml": 'epochs = 7\nlr = 0.05\n[policy]\nname = "budget"\nmacs = 0.4\n[policy.schedule]\ncount = 8\n',
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_file_fills_the_settings_and_is_overruled_field_by_field(tmp_path: Path, name: str) -> None:
    config = tmp_path / name
    config.write_text(CONFIGURATIONS[name])
    assert settings_from({}, config=config) == Settings(epochs=7, lr=0.05, policy=composed(Budget(macs=0.4), count=8))
    overruled = settings_from({"epochs": 9, "policy": {"macs": 0.3}}, config=config)
    assert overruled == Settings(epochs=9, lr=0.05, policy=composed(Budget(macs=0.3), count=8))


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
    ("AUTOWIDTH_POLICY__NAME", "never", {"policy": Never()}),
    ("AUTOWIDTH_POLICY", '{"name": "budget", "macs": 0.3}', {"policy": Budget(macs=0.3)}),
    (
        "AUTOWIDTH_POLICY",
        '{"name": "budget", "limits": {"protect": ["stem*"]}}',
        {"policy": composed(Budget(), protect=("stem*",))},
    ),
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


HALF = 'policy = {name = "budget", macs = 0.4, schedule = {count = 4}}'
DEAR = 'policy = {name = "price", nats_per_model = 0.4, pace = 0.3, limits = {offer = 0.1}}'
POLICIES: list[tuple[str, dict[str, Any], Any]] = [
    # file, option, what comes out
    (HALF, {"macs": 0.3}, composed(Budget(macs=0.3), count=4)),
    (HALF, {"params": 0.3}, composed(Budget(params=0.3), count=4)),
    (HALF, {"latency_ms": 3}, composed(Budget(latency_ms=3), count=4)),
    (HALF, {"price": 0.2}, composed(Price(nats_per_model=0.2), count=4)),
    (HALF, {"auto": True}, composed(Auto(), count=4)),
    (HALF, {"edit": False}, Never()),
    (HALF, {"named": "price"}, composed(Price(), count=4)),
    (HALF, {}, composed(Budget(macs=0.4), count=4)),
    (DEAR, {"macs": 0.3}, replace(Budget(macs=0.3), limits=Limits(offer=0.1))),
    (DEAR, {"price": 0.2}, replace(Price(nats_per_model=0.2), limits=Limits(offer=0.1))),
    ('policy = {name = "never"}', {"macs": 0.3}, Budget(macs=0.3)),
    ("policy = {schedule = {count = 4}}", {"macs": 0.3}, composed(Budget(macs=0.3), count=4)),
    ("policy = {schedule = {count = 4}}", {}, composed(Auto(), count=4)),
]


@pytest.mark.parametrize(("file", "option", "expected"), POLICIES, ids=[f"{f}-{o}" for f, o, _ in POLICIES])
def test_the_target_of_an_option_holds_whole(
    tmp_path: Path, file: str, option: dict[str, Any], expected: dict[str, Any]
) -> None:
    bounds = {name: option.get(name) for name in ("macs", "params", "latency", "latency_ms")}
    options = from_options(
        bounds, price=option.get("price"), auto=option.get("auto", False), edit=option.get("edit", True),
        named=option.get("named"),
    )  # fmt: skip
    assert settings_from(options, config=written(tmp_path, file)) == Settings(policy=expected)


def test_the_target_of_the_environment_stands_between_option_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written(tmp_path, 'policy = {name = "budget", macs = 0.4, schedule = {count = 4}, limits = {grace = 1}}')
    monkeypatch.setenv("AUTOWIDTH_POLICY__NAME", "budget")
    monkeypatch.setenv("AUTOWIDTH_POLICY__PARAMS", "0.5")
    monkeypatch.setenv("AUTOWIDTH_POLICY__SCHEDULE__COUNT", "5")
    assert settings_from({}, config=config).policy == composed(Budget(params=0.5), count=5, grace=1)
    named = settings_from({"policy": {"name": "budget", "macs": 0.3}}, config=config)
    assert named.policy == composed(Budget(macs=0.3), count=5, grace=1)


def test_options_that_choose_different_ends_exclude_each_other() -> None:
    nothing: dict[str, Any] = {"price": None, "auto": False, "edit": True, "named": None}
    for given in ({"auto": True}, {"price": 0.5}, {"edit": False}, {"named": "price"}):
        with pytest.raises(TargetError, match="each choose where the run ends: keep one of them"):
            from_options({"macs": 0.5}, **(nothing | given))
    with pytest.raises(TargetError, match="allowed are never, budget, price, auto"):
        from_options({"macs": None}, **(nothing | {"named": "budgte"}))
    assert from_options({"macs": None}, **nothing) == {}


# ---- where the mistake is --------------------------------------------------------------------------------------------

PLACES: list[tuple[str, dict[str, str], dict[str, Any], str]] = [
    ("epochs = 0", {}, {}, r"^setting 'epochs' in \S*run.toml should be greater .* got 0$"),
    ("epochs = 0", {"EPOCHS": "x"}, {}, r"^setting 'epochs' in the environment should be .* got 'x'$"),
    ("epochs = 0", {"EPOCHS": "x"}, {"epochs": -1}, r"^setting 'epochs' should be greater .* got -1$"),
    ('policy = {name = "budget", mcas = 1}', {}, {}, r"'policy.mcas' in \S*run.toml; did you mean policy.macs"),
    (
        "policy = {schedule = {count = -1}}",
        {},
        {"policy": {"name": "budget", "params": 0.5}},
        r"'policy.schedule' in \S*run.toml: count=-1",
    ),
    (
        "",
        {"POLICY__NAME": "auto", "POLICY__SCHEDULE__COUNT": "x"},
        {},
        r"'policy.schedule.count' in the environment should be a valid integer.* got 'x'",
    ),
    (
        "",
        {"EPOCHZ": "1"},
        {},
        r"^the variable AUTOWIDTH_EPOCHZ of the environment is no setting: .* mean epochs\?$",
    ),
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
