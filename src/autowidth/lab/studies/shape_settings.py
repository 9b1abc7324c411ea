"""The settings in which shapes are compared: network, recipe, held-out images, the space of shapes of equal cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from autowidth.cost import macs_cost
from autowidth.lab.methods import uniform_widths
from autowidth.lab.models import resolve
from autowidth.lab.settings import Settings, settings_of
from autowidth.lab.studies.widths import Shape, Space
from autowidth.lab.suites.compare import RECIPES
from autowidth.lab.suites.published import FINE_TUNED, TABLES
from autowidth.trace import trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A network, its recipe and its images.

    train: settings of every training, `epochs` among them; choice: what sets held-out images apart from the training
    images; image: the shape of one image; macs: the upper end of the band, as a share of the dense MACs; most: the
    largest width, as a multiple of the dense one; published: whether shapes are cut out of published weights and
    fine-tuned, instead of being trained from fresh ones.
    """

    model: str
    train: Mapping[str, Any]
    choice: Mapping[str, Any]
    image: tuple[int, int, int]
    macs: float = 0.25
    most: float = 2.0
    published: bool = False

    def early(self, total_steps: int) -> tuple[int, ...]:
        """The steps after which a training is looked at before its end, and before its start.

        Published weights: 1, 10, 50 and 200 steps of recovery from the cut; fresh ones: 10, 30 and 60 % of the run.
        """
        steps = (1, 10, 50, 200) if self.published else tuple(round(part * total_steps) for part in (0.1, 0.3, 0.6))
        return tuple(sorted({step for step in steps if 0 < step < total_steps}))


def _recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe of the comparison, without those of its policy."""
    recipe = RECIPES[name]
    return {"epochs": recipe.epochs, **{key: value for key, value in recipe.train.items() if key != "policy"}}


QUICK: Mapping[str, Any] = {"bf16": True, "channels_last": True}
"""What makes a training about twice as fast on a processor that computes in bfloat16."""

BRIEF: Mapping[str, Any] = {**TABLES[FINE_TUNED].train, "epochs": 2, **QUICK}
"""A brief fine-tuning of published weights, by the recipe of suite `published`."""

HALVED: Mapping[str, Any] = {"limit": 40_000, "holdout": 0.5}

SETTINGS: Mapping[str, Setting] = {
    "resnet20-mini": Setting(model="resnet20", train={**_recipe("mini"), **QUICK}, choice=HALVED, image=(3, 16, 16)),
    "vgg8-mini": Setting(model="vgg8", train={**_recipe("mini"), **QUICK}, choice=HALVED, image=(3, 16, 16)),
    "resnet20-published": Setting(
        model="resnet20-padding", train=BRIEF, choice=HALVED, image=(3, 32, 32), macs=0.5, most=1.0, published=True,
    ),
    "resnet8-digits": Setting(model="resnet8", train=_recipe("digits"), choice={"holdout": 0.3}, image=(1, 8, 8)),
}  # fmt: skip
"""The settings by name. The published weights were trained on all training images (99.84 % of those that are held out
here are classified rightly before anything is removed): held-out images of this setting are new to the fine-tuning
only, and its shapes are compared by how well they keep what was learnt; test images alone are new to them."""


@cache
def space_of(name: str) -> Space:
    """The shapes of a setting's network."""
    setting = SETTINGS[name]
    network = resolve(setting.model, num_classes=10, in_channels=setting.image[0])
    channel_map = trace(network, torch.zeros(2, *setting.image))
    return Space(
        cost=macs_cost(channel_map), dense=tuple(channel_map.widths.values()), low=setting.macs - 0.01,
        high=setting.macs, most=setting.most,
    )  # fmt: skip


def uniform_shape(name: str) -> Shape:
    """The shape that the comparisons' control `uniform` trains."""
    space = space_of(name)
    dense = dict(zip(space.cost.names, space.dense, strict=True))
    target = SETTINGS[name].macs * space.cost.at(dense)
    return tuple(uniform_widths(space.cost, dense, target).values())


def is_ours(name: str, run: str) -> bool:
    """Whether a run of the comparison is ours as it stands, from the dense widths to the MACs of this setting."""
    return run.startswith("autowidth-seed") and run.endswith(f"-macs{SETTINGS[name].macs:g}-start1")


def training_of(name: str, data: str, seed: int, epochs: int | None = None) -> Settings:
    """The settings of a training, measured on held-out images."""
    setting = SETTINGS[name]
    given = {"model": setting.model, "data": data, "seed": seed, "threads": 1, "looks": 1}
    return settings_of({**given, **setting.train, **setting.choice, **({"epochs": epochs} if epochs else {})})
