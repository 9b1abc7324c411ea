"""What is told of published networks made smaller: tables and a picture of the records, with others' figures beside."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autowidth.lab.plots import OURS, PUBLISHED, TOOL
from autowidth.lab.tables import markdown, spread

Record = Mapping[str, Any]

logger = logging.getLogger(__name__)

ABOUT = """# Published networks made smaller

The published ResNets for CIFAR-10 of Y. Idelbayev's pytorch_resnet_cifar10, with their weights. Accuracy in percent of
the 10,000 test images, mean over seeds and standard deviation between them; choices were made on 5,000 training images
that are held out. MACs are a share of the network's own. Torch-Pruning is given the first convolution of each block
only, since its handling of zero-padding shortcuts breaks on these networks ("mat1 and mat2 shapes cannot be
multiplied"), and so is neuron merging, as in its paper. A measure with `-reconstructed` behind its name ranks the
filters, and what it removes is repaired by our least-squares reconstruction.
"""

UNTRAINED = """Nothing is trained. Every network then gets the same norm statistics: plain averages over 8,192 augmented
training images. An asterisk marks the best row of a column."""

LEFT = """The same with norms as each method leaves them:"""

TUNED = """Equal epochs, one recipe; networks that start from fresh weights get the rate and schedule that these need.
With `-taught` behind its name a method learns from the network that was brought as well as from labels.
Seconds are those of the whole way, reviews and removal included, on the device that stands beside them."""

THEIRS: Mapping[str, tuple[tuple[str, float, float], ...]] = {
    "resnet56": (
        ("OCSPruner, one run", 50, 93.81),
        ("CORING, pipeline", 53, 94.22),
        ("DepGraph, pipeline", 47, 93.83),
        ("uniform width from scratch", 50, 93.20),
        ("ResNet-32 from scratch", 55, 93.41),
        ("dense with a good recipe", 100, 94.21),
    )
}
"""Published figures near half of the MACs, by network: name, MACs left in percent, accuracy in percent. Theirs: other
recipes, other bases, and hundreds of epochs as a rule; the sources at hand do not give them all, so none are told."""


def published_table(records: Sequence[Record]) -> str:
    """The records as Markdown: a section for each table, model and, of fine-tuned networks, target."""
    parts = [ABOUT]
    for model in _values(records, "model", table="no-training"):
        mine = [r for r in records if (r["table"], r["model"]) == ("no-training", model)]
        parts += [f"## {model}, without training\n", UNTRAINED + "\n", _by_target(mine, "accuracy")]
        parts += [f"\n{LEFT}\n", _by_target(mine, "accuracy_as_left"), ""]
    for model in _values(records, "model", table="fine-tuned"):
        mine = [r for r in records if (r["table"], r["model"]) == ("fine-tuned", model)]
        parts += [f"## {model}, fine-tuned\n", TUNED + "\n"]
        for target in sorted({r["target"] for r in mine}, reverse=True):
            parts += [f"At {target:.0%} of the MACs:\n", _by_method([r for r in mine if r["target"] == target]), ""]
    parts += [_theirs(model) for model in THEIRS if model in _values(records, "model")]
    return "\n".join(parts)


def _values(records: Sequence[Record], key: str, **where: Any) -> list[Any]:
    """The different values of a key, sorted, among records with these values of others."""
    return sorted({r[key] for r in records if all(r[name] == value for name, value in where.items())})


def _by_target(records: Sequence[Record], what: str) -> str:
    """A row for every method and a column for every target, the best rows at the lowest target first."""
    targets = sorted({r["target"] for r in records}, reverse=True)
    found = {
        method: {t: [100 * r[what] for r in records if (r["method"], r["target"]) == (method, t)] for t in targets}
        for method in _values(records, "method")
    }
    means = {m: [statistics.mean(by[t]) if by[t] else 0.0 for t in targets] for m, by in found.items()}
    best = [max((row[n] for m, row in means.items() if m != "dense"), default=0.0) for n in range(len(targets))]
    rows = []
    for method in sorted(found, key=lambda name: means[name][::-1], reverse=True):
        mine = [r for r in records if r["method"] == method]
        cells = [
            spread(found[method][t]) + " *" * (found[method][t] != [] and method != "dense" and mean == top)
            for t, mean, top in zip(targets, means[method], best, strict=True)
        ]
        rows.append([method, *cells, f"{statistics.mean(r['cpu_seconds'] for r in mine):.0f}", _seeds(mine)])
    return markdown(("method", *(f"{t:.0%}" for t in targets), "processor seconds", "seeds"), rows)


def _by_method(records: Sequence[Record]) -> str:
    """A row for every method, the most accurate first."""
    groups = [[r for r in records if r["method"] == method] for method in _values(records, "method")]
    groups.sort(key=lambda rows: -statistics.mean(r["accuracy"] for r in rows))
    rows = [
        [
            rows[0]["method"], spread([100 * r["accuracy"] for r in rows]),
            f"{statistics.mean(100 * r['macs'] / r['macs_dense'] for r in rows):.1f}",
            f"{statistics.mean(r['params'] for r in rows):,.0f}",
            ", ".join(map(str, sorted({r["epochs"] for r in rows}))),
            ", ".join(f"{n:,}" for n in sorted({r["images"] for r in rows})),
            f"{statistics.mean(r['seconds'] for r in rows):.0f} ({', '.join(sorted({r['device'] for r in rows}))})",
            _seeds(rows),
        ]
        for rows in groups
    ]  # fmt: skip
    return markdown(("method", "accuracy %", "MACs %", "parameters", "epochs", "images", "seconds", "seeds"), rows)


def _theirs(model: str) -> str:
    rows = [[name, f"{accuracy:.2f}", f"{macs:g}"] for name, macs, accuracy in THEIRS[model]]
    return (
        f"## {model}, figures of others\n\nTheirs, as published, by other recipes and from other bases, fine-tuned for "
        f"many more epochs as a rule.\n\n{markdown(('method', 'accuracy %', 'MACs %'), rows)}\n"
    )


def _seeds(records: Sequence[Record]) -> str:
    return ", ".join(str(seed) for seed in sorted({r["seed"] for r in records}))


# ---- picture ---------------------------------------------------------------------------------------------------------


def published_plot(records: Sequence[Record], file: Path) -> None:
    """Writes an SVG with a panel for every model: accuracy without training against the share of MACs, a line a method.

    Without matplotlib, or without such records, nothing is drawn.
    """
    models = _values(records, "model", table="no-training")
    if not models:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture: matplotlib is not installed, pip install 'autowidth[bench]'")
        return
    figure = Figure(figsize=(7 * len(models), 5.5), layout="constrained")
    for panel, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        mine = [r for r in records if (r["table"], r["model"]) == ("no-training", model)]
        for method in _values(mine, "method"):
            _line(panel, method, [r for r in mine if r["method"] == method])
        panel.set_title(f"{model}, nothing trained, the same norm statistics")
        panel.set_xlabel("MACs, % of the network as published")
        panel.set_ylabel("accuracy on test images, %")
        panel.invert_xaxis()
        panel.grid(alpha=0.25)
        panel.legend(fontsize=6, ncols=2)
    figure.savefig(file, metadata={"Date": None})


def _line(panel: Any, method: str, records: Sequence[Record]) -> None:
    """One method's line; the network as it was brought is a level."""
    if method == "dense":
        panel.axhline(100 * statistics.mean(r["accuracy"] for r in records), color="black", linewidth=0.8, label=method)
        return
    targets = sorted({r["target"] for r in records})
    y = [100 * statistics.mean(r["accuracy"] for r in records if r["target"] == t) for t in targets]
    ours = method == "autowidth"
    colour = OURS if ours else TOOL if method.startswith("torch-pruning") else PUBLISHED
    style = "--" if method.endswith("-reconstructed") else "-"
    panel.plot(
        [100 * t for t in targets], y, f"o{style}", color=colour, linewidth=2.5 if ours else 1, markersize=3,
        label=method,
    )  # fmt: skip
