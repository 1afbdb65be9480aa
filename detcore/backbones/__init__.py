"""Networks from images to features. Each carries the `pixels` its weights were trained on."""

from typing import Any

from torch import nn

from detcore.backbones.mobilenetv2 import MobileNetV2
from detcore.backbones.resnet import ResNet


def _resnet(depth: int) -> Any:
    def build(cfg: Any) -> ResNet:
        channels = [round(cfg.width * base) for base in (64, 128, 256, 512)]
        return ResNet(depth, cfg.style, cfg.norm, cfg.freeze, stem=channels[0], middle=channels)

    return build


BACKBONES = {
    "resnet18": _resnet(18),
    "resnet34": _resnet(34),
    "resnet50": _resnet(50),
    "resnet101": _resnet(101),
    "mobilenetv2": lambda cfg: MobileNetV2(cfg.width, cfg.norm, cfg.freeze),
}


def build_backbone(cfg: Any) -> nn.Module:
    """cfg: the recipe's `train.model.backbone`. Random weights; `detcore.weights` loads others."""
    return BACKBONES[cfg.name](cfg)
