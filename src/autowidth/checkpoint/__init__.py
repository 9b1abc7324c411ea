"""Shapes, weights and history in safetensors + JSON; a fresh model takes the shapes of the file."""

from autowidth.checkpoint.errors import CheckpointError, WriteError
from autowidth.checkpoint.folder import RUN, SCHEMA
from autowidth.checkpoint.run import HISTORY, Run
from autowidth.checkpoint.saving import MODEL, load_, read_run, read_tensors, save
from autowidth.checkpoint.state_dicts import load_state_dict_

__all__ = [
    "HISTORY",
    "MODEL",
    "RUN",
    "SCHEMA",
    "CheckpointError",
    "Run",
    "WriteError",
    "load_",
    "load_state_dict_",
    "read_run",
    "read_tensors",
    "save",
]
