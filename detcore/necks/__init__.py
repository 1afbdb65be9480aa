"""Features of a backbone to the levels that a head is shared by, finest first."""

from typing import Any

from torch import nn

from detcore.backbones import build_backbone
from detcore.necks.fpn import FPN
from detcore.necks.hrfpn import HRFPN


def build_pyramid(cfg: Any, **fpn: Any) -> tuple[nn.Module, nn.Module]:
    """Backbone and neck. cfg: the recipe's `train.model`; fpn: what the detector's FPN, if it has one, is
    like."""
    neck, options = (HRFPN, {}) if cfg.neck == "hrfpn" else (FPN, fpn)
    backbone = build_backbone(cfg.backbone, neck.inputs)
    return backbone, neck(backbone.channels, cfg.head.channels, **options)
