"""A network taken out of the folder of a run: built by the user's own code, with the widths and weights of the run."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from autowidth.checkpoint import load_, read_run
from autowidth.errors import AutoWidthError
from autowidth.trace import Inputs


class FromRunError(AutoWidthError, ValueError):
    """A run that its network cannot be taken out of."""


def from_run(
    path: str | os.PathLike[str], model_factory: Callable[[], nn.Module], *, example_inputs: Inputs | None = None
) -> nn.Module:
    """The network of a run, in evaluation mode on the CPU.

    model_factory: called without arguments, returns a module of the class that the run started with, built as it was
        built then; its weights do not matter. example_inputs: what it is called with; where none are given, zeros of
        the `input_shape` in run.json, which every run of the command has, and `save(..., extra={"input_shape": [3, 32,
        32]})` gives to yours.

    Raises CheckpointError where the run is missing, damaged or of another network, FromRunError where the factory fails
    or the run does not say its input shape, TraceError where the model does not run on the inputs.
    """
    run = read_run(path)
    inputs = _inputs(run.extra.get("input_shape"), str(run.folder)) if example_inputs is None else example_inputs
    model = _built(model_factory)
    load_(model, run.folder, example_inputs=inputs)
    return model.eval()


def _inputs(shape: object, folder: str) -> torch.Tensor:
    """Two samples of zeros of this shape. Raises FromRunError where it is none."""
    if isinstance(shape, list) and shape and all(type(length) is int and length > 0 for length in shape):
        return torch.zeros(2, *shape)
    raise FromRunError(
        f"run {folder} does not say the shape of its inputs: give example_inputs, or save with "
        'extra={"input_shape": [3, 32, 32]}'
    )


def _built(model_factory: Callable[[], nn.Module]) -> nn.Module:
    """What the factory returns. Raises FromRunError where that is no module, or nothing."""
    if isinstance(model_factory, nn.Module) or not callable(model_factory):
        raise FromRunError(
            f"model_factory is a {type(model_factory).__name__}: give a class or function that returns a fresh model, "
            "such as lambda: Net(num_classes=10)"
        )
    try:
        model = model_factory()
    except Exception as error:  # it is the user's code that runs here
        raise FromRunError(f"model_factory failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise FromRunError(f"model_factory returned a {type(model).__name__}, expected an nn.Module")
    return model
