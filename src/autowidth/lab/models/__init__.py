"""Networks of the laboratory: CIFAR ResNet, VGG, DenseNet, GoogLeNet, MobileNetV2, each with a width factor.

Imports point to the left: registry, parts < networks (one file per family) < naming < importing. A new network is one
class or function under `@model` in `networks`.

MACs in this folder are those of convolutions and linear layers at 3 x 32 x 32 with 10 classes. Figures in the
literature often count normalisations, activations and additions as well; where ours differ from a published one, the
docstring of the network says by what.
"""

from autowidth.lab.models.importing import resolve
from autowidth.lab.models.naming import build, spec
from autowidth.lab.models.networks.densenet import DenseLayer, DenseNet, norm_conv
from autowidth.lab.models.networks.googlenet import INCEPTIONS, GoogLeNet, Inception, InceptionBlock
from autowidth.lab.models.networks.mobilenet import INVERTED, InvertedResidual, MobileNetV2
from autowidth.lab.models.networks.resnet import BasicBlock, PaddingShortcut, ResNet, Shortcut
from autowidth.lab.models.networks.vgg import VGG, VGG8, VGG16
from autowidth.lab.models.parts import Head, conv_norm, initialise, scaled
from autowidth.lab.models.registry import MODELS, Builder, ModelSpec, UnknownModelError, model

__all__ = [
    "INCEPTIONS",
    "INVERTED",
    "MODELS",
    "VGG",
    "VGG8",
    "VGG16",
    "BasicBlock",
    "Builder",
    "DenseLayer",
    "DenseNet",
    "GoogLeNet",
    "Head",
    "Inception",
    "InceptionBlock",
    "InvertedResidual",
    "MobileNetV2",
    "ModelSpec",
    "PaddingShortcut",
    "ResNet",
    "Shortcut",
    "UnknownModelError",
    "build",
    "conv_norm",
    "initialise",
    "model",
    "norm_conv",
    "resolve",
    "scaled",
    "spec",
]
