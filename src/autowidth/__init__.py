"""Train a convolutional network once and come out with the right number of filters in every layer."""

from autowidth.channels import ChannelGroup, ChannelMap, IndexMap, ParamAxis
from autowidth.checkpoint import Run, load_, read_run, save
from autowidth.cost import count_macs
from autowidth.engine import AutoWidth, resize_
from autowidth.errors import AutoWidthError
from autowidth.history import Event, History
from autowidth.policy import Auto, Budget, Limits, Never, Price, Schedule
from autowidth.review.effort import Effort
from autowidth.shrink import shrink_
from autowidth.trace import trace
from autowidth.version import __version__

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
    "Run",
    "Schedule",
    "__version__",
    "count_macs",
    "load_",
    "read_run",
    "resize_",
    "save",
    "shrink_",
    "trace",
]
