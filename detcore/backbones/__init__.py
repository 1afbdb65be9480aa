"""Networks from images to features. Each carries the `pixels` its weights were trained on."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from detcore.backbones.hrnet import STRIDES, HRNet
from detcore.backbones.mobilenetv2 import MobileNetV2
from detcore.backbones.resnet import ResNet


def _resnet(depth: int) -> Any:
    def build(cfg: Any, strides: Sequence[int]) -> ResNet:
        taps = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
        if cfg.dilate:
            taps[16] = "res5"
        channels = [round(cfg.width * base) for base in (64, 128, 256, 512)]
        return ResNet(
            depth,
            cfg.style,
            cfg.norm,
            cfg.freeze,
            stem=channels[0],
            middle=channels,
            taps=[taps[stride] for stride in strides],
            dilate=cfg.dilate,
        )

    return build


def _mobilenetv2(cfg: Any, strides: Sequence[int]) -> MobileNetV2:
    taps = {4: "layer2", 8: "layer3", 16: "layer5", 32: "conv2"}
    if cfg.style == "tensorflow":  # arXiv:1801.04381, 6.2; others take what the block before gives
        taps[16] = "layer6.expand"
    return MobileNetV2(cfg.width, cfg.norm, cfg.freeze, [taps[stride] for stride in strides], cfg.style)


def _hrnet(base: int) -> Any:
    def build(cfg: Any, strides: Sequence[int]) -> HRNet:
        return HRNet(
            [round(cfg.width * base * 2**branch) for branch in range(4)],
            norm=cfg.norm,
            freeze=cfg.freeze,
            taps=[STRIDES.index(stride) for stride in strides],
            stem=round(cfg.width * 64),
            middle=round(cfg.width * 64),
        )

    return build


BACKBONES = {
    "resnet18": _resnet(18),
    "resnet34": _resnet(34),
    "resnet50": _resnet(50),
    "resnet101": _resnet(101),
    "mobilenetv2": _mobilenetv2,
    "hrnet_w18": _hrnet(18),
    "hrnet_w32": _hrnet(32),
    "hrnet_w40": _hrnet(40),
}


def build_backbone(cfg: Any, strides: Sequence[int] = (32,)) -> nn.Module:
    """cfg: the recipe's `train.model.backbone`. Gives the last feature of each of `strides`, finest first.

    Random weights; `detcore.weights` loads others."""
    return BACKBONES[cfg.name](cfg, strides)
