"""Where a loader stands, as plain data; and a loader that can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch

from autowidth.errors import AutoWidthError
from autowidth.randomness import load_random_state, random_state

T = TypeVar("T")

_DRAWING = ("", "sampler", "batch_sampler", "batch_sampler.sampler")
"""Parts of a torch DataLoader that may draw from a generator of their own."""


class LoaderError(AutoWidthError, ValueError):
    """A state that was taken of another loader."""


def loader_state(loader: object) -> dict[str, Any] | None:
    """What the next pass over a loader depends on, beside the global random state; None where nothing is known of it.

    That is its `state_dict()` where it has one, else the states of the generators that a DataLoader draws from.
    """
    if hasattr(loader, "state_dict"):
        return {"state": loader.state_dict()}
    generators = _generators(loader)
    return {"generators": [generator.get_state() for generator in generators]} if generators else None


def load_loader_state(loader: object, state: dict[str, Any] | None, *, anew: bool = False) -> None:
    """Goes to where `loader_state` was taken. Raises LoaderError for a state of another kind of loader.

    With `anew` the pass that was going on is over, as that of a `for` which was left: the next one is a new pass. A
    loader with a state dict has a method `begin_anew` for that.
    """
    generators, own = _generators(loader), hasattr(loader, "state_dict")
    kept = [] if state is None else state.get("generators", [])
    if own != (state is not None and "state" in state) or len(kept) != (0 if own else len(generators)):
        raise LoaderError(
            f"the state was not taken of a loader like this {type(loader).__name__}: build the loader as it was built, "
            "with a generator of its own if it had one"
        )
    if own:
        loader.load_state_dict(state["state"])  # type: ignore[attr-defined,index]
        if anew and hasattr(loader, "begin_anew"):
            loader.begin_anew()
        return
    for generator, content in zip(generators, kept, strict=True):
        generator.set_state(content)


def _generators(loader: object) -> list[torch.Generator]:
    """The generators of a DataLoader and its samplers, each once."""
    found: dict[int, torch.Generator] = {}
    for path in _DRAWING:
        part: object = loader
        for name in filter(None, path.split(".")):
            part = getattr(part, name, None)
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


class Resumable(Generic[T]):
    """A loader that knows where it stands: around a torch DataLoader, or anything that can be iterated again.

    `state_dict` says which batch comes next and what the order of this epoch was drawn from. After `load_state_dict`
    the next `for` goes on with that batch: it draws the order once more, reads up to it again and drops what it reads,
    so that order and augmentation are what they would have been, whether they come from the global generators or from
    those of a DataLoader, with worker processes or without. A `for` that is left by `break` is over: the next one is a
    new epoch. With worker processes random numbers are to be drawn in them, not while they are started.
    """

    def __init__(self, loader: Iterable[T]) -> None:
        self.loader = loader
        self._batch = 0
        self._began: dict[str, Any] | None = None
        self._goes_on = False

    def __len__(self) -> int:
        """Batches of one epoch."""
        return len(self.loader)  # type: ignore[arg-type]

    @property
    def dataset(self) -> Any:
        """What is read, where the loader says it."""
        return self.loader.dataset  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[T]:
        first, now = (self._batch, self._here()) if self._goes_on else (0, None)
        if self._goes_on and self._began is not None:
            self._put(self._began)
        else:
            self._began = self._here()
        self._goes_on, self._batch = False, 0
        stream = iter(self.loader)
        for _ in range(first):
            next(stream, None)
        if now is not None:
            self._put(now)
        # The count is moved before the batch goes out: a state that is saved while it is in use points behind it.
        for self._batch, batch in enumerate(stream, first + 1):
            yield batch
        self._batch, self._began = 0, None

    def state_dict(self) -> dict[str, Any]:
        """The number of the next batch, what the epoch began with, None between two epochs, and the generators now."""
        return {"batch": self._batch, "began": self._began, "loader": loader_state(self.loader)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where the state was taken; the next `for` begins there. Raises LoaderError."""
        if state.keys() != {"batch", "began", "loader"}:
            raise LoaderError("the state of a loader lacks its batch, beginning or generators: take it from state_dict")
        load_loader_state(self.loader, state["loader"])
        self._batch, self._began = state["batch"], state["began"]
        self._goes_on = self._began is not None

    def begin_anew(self) -> None:
        """The epoch that was going on is over: the next `for` is a new one."""
        self._goes_on = False

    def _here(self) -> dict[str, Any]:
        """What the order and the content of an epoch are drawn from, now."""
        return {"random": random_state(), "loader": loader_state(self.loader)}

    def _put(self, state: dict[str, Any]) -> None:
        load_random_state(state["random"])
        load_loader_state(self.loader, state["loader"])
