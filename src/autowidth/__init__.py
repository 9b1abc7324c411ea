"""Train a convolutional network once and come out with the right number of filters in every layer."""

from autowidth.channels import ChannelGroup, ChannelMap, IndexMap, ParamAxis
from autowidth.checkpoint import Run, load_, load_state_dict_, read_run, save
from autowidth.cost import count_macs
from autowidth.engine import AutoWidth, resize_
from autowidth.errors import AutoWidthError
from autowidth.export import export_onnx, export_program
from autowidth.history import Event, History
from autowidth.hub import from_hub, push_to_hub
from autowidth.loaders import Resumable
from autowidth.measure import time_layers, time_side_by_side
from autowidth.policy import Auto, Budget, Limits, Never, Price, Schedule
from autowidth.review.effort import Effort
from autowidth.shrink import shrink_
from autowidth.signals import stop_asked
from autowidth.takeaway import from_run
from autowidth.trace import trace
from autowidth.training import resume_, save_training, saved_trainings
from autowidth.version import __version__
from autowidth.widths import Widths, apply_widths_, read_widths, widths_of, write_widths

__all__ = [
    "Auto",
    "AutoWidth",
    "AutoWidthError",
    "Budget",
    "ChannelGroup",
    "ChannelMap",
    "Effort",
    "Event",
    "History",
    "IndexMap",
    "Limits",
    "Never",
    "ParamAxis",
    "Price",
    "Resumable",
    "Run",
    "Schedule",
    "Widths",
    "__version__",
    "apply_widths_",
    "count_macs",
    "export_onnx",
    "export_program",
    "from_hub",
    "from_run",
    "load_",
    "load_state_dict_",
    "push_to_hub",
    "read_run",
    "read_widths",
    "resize_",
    "resume_",
    "save",
    "save_training",
    "saved_trainings",
    "shrink_",
    "stop_asked",
    "time_layers",
    "time_side_by_side",
    "trace",
    "widths_of",
    "write_widths",
]
