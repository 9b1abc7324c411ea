"""Rows of tables that hold encoded images: columns, labels, Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from autowidth.lab.data.decoding import Encoded
from autowidth.lab.data.errors import DataError, packages_for
from autowidth.lab.data.sources import numbered


def encoded_rows(images: Sequence[bytes | Path | None], labels: Iterable[int | None], place: str) -> Encoded:
    """Rows of a table. Raises DataError for a missing label."""
    numbers = []
    for row, label in enumerate(labels):
        if label is None or label < 0:
            raise DataError(f"{place}, row {row} has the label {label}, expected a number from 0 on")
        numbers.append(label)
    where = [f"{place}, row {row}" for row in range(len(numbers))]
    return Encoded(images=images, labels=torch.tensor(numbers), where=where)


def content(image: object) -> bytes | Path | None:
    """The image in a row of a table: bytes, or a mapping with bytes or a path; None where there is neither."""
    if isinstance(image, Mapping):
        if image.get("bytes") is None and image.get("path"):
            return Path(str(image["path"]))
        image = image.get("bytes")
    return image if isinstance(image, bytes) else None


CIFAR100_LABELS = {"fine_label": 100, "coarse_label": 20}
"""Columns of labels of CIFAR-100, and how many classes each tells apart. The first that is there counts."""


def columns(present: Sequence[str], place: str) -> tuple[str, str]:
    """The names of the image and label columns. Raises DataError where one is missing."""
    image = next((name for name in ("img", "image") if name in present), None)
    label = next((name for name in ("label", *CIFAR100_LABELS) if name in present), None)
    if image is None or label is None:
        wanted = "img or image" if image is None else "label, fine_label or coarse_label"
        raise DataError(f"{place} has the columns {', '.join(present)}, expected one named {wanted}")
    return image, label


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Parquet files of one split; `names` of the classes where the files tell them."""

    encoded: Encoded
    names: tuple[str, ...] | None

    @classmethod
    def read(cls, files: Sequence[Path]) -> Table:
        """All rows, still encoded. Raises DataError for a file that is not Parquet or lacks a column."""
        with packages_for(f"{files[0]}"):
            import pyarrow
            from pyarrow import parquet  # here: half a second to import

        parts: list[Encoded] = []
        names: tuple[str, ...] | None = None
        for file in files:
            try:
                schema = parquet.read_schema(file)
                image, label = columns(schema.names, str(file))
                table = parquet.read_table(file, columns=[image, label])
            except pyarrow.ArrowException as error:
                raise DataError(f"{file} is no readable Parquet file: {error}") from error
            names = names or _label_names(schema.metadata, label)
            if names is None and label in CIFAR100_LABELS:
                names = numbered(CIFAR100_LABELS[label])
            images = [content(row) for row in table[image].to_pylist()]
            parts.append(encoded_rows(images, table[label].to_pylist(), file.name))
        contents = [image for part in parts for image in part.images]
        where = [place for part in parts for place in part.where]
        labels = torch.cat([part.labels for part in parts])
        return cls(encoded=Encoded(images=contents, labels=labels, where=where), names=names)


def _label_names(metadata: Mapping[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """Class names that the datasets library left in a Parquet schema, if it did."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):
        return None
