"""Train a convolutional network once and come out with the right number of filters in every layer."""

from autowidth.channels import ChannelGroup, ChannelMap, IndexMap, ParamAxis
from autowidth.checkpoint import load_, save
from autowidth.cost import count_macs
from autowidth.engine import AutoWidth, Effort, resize_
from autowidth.history import Event, History
from autowidth.policy import Auto, Budget, Never, Price
from autowidth.trace import trace
from autowidth.version import __version__

__all__ = [
    "Auto",
    "AutoWidth",
    "Budget",
    "ChannelGroup",
    "ChannelMap",
    "Effort",
    "Event",
    "History",
    "IndexMap",
    "Never",
    "ParamAxis",
    "Price",
    "__version__",
    "count_macs",
    "load_",
    "resize_",
    "save",
    "trace",
]
