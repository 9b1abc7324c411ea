"""The command line: what it prints where, what it writes, how it refuses."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autowidth import cli
from autowidth.__main__ import main
from autowidth.channels import ChannelMap
from autowidth.checkpoint import load_, read_run
from autowidth.cost import macs_cost, params_cost
from autowidth.lab.models import build
from autowidth.lab.settings import Settings
from autowidth.trace import trace
from autowidth.training import saved_trainings
from autowidth.version import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, "-m", "autowidth"]
CONFIG = """
model = "resnet8"
width = 0.5
epochs = 2
limit = 192
batch_size = 32
device = "cpu"
policy = {name = "budget", macs = 0.6, schedule = {count = 2, begin = 0.2, end = 0.8}, limits = {grace = 1}}
effort = {probe_samples = 64, audit_samples = 64, audit_filters = 4}
"""
NETWORK = """
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, num_classes=10, in_channels=3):
        super().__init__()
        self.first = nn.Conv2d(in_channels, 6, 3)
        self.head = nn.Linear(6 * 4 * 4, num_classes)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.first(x), 4).flatten(1))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with a short configuration and a network in the one above it."""
    (tmp_path / "run.toml").write_text(CONFIG)
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    return inner


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "PYTHONPATH")}
    return kept | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1", "TERM": "xterm"}


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program in the working folder, with its output in pipes."""
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, env=environment(), timeout=120)


def called(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the console entry, called in this process."""
    monkeypatch.setattr(sys, "argv", ["autowidth", *arguments])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return code or 0


# ---- train -----------------------------------------------------------------------------------------------------------

PROMISED = {
    "accuracy", "loss", "macs", "macs_start", "params", "params_start", "removed", "inserted", "inserted_alive",
    "seconds", "review_seconds", "seed", "widths_start", "widths", "out",
}  # fmt: skip


def test_train_as_json_prints_one_object_and_writes_a_run_that_loads(folder: Path) -> None:
    done = program("train", "--config", "../run.toml", "--seed", "5", "--macs", "0.7", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert result.keys() >= PROMISED
    assert (result["seed"], result["out"]) == (5, "runs/resnet8-digits-5")
    assert len(result["history"]) == result["reviews"] == 2
    assert sum(sum(review["removed"].values()) for review in result["history"]) == result["removed"] > 0
    assert all(review.keys() >= {"price", "predicted", "measured", "inserted", "alive"} for review in result["history"])
    assert 0.4 < result["macs"] / result["macs_start"] <= 0.7
    assert "epoch 2/2" in done.stderr
    assert "channel group" in done.stderr
    fresh = build("resnet8", in_channels=1, width=0.5)
    assert load_(fresh, result["out"], example_inputs=torch.zeros(1, 1, 8, 8)).widths == result["widths"]
    run = read_run(result["out"])
    assert run.extra["result"] == result
    settings = Settings.model_validate(run.extra["settings"])
    assert (settings.seed, settings.policy.macs, settings.policy.schedule.count, settings.epochs) == (5, 0.7, 2, 2)


def test_train_into_a_pipe_prints_plain_lines_and_a_table(folder: Path) -> None:
    done = program("train", "--config", "../run.toml", "--out", "here")
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search(r"[^\n -~]", done.stdout)
    lines = done.stdout.splitlines()
    assert [line[:9] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    run = read_run("here")
    result, history = run.extra["result"], run.history()
    assert history is not None
    for event in history:
        told = next(line for line in lines if f"at step {event.step}:" in line)
        assert f"-{sum(event.removed.values())} +{sum(event.inserted.values())} filters" in told
        assert told.endswith(f"widths {' '.join(map(str, event.widths.values()))}")
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(" ") and line.split()}
    cost = macs_cost(_traced(result))
    marginal = dict(zip(cost.names, cost.of_channel(result["widths"]), strict=True))
    weakest_and_strongest = history.events[-1].worths
    for name, width in result["widths_start"].items():
        weakest, _, strongest = weakest_and_strongest[name]
        assert rows[name][:2] == [str(width), str(result["widths"][name])]
        assert float(rows[name][2].replace(",", "")) == round(marginal[name])
        assert [float(w) for w in rows[name][3:]] == pytest.approx([weakest, strongest], rel=0.01)
    assert (
        f"accuracy {result['accuracy']:.2%} with {result['macs'] / result['macs_start']:.1%} of the MACs" in lines[-2]
    )
    assert lines[-1].startswith("written to here")


def _traced(result: dict[str, Any]) -> ChannelMap:
    network = build("resnet8", in_channels=1, width=0.5)
    return load_(network, result["out"], example_inputs=torch.zeros(1, 1, 8, 8))


def test_epochs_that_are_not_evaluated_have_a_line_without_accuracy(folder: Path) -> None:
    (folder.parent / "looks.toml").write_text(f"looks = 2\n{CONFIG}")
    done = program("train", "--config", "../looks.toml", "--epochs", "4", "--no-edit", "--out", "here")
    assert (done.returncode, done.stderr) == (0, "")
    found = re.findall(r"^epoch (\d)/4  loss [\d.]+  accuracy +(\S+)  MACs", done.stdout, flags=re.MULTILINE)
    assert [(epoch, said == "-") for epoch, said in found] == [("1", True), ("2", False), ("3", False), ("4", False)]


def test_the_environment_overrules_the_file_and_is_overruled_by_an_option(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOWIDTH_SEED", "3")
    monkeypatch.setenv("AUTOWIDTH_EPOCHS", "5")
    line = ("train", "--config", "../run.toml", "--epochs", "1", "--params", "0.7", "--out", "here", "--quiet")
    assert program(*line).returncode == 0
    settings = Settings.model_validate(read_run("here").extra["settings"])
    assert (settings.seed, settings.epochs, settings.limit) == (3, 1, 192)
    assert (settings.policy.params, settings.policy.macs, settings.policy.schedule.count) == (0.7, None, 2)


def test_train_on_ones_own_network_without_reviews(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_net.py").write_text(NETWORK)
    options = ("--model", "my_net:Net", "--width", "1", "--no-edit", "--out", "mine", "--quiet", "--epochs", "1")
    done = program("train", "--config", "../run.toml", *options)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.startswith("accuracy ")
    assert first.endswith("no reviews")
    assert second.startswith("written to mine")
    result = read_run("mine").extra["result"]
    assert result["widths"] == result["widths_start"] == {"first": 6}


def test_train_in_a_terminal_draws_and_leaves_the_result(folder: Path) -> None:
    keeper, terminal = pty.openpty()
    arguments = [*PROGRAM, "train", "--config", "../run.toml", "--out", "here"]
    child = subprocess.Popen(arguments, stdin=terminal, stdout=terminal, stderr=terminal, env=environment())
    os.close(terminal)
    seen = b""
    while select.select([keeper], [], [], 120)[0]:
        try:
            seen += os.read(keeper, 65536)
        except OSError:  # on Linux the end of a terminal is an error
            break
    os.close(keeper)
    assert child.wait(30) == 0
    text = seen.decode()
    assert "\x1b[?25l" in text  # the cursor was hidden ...
    assert text.count("\x1b[?25h") >= 1  # ... and shown again
    assert "\x1b[2K" in text  # lines were drawn over
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "2/2" in plain
    assert "review 2 at step" in plain
    assert "written to here" in plain
    lines = [line.strip() for line in plain.replace("\r", "\n").splitlines()]
    for said in (
        "epoch 1/2  loss",
        "epoch 2/2  loss",
        "review 1 at step",
        "review 2 at step",
    ):  # each stays, in one line
        assert sum(line.startswith(said) for line in lines) == 1
    assert sum("that earned least for what they cost" in line for line in lines) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_saved_says_how_to_go_on_and_goes_on(
    folder: Path, number: signal.Signals, code: int
) -> None:
    arguments = [*PROGRAM, "train", "--config", "../run.toml", "--epochs", "1000", "--out", "here"]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert child.stdout is not None
    while not child.stdout.readline().startswith("epoch"):
        assert child.poll() is None
    child.send_signal(number)
    _, complaint = child.communicate(timeout=60)
    assert child.returncode == code
    said = r"autowidth: stopped at step (\d+) of \d+; go on with: autowidth train --resume here\n"
    assert (told := re.fullmatch(said, complaint)), complaint
    assert sorted(p.name for p in folder.iterdir()) == ["here"]
    live = {"live-history.jsonl", "live-progress.jsonl"}  # with which its page goes on
    assert {p.name for p in (folder / "here").iterdir()} == {"training", *live}
    (saved,) = saved_trainings(folder / "here" / "training")
    assert read_run(saved).extra["step"] == int(told[1])
    epochs = int(read_run(saved).extra["epoch"]) + 2
    line = [*PROGRAM, "train", "--resume", "here", "--epochs", str(epochs), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["epochs"] == read_run("here").extra["result"]["epochs"] == epochs
    assert f"going on at step {told[1]} of" in done.stderr


# ---- errors ----------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, str]] = [
    ("train --model resnet21", "nearest is resnet20"),
    ("train --model my_net:Gone", "no 'Gone'"),
    ("train --model my_net:Flat", "no channel group that can be resized"),
    ("train --data digitz", "did you mean digits"),
    ("train --data folder:nowhere", "no folder nowhere"),
    ("train --device cuda:99", "use cpu or auto"),
    ("train --device abacus", "allowed are auto, cpu"),
    ("train --macs 0", "macs=0 is impossible"),
    ("train --macs -1", "macs=-1 is impossible"),
    ("train --macs 0.0001", "the least that widths allow"),
    ("train --latency 0.001", "latency=0.001 is below the least that widths allow"),
    ("train --latency 0.5 --macs 0.5", "macs=0.5 and latency=0.5: pass one of them"),
    ("train --latency-ms -3", "latency_ms=-3 is impossible"),
    ("train --auto --latency 0.5", "--auto each choose where the run ends: keep one of them"),
    ("train --macs 2 --config no_insertion.toml", "offer=0"),
    ("train --epochs 0", "'epochs' should be greater than or equal to 1, got 0"),
    ("train --lr nan", "'lr' should be a finite number"),
    ("train --batch-size 9999", "batch of 9999"),
    ("train --config nowhere.toml", "cannot read the configuration nowhere.toml"),
    ("train --config misspelt.toml", "'epochz' in misspelt.toml"),
    ("train --out my_net.py", "it is a file"),
    ("train --out my_net.py/run", "name a folder you may write to"),
    ("train --out .", "no folder of a run"),
    ("inspect nothing", "no model is named 'nothing'"),
    ("inspect my_net:Net", "give one, such as --input 1,3,224,224"),
    ("inspect resnet20 --input 1,3,x", "'1,3,x' is no shape"),
    ("inspect resnet20 --input 32", "'32' is no shape"),
    ("inspect resnet20 --input 1,3,32", "does not run on the example inputs"),
]


@pytest.mark.parametrize(("line", "part"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_gets_one_sentence_and_code_2_and_leaves_nothing(
    folder: Path, line: str, part: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "my_net.py").write_text(NETWORK)
    (folder / "misspelt.toml").write_text("epochz = 3")
    (folder / "no_insertion.toml").write_text("policy = {limits = {offer = 0}}")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "my_net", raising=False)
    before = sorted(folder.rglob("*"))
    command, *rest = line.split()
    quiet = ["--quiet"] if command == "train" else []
    assert called(command, *rest, *quiet, monkeypatch=monkeypatch) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("autowidth: ")
    assert captured.err.count("\n") == 1
    assert part in captured.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("line", ["train --lr 1e30 --no-edit --epochs 1", "train --lr 1e30 --epochs 1"])
def test_a_training_that_diverges_gets_one_sentence_a_code_of_its_own_and_leaves_nothing(
    folder: Path, line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert called(*line.split(), "--quiet", monkeypatch=monkeypatch) == 3
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("autowidth: ") and captured.err.count("\n") == 1
    assert "diverged; lower lr" in captured.err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("line", ["train --epochs many", "train --no-such-option", "inspect", "no-such-command"])
def test_a_line_that_cannot_be_read_gets_code_2(
    folder: Path, line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert called(*line.split(), monkeypatch=monkeypatch) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_a_mistake_has_no_traceback_unless_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = program("train", "--model", "resnet21")
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.count("\n") == 1
    assert called("train", "--model", "resnet21", "--debug", monkeypatch=monkeypatch) == 2
    debug = capfd.readouterr().err
    assert debug.startswith("Traceback")
    assert debug.endswith(plain.stderr)


def test_a_bug_is_not_blamed_on_the_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.inspect, "inspected", lambda *_: [][1])
    monkeypatch.setattr(sys, "argv", ["autowidth", "inspect", "resnet20"])
    with pytest.raises(IndexError):
        main()


def test_the_version_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert called("--version", monkeypatch=monkeypatch) == 0
    assert capfd.readouterr().out == f"autowidth {__version__}\n"


BARE = """
import sys
for name in ("typer", "pydantic"):
    sys.modules[name] = None
sys.argv = ["autowidth", "train"]
from autowidth.__main__ import main
main()
"""


def test_without_the_packages_of_the_laboratory_one_sentence_says_what_to_install(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=environment(), timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "not installed here (pydantic, typer): pip install 'autowidth[lab]'" in done.stderr


def test_the_command_leaves_the_module_path_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "json.py").write_text("raise RuntimeError('not the json of Python')")
    monkeypatch.setattr(sys, "argv", ["autowidth", "inspect", "resnet8", "--json"])
    before = sys.path.copy()
    with pytest.raises(SystemExit):
        main()
    assert sys.path == before
    assert json.loads(capfd.readouterr().out)["model"] == "resnet8"


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_as_json_says_what_the_trace_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert called("inspect", "vgg8", "--input", "2,1,16,16", "--json", monkeypatch=monkeypatch) == 0
    book = json.loads(capfd.readouterr().out)
    network = build("vgg8", in_channels=1)
    channel_map = trace(network, torch.zeros(2, 1, 16, 16))
    macs, params = macs_cost(channel_map), params_cost(channel_map, dict(network.named_parameters()))
    assert {g["name"]: g["width"] for g in book["groups"]} == channel_map.widths
    for number, group in enumerate(book["groups"]):
        assert group["macs_per_channel"] == round(macs.of_channel(channel_map.widths)[number])
        assert group["params_per_channel"] == round(params.of_channel(channel_map.widths)[number])
        assert [p["axis"] for p in group["places"]] == [str(axis) for axis in channel_map.groups[number].axes]
    frozen = [(f["axis"], f["positions"], f["reason"]) for f in book["frozen"]]
    assert frozen == [(str(f.axis), len(f.index), f.reason) for f in channel_map.frozen]
    assert book["macs"] == round(macs.at(channel_map.widths))
    assert book["params"] == sum(p.numel() for p in network.parameters())


def test_inspect_prints_every_group_and_every_reason_why_axes_are_frozen(folder: Path) -> None:
    (folder / "my_net.py").write_text(NETWORK)
    done = program("inspect", "my_net:Net", "--input", "1,3,8,8")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()]
    # One channel: 27 weights at 6 x 6 pixels and 16 x 10 in the head; 27 + 1 + 160 parameters.
    assert ["first", "6", f"{27 * 36 + 160:,}", "188"] in [line[:4] for line in lines]
    assert "read by 1 (16 copies)" in done.stdout
    assert ["model input", "1", "first.weight[dim 1]"] in lines
    assert ["model output", "2", "head.weight[dim 0], head.bias[dim 0]"] in lines
    totals = f"{6 * (27 * 36 + 160):,} MACs per sample, {6 * 188 + 10:,} parameters, 6 channels in 1 channel groups"
    assert totals in done.stdout


def test_inspect_says_what_stays_because_it_does_not_train(folder: Path) -> None:
    half = "\ndef half_frozen():\n    net = Net()\n    net.first.requires_grad_(False)\n    return net\n"
    (folder / "my_net.py").write_text(NETWORK + half)
    done = program("inspect", "my_net:half_frozen", "--input", "1,3,8,8")
    assert done.returncode == 0, done.stderr
    assert "No channel group can be resized." in done.stdout
    assert "its parameters do not train (requires_grad=False)" in done.stdout


def test_inspect_without_an_input_takes_the_models_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert called("inspect", "resnet20", "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capfd.readouterr().out)["input"] == [1, 3, 32, 32]


def test_a_reader_that_leaves_early_gets_no_complaint(folder: Path) -> None:
    line = f"{' '.join(PROGRAM)} inspect resnet56 | head -n 1"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.stdout.strip() == "Channel groups"
    assert done.stderr == ""


@pytest.mark.parametrize("command", [(), ("train",), ("inspect",)])
def test_help_teaches_by_example(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert called(*command, "--help", monkeypatch=monkeypatch) == 0
    text = capfd.readouterr().out
    for name in command or ("train", "inspect"):
        assert f"  autowidth {name}" in text if command else f" {name} " in text
    assert max(map(len, text.splitlines())) <= 80


def test_every_setting_in_the_help_has_its_default(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    called("train", "--help", monkeypatch=monkeypatch)
    text = re.sub(r"[\s│]+", " ", capfd.readouterr().out)
    settings = Settings()
    for name in ("model", "data", "epochs", "lr", "seed", "width", "device"):
        assert f"default {getattr(settings, name)} " in text
