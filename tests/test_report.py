"""The page of a run: what it says, from which files, what it refuses, and what is on disk while a run goes on."""

from __future__ import annotations

import base64
import gzip
import html
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from torch import nn
from typer.testing import CliRunner

from autowidth.channels import IndexMap
from autowidth.checkpoint import read_run, save
from autowidth.cli import app
from autowidth.history import Event, Fidelity, History
from autowidth.report.compare import compared
from autowidth.report.figures import Figure, figures_of
from autowidth.report.page import page_of, page_of_several
from autowidth.report.progress import Epoch, Facts, ProgressError, add, begin, read_course
from autowidth.report.record import LIVE_HISTORY, LIVE_PROGRESS, RecordError, read_record
from autowidth.report.story import Story, fidelity_of, story_of, worths_of
from autowidth.report.words import decided, reason_for_no_removal
from records import written

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, "-m", "autowidth"]
CONFIG = """
model = "resnet8"
width = 0.5
epochs = 3
limit = 192
batch_size = 32
device = "cpu"
policy = {name = "budget", macs = 0.6, schedule = {count = 3, begin = 0.2, end = 0.8}, limits = {grace = 1}}
effort = {probe_samples = 64, audit_samples = 64, audit_filters = 4}
"""


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    return kept | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}


def program(*arguments: str, at: Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, with `at` as its working folder."""
    before = Path.cwd()
    os.chdir(at)
    try:
        done = CliRunner().invoke(app, arguments)
    finally:
        os.chdir(before)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that the command trained; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "run.toml").write_text(CONFIG)
    done = program("train", "--config", "run.toml", "--out", "run", at=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith("history.jsonl, progress.jsonl, report.html")
    return folder / "run"


def data_of(page: str) -> dict[str, Any]:
    """What a page carries for its pictures."""
    packed = re.search(r'id="data">([^<]*)</script>', page)
    assert packed is not None
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    return found


def words_of(page: str) -> str:
    """The text of a page, without what is packed, styles and scripts."""
    bare = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", bare)).split())


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_every_run_ends_with_its_page_and_all_of_it_is_from_the_files(trained: Path) -> None:
    run = read_run(trained)
    history, result = run.history(), run.extra["result"]
    assert history is not None
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 3 * 2**20
    text = words_of(page)
    assert "resnet8 on digits, seed 0" in text
    assert f"{100 * result['accuracy']:.2f} %" in text
    assert f"{history.removed_total:,} {result['inserted']} inserted" in text
    data = data_of(page)
    widths = data["figures"]["widths"]["views"][0]["data"][0]
    names = [layer.name for layer in history.layers]
    assert widths["y"] == names
    for row, layer in zip(widths["text"], history.layers, strict=True):
        after = [layer.width(history.widths_start, widths) for _, widths in history.replay()]
        assert row == [layer.shape[layer.out], *after]
    course = read_course(trained / "progress.jsonl")
    assert data["figures"]["accuracy"]["views"][0]["data"][0]["y"] == [e.accuracy for e in course.epochs]
    assert course.epochs[-1].accuracy == result["accuracy"]
    assert data["figures"]["macs"]["views"][0]["data"][0]["y"][:4] == [result["macs_start"], *(e.macs for e in history)]
    for event in history:
        assert decided(event) in text
    for name in ("torch", "numpy", "python", "system"):
        assert course.facts.versions[name] in text
    last = {w["group"]: w for w in data["worths"] if w["review"] == len(history)}
    event = history.events[-1]
    for group, worths in event.filter_worths.items():
        assert last[group]["worth"] == sorted(worths)
        gone = event.maps[group].removed if group in event.maps else ()
        assert sorted(w for w, left in zip(last[group]["worth"], last[group]["left"], strict=True) if left) == sorted(
            worths[c] for c in gone
        )


def test_whoever_left_was_worth_less_than_the_price_and_the_price_is_that_of_the_policy(trained: Path) -> None:
    history = History.read(trained / "history.jsonl")
    for event in history:
        assert event.price is not None
        assert event.prices.keys() == event.widths.keys() == event.filter_worths.keys()
        for group, price in event.prices.items():
            worths = event.filter_worths[group]
            assert min(worths) == pytest.approx(event.worths[group][0], rel=0.01)
            assert len(worths) == (event.maps[group].size if group in event.maps else event.widths[group])
            assert price >= 0
            assert (price == 0) == (event.price == 0)
    last = next(event for event in reversed(history.events) if event.price)
    for layer in history.layers:
        for group in layer.groups[:1] if len(layer.groups) == 1 else ():
            narrower = last.widths | {group: last.widths[group] - 1}
            saved = sum(
                y.macs_at(history.widths_start, last.widths) - y.macs_at(history.widths_start, narrower)
                for y in history.layers
            )
            assert last.prices[group] == pytest.approx((last.price or 0) * saved, rel=1e-6)


def test_the_command_of_the_page_repeats_the_run(trained: Path, tmp_path: Path) -> None:
    page = (trained / "report.html").read_text(encoding="utf-8")
    command = re.search(r'<code id="command">(.*?)</code>', page)
    assert command is not None
    first, *arguments = html.unescape(command[1]).split()
    assert (first, arguments[:3]) == ("autowidth", ["train", "--config", "settings.json"])
    (tmp_path / "settings.json").write_text(json.dumps(data_of(page)["settings"]))
    done = program(*arguments, "--quiet", at=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    before, after = read_run(trained).extra["result"], read_run(tmp_path / "run-again").extra["result"]
    assert (before["widths"], before["accuracy"], before["loss"]) == (
        after["widths"], after["accuracy"], after["loss"],
    )  # fmt: skip


def figures(story: Story) -> dict[str, Figure]:
    return {figure.key: figure for figure in figures_of(story)}


def test_plotly_knows_every_word_of_every_figure(tmp_path: Path, trained: Path) -> None:
    written(tmp_path / "h.jsonl", layers=30, reviews=9)
    stories = [story_of(read_record(path)) for path in (trained, tmp_path / "h.jsonl")]
    everything = [*figures_of(stories[0]), *figures_of(stories[1]), *compared(stories).figures]
    assert {f.key for f in everything} == {
        "widths", "network", "accuracy", "loss", "macs", "params", "plans", "ranks", "frontier", "final",
    }  # fmt: skip
    for figure in everything:
        assert figure.summary
        assert figure.rows
        assert {len(row) for row in figure.rows} == {len(figure.headings)}
        for view in figure.views:
            assert view.traces
            drawn = json.loads(re.sub(r'"var\(--[a-z-]+\)"', '"#123456"', json.dumps([view.traces, view.layout])))
            go.Figure(data=drawn[0], layout=drawn[1])  # raises where a name is none of Plotly's


def test_losses_of_answers_are_not_drawn_beside_those_on_labels(trained: Path) -> None:
    story = story_of(read_record(trained))
    first = replace(story, reviews=tuple(replace(r, event=replace(r.event, step=0)) for r in story.reviews))
    drawn = [[trace["name"] for trace in figures(s)["loss"].views[0].traces] for s in (story, first)]
    assert "probe, before a review" in drawn[0] and "probe, before a review" not in drawn[1]
    assert "training, mean of an epoch" in drawn[1]


def test_a_page_compares_runs(trained: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        shutil.copytree(trained, tmp_path / f"{number}" / "run")
    done = program("report", "1/run", "2/run", at=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    data = data_of(page)
    assert [len(data["figures"][key]["views"][0]["data"]) for key in ("accuracy", "loss", "macs", "frontier")] == [
        2
    ] * 4
    text = words_of(page)
    assert "1/run" in text
    assert "2/run" in text
    assert "None that the records tell." in text


def test_settings_that_differ_are_told(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "other")
    progress = tmp_path / "other" / "progress.jsonl"
    progress.write_text(progress.read_text().replace('"lr":0.1,', '"lr":0.2,', 1))
    other = read_record(tmp_path / "other")
    assert other.remarks == ("progress.jsonl is of another run and is left out",)
    stories = [story_of(read_record(trained)), story_of(replace(other, settings=other.settings | {"lr": 0.05}))]
    assert compared(stories).differences == (("lr", "0.1", "0.05"),)
    assert "lr" in words_of(page_of_several(stories))


# ---- words -----------------------------------------------------------------------------------------------------------


def event(**fields: Any) -> Event:
    known = {"step": 1, "total_steps": 9, "macs_before": 2_000_000, "macs": 2_000_000, "params_before": 9, "params": 9}
    return Event(**(known | {"widths": {"a": 4}} | fields))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"target": 2e6}, "nothing was removed or inserted: the network is at 2 M MACs, and 2 M MACs are allowed"),
        ({"target": 1e6}, "but no filter may leave"),
        ({"notes": ("a loss of 0 says nothing about size: nothing was done",)}, "a loss of 0 says nothing about size"),
        ({}, "the policy decides nothing here"),
        (
            {"target": 1e6, "price": 2e-9, "maps": {"a": IndexMap.removing([1, 2], 6)}},
            "2 filters left that earned least for what they cost (a 2); aiming at 1 M MACs, from 2 M MACs; "
            "who stays earns at least 0.002 nats per million MACs",
        ),
        ({"unit": "ms", "target": 0.5, "maps": {"a": IndexMap.identity(3).inserting(1)}}, "1 filter came where more"),
    ],
)  # fmt: skip
def test_a_review_says_what_it_decided_and_why(found: dict[str, Any], expected: str) -> None:
    assert expected in decided(event(**found))


def test_a_run_that_removed_nothing_says_so_and_why() -> None:
    history = History({"a": 4})
    assert reason_for_no_removal(history) == "no review took place"
    history.append(event(target=2_000_000.0))
    assert (reason_for_no_removal(history) or "").startswith("at the last of 1 review, the network is at 2 M MACs")
    history.append(event(maps={"a": IndexMap.removing([0], 4)}, widths={"a": 3}))
    assert reason_for_no_removal(history) is None


def test_the_command_says_that_nothing_was_removed(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    done = program("train", "--config", "run.toml", "--macs", "1", "--epochs", "1", "--out", "run", at=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    if "-0 " in done.stdout and not re.search(r": -[1-9]", done.stdout):
        assert lines[-2].startswith("nothing was removed: at the last of 3 reviews, ")
        assert "MACs are allowed" in lines[-2]
    words = [after for line, after in itertools.pairwise(lines) if line.startswith("  review ")]
    assert len(words) == 3 and all(line.startswith("    ") for line in words)  # a review in words, each


def test_why_a_layer_is_as_wide_as_it_is() -> None:
    history = History({"kept": 3, "moved": 4, "safe": 2})
    maps = {"moved": IndexMap.removing([0], 4)}
    history.append(
        event(
            widths={"kept": 3, "moved": 3, "safe": 2}, maps=maps, prices={"kept": 0.1, "moved": 0.1, "safe": 0.1},
            filter_worths={"kept": (0.2, 0.3, 0.5), "moved": (0.01, 0.02, 0.03, 0.5), "safe": (0.0, 0.0)},
            interactions={"moved": 0.1},
        )
    )  # fmt: skip
    record = read_record_of(history, settings={"policy": {"limits": {"protect": ["saf*"]}}})
    whys = {layer.name: layer.why for layer in story_of(record).layers}
    assert whys["kept"] == (
        "Kept all of its 3 filters. The weakest that stays is worth 0.2 nats, and one filter here has to be worth "
        "0.1 nats: it pays for itself."
    )
    assert whys["moved"].startswith("From 4 to 3: 1 filter left. Alone its weakest is worth 0.02 nats")
    assert "would cost 0.32 nats" in whys["moved"]
    assert whys["safe"] == "Kept at 2: it is protected by the settings (protect)."


def read_record_of(history: History, *, settings: dict[str, Any]) -> Any:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        history.write(Path(folder) / "h.jsonl")
        return replace(read_record(Path(folder) / "h.jsonl"), settings=settings)


def test_worths_of_many_reviews_are_bounded_and_the_last_ones_are_whole(tmp_path: Path) -> None:
    history = written(tmp_path / "h", layers=12, reviews=8, judged=8)
    last = sum(map(len, history.events[-1].filter_worths.values()))
    assert {w.review for w in worths_of(history, most=10**6)} == set(range(1, 9))
    assert {w.review for w in worths_of(history, most=2 * last + 40)} == {7, 8}
    thinned = worths_of(history, most=last // 2)
    assert {w.review for w in thinned} == {8}
    for w in thinned:
        whole = sorted(history.events[-1].filter_worths[w.group])
        assert (w.worth[0], w.worth[-1], w.total) == (whole[0], whole[-1], len(whole))
        assert 0 < len(w.worth) <= w.total


def test_how_well_it_predicted_in_words() -> None:
    assert fidelity_of([]).sentence == "No prediction was checked: there was no audit and no plan."
    found = fidelity_of([event(predicted=0.1, measured=0.5, fidelity=Fidelity(spearman=0.5, slope=1.0, count=4))])
    assert found.spearman == 0.5
    assert "4 filters were taken away" in found.sentence
    assert "0 of 1 stayed within twice the prediction" in found.sentence


# ---- while a run goes on ---------------------------------------------------------------------------------------------


def test_a_live_run_has_a_page_and_a_killed_one_too(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    long = ("--epochs", "2000")
    child = subprocess.Popen(
        [*PROGRAM, "train", "--config", "run.toml", *long, "--out", "run", "--quiet"], env=environment(), cwd=tmp_path
    )
    try:
        progress, deadline = tmp_path / "run" / LIVE_PROGRESS, time.monotonic() + 120
        while not progress.is_file() or progress.read_text().count("\n") < 3:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        page = page_of(story_of(read_record(tmp_path / "run")))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(30)
    assert re.search(r"not finished: \d+ of 2000 epochs", words_of(page))
    assert len(data_of(page)["figures"]["accuracy"]["views"][0]["data"][0]["y"]) >= 2
    with (tmp_path / "run" / LIVE_PROGRESS).open("a") as file:
        file.write('{"epoch": 9')
    done = program("report", "run", at=tmp_path)
    assert (done.returncode, done.stderr) == (
        0, "autowidth: live-progress.jsonl: the last line was cut short and is left out\n",
    )  # fmt: skip
    assert (tmp_path / "run" / "report.html").is_file()
    again = program("train", "--config", "run.toml", "--epochs", "1", "--out", "run", "--quiet", at=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert sorted(set(os.listdir(tmp_path / "run")) - {"training"}) == [
        "history.jsonl", "model.safetensors", "progress.jsonl", "report.html", "run.json", "widths.json",
    ]  # fmt: skip


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_history_cut_off_in_a_line_is_drawn_with_a_remark(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    lines = (trained / "history.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / "history.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:100])
    done = program("report", "run", at=tmp_path)
    assert done.returncode == 0
    assert "dropped the last line" in done.stderr
    text = words_of((tmp_path / "run" / "report.html").read_text())
    assert "history.jsonl holds 2 of the 3 reviews of the saved run" in text


@pytest.mark.parametrize("old", [1, 2, 3])
def test_a_history_of_an_older_version_is_drawn_without_what_it_lacks(tmp_path: Path, old: int) -> None:
    written(tmp_path / "h.jsonl", layers=4, reviews=3)
    header, *events = map(json.loads, (tmp_path / "h.jsonl").read_text().splitlines())
    del header["layers"]
    for found in events:
        for name in ("filter_worths", "prices", "interactions"):
            del found[name]
        if old < 3:
            del found["memory"]
        if old == 1:
            found["announced"], found["target_macs"] = found.pop("predicted"), found.pop("target")
            del found["unit"]
    lines = [header | {"schema": old}, *events]
    (tmp_path / "h.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    story = story_of(read_record(tmp_path / "h.jsonl"))
    assert [layer.name for layer in story.layers] == list(header["widths_start"])
    assert not story.worths
    assert "What every filter is worth" not in words_of(page_of(story))
    assert figures(story).keys() == {"widths", "network", "loss", "macs", "params", "plans", "ranks"}


def spoilt(path: Path, *, line: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines) + "\n")


REFUSED = [
    ("nowhere", "there is no run at nowhere: name the folder of a run, or a history file"),
    ("empty", "empty holds no run.json and no history.jsonl"),
    ("newer.jsonl", "has format 99, this version reads up to 4: install a newer autowidth"),
    ("damaged.jsonl", "line 2 is damaged: no event"),
    ("other.txt", "no header with a schema version"),
    ("run --out taken.txt", "taken.txt is there and is no report: name another file with --out, or pass --force"),
    ("run --out gone/page.html", "there is no folder gone to write page.html to"),
    ("run --out empty", "--out empty is a folder: name a file, such as empty/report.html"),
    ("bare", "was saved without a history"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_cannot_be_drawn_is_refused_in_one_sentence(
    trained: Path, tmp_path: Path, arguments: str, sentence: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from autowidth.__main__ import main

    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.txt").write_text("precious")
    (tmp_path / "other.txt").write_text("hello\n")
    for name in ("newer", "damaged"):
        written(tmp_path / f"{name}.jsonl", layers=2, reviews=2)
    spoilt(tmp_path / "newer.jsonl", line=0, text='{"schema": 99, "widths_start": {}}')
    spoilt(tmp_path / "damaged.jsonl", line=1, text='{"step": 3}')
    shutil.copytree(trained, tmp_path / "run")
    save(tmp_path / "bare", nn.Linear(1, 1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["autowidth", "report", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("autowidth: ")
    assert said.count("\n") == 1
    assert sentence in said
    assert (tmp_path / "taken.txt").read_text() == "precious"


def test_force_replaces_what_is_there(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken.txt").write_text("precious")
    done = program("report", str(trained), "--out", "taken.txt", "--force", at=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    again = program("report", str(trained), "--out", "taken.txt", at=tmp_path)  # now it is a page of ours
    assert (again.returncode, again.stderr) == (0, "")


def test_a_run_without_reviews_and_a_history_without_events_have_pages(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    done = program("train", "--config", "run.toml", "--no-edit", "--epochs", "1", "--out", "run", at=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    text = words_of((tmp_path / "run" / "report.html").read_text())
    assert "No review took place: all widths are those that the network was brought with." in text
    History({"a": 3}, path=tmp_path / "h.jsonl")
    text = words_of(page_of(story_of(read_record(tmp_path / "h.jsonl"))))
    assert "As wide as it was brought, 3: no review took place." in text
    assert "Nothing has been recorded over time" in text


def test_a_report_that_is_not_ours_stays_where_a_run_ends(tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text("my own notes")
    (tmp_path / "run.toml").write_text(CONFIG)
    done = program("train", "--config", "run.toml", "--epochs", "1", "--out", "run", "--quiet", at=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "is there and is no report" in done.stdout
    assert (tmp_path / "run" / "report.html").read_text() == "my own notes"


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["{}"], "line 1: no header"),
        (['{"schema": 7}'], "has format 7, this version reads up to 1"),
        ([None, '{"epoch": 1}', '{"epoch": 2}'], "line 2 is damaged: no epoch"),
    ],
)
def test_damaged_progress_is_refused_in_a_sentence(tmp_path: Path, lines: list[str | None], sentence: str) -> None:
    path = tmp_path / "progress.jsonl"
    facts = Facts(settings={}, versions={}, data="", part="test", epochs=1, total_steps=1, macs_start=1, params_start=1)
    begin(path, facts)
    header = path.read_text().strip()
    path.write_text("\n".join(line or header for line in lines) + "\n")
    with pytest.raises(ProgressError, match=sentence):
        read_course(path)


def test_progress_comes_back_as_it_was_written(tmp_path: Path) -> None:
    facts = Facts(settings={"a": 1}, versions={"torch": "2"}, data="x", part="test", epochs=2, total_steps=4,
                  macs_start=5, params_start=6, accuracy_start=0.5, began="now", command="autowidth train")  # fmt: skip
    epochs = [Epoch(epoch=n, step=n, loss=float("nan"), accuracy=0.1, macs=3, params=2, seconds=1.5) for n in (1, 2)]
    begin(tmp_path / "p", facts)
    for epoch in epochs:
        add(tmp_path / "p", epoch)
    course = read_course(tmp_path / "p")
    assert course.facts == facts
    assert [(e.epoch, e.loss, e.accuracy, e.seconds) for e in course.epochs] == [
        (1, None, 0.1, 1.5),
        (2, None, 0.1, 1.5),
    ]


def test_a_folder_without_a_record_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=re.escape(f"{tmp_path} holds no run.json")):
        read_record(tmp_path)
    written(tmp_path / "history.jsonl", layers=2, reviews=1)
    assert read_record(tmp_path).name == tmp_path.name
    assert not (tmp_path / LIVE_HISTORY).exists()


def test_packages_that_are_missing_are_named_with_the_command_that_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autowidth.report import page

    written(tmp_path / "h.jsonl", layers=2, reviews=1)
    page._plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(
        page.MissingPackageError, match=r"plotly, which is not installed: pip install 'autowidth\[report\]'"
    ):
        page_of(story_of(read_record(tmp_path / "h.jsonl")))
