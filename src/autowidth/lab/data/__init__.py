"""Image sets of the laboratory: every split one tensor on the device, cropped, flipped and scaled in batches.

A set that would be too large for that stays encoded, and worker processes decode its batches ahead of time; whoever
reads batches sees no difference. Letters in shapes: N images, C channels, H rows, W columns. A pixel is a fraction of
full scale, 0 to 1, as float32, or its 255-fold as uint8. Nothing is cached on disk.

Imports point to the left: errors < pixels < augment, decoding < streaming < splits < batches < sets; splits < sources <
tables < readers (one file per kind of set); decoding < extents; splits < overlap; sets, sources, extents, overlap <
assembling; all of them < loading. A new kind of set is one
function under `@reader` in `readers`.
"""

from autowidth.lab.data.augment import Augmentation, Draws, Level
from autowidth.lab.data.batches import Batches
from autowidth.lab.data.errors import CorruptImageError, DataError, UnknownDataError
from autowidth.lab.data.loading import FORMS, STREAM_ABOVE, cifar10, digits, folder, load, resizable
from autowidth.lab.data.pixels import Edge, channel_statistics, crop, flip, pooled, scale, unit
from autowidth.lab.data.readers.cifar import CIFAR10_CLASSES
from autowidth.lab.data.sets import ImageSet
from autowidth.lab.data.sources import reader
from autowidth.lab.data.splits import Part, Split
from autowidth.lab.data.streaming import Pictures

__all__ = [
    "CIFAR10_CLASSES",
    "FORMS",
    "STREAM_ABOVE",
    "Augmentation",
    "Batches",
    "CorruptImageError",
    "DataError",
    "Draws",
    "Edge",
    "ImageSet",
    "Level",
    "Part",
    "Pictures",
    "Split",
    "UnknownDataError",
    "channel_statistics",
    "cifar10",
    "crop",
    "digits",
    "flip",
    "folder",
    "load",
    "pooled",
    "reader",
    "resizable",
    "scale",
    "unit",
]
