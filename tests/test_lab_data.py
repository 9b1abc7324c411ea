"""The image sets of the laboratory: real small files, laws of augmentation, order and resumption of batches."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from torch import Tensor

from autowidth.lab import data
from autowidth.lab.data import (
    Augmentation,
    Batches,
    CorruptImageError,
    DataError,
    ImageSet,
    Pictures,
    Split,
    UnknownDataError,
    channel_statistics,
    crop,
    flip,
    pooled,
    scale,
)
from autowidth.lab.data import pixels as pixel_functions
from autowidth.lab.data.decoding import FORMATS
from autowidth.lab.data.sources import READERS, Source, forms

# --- files and oracles ----------------------------------------------------------------------------------------------


def picture(number: int, side: int = 8) -> np.ndarray:
    """An image that differs from all others of another number."""
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    *,
    columns: tuple[str, str] = ("img", "label"),
    names: Sequence[str] | None = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = pa.array([{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(images)])
    table = pa.table({columns[0]: structs, columns[1]: pa.array(labels, pa.int64())})
    if names is not None:
        features = {"info": {"features": {columns[1]: {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path)


@pytest.fixture
def small_cifar(tmp_path: Path) -> Path:
    """40 training images in two files and 10 test images, labels 0 to 9 in turn."""
    pictures = [encoded(picture(i)) for i in range(50)]
    labels = [i % 10 for i in range(50)]
    write_parquet(tmp_path / "train-00000-of-00002.parquet", pictures[:20], labels[:20])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", pictures[20:40], labels[20:40])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", pictures[40:], labels[40:])
    return tmp_path


def chw(number: int) -> Tensor:
    return torch.from_numpy(picture(number)).permute(2, 0, 1)


def numbers(split: Split, count: int = 60) -> list[int]:
    """Which pictures a split holds, in its order."""
    known = {chw(i).numpy().tobytes(): i for i in range(count)}
    return [known[image.contiguous().numpy().tobytes()] for image in split.images]


def cropped_slowly(images: Tensor, down: Tensor, right: Tensor, edge: str) -> Tensor:
    """Pad for real, with numpy, then cut out."""
    reach = int(max(down.abs().max(), right.abs().max()))
    out = []
    for image, d, r in zip(images.numpy(), down.tolist(), right.tolist(), strict=True):
        margins = ((0, 0), (reach, reach), (reach, reach))
        padded = np.pad(image, margins, mode="reflect") if edge == "reflect" else np.pad(image, margins)
        height, width = image.shape[1:]
        out.append(padded[:, reach + d : reach + d + height, reach + r : reach + r + width])
    return torch.from_numpy(np.stack(out))


def split_of(count: int, side: int = 6, channels: int = 2) -> Split:
    """A float split whose pixels tell image, channel, row and column apart."""
    size = count * channels * side * side
    images = torch.arange(size, dtype=torch.float32).reshape(count, channels, side, side) + 1
    return Split(images=images, labels=torch.arange(count))


def batches_of(split: Split, batch_size: int = 4, **settings: object) -> Batches:
    channels = split.images.shape[1]
    options: dict[str, object] = {"mean": [0.0] * channels, "std": [1.0] * channels, **settings}
    return Batches(split, batch_size=batch_size, **options)


def same(one: Sequence[tuple[Tensor, Tensor]], other: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


# --- augmentation ---------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 6), st.integers(2, 6))


@given(shape=shapes, edge=st.sampled_from(["reflect", "zero"]), is_uint8=st.booleans(), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_crop_equals_real_padding(shape: tuple[int, int, int, int], edge: str, is_uint8: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, shape, generator=generator).to(torch.uint8 if is_uint8 else torch.float32)
    reach = min(shape[2:]) - 1 if edge == "reflect" else 9
    down, right = torch.randint(-reach, reach + 1, (2, shape[0]), generator=generator)
    out = crop(images, down, right, edge=edge)  # type: ignore[arg-type]
    assert out.dtype == images.dtype
    assert torch.equal(out, cropped_slowly(images, down, right, edge))


def test_crop_without_a_move_is_identity_and_moves_undo_each_other_inside() -> None:
    images, still = split_of(5).images, torch.zeros(5, dtype=torch.int64)
    moves = torch.tensor([0, 1, -1, 2, -2])
    for edge in ("reflect", "zero"):
        assert torch.equal(crop(images, still, still, edge=edge), images)
        back = crop(crop(images, moves, -moves, edge=edge), -moves, moves, edge=edge)
        assert torch.equal(back[:, :, 2:-2, 2:-2], images[:, :, 2:-2, 2:-2])


def test_flipping_twice_is_identity_and_flips_only_the_chosen() -> None:
    images, which = split_of(4).images, torch.tensor([True, False, True, False])
    once = flip(images, which)
    assert torch.equal(once[1], images[1])
    assert torch.equal(once[0, 1, 2], images[0, 1, 2].flip(0))
    assert torch.equal(flip(once, which), images)


@pytest.mark.parametrize("edge", ["reflect", "zero"])
@pytest.mark.parametrize("flips", [False, True])
def test_every_augmented_image_is_a_moved_original(edge: str, flips: bool) -> None:
    split, padding = split_of(200, side=5), 2
    augmentation = Augmentation(padding=padding, edge=edge, flip=flips)  # type: ignore[arg-type]
    ((images, labels),) = batches_of(split, 200, augmentation=augmentation)
    seen = set()
    moves = list(itertools.product(range(-padding, padding + 1), repeat=2))
    down, right = torch.tensor(moves).T
    for image, label in zip(images, labels.tolist(), strict=True):
        candidates = cropped_slowly(split.images[label].expand(len(moves), -1, -1, -1), down, right, edge)
        candidates = torch.cat([candidates, candidates.flip(3)] if flips else [candidates])
        found = [i for i, candidate in enumerate(candidates) if torch.equal(candidate, image)]
        assert found, f"image {label} is no moved original"
        seen.update(found)
    assert len(seen) == len(moves) * (2 if flips else 1), "some moves never happen"


def test_moves_and_flips_are_even() -> None:
    draws = Augmentation(padding=1, flip=True).draw(30_000, torch.Generator().manual_seed(0))
    for moves in (draws.down, draws.right):
        assert torch.bincount(moves + 1).tolist() == pytest.approx([10_000] * 3, rel=0.05)
    assert draws.flip.sum().item() == pytest.approx(15_000, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([draws.down.float(), draws.right.float()]))[0, 1]) < 0.03


def test_no_augmentation_is_identity() -> None:
    split = split_of(5)
    ((images, labels),) = batches_of(split, 5, shuffle=False)
    assert torch.equal(images, split.images)
    assert torch.equal(labels, split.labels)


def test_augmentation_that_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match="6 x 6 cannot be reflected by 6 pixels: pad by at most 5"):
        batches_of(split_of(5), augmentation=Augmentation(padding=6))
    batches_of(split_of(5), augmentation=Augmentation(padding=6, edge="zero"))
    with pytest.raises(DataError, match="padded by -1"):
        Augmentation(padding=-1)
    with pytest.raises(DataError, match="'wrap', allowed are"):
        Augmentation(edge="wrap")  # type: ignore[arg-type]


# --- pixels ---------------------------------------------------------------------------------------------------------


def test_scaling_by_the_statistics_gives_mean_zero_and_deviation_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_functions, "_CHUNK", 7)  # several chunks, the last one short
    images = torch.randint(0, 256, (50, 3, 5, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:, 1] //= 3
    mean, std = channel_statistics(images)
    expected = np.asarray(images, dtype=np.float64) / 255
    np.testing.assert_allclose(mean, expected.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, expected.std((0, 2, 3)), rtol=1e-6)
    scaled = scale(images, torch.tensor(mean), torch.tensor(std))
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_uint8_and_float_pixels_mean_the_same() -> None:
    images = torch.randint(0, 256, (9, 2, 4, 4)).to(torch.uint8)
    floats = images.float() / 255
    assert channel_statistics(images) == channel_statistics(floats)
    mean, std = torch.tensor([0.2, 0.4]), torch.tensor([0.5, 2.0])
    assert torch.equal(scale(images, mean, std), scale(floats, mean, std))


def test_a_channel_that_never_changes_stays_finite() -> None:
    mean, std = channel_statistics(torch.full((40, 1, 8, 8), 77, dtype=torch.uint8))
    assert std == (1.0,)
    assert mean == pytest.approx((77 / 255,))


def test_pooling_averages() -> None:
    images = torch.tensor([[0, 1, 8, 8], [2, 3, 8, 9]], dtype=torch.float32)[None, None]
    assert torch.equal(pooled(images, 2), torch.tensor([[1.5, 8.25]])[None, None])
    assert torch.equal(pooled(images.to(torch.uint8), 2), torch.tensor([[2, 8]], dtype=torch.uint8)[None, None])
    assert pooled(images, 1) is images
    with pytest.raises(DataError, match="2 x 4 by 4"):
        pooled(images, 4)
    with pytest.raises(DataError, match="by 0"):
        pooled(images, 0)


# --- batches --------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 30), batch_size=st.integers(1, 12), drop_last=st.booleans())
@settings(deadline=None, max_examples=60)
def test_an_epoch_holds_every_image_once(count: int, batch_size: int, drop_last: bool) -> None:
    if drop_last and batch_size > count:
        with pytest.raises(DataError, match="leaves none"):
            batches_of(split_of(count), batch_size, drop_last=drop_last)
        return
    batches = batches_of(split_of(count), batch_size, drop_last=drop_last)
    labels = [labels for _, labels in batches]
    assert len(labels) == len(batches)
    assert all(len(chunk) == batch_size for chunk in labels[: None if drop_last else -1])
    everything = torch.cat(labels).tolist()
    assert len(set(everything)) == len(everything)
    assert len(everything) == (count // batch_size * batch_size if drop_last else count)


def test_images_stay_with_their_labels() -> None:
    split = split_of(20)
    for images, labels in batches_of(split, 6):
        assert torch.equal(images, split.images[labels])


def test_epochs_depend_on_seed_and_number_alone() -> None:
    split, augmentation = split_of(20), Augmentation(padding=1, flip=True)

    def fresh(seed: int) -> Batches:
        return batches_of(split, augmentation=augmentation, seed=seed)

    batches = fresh(5)
    epochs = [list(batches) for _ in range(3)]
    assert same(epochs[2], list(fresh(5).at(2)))
    assert same(epochs[0], list(fresh(5)))
    assert not same(epochs[0], epochs[1])
    assert not same(epochs[0], list(fresh(6)))
    assert not same(list(fresh(5).at(6)), list(fresh(6).at(5)))
    before = batches.state_dict()
    list(batches.at(0))
    assert batches.state_dict() == before


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    epochs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        epochs.append(list(batches_of(split_of(10), augmentation=Augmentation(padding=1, flip=True))))
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*epochs)


@pytest.mark.parametrize("done", [0, 1, 3, 4, 5, 9, 10, 11])
def test_resuming_goes_on_with_the_very_next_batch(done: int) -> None:
    def fresh() -> Batches:
        return batches_of(split_of(18), augmentation=Augmentation(padding=1), seed=3)  # 5 batches, the last one short

    def endless(batches: Batches) -> Callable[[int], list[tuple[Tensor, Tensor]]]:
        stream = itertools.chain.from_iterable(iter(lambda: batches, None))
        return lambda count: list(itertools.islice(stream, count))

    whole = endless(fresh())(20)
    first = fresh()
    endless(first)(done)
    state = json.loads(json.dumps(first.state_dict()))
    second = fresh()
    second.load_state_dict(state)
    assert second.epoch == done // 5
    assert same(endless(second)(20 - done), whole[done:])


def test_the_next_for_begins_a_new_epoch_after_a_break() -> None:
    batches = batches_of(split_of(20))
    for number, _ in enumerate(batches):
        if number == 1:
            break
    assert same(list(batches), list(batches.at(1)))
    assert same(list(batches), list(batches.at(2)))
    batches.load_state_dict({**batches.state_dict(), "epoch": 7, "batch": 3})
    next(iter(batches))
    assert same(list(batches), list(batches.at(8)))


def test_a_foreign_state_is_refused() -> None:
    batches = batches_of(split_of(20), seed=1)
    good = batches.state_dict()
    for key, value, message in [
        ("seed", 2, "taken with seed 2, here it is 1"),
        ("batch_size", 5, "taken with batch_size 5, here it is 4"),
        ("images", 21, "taken with images 21, here it is 20"),
        ("batch", 5, "batch 5 of 5"),
        ("epoch", -1, "epoch -1"),
    ]:
        with pytest.raises(DataError, match=message):
            batches.load_state_dict({**good, key: value})
    with pytest.raises(DataError, match="no entry 'epoch'"):
        batches.load_state_dict({})
    assert batches.state_dict() == good


def test_batches_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="batch size is 0"):
        batches_of(split_of(3), 0)
    with pytest.raises(DataError, match="seed is -1"):
        batches_of(split_of(3), seed=-1)


def test_splits_that_do_not_fit_are_refused() -> None:
    images, labels = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    for bad in (images[0], images.double()):
        with pytest.raises(DataError, match="expected float32 or uint8"):
            Split(images=bad, labels=labels)
    for bad in (labels[:2], labels.int()):
        with pytest.raises(DataError, match=r"expected int64 of shape \(3,\)"):
            Split(images=images, labels=bad)
    with pytest.raises(DataError, match="holds no image"):
        Split(images=images[:0], labels=labels[:0])


# --- digits ---------------------------------------------------------------------------------------------------------


def keys(split: Split) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.images]


def test_digits_are_split_evenly_and_completely() -> None:
    digits = data.digits(holdout=0.1)
    assert digits.image_shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    assert digits.held_out is not None
    parts = [digits.train, digits.held_out, digits.test]
    assert sum(map(len, parts)) == 1797
    from sklearn.datasets import load_digits

    originals = sorted((x / 16).astype(np.float32).tobytes() for x in load_digits().images)
    assert sorted(key for part in parts for key in keys(part)) == originals
    every = torch.bincount(torch.cat([part.labels for part in parts]))
    assert ((torch.bincount(digits.test.labels) - every * 0.2).abs() <= 0.5).all()
    assert (
        (torch.bincount(digits.held_out.labels) - torch.tensor(list(digits.class_counts.values())) / 9).abs() < 1
    ).all()
    pixels = digits.train.images
    assert (pixels.min(), pixels.max()) == (0, 1)
    np.testing.assert_allclose(digits.mean, pixels.mean().item(), rtol=1e-5)


def test_digit_splits_depend_on_the_split_seed_alone() -> None:
    one = data.digits()
    torch.manual_seed(99)
    np.random.seed(99)
    again, other = data.digits(), data.digits(1)
    assert keys(one.train) == keys(again.train)
    assert set(keys(one.test)) != set(keys(other.test))
    assert set(keys(one.test)) == set(keys(data.digits(holdout=0.2, limit=500).test))


def test_digits_are_never_flipped_and_move_by_one_pixel() -> None:
    digits = data.digits()
    assert digits.augmentation == Augmentation(padding=1, edge="zero", flip=False)
    images, labels = next(iter(digits.training_batches(64, seed=0)))
    assert images.shape == (64, 1, 8, 8)
    assert labels.dtype == torch.int64
    assert len(list(digits.training_batches(500, seed=0))) == 2
    plain = torch.cat([labels for _, labels in digits.plain_batches("test", 100)])
    assert torch.equal(plain, digits.test.labels)


def test_parts_that_are_not_there_are_refused() -> None:
    with pytest.raises(DataError, match=r"holdout=0.1"):
        data.digits().part("held_out")
    with pytest.raises(DataError, match="no part 'valid'"):
        data.digits().part("valid")  # type: ignore[arg-type]


# --- Parquet and binary ---------------------------------------------------------------------------------------------


def test_parquet_rows_come_out_pixel_by_pixel(small_cifar: Path) -> None:
    cifar = data.cifar10(small_cifar)
    assert cifar.name == "CIFAR-10"
    assert cifar.classes == data.CIFAR10_CLASSES
    assert cifar.train.images.dtype == torch.uint8
    assert numbers(cifar.train) == list(range(40))
    assert numbers(cifar.test) == list(range(40, 50))
    assert cifar.train.labels.tolist() == [i % 10 for i in range(40)]
    assert cifar.class_counts == dict.fromkeys(data.CIFAR10_CLASSES, 4)
    assert cifar.held_out is None
    assert cifar.skipped == ()


def test_limits_are_nested_and_fixed(small_cifar: Path) -> None:
    def chosen(limit: int, split_seed: int = 0) -> list[int]:
        return numbers(data.cifar10(small_cifar, limit=limit, split_seed=split_seed).train)

    assert chosen(25)[:10] == chosen(10)
    assert len(set(chosen(25))) == 25
    assert chosen(10) != list(range(10))
    assert set(chosen(10)) != set(chosen(10, split_seed=1))
    for bad in (0, 41, -3):
        with pytest.raises(DataError, match=f"limit is {bad} training images, allowed are 1 to 40"):
            chosen(bad)


def test_holdout_takes_its_share_of_each_class_and_nothing_is_lost(small_cifar: Path) -> None:
    cifar = data.cifar10(small_cifar, holdout=0.25)
    assert cifar.held_out is not None
    assert torch.bincount(cifar.held_out.labels).tolist() == [1] * 10
    assert sorted(numbers(cifar.train) + numbers(cifar.held_out)) == list(range(40))
    assert numbers(cifar.test) == list(range(40, 50))
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="held-out share is"):
            data.cifar10(small_cifar, holdout=bad)
    with pytest.raises(DataError, match="is none or all"):
        data.cifar10(small_cifar, holdout=0.01)


def test_pooling_on_request_and_the_name_says_so(small_cifar: Path) -> None:
    plain, half = data.cifar10(small_cifar), data.cifar10(small_cifar, pool=2)
    assert half.image_shape == (3, 4, 4)
    assert half.name == "CIFAR-10, pooled to 4 x 4"
    expected = plain.train.images.float().reshape(40, 3, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(half.train.images.float(), expected, atol=0.5, rtol=0)
    assert half.mean == pytest.approx(channel_statistics(half.train.images)[0])


def test_other_column_names_class_names_and_folders(tmp_path: Path) -> None:
    pictures = [encoded(picture(i)) for i in range(6)]
    for part, images in (("train", pictures[:3]), ("test", pictures[3:])):
        write_parquet(
            tmp_path / "plain_text" / f"{part}-0.parquet", images, [0, 2, 1], columns=("image", "label"), names="abc"
        )
        write_parquet(tmp_path / "hundred" / f"{part}.parquet", images, [0, 99, 1], columns=("img", "fine_label"))
        write_parquet(tmp_path / "many" / f"{part}.parquet", images, [0, 14, 1])
    with pytest.raises(DataError, match="several folders"):
        data.cifar10(tmp_path)
    named = data.cifar10(tmp_path / "plain_text")
    assert named.classes == ("a", "b", "c")
    assert named.name == "plain_text"
    assert numbers(named.test) == [3, 4, 5]
    hundred = data.cifar10(tmp_path / "hundred")
    assert (hundred.name, len(hundred.classes)) == ("CIFAR-100", 100)
    assert len(data.cifar10(tmp_path / "many").classes) == 15
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "plain_text").rename(alone / "plain_text")
    assert numbers(data.cifar10(alone).train) == [0, 1, 2]


def test_jpegs_are_named_as_lossy(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [encoded(picture(i), "JPEG") for i in range(4)], [0, 1, 2, 3])
    assert data.cifar10(tmp_path).name == "CIFAR-10 (JPEG)"


def test_grey_and_palette_images_become_three_channels(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(grey).convert("P").save(buffer, "PNG")
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [encoded(grey), buffer.getvalue()], [0, 1])
    images = data.cifar10(tmp_path).train.images
    assert images.shape == (2, 3, 8, 8)
    assert torch.equal(images[0], torch.from_numpy(grey).expand(3, 8, 8))


BAD_ROWS = {
    "text": b"this is no image",
    "empty": b"",
    "missing": None,
    "half": encoded(picture(1, 32), "JPEG")[:400],
    "broken chunk": encoded(picture(1))[:40] + b"\xff" * 30,
    "other extent": encoded(picture(1, 9)),
}


@pytest.mark.parametrize("limit", [1, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_named_and_refused_or_skipped(
    tmp_path: Path, bad: str, limit: float, caplog: pytest.LogCaptureFixture
) -> None:
    def read(*, skip: bool) -> ImageSet:
        return data.load(f"cifar10:{tmp_path}", skip_corrupt=skip, stream_above=limit, workers=0)

    good = [encoded(picture(i)) for i in range(4)]
    write_parquet(tmp_path / "train-0.parquet", [good[0], good[1], BAD_ROWS[bad], good[3]], [0, 1, 2, 3])
    write_parquet(tmp_path / "test-0.parquet", good, [0, 1, 2, 3])
    with pytest.raises(CorruptImageError, match=r"train-0.parquet, row 2: .+; mend it, or skip corrupt images"):
        read(skip=False)
    with caplog.at_level(logging.WARNING):
        cifar = read(skip=True)
    assert numbers(in_memory(cifar.train)) == [0, 1, 3]
    assert cifar.train.labels.tolist() == [0, 1, 3]
    assert cifar.skipped == ("train-0.parquet, row 2",)
    assert len([r for r in caplog.records if r.name == "autowidth.lab.data.assembling"]) == 1
    assert "left out 1 of 8 images" in caplog.text
    assert "the first is train-0.parquet, row 2: " in caplog.text
    assert str(cifar).endswith("; 1 unreadable left out, the first is train-0.parquet, row 2")


@pytest.mark.parametrize("limit", [1, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_nothing_readable_is_refused(tmp_path: Path, limit: float, part: str) -> None:
    for name in ("train", "test"):
        images = [b"x", b"y"] if name == part else [encoded(picture(0)), encoded(picture(1))]
        write_parquet(tmp_path / f"{name}.parquet", images, [0, 1])
    with pytest.raises(DataError, match=rf"none of 2 images can be read; the first is {part}.parquet, row 0"):
        data.load(f"cifar10:{tmp_path}", skip_corrupt=True, stream_above=limit, workers=0)


@pytest.mark.parametrize("label", [None, -1])
def test_a_row_without_a_label_is_named(tmp_path: Path, label: int | None) -> None:
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [encoded(picture(0)), encoded(picture(1))], [0, label])
    with pytest.raises(DataError, match=f"train.parquet, row 1 has the label {label}"):
        data.cifar10(tmp_path)


def test_a_label_without_a_class_is_named(tmp_path: Path) -> None:
    for part, last in (("train", 1), ("test", 2)):
        images = [encoded(picture(0)), encoded(picture(1))]
        write_parquet(tmp_path / f"{part}.parquet", images, [0, last], names="ab")
    with pytest.raises(DataError, match=r"test.parquet, row 1 has the label 2, allowed are 0 to 1"):
        data.cifar10(tmp_path)


def test_folders_that_hold_no_cifar_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        data.cifar10(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"holds no train\*.parquet"):
        data.cifar10(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"holds no test\*.parquet"):
        data.cifar10(tmp_path)
    (tmp_path / "test.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"train.parquet is no readable Parquet file"):
        data.cifar10(tmp_path)
    with pytest.raises(DataError, match="it is a file, give its folder"):
        data.cifar10(tmp_path / "train.parquet")
    write_parquet(tmp_path / "train.parquet", [b""], [0], columns=("photo", "label"))
    with pytest.raises(DataError, match="has the columns photo, label, expected one named img or image"):
        data.cifar10(tmp_path)
    write_parquet(tmp_path / "train.parquet", [b""], [0], columns=("img", "kind"))
    with pytest.raises(DataError, match="expected one named label, fine_label or coarse_label"):
        data.cifar10(tmp_path)


def record(label_bytes: Sequence[int], number: int) -> bytes:
    return bytes(label_bytes) + np.ascontiguousarray(picture(number, 32).transpose(2, 0, 1)).tobytes()


def test_binary_batches_are_read(tmp_path: Path) -> None:
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    (inner / "data_batch_1.bin").write_bytes(record([3], 0) + record([9], 1))
    (inner / "data_batch_2.bin").write_bytes(record([0], 2))
    (inner / "test_batch.bin").write_bytes(record([5], 3))
    cifar = data.cifar10(tmp_path)
    assert (cifar.name, cifar.image_shape) == ("CIFAR-10", (3, 32, 32))
    assert cifar.train.labels.tolist() == [3, 9, 0]
    assert cifar.test.labels.tolist() == [5]
    assert torch.equal(cifar.train.images[2], torch.from_numpy(picture(2, 32)).permute(2, 0, 1))
    assert len(data.cifar10(inner, limit=2).train) == 2


def test_binary_batches_of_cifar100_use_the_fine_label(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(record([19, 98], 0) + record([1, 4], 1))
    (tmp_path / "test.bin").write_bytes(record([2, 7], 2))
    cifar = data.cifar10(tmp_path)
    assert (cifar.name, cifar.train.labels.tolist(), cifar.test.labels.tolist()) == ("CIFAR-100", [98, 4], [7])


@pytest.mark.parametrize(
    ("inner", "files", "name"),
    [
        ("cifar-10-batches-py", ("data_batch_1", "test_batch", "batches.meta"), "cifar-10-binary.tar.gz"),
        ("cifar-100-python", ("train", "test", "meta"), "cifar-100-binary.tar.gz"),
    ],
)
def test_the_python_version_is_refused_unless_another_is_there(
    tmp_path: Path, inner: str, files: Sequence[str], name: str
) -> None:
    (tmp_path / inner).mkdir()
    for file in files:
        (tmp_path / inner / file).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    for place in (tmp_path, tmp_path / inner):
        with pytest.raises(DataError, match=f"{inner} holds the Python version .* take the binary version, {name}"):
            data.cifar10(place)
    (tmp_path / "data_batch_1.bin").write_bytes(record([3], 0))
    (tmp_path / "test_batch.bin").write_bytes(record([5], 3))
    assert len(data.cifar10(tmp_path).train) == 1


def test_the_label_columns_of_cifar100_are_told_apart(tmp_path: Path) -> None:
    pictures = [encoded(picture(i)) for i in range(2)]
    structs = pa.array([{"bytes": b, "path": None} for b in pictures])
    labels = {"fine_label": pa.array([49, 33]), "coarse_label": pa.array([10, 7])}
    for place, columns in (("fine", labels), ("coarse", {"coarse_label": labels["coarse_label"]})):
        (tmp_path / place).mkdir()
        for part in ("train", "test"):
            pq.write_table(pa.table({"img": structs, **columns}), tmp_path / place / f"{part}-0.parquet")
    fine, coarse = (data.load(f"cifar100:{tmp_path / place}") for place in ("fine", "coarse"))
    assert (fine.name, len(fine.classes), fine.train.labels.tolist()) == ("CIFAR-100", 100, [49, 33])
    assert (len(coarse.classes), coarse.train.labels.tolist()) == (20, [10, 7])


def test_cifar10_is_not_taken_for_cifar100(small_cifar: Path) -> None:
    with pytest.raises(DataError, match=r"holds 10 classes, those of CIFAR-100 are 100 .* try cifar10:"):
        data.load(f"cifar100:{small_cifar}")


def test_broken_binary_batches_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(record([5], 3))
    with pytest.raises(DataError, match=r"holds test_batch.bin but no data_batch_\*.bin"):
        data.cifar10(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(record([5], 3)[:-1])
    with pytest.raises(DataError, match=r"data_batch_1.bin has 3072 bytes, expected a multiple of 3073"):
        data.cifar10(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(record([5], 3) + record([10], 3))
    with pytest.raises(DataError, match=r"data_batch_1.bin, row 1 has the label 10, allowed are 0 to 9"):
        data.cifar10(tmp_path)


# --- image folders --------------------------------------------------------------------------------------------------


def write_classes(place: Path, counts: dict[str, int], side: tuple[int, int] = (12, 12)) -> None:
    for label, (name, count) in enumerate(counts.items()):
        (place / name).mkdir(parents=True)
        for number in range(count):
            shade = np.full((*side, 3), (40 * label + number) % 256, dtype=np.uint8)
            Image.fromarray(shade).save(place / name / f"{number}.png")


def test_an_image_folder_is_read_and_split(tmp_path: Path) -> None:
    write_classes(tmp_path / "animals", {"bee": 10, "cow": 20})
    (tmp_path / "animals" / "bee" / ".hidden").write_text("x")
    (tmp_path / "animals" / ".cache").mkdir()
    animals = data.folder(tmp_path / "animals", size=6)
    assert (animals.name, animals.classes, animals.image_shape) == ("animals", ("bee", "cow"), (3, 6, 6))
    assert animals.class_counts == {"bee": 8, "cow": 16}
    assert torch.bincount(animals.test.labels).tolist() == [2, 4]
    for split in (animals.train, animals.test):
        assert torch.equal(split.labels, (split.images[:, 0, 0, 0] >= 40).long())
    shades = torch.cat([animals.train.images[:, 0, 0, 0], animals.test.images[:, 0, 0, 0]])
    assert sorted(shades.tolist()) == [*range(10), *range(40, 60)]


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_given_splits_of_a_folder_are_kept(tmp_path: Path, test_name: str) -> None:
    write_classes(tmp_path / "train", {"bee": 3, "cow": 2})
    write_classes(tmp_path / test_name, {"bee": 1, "cow": 1})
    animals = data.folder(tmp_path, size=4)
    assert (len(animals.train), len(animals.test), animals.classes) == (5, 2, ("bee", "cow"))
    write_classes(tmp_path / test_name, {"dog": 1})
    with pytest.raises(DataError, match="holds the class 'dog', which"):
        data.folder(tmp_path)


def test_images_are_cut_to_a_square_about_their_middle(tmp_path: Path) -> None:
    wide = np.zeros((4, 8, 3), dtype=np.uint8)
    wide[:, 2:6] = 200
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.fromarray(wide).save(tmp_path / name / f"{number}.png")
    assert (data.folder(tmp_path, size=4).train.images == 200).all()


def test_corrupt_files_are_named_and_refused_or_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_classes(tmp_path, {"bee": 10, "cow": 10})
    (tmp_path / "cow" / "notes.txt").write_text("moo")
    with pytest.raises(CorruptImageError, match=r"cow.notes.txt: no readable image; mend it"):
        data.folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        animals = data.folder(tmp_path, skip_corrupt=True)
    assert [Path(name).name for name in animals.skipped] == ["notes.txt"]
    assert animals.class_counts == {"bee": 8, "cow": 8}
    assert len(animals.train) + len(animals.test) == 20
    assert "notes.txt" in caplog.text


# A drawing of 8 x 8 points, as any program writes one; to see it, Ghostscript runs what stands in it.
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
newpath 1 1 moveto 7 1 lineto 7 7 lineto closepath 0.5 setgray fill
showpage
%%EOF
"""


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `gs` that is found before any other; the file that is there once it has been called."""
    called, program = tmp_path / "called", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {called}\n[ "$1" = --version ]\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # pillow looks for it once
    return called


@pytest.mark.parametrize("limit", [1, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("kind", ["folder", "table"])
def test_a_drawing_under_the_name_of_a_photograph_starts_no_program(
    tmp_path: Path, ghostscript: Path, kind: str, limit: float, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "folder":
        write_classes(tmp_path / "set", {"bee": 5, "cow": 5})
        (tmp_path / "set" / "cow" / "photo.jpg").write_bytes(EPS)
        text, place = f"folder:{tmp_path / 'set'}", str(tmp_path / "set" / "cow" / "photo.jpg")
    else:
        write_parquet(
            tmp_path / "set" / "train-0.parquet", [*[encoded(picture(i)) for i in range(3)], EPS], [0, 1, 0, 1]
        )
        write_parquet(tmp_path / "set" / "test-0.parquet", [encoded(picture(i)) for i in range(2)], [0, 1])
        text, place = f"cifar10:{tmp_path / 'set'}", "train-0.parquet, row 3"
    reason = "its format is EPS, allowed are PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM"
    with pytest.raises(CorruptImageError) as caught:
        data.load(text, stream_above=limit, workers=0)
    assert str(caught.value) == f"{place}: {reason}; mend it, or skip corrupt images (skip_corrupt)"
    with caplog.at_level(logging.WARNING):
        assert data.load(text, stream_above=limit, workers=0, skip_corrupt=True).skipped == (place,)
    assert f"{place}: {reason}" in caplog.text
    assert not ghostscript.exists()


def test_the_program_would_have_been_seen(tmp_path: Path, ghostscript: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(EPS)
    with pytest.raises(subprocess.CalledProcessError), Image.open(tmp_path / "photo.jpg") as image:
        image.load()
    assert ghostscript.exists()


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_all_allowed_formats_are_read(tmp_path: Path, kind: str) -> None:
    """And the format of several images in one JPEG, as telephones write it."""
    grey = np.full((8, 8, 3), 90, dtype=np.uint8)
    options = {"save_all": True, "append_images": [Image.fromarray(grey)]} if kind == "MPO" else {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.fromarray(grey).save(tmp_path / name / f"{number}.jpg", kind, **options)
    images = data.folder(tmp_path, size=8).train.images
    assert isinstance(images, Tensor)
    assert (images.int() - 90).abs().max() <= 2


def test_folders_without_classes_or_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected one per class"):
        data.folder(tmp_path)
    write_classes(tmp_path, {"bee": 2, "cow": 0})
    with pytest.raises(DataError, match="cow holds no file"):
        data.folder(tmp_path)
    with pytest.raises(DataError, match="resized to 0 pixels"):
        data.folder(tmp_path, size=0)


# --- texts ----------------------------------------------------------------------------------------------------------


def test_texts_lead_to_their_sets(small_cifar: Path, tmp_path: Path) -> None:
    assert data.load("digits", pool=2).image_shape == (1, 4, 4)
    assert len(data.load(f"cifar10:{small_cifar}", limit=7).train) == 7
    write_classes(tmp_path / "pictures", {"bee": 5, "cow": 5})
    assert data.load(f"folder:{tmp_path / 'pictures'}").image_shape == (3, 12, 12)
    assert data.load(f"folder:{tmp_path / 'pictures'}", size=16, pool=2).image_shape == (3, 8, 8)


@pytest.mark.parametrize("text", ["", "digits:", "digits:x", "cifar10", "cifar10:", "hf:", "mnist", "c:/x"])
def test_unknown_texts_are_refused_with_the_allowed_forms(text: str) -> None:
    with pytest.raises(UnknownDataError, match="allowed are digits, cifar10:PATH, cifar100:PATH, folder:PATH, hf"):
        data.load(text)


def test_a_slip_of_the_pen_is_noticed() -> None:
    with pytest.raises(UnknownDataError, match=r"did you mean cifar10\?"):
        data.load("cifar1:x")


def test_a_size_where_none_can_be_given_is_refused() -> None:
    with pytest.raises(DataError, match="digits have a size of their own"):
        data.load("digits", size=16)


def test_the_hub_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'autowidth\[hub\]'"):
        data.load("hf:somebody/something")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the extra hub is not installed")
@pytest.mark.filterwarnings("default")  # what other packages warn of is not ours
def test_a_data_set_in_the_hubs_layout_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["bee", "cow"])})
    for part, start in (("train", 0), ("validation", 10)):
        rows = {"image": [picture(i) for i in range(start, start + 10)], "label": [i % 2 for i in range(10)]}
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"{part}-0.parquet")
    found = data.load(f"hf:{tmp_path / 'set'}")
    assert found.classes == ("bee", "cow")
    assert (numbers(found.train), numbers(found.test)) == (list(range(10)), list(range(10, 20)))
    assert found.train.labels.tolist() == [0, 1] * 5
    streamed = data.load(f"hf:{tmp_path / 'set'}", stream_above=0, workers=2)
    assert numbers(in_memory(streamed.train)) == list(range(10))
    assert same(list(streamed.training_batches(4, seed=0)), list(found.training_batches(4, seed=0)))


@pytest.mark.parametrize(
    ("package", "text", "sentence"),
    [
        ("sklearn", "digits", r"the set digits needs the package scikit-learn, .* pip install 'autowidth\[lab\]'"),
        ("pyarrow", "cifar10:{cifar}", r"parquet needs the package pyarrow, .* pip install 'autowidth\[lab\]'"),
        ("PIL", "cifar10:{cifar}", r"an image file needs the package pillow, .* pip install 'autowidth\[lab\]'"),
        ("PIL", "folder:{photos}", r"an image file needs the package pillow, .* pip install 'autowidth\[lab\]'"),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(
    small_cifar: Path, photos: Path, package: str, text: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=sentence):
        data.load(text.format(cifar=small_cifar, photos=photos))


def test_image_sets_import_no_package_that_only_some_of_them_need() -> None:
    program = """if True:
        import sys
        import autowidth.lab.data
        print(*{name.split(".")[0] for name in sys.modules} & {"PIL", "pyarrow", "sklearn", "datasets"})
        print(*[name for name in sys.modules if name.startswith("autowidth.lab.models")])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n\n"


def test_a_decorated_function_is_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(text: str) -> Source:
        """As many images as the text says."""
        split = Split(images=torch.rand(int(text), 1, 2, 2), labels=torch.arange(int(text)) % 2)
        return Source(name="noise", classes=("a", "b"), train=split, test=split)

    monkeypatch.setitem(READERS, "noise", None)  # so that it is taken out again
    del READERS["noise"]
    assert data.reader("noise", form="noise:COUNT", own_size=True)(noise) is noise
    assert len(data.load("noise:6").train) == 6
    assert forms() == (*data.FORMS, "noise:COUNT")
    with pytest.raises(UnknownDataError, match=r"allowed are digits, .*, noise:COUNT; did you mean noise\?"):
        data.load("nois:6")
    with pytest.raises(DataError, match="noise have a size of their own"):
        data.load("noise:6", size=3)
    for name, form in [("noise", "noise:N"), ("sound", "noise:N")]:
        with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
            data.reader(name, form=form)


def test_the_forms_are_those_of_the_readers() -> None:
    assert data.FORMS == ("digits", "cifar10:PATH", "cifar100:PATH", "folder:PATH", "hf:NAME[:CONFIG]")


# --- streams --------------------------------------------------------------------------------------------------------

EXAMPLES = {
    "table": ({}, {}),
    "folder": ({"size": 7}, {}),
    "held out": ({"size": 8}, {"holdout": 0.25}),
    "pooled": ({"size": 8}, {"pool": 2}),
    "limited": ({"size": 8}, {"limit": 9}),
}


def in_memory(split: Split) -> Split:
    if isinstance(split.images, Tensor):
        return split
    return Split(images=split.images.decoded(range(len(split))), labels=split.labels)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """JPEG and PNG files of many extents, some turned by their EXIF, in two classes."""
    for number in range(30):
        place = tmp_path / "photos" / ("bee" if number % 3 else "cow")
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture(number, 20)).resize((9 + number, 40 - number))
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 4 == 1 else 1
        image.save(place / f"{number}.{'png' if number % 2 else 'jpg'}", exif=exif)
    return tmp_path / "photos"


forking = pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning",  # of Python 3.12, about processes with threads, such as torch's
    "ignore:This DataLoader will create:UserWarning",  # where there is one core
)


@forking
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("example", EXAMPLES)
def test_a_streamed_set_is_the_set_in_memory(small_cifar: Path, photos: Path, example: str, workers: int) -> None:
    of_files, options = EXAMPLES[example]
    text = f"folder:{photos}" if of_files else f"cifar10:{small_cifar}"
    kept = data.load(text, **of_files, **options)
    streamed = data.load(text, **of_files, **options, stream_above=0, workers=workers)
    assert isinstance(streamed.train.images, Pictures)
    assert isinstance(kept.train.images, Tensor)
    assert (streamed.image_shape, streamed.class_counts) == (kept.image_shape, kept.class_counts)
    assert (streamed.mean, streamed.std) == (pytest.approx(kept.mean, rel=1e-12), pytest.approx(kept.std, rel=1e-12))
    assert kept.augmentation == streamed.augmentation
    parts = [part for part in ("train", "held_out", "test") if part != "held_out" or "holdout" in options]
    for part in parts:
        assert same(list(streamed.plain_batches(part, 4)), list(kept.plain_batches(part, 4)))  # type: ignore[arg-type]
    one, other = streamed.training_batches(4, seed=3), kept.training_batches(4, seed=3)
    for _ in range(2):  # epochs, augmented
        assert len(one) == len(other)
        assert same(list(one), list(other))
    assert same(list(one.at(7)), list(other.at(7)))


@forking
def test_a_stream_goes_on_where_it_stood_and_leaves_chance_and_no_worker_behind(small_cifar: Path) -> None:
    images = data.load(f"cifar10:{small_cifar}", stream_above=0, workers=2)
    before = torch.get_rng_state()
    batches = images.training_batches(8, seed=1)
    whole = list(batches.at(0))
    for number, _ in enumerate(batches, 1):
        if number == 2:
            break
    assert multiprocessing.active_children() == []
    again = images.training_batches(8, seed=1)
    again.load_state_dict(batches.state_dict())
    assert same(list(again), whole[2:])
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(list(images.training_batches(8, seed=2)), whole)


def test_the_decoded_extent_decides_what_is_streamed(small_cifar: Path) -> None:
    mebibytes = 50 * 3 * 8 * 8 / 2**20
    for options, limit, streams in [
        ({}, mebibytes, False),
        ({}, mebibytes * 0.999, True),
        ({"pool": 2}, mebibytes / 4, False),
        ({"pool": 2}, mebibytes / 4.01, True),
        ({"limit": 10}, mebibytes * 0.4, False),
    ]:
        images = data.load(f"cifar10:{small_cifar}", stream_above=limit, **options)  # type: ignore[arg-type]
        splits = [images.train, images.test]
        assert [isinstance(split.images, Pictures) for split in splits] == [streams] * 2
    assert isinstance(data.load("digits", stream_above=0).train.images, Tensor)


@forking
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_goes_while_it_is_needed_is_named_in_one_sentence(photos: Path, workers: int) -> None:
    images = data.load(f"folder:{photos}", size=8, stream_above=0, workers=workers)
    assert isinstance(images.test.images, Pictures)
    lost = images.test.images.where[2]
    Path(lost).unlink()
    with pytest.raises(CorruptImageError, match="it was readable when it was loaded") as caught:
        list(images.plain_batches("test", 4))
    assert str(caught.value).startswith(lost)
    assert "Traceback" not in str(caught.value)


@forking
def test_a_corrupt_file_is_found_by_workers_before_training(photos: Path) -> None:
    (photos / "cow" / "notes.txt").write_text("moo")
    with pytest.raises(CorruptImageError, match=r"cow.notes.txt: no readable image; mend it"):
        data.load(f"folder:{photos}", stream_above=0, workers=2)
    streamed = data.load(f"folder:{photos}", stream_above=0, workers=2, skip_corrupt=True)
    kept = data.load(f"folder:{photos}", skip_corrupt=True)
    assert streamed.skipped == kept.skipped
    assert [Path(name).name for name in kept.skipped] == ["notes.txt"]
    assert same(list(streamed.training_batches(4, seed=0)), list(kept.training_batches(4, seed=0)))


def test_a_stream_that_cannot_be_is_refused(small_cifar: Path) -> None:
    for options in ({"stream_above": -1}, {"stream_above": float("nan")}, {"workers": -1}):
        with pytest.raises(DataError, match="cannot be streamed above"):
            data.load(f"cifar10:{small_cifar}", **options)
    with pytest.raises(DataError, match="cannot pool images of 8 x 8 by 3"):
        data.load(f"cifar10:{small_cifar}", stream_above=0, workers=0, pool=3)
    with pytest.raises(DataError, match="cannot be pooled by 0"):
        data.load("digits", pool=0)


def test_a_set_tells_its_splits_and_class_counts_in_one_line(small_cifar: Path, tmp_path: Path) -> None:
    assert str(data.cifar10(small_cifar, holdout=0.25)) == (
        "CIFAR-10: 30 training, 10 held-out and 10 test images of 3 x 8 x 8; training images moved by up to 1 pixel "
        "and flipped at random; training images by class: " + ", ".join(f"{name} 3" for name in data.CIFAR10_CLASSES)
    )
    streamed = str(data.load(f"cifar10:{small_cifar}", stream_above=0, workers=0))
    assert streamed.startswith("CIFAR-10: 40 training and 10 test images of 3 x 8 x 8; streamed by 0 workers; training")
    write_classes(tmp_path / "many", {f"kind {n:02}": 5 + n for n in range(13)})
    assert str(data.folder(tmp_path / "many")).endswith("; 13 classes of 4 (kind 00) to 14 (kind 12) training images")


def test_a_set_moves_to_a_device_as_a_whole(small_cifar: Path) -> None:
    moved: ImageSet = data.cifar10(small_cifar, holdout=0.25).to("meta")
    assert moved.held_out is not None
    for split in (moved.train, moved.held_out, moved.test):
        assert split.images.device.type == split.labels.device.type == "meta"
