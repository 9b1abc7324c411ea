"""The door of tracing: from a model and example inputs to its channel map."""

from __future__ import annotations

from torch import nn

from autowidth.channels import ChannelMap
from autowidth.trace.passes import first_passes
from autowidth.trace.rehearsal import rehearsed
from autowidth.trace.scratch import Inputs, arguments, undisturbed
from autowidth.unwrapping import inner_model, written
from autowidth.wrappers import refuse_sharded


def trace(model: nn.Module, example_inputs: Inputs, *, rehearse: bool = True) -> ChannelMap:
    """Returns the channel map of a model: which channels live where, what is frozen and why.

    Runs scratch copies of the model, never the model itself: first without data (meta tensors), and with the data
    where the forward pass needs values. Training and evaluation mode are both followed, and what they say is united.
    `example_inputs` is what the model is called with: a tensor, a tuple of arguments, or a mapping of keyword
    arguments. Of a compiled model the model inside is traced. Only the branch of the code that these inputs take is
    seen. With `rehearse`, every channel group is resized for trial on a scratch copy, and frozen if the network does
    not survive it.

    A DistributedDataParallel wrapper is looked through. Raises TraceError if the model cannot be run on the inputs, or
    returns tensors that cannot be found, and ShardedModelError.
    """
    refuse_sharded(written(model))
    model = inner_model(model)
    args, kwargs = arguments(model, example_inputs)
    with undisturbed(model):
        passes, channel_map = first_passes(model, args, kwargs)
        return rehearsed(passes, channel_map) if rehearse else channel_map
