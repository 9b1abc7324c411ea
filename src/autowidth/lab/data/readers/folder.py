"""A folder with one sub-folder of image files per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from autowidth.lab.data.decoding import Encoded
from autowidth.lab.data.errors import DataError
from autowidth.lab.data.sources import Source, existing_folder, reader


@reader("folder", form="folder:PATH")
def read_folder(text: str) -> Source:
    """The splits train and test (or val) where there are such sub-folders, else one split to be divided."""
    place = existing_folder(text)
    tests = [place / name for name in ("test", "val") if (place / name).is_dir()]
    if not (place / "train").is_dir() or not tests:
        classes = _class_folders(place)
        found = _class_files(place, classes)
        return Source(name=place.name, classes=classes, train=found, test=None, any_size=True)
    classes = _class_folders(place / "train")
    if unknown := set(_class_folders(tests[0])) - set(classes):
        raise DataError(f"{tests[0]} holds the class {min(unknown)!r}, which {place / 'train'} does not have")
    train, test = _class_files(place / "train", classes), _class_files(tests[0], classes)
    return Source(name=place.name, classes=classes, train=train, test=test, any_size=True)


def _class_folders(place: Path) -> tuple[str, ...]:
    """Names of the sub-folders, in order. Raises DataError where there are none."""
    found = sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise DataError(f"{place} holds no folder: expected one per class with its images in it")
    return tuple(found)


def _class_files(place: Path, classes: Sequence[str]) -> Encoded:
    """All files of the class folders in `place`. Raises DataError for a class folder without files."""
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        entries = (place / name).rglob("*") if (place / name).is_dir() else ()
        found = sorted(entry for entry in entries if entry.is_file() and not entry.name.startswith("."))
        if not found:
            raise DataError(f"the class folder {place / name} holds no file: put images into it or remove the class")
        files += found
        labels += [label] * len(found)
    return Encoded(images=files, labels=torch.tensor(labels), where=[str(file) for file in files])
