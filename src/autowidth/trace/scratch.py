"""Inputs that fit a model, and scratch copies of it that may be run and spoilt."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autowidth.errors import AutoWidthError
from autowidth.trace.frames import described
from autowidth.unwrapping import uncompiled

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments."""


class TraceError(AutoWidthError, ValueError):
    """The model cannot be traced with these example inputs."""


def arguments(model: nn.Module, example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call with these inputs. Raises TraceError for what does not fit."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = tuple(example_inputs)
    tensors = tensors_in((args, kwargs))
    if not tensors:
        raise TraceError("example_inputs hold no tensor: pass what the model is called with, such as one batch")
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None:
        raise TraceError(f"{type(model).__name__} has no parameters, so it has no channels to resize")
    for tensor in tensors:
        if tensor.device != weight.device:
            raise TraceError(
                f"example inputs are on {tensor.device}, the model is on {weight.device}: move them to {weight.device}"
            )
        if tensor.is_floating_point() and tensor.dtype != weight.dtype:
            raise TraceError(f"example inputs are {tensor.dtype}, the model is {weight.dtype}: convert the inputs")
    return args, kwargs


def tensors_in(tree: object) -> list[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Keeps the caller's modes, autocast, compiled code and the garbage collector out; puts random states back."""
    states = random.getstate(), np.random.get_state()
    homes = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    devices = [home.index for home in homes if home.type == "cuda"]
    collecting = gc.isenabled()
    gc.disable()  # a map is millions of small tuples without cycles: looking through them again and again costs a third
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))  # dropout and trial insertions draw from it
            stack.enter_context(uncompiled())
            stack.enter_context(torch.inference_mode(False))  # there ops arrive whole that have no rules
            for kind in {home.type for home in homes} - {"meta"}:
                stack.enter_context(torch.autocast(kind, enabled=False))  # its cached weights carry no labels
            yield
    finally:
        if collecting:
            gc.enable()
        random.setstate(states[0])
        np.random.set_state(states[1])


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are on the meta device: shapes without memory."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copied(model, memo)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy. Raises TraceError where torch cannot make one."""
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({described(error)}): where hooks compute weights, use "
            "torch.nn.utils.parametrizations (weight_norm, spectral_norm) instead, and keep no results as attributes"
        ) from error


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer."""
    return {name: tuple(t.shape) for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}
