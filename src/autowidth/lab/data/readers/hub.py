"""Image sets of the Hugging Face hub, or of a folder in its layout, by the package `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autowidth.lab.data.errors import DataError, packages_for
from autowidth.lab.data.sources import Source, reader
from autowidth.lab.data.tables import columns, content, encoded_rows


@reader("hf", form="hf:NAME[:CONFIG]")
def read_hub(text: str) -> Source:
    """The splits train and test, or validation where there is no test, as NAME or NAME:CONFIG names them."""
    with packages_for(f"hf:{text}", extra="hub"):
        import datasets  # here: slow to import
    name, _, configuration = text.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load hf:{text}: {error}") from error
    if "train" not in found:
        raise DataError(f"hf:{text} has the splits {', '.join(found)}, expected one named train")
    features = found["train"].features
    image, label = columns(list(features), f"hf:{text}")
    if not isinstance(features[label], datasets.ClassLabel):
        raise DataError(f"the column {label!r} of hf:{text} is {features[label]}, expected class labels")
    encoded = {}
    for part in [part for part in ("train", "test", "validation") if part in found]:
        rows = found[part].cast_column(image, datasets.Image(decode=False)).select_columns([image])
        encoded[part] = encoded_rows(_HubImages(rows, image), found[part][label], f"hf:{text} {part}")
    test = encoded.get("test", encoded.get("validation"))
    return Source(name=name, classes=tuple(features[label].names), train=encoded["train"], test=test)


@dataclass(frozen=True, slots=True)
class _HubImages(Sequence[Any]):
    """The encoded images in a column of a hub's table, which stays on the disk until they are asked for."""

    rows: Any
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        return content(self.rows[number][self.column])
