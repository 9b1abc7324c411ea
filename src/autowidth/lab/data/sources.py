"""What readers find, and the decorator that enters a reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autowidth.lab.data.augment import Augmentation
from autowidth.lab.data.decoding import Encoded
from autowidth.lab.data.errors import DataError
from autowidth.lab.data.splits import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a reader found; without a test split a fifth of each class becomes one.

    `any_size` says that its images may be of any size, so that one is chosen unless it is asked for.
    """

    name: str
    classes: tuple[str, ...]
    train: Split | Encoded
    test: Split | Encoded | None
    augmentation: Augmentation | None = None
    any_size: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A kind of image set: the form of the texts that name one, what reads it, and whether its images have one size.

    `read` gets what stands behind the first colon of the text. It raises DataError where that leads to no such set.
    """

    form: str
    read: Callable[[str], Source]
    own_size: bool

    @property
    def takes_text(self) -> bool:
        """Whether something stands behind the name."""
        return ":" in self.form


READERS: dict[str, Reader] = {}
"""The readers by the name that a text begins with."""


def reader(
    name: str, *, form: str, own_size: bool = False
) -> Callable[[Callable[[str], Source]], Callable[[str], Source]]:
    """Enters the decorated function under this name. Raises ValueError for one that is taken or that the form lacks.

    `own_size` says that its images cannot be asked for in another size.
    """
    if name in READERS or form.partition(":")[0] != name:
        raise ValueError(
            f"a reader of the form {form!r} cannot be named {name!r}: the name is free and begins the form"
        )

    def enter(read: Callable[[str], Source]) -> Callable[[str], Source]:
        READERS[name] = Reader(form=form, read=read, own_size=own_size)
        return read

    return enter


def forms() -> tuple[str, ...]:
    """The texts that are understood, those that are whole first."""
    return tuple(READERS[name].form for name in sorted(READERS, key=lambda name: (READERS[name].takes_text, name)))


def existing_folder(text: str) -> Path:
    """The folder, whole. Raises DataError where there is none."""
    place = Path(text).expanduser()
    if not place.is_dir():
        raise DataError(f"there is no folder {place}" + (": it is a file, give its folder" if place.exists() else ""))
    return place.resolve()


def numbered(count: int) -> tuple[str, ...]:
    """Names of classes that have none: their numbers."""
    return tuple(str(number) for number in range(count))
