"""Damaged and forged runs: each loads as it was saved, or is refused in one sentence, quickly and in little memory."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from autowidth.checkpoint import save
from hostile import CORPUS, DAMAGES, FORGERIES, Loader, Mutation, Outcome, cases, deep, sealed

SECONDS = 1.0
"""Of the processor, that one attempt may take."""

MEGABYTES = 64.0
"""Of memory, beside twice the files."""


def size(folder: Path) -> float:
    """Of the files of a run, in MB."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 2**20


def tried(loader: Loader, place: Path, run: Path, mutation: Mutation, seed: int, *, seal: bool) -> Outcome:
    """What comes of a copy of the run with the mutation."""
    shutil.rmtree(place, ignore_errors=True)
    folder = Path(shutil.copytree(run, place / run.name))
    mutation(folder, random.Random(seed))
    if seal:
        sealed(folder)
    before = listing(place)
    outcome = loader.load(folder, run.name)
    assert listing(place) == before, f"{mutation.__name__}, seed {seed}: files have changed"
    return outcome


def listing(place: Path) -> dict[str, tuple[int, int]]:
    """Every name below a folder, with length and time of change: what reading leaves alone."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(place.rglob("*"))}


def wrong(loader: Loader, place: Path, count: int, mutations: tuple[Mutation, ...], *, schema: int = 2,
          seal: bool = False) -> tuple[list[str], Counter[str]]:  # fmt: skip
    """What is not as it should be, and how many mutations there were of each outcome."""
    whole = {
        run.name: loader.load(run, run.name).said for run in (CORPUS / f"schema_{schema}").iterdir()
    }  # what the runs load as when nothing is changed
    assert all(said.startswith("loaded") for said in whole.values()), whole
    found, counts = [], Counter()
    worst_seconds = worst_memory = 0.0
    for name, run, mutation, seed in cases(count, mutations, schema):
        outcome = tried(loader, place, run, mutation, seed, seal=seal)
        loaded = outcome.said.startswith("loaded")
        counts["loaded" if loaded else outcome.said] += 1
        if not loaded and outcome.said != "refused":
            found.append(f"{name}: {outcome.said} {outcome.detail}")
        if loaded and not seal and schema > 1 and outcome.said not in whole.values():
            found.append(f"{name}: loaded as something that was never saved")
        # The first format does not say how large its files are, so that they are read as they have become.
        files = size(place / run.name) if schema == 1 else size(run)
        if outcome.seconds > SECONDS or outcome.megabytes > MEGABYTES + 2 * files:
            found.append(f"{name}: {outcome.seconds:.2f} s, {outcome.megabytes:.0f} MB")
        if outcome.outside:
            found.append(f"{name}: touched {outcome.outside[:3]}")
        worst_seconds, worst_memory = max(worst_seconds, outcome.seconds), max(worst_memory, outcome.megabytes)
    print(f"{count} mutations: {dict(counts)}; at most {worst_seconds:.2f} s of the processor, {worst_memory:.0f} MB")
    return found, counts


@pytest.fixture(scope="module")
def loader():
    with Loader() as one:
        yield one


KINDS = {
    "damaged": (DAMAGES, 2, False),
    "forged": (FORGERIES, 2, True),
    "of the first format": (DAMAGES, 1, False),
}
"""Name -> mutations, format, whether the checksums are made to fit."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_runs(loader: Loader, tmp_path: Path, kind: str) -> None:
    mutations, schema, seal = KINDS[kind]
    found, counts = wrong(loader, tmp_path, 110, mutations, schema=schema, seal=seal)
    assert found == []
    assert counts["refused"] > 60
    assert counts["loaded"] > 0


def test_a_large_run_takes_at_most_three_times_its_file_in_memory(loader: Loader, tmp_path: Path) -> None:
    """Its pages, the network, and less than another while tensors are resized."""
    save(tmp_path / "run", deep(480))
    assert size(tmp_path / "run") > 70
    loader.load(CORPUS / "schema_2" / "tied", "tied")  # what torch imports at first use is not counted
    outcome = loader.load(tmp_path / "run", "deep")
    assert outcome.said.startswith("loaded")
    assert outcome.megabytes < 3 * size(tmp_path / "run"), outcome


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("damaged", 10_000), ("forged", 2_000), ("of the first format", 1_000)])
def test_thousands_of_runs(loader: Loader, tmp_path: Path, kind: str, count: int) -> None:
    mutations, schema, seal = KINDS[kind]
    found, counts = wrong(loader, tmp_path, count, mutations, schema=schema, seal=seal)
    assert found == []
    assert counts["refused"] > count / 2
    assert counts["loaded"] > 0
