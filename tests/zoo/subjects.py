"""Which networks are examined, and on images of which size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .torchvision_schemas import import_timm, import_torchvision

BATCH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One network: the library and family that it comes from, and the side of its square images in pixels."""

    name: str
    library: str
    family: str
    pixels: int

    def build(self) -> nn.Module:
        """A network of its own with random weights. Raises ImportError where the library is not installed."""
        model = self.name.removesuffix(" (timm)")
        if self.library == "timm":
            built: nn.Module = import_timm().create_model(model, pretrained=False)
            return built
        import_torchvision()
        from torchvision import models

        options: dict[str, Any] = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
        made: nn.Module = getattr(models, model)(weights=None, **options)
        return made

    def inputs(self) -> Tensor:
        """Random images (BATCH, 3, pixels, pixels)."""
        return torch.randn(BATCH, 3, self.pixels, self.pixels)


TORCHVISION = (
    "alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet",
    "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet1_0", "efficientnet_b0",
    "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "squeezenet1_1", "shufflenet_v2_x1_0", "convnext_tiny",
    "vit_b_16", "swin_t", "maxvit_t",
)  # fmt: skip
"""At the size that they were made for: 224 pixels, inception_v3 299."""

CONVOLUTIONAL: Mapping[str, tuple[str, ...]] = {
    "byoanet": ("halonet26t", "botnet26t_256", "lambda_resnet26t", "bat_resnext26ts"),
    "byobnet": ("repvgg_a0", "gernet_s", "mobileone_s0", "eca_resnext26ts"),
    "convmixer": ("convmixer_768_32",),
    "convnext": ("convnext_atto", "convnextv2_atto"),
    "cspnet": ("cspresnet50", "cspdarknet53", "cs3darknet_focus_s", "darknet17"),
    "cspnext": ("cspnext_tiny",),
    "densenet": ("densenetblur121d",),
    "dla": ("dla46_c",),
    "dpn": ("dpn48b",),
    "edgenext": ("edgenext_xx_small",),
    "efficientnet": (
        "efficientnet_lite0", "efficientnet_es", "tinynet_e", "mnasnet_small", "semnasnet_075", "mobilenetv1_100",
        "mobilenetv2_050", "mobilenetv4_conv_small_050", "mixnet_s", "fbnetc_100", "spnasnet_100",
    ),
    "fasternet": ("fasternet_t0",),
    "fastvit": ("fastvit_t8",),
    "focalnet": ("focalnet_tiny_srf",),
    "ghostnet": ("ghostnet_050", "ghostnetv2_100", "ghostnetv3_050"),
    "hardcorenas": ("hardcorenas_a",),
    "hgnet": ("hgnet_tiny", "hgnetv2_b0"),
    "hrnet": ("hrnet_w18_small",),
    "inception_next": ("inception_next_atto",),
    "inception_resnet_v2": ("inception_resnet_v2",),
    "inception_v3": ("inception_v3 (timm)",),
    "inception_v4": ("inception_v4",),
    "lcnetv2": ("lcnetv2_small",),
    "mambaout": ("test_mambaout",),
    "metaformer": ("poolformer_s12", "poolformerv2_s12", "convformer_s18"),
    "mobilenetv3": ("mobilenetv3_small_050", "lcnet_050", "fbnetv3_b"),
    "nasnet": ("nasnetalarge",),
    "nfnet": ("nfnet_l0", "nf_regnet_b0", "nf_resnet26"),
    "pnasnet": ("pnasnet5large",),
    "rdnet": ("rdnet_tiny",),
    "regnet": ("regnety_002", "regnetz_005"),
    "repghost": ("repghostnet_050",),
    "repvit": ("repvit_m0_9",),
    "res2net": ("res2net50_14w_8s",),
    "resnest": ("resnest14d",),
    "resnet": ("resnet10t", "seresnext26d_32x4d", "ecaresnet26t"),
    "resnetv2": ("resnetv2_18", "resnetv2_50x1_bit"),
    "rexnet": ("rexnet_100",),
    "selecsls": ("selecsls42",),
    "senet": ("legacy_seresnet18",),
    "sknet": ("skresnet18",),
    "starnet": ("starnet_s050",),
    "tresnet": ("tresnet_m",),
    "vgg": ("vgg11",),
    "vovnet": ("ese_vovnet19b_dw", "eca_vovnet39b"),
    "xception": ("legacy_xception",),
    "xception_aligned": ("xception41",),
}  # fmt: skip
"""timm's convolutional families (its modules) with small members of each."""

MIXED: Mapping[str, tuple[str, ...]] = {
    "coat": ("coat_lite_tiny",),
    "cpubone": ("cpubone_nano",),
    "crossvit": ("crossvit_tiny_240",),
    "csatv2": ("csatv2",),
    "davit": ("davit_tiny",),
    "deit": ("deit_tiny_patch16_224",),
    "efficientformer": ("efficientformer_l1",),
    "efficientformer_v2": ("efficientformerv2_s0",),
    "efficientvim": ("efficientvim_m1",),
    "efficientvit_mit": ("efficientvit_b0",),
    "efficientvit_msra": ("efficientvit_m0",),
    "gcvit": ("gcvit_xxtiny",),
    "iformer": ("iformer_t",),
    "levit": ("levit_128s",),
    "lowformer": ("lowformer_b0",),
    "maxxvit": ("test_coatnet",),
    "mlp_mixer": ("gmlp_ti16_224",),
    "mobilevit": ("mobilevit_xxs", "mobilevitv2_050"),
    "nextvit": ("nextvit_small",),
    "pit": ("pit_ti_224",),
    "pvt_v2": ("pvt_v2_b0",),
    "sequencer": ("sequencer2d_s",),
    "shvit": ("shvit_s1",),
    "swiftformer": ("swiftformer_xs",),
    "tiny_vit": ("tiny_vit_5m_224",),
    "visformer": ("visformer_tiny",),
    "volo": ("volo_d1_224",),
    "xcit": ("xcit_nano_12_p8_224",),
}
"""timm's families that mix convolutions with attention or recurrence, and some without convolutions: extras."""

_PIXELS: Mapping[str, int] = {
    "inception_v3": 299,
    **dict.fromkeys(("inception_v3 (timm)", "inception_v4", "inception_resnet_v2"), 96),
    "test_coatnet": 160,
    **dict.fromkeys(
        (
            "volo_d1_224", "efficientformer_l1", "efficientformerv2_s0", "visformer_tiny", "levit_128s", "gcvit_xxtiny",
            "deit_tiny_patch16_224", "gmlp_ti16_224", "pit_ti_224", "coat_lite_tiny",
        ),
        224,
    ),
    **dict.fromkeys(("halonet26t", "botnet26t_256", "bat_resnext26ts"), 256),
}  # fmt: skip
"""Sides that differ from the usual ones: what the architecture allows."""


KNOWN: Mapping[str, str] = dict.fromkeys(
    ("efficientvim_m1", "gmlp_ti16_224", "iformer_t"),
    "MACs foreseen",
)
"""Name -> words of the one promise that is known not to hold. Layers that mix tokens, and products of activations, cost
what the width of the channels is that they run over; the cost model counts the weights' own two dims only."""


def _subjects() -> dict[str, Subject]:
    found = [
        Subject(name=name, library="torchvision", family="torchvision", pixels=_PIXELS.get(name, 224))
        for name in TORCHVISION
    ]
    for families in (CONVOLUTIONAL, MIXED):
        for family, names in families.items():
            for name in names:
                found.append(Subject(name=name, library="timm", family=family, pixels=_PIXELS.get(name, 64)))
    subjects = {subject.name: subject for subject in found}
    assert len(subjects) == len(found), "two subjects have the same name"
    return subjects


SUBJECTS: Mapping[str, Subject] = _subjects()
"""Name -> subject, torchvision's first."""
