"""CIFAR-10 and CIFAR-100 out of a folder: Parquet files or binary batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autowidth.lab.data.errors import DataError
from autowidth.lab.data.sources import Source, existing_folder, numbered, reader
from autowidth.lab.data.splits import Split
from autowidth.lab.data.tables import Table

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_JPEG = b"\xff\xd8\xff"


@reader("cifar10", form="cifar10:PATH", own_size=True)
def read_cifar(text: str) -> Source:
    """CIFAR-10 or CIFAR-100, whichever lies there. Raises DataError for the Python version, which is pickle."""
    place = existing_folder(text)
    for inner in (place, place / "cifar-10-batches-bin", place / "cifar-100-binary"):
        if (inner / "test_batch.bin").exists():
            return _binary("CIFAR-10", inner, "data_batch_*.bin", "test_batch.bin", CIFAR10_CLASSES, label_bytes=1)
        if (inner / "test.bin").exists():
            return _binary("CIFAR-100", inner, "train.bin", "test.bin", numbered(100), label_bytes=2)
    train_files, test_files = _parquet_files(place, "train"), _parquet_files(place, "test")
    if not train_files or not test_files:
        _refuse_pickle(place)
        missing = "test*.parquet" if train_files else "train*.parquet"
        raise DataError(f"{place} holds no {missing} and no binary batches of CIFAR: give the folder that does")
    train, test = Table.read(train_files), Table.read(test_files)
    classes = _classes(train, test)
    name = {10: "CIFAR-10", 100: "CIFAR-100"}.get(len(classes), place.name)
    lossy = any(isinstance(data, bytes) and data.startswith(_JPEG) for data in train.encoded.images)
    return Source(name=f"{name} (JPEG)" if lossy else name, classes=classes, train=train.encoded, test=test.encoded)


_PICKLED = {"CIFAR-10": ("cifar-10-batches-py", "data_batch_1"), "CIFAR-100": ("cifar-100-python", "train")}
"""The folder and a file of the Python version."""


def _refuse_pickle(place: Path) -> None:
    """Raises DataError where the Python version of CIFAR lies."""
    for name, (inner, file) in _PICKLED.items():
        if found := next((folder for folder in (place, place / inner) if (folder / file).is_file()), None):
            raise DataError(
                f"{found} holds the Python version of {name}, which is pickle and would run what code is in it: "
                f"take the binary version, {name.lower()}-binary.tar.gz"
            )


@reader("cifar100", form="cifar100:PATH", own_size=True)
def read_cifar100(text: str) -> Source:
    """CIFAR-100. Raises DataError also where the number of classes is another."""
    source = read_cifar(text)
    if (count := len(source.classes)) not in (100, 20):
        raise DataError(
            f"{text} holds {count} classes, those of CIFAR-100 are 100 or, coarsely, 20: try cifar10:{text}"
        )
    return source


def _classes(train: Table, test: Table) -> tuple[str, ...]:
    """The classes of both splits. Raises DataError, with the row, where a label has no class."""
    names = train.names or test.names
    highest = int(max(train.encoded.labels.max(), test.encoded.labels.max()))
    if names is None:
        return CIFAR10_CLASSES if highest < 10 else numbered(highest + 1)
    for encoded in (train.encoded, test.encoded):
        for where, label in zip(encoded.where, encoded.labels.tolist(), strict=True):
            if label >= len(names):
                raise DataError(f"{where} has the label {label}, allowed are 0 to {len(names) - 1}")
    return names


def _parquet_files(place: Path, part: str) -> list[Path]:
    """The files of one split, in the folder or in one below it. Raises DataError where several folders hold some."""
    found = sorted(place.glob(f"{part}*.parquet")) or sorted(place.glob(f"*/{part}*.parquet"))
    if len({file.parent for file in found}) > 1:
        homes = ", ".join(sorted({file.parent.name for file in found}))
        raise DataError(f"{place} holds {part}*.parquet in several folders ({homes}): give one of them")
    return found


def _binary(name: str, place: Path, train: str, test: str, classes: tuple[str, ...], *, label_bytes: int) -> Source:
    """CIFAR's binary records: label bytes, the last of which counts, then 3 x 32 x 32 pixels."""
    files = sorted(place.glob(train))
    if not files:
        raise DataError(f"{place} holds {test} but no {train}: put all binary batches into one folder")
    parts = [_records(file, classes=len(classes), label_bytes=label_bytes) for file in files]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    last = _records(place / test, classes=len(classes), label_bytes=label_bytes)
    train_split, test_split = Split(images=images, labels=labels), Split(images=last[0], labels=last[1])
    return Source(name=name, classes=classes, train=train_split, test=test_split)


def _records(file: Path, *, classes: int, label_bytes: int) -> tuple[Tensor, Tensor]:
    """Images and labels in one file."""
    pixels = 3 * 32 * 32
    content = np.fromfile(file, dtype=np.uint8)
    if not content.size or content.size % (label_bytes + pixels):
        raise DataError(f"{file} has {content.size} bytes, expected a multiple of {label_bytes + pixels}")
    rows = content.reshape(-1, label_bytes + pixels)
    labels = rows[:, label_bytes - 1].astype(np.int64)
    if (bad := np.flatnonzero(labels >= classes)).size:
        raise DataError(f"{file}, row {bad[0]} has the label {labels[bad[0]]}, allowed are 0 to {classes - 1}")
    images = torch.from_numpy(rows[:, label_bytes:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(labels)
