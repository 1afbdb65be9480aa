"""Networks from images to features. Each carries the `pixels` its weights were trained on."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from detcore.backbones.mobilenetv2 import MobileNetV2
from detcore.backbones.resnet import ResNet


def _resnet(depth: int) -> Any:
    taps = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}

    def build(cfg: Any, strides: Sequence[int]) -> ResNet:
        channels = [round(cfg.width * base) for base in (64, 128, 256, 512)]
        return ResNet(
            depth,
            cfg.style,
            cfg.norm,
            cfg.freeze,
            stem=channels[0],
            middle=channels,
            taps=[taps[stride] for stride in strides],
        )

    return build


def _mobilenetv2(cfg: Any, strides: Sequence[int]) -> MobileNetV2:
    taps = {4: "layer2", 8: "layer3", 16: "layer5", 32: "conv2"}
    return MobileNetV2(cfg.width, cfg.norm, cfg.freeze, [taps[stride] for stride in strides])


BACKBONES = {
    "resnet18": _resnet(18),
    "resnet34": _resnet(34),
    "resnet50": _resnet(50),
    "resnet101": _resnet(101),
    "mobilenetv2": _mobilenetv2,
}


def build_backbone(cfg: Any, strides: Sequence[int] = (32,)) -> nn.Module:
    """cfg: the recipe's `train.model.backbone`. Gives the last feature of each of `strides`, finest first.

    Random weights; `detcore.weights` loads others."""
    return BACKBONES[cfg.name](cfg, strides)
