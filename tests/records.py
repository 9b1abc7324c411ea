"""Records of runs for the tests of pages: histories of any size, made by the laws of the record itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autowidth.channels import IndexMap
from autowidth.history import Event, Fidelity, History
from autowidth.layers import Layer


def layered(count: int, prefix: str = "stage.block") -> tuple[dict[str, int], list[Layer]]:
    """Widths of so many channel groups, and a chain of layers that have them, with a frozen head."""
    rng = np.random.default_rng(count)
    start = {f"{prefix}.{n}.conv": int(rng.integers(16, 129)) for n in range(count)}
    names = list(start)
    layers = [
        Layer(
            name=name, shape=(start[name], start[names[n - 1]] if n else 3, 3, 3), macs=1e5 * start[name],
            axes={0: {name: 1}} | ({1: {names[n - 1]: 1}} if n else {}),
        )
        for n, name in enumerate(names)
    ]  # fmt: skip
    head = Layer(name="head", shape=(10, start[names[-1]]), macs=1e4, axes={1: {names[-1]: 1}}, frozen="model output")
    return start, [*layers, head]


def moved(widths: dict[str, int], rng: np.random.Generator) -> dict[str, IndexMap]:
    """Maps that remove up to two channels of about half of the groups, and insert up to one."""
    maps = {}
    for name, width in widths.items():
        if width > 6 and rng.random() < 0.5:
            gone = rng.choice(width, int(rng.integers(0, 3)), replace=False).tolist()
            index_map = IndexMap.removing(gone, width).inserting(int(rng.integers(0, 2)))
            if not index_map.is_identity:
                maps[name] = index_map
    return maps


def written(path: Path, *, layers: int, reviews: int, judged: int = 2, prefix: str = "stage.block") -> History:
    """Writes a history of so many layers and reviews; the last `judged` have the worths of all filters."""
    start, chain = layered(layers, prefix)
    history, widths, rng, macs = History(start, layers=chain), dict(start), np.random.default_rng(0), 10**9
    for number in range(1, reviews + 1):
        known = number > reviews - judged
        worths = {g: tuple(rng.lognormal(-8, 2, w).tolist()) for g, w in widths.items()} if known else {}
        maps, before = moved(widths, rng), macs
        widths |= {group: index_map.width for group, index_map in maps.items()}
        macs = round(macs * 0.99)
        history.append(
            Event(
                step=number * 10, total_steps=reviews * 11, loss=2 / number, predicted=0.01,
                measured=float(rng.normal(0.01, 0.01)), price=1e-9, target=macs, macs_before=before, macs=macs,
                params_before=before // 50, params=macs // 50, widths=dict(widths), maps=maps, filter_worths=worths,
                prices=dict.fromkeys(worths, 3e-4), interactions=dict.fromkeys(worths, 1e-5),
                fidelity=Fidelity(spearman=float(rng.uniform(0.2, 0.9)), slope=1.0, count=8), seconds={"probe": 0.5},
            )
        )  # fmt: skip
    history.write(path)
    return history
