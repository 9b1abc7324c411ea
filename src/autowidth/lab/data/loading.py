"""From a text to an image set."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from autowidth.lab.data import readers  # noqa: F401  they enter themselves
from autowidth.lab.data.assembling import Options, assembled
from autowidth.lab.data.decoding import Side
from autowidth.lab.data.errors import DataError, UnknownDataError
from autowidth.lab.data.sets import ImageSet
from autowidth.lab.data.sources import READERS, forms

FORMS = forms()
"""The texts that `load` takes."""

STREAM_ABOVE = 2048
"""MiB of decoded images, all splits together, above which a set is streamed unless another limit is given."""


def load(
    text: str,
    *,
    holdout: float = 0.0,
    limit: int | None = None,
    pool: int = 1,
    size: Side = None,
    split_seed: int = 0,
    skip_corrupt: bool = False,
    stream_above: float = STREAM_ABOVE,
    workers: int | None = None,
) -> ImageSet:
    """The image set that `text` names: `digits`, `cifar10:PATH`, `cifar100:PATH`, `folder:PATH`, `hf:NAME[:CONFIG]`.

    `limit` keeps the first training images of a fixed permutation, so that a smaller limit is part of a larger one;
    `holdout` is the share of each class of those that is set apart for choices. `pool` averages that many pixels by as
    many into one. `size` is the side of the square, or the (H, W), to which images of a folder or of the hub are cut
    and resized; if it is not given, those of a folder stay as they are where they have one size of at most 512 pixels,
    and otherwise become squares, which `resized` tells.
    All splits depend on `split_seed` alone. A file or row without a readable image is refused, or with `skip_corrupt`
    left out, logged, and named in `skipped`.

    Images that would be more than `stream_above` MiB when decoded are not kept but streamed by `workers` processes
    (None: one per core, at most 8), once they have all been looked at. The batches are the same, whatever the number
    of workers.

    Raises UnknownDataError for another text, DataError where the data do not fit what is asked, and CorruptImageError.
    """
    options = Options(
        holdout=holdout, limit=limit, pool=pool, size=size, split_seed=split_seed, skip_corrupt=skip_corrupt,
        stream_above=stream_above, workers=_cores() if workers is None else workers,
    )  # fmt: skip
    kind, _, rest = text.partition(":")
    reader = READERS.get(kind)
    if reader is not None and reader.own_size and size is not None:
        raise DataError(f"images of {kind} have a size of their own: give no size, use pool to make them smaller")
    if reader is None or not (rest if reader.takes_text else text == kind):
        raise _unknown(text)
    return assembled(reader.read(rest), options)


def resizable(text: str) -> bool:
    """Whether the images that a text names can be asked for in another size than they have."""
    reader = READERS.get(text.partition(":")[0])
    return reader is not None and not reader.own_size


def _unknown(text: str) -> UnknownDataError:
    """The error for a text that has none of the forms, with the closest."""
    kind = text.partition(":")[0]
    close = difflib.get_close_matches(kind, READERS, n=1)
    hint = f"; did you mean {close[0]}?" if close and close[0] != kind else ""
    return UnknownDataError(f"no data set is named {text!r}; allowed are {', '.join(forms())}{hint}")


def digits(split_seed: int = 0, *, holdout: float = 0.0, limit: int | None = None, pool: int = 1) -> ImageSet:
    """The 1797 handwritten digits that come with scikit-learn, 1 x 8 x 8, float32; a fifth of each class is the test.

    They are augmented by moves of up to one pixel with black beyond the border, and never flipped.
    The keywords, and what is raised, are those of `load`.
    """
    return load("digits", holdout=holdout, limit=limit, pool=pool, split_seed=split_seed)


def cifar10(
    path: str | Path,
    *,
    holdout: float = 0.0,
    limit: int | None = None,
    pool: int = 1,
    split_seed: int = 0,
    skip_corrupt: bool = False,
) -> ImageSet:
    """CIFAR-10 or CIFAR-100 out of a folder: Parquet files train*.parquet and test*.parquet, or the binary batches.

    Parquet: a column `img` or `image` of encoded images, and `label`, `fine_label` or, where there is neither,
    `coarse_label`. Binary: data_batch_*.bin and test_batch.bin, or train.bin and test.bin of CIFAR-100 with its fine
    labels; the Python version is refused, because it is pickle. Images are 3 x H x W, uint8. Where they come as lossy
    JPEG, the name of the set says so. The keywords, and what is raised, are those of `load`.
    """
    return load(
        f"cifar10:{path}", holdout=holdout, limit=limit, pool=pool, split_seed=split_seed, skip_corrupt=skip_corrupt
    )


def folder(
    path: str | Path,
    *,
    size: int | None = None,
    holdout: float = 0.0,
    limit: int | None = None,
    pool: int = 1,
    split_seed: int = 0,
    skip_corrupt: bool = False,
) -> ImageSet:
    """A folder with one sub-folder of images per class, 3 channels; `size` as for `load`.

    With sub-folders train and test (or val) that hold the classes, these are the splits; otherwise a fifth of each
    class is the test. Hidden files are passed over, every other file must be an image.
    The keywords, and what is raised, are those of `load`.
    """
    return load(
        f"folder:{path}",
        size=size,
        holdout=holdout,
        limit=limit,
        pool=pool,
        split_seed=split_seed,
        skip_corrupt=skip_corrupt,
    )


def _cores() -> int:
    """Processes that decode unless another number is given: one per core, at most 8."""
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(8, len(ours))
