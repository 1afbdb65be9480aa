"""Detectors by name. Each gives `forward(images, sizes, targets) -> losses` and `detect(images, sizes)`."""

from typing import Any

from torch import nn

from detcore.models.atss import build_atss
from detcore.models.cornernet import build_cornernet
from detcore.models.fcos import build_fcos
from detcore.models.retinanet import build_retinanet
from detcore.models.ssdlite import build_ssdlite
from detcore.models.yolof import build_yolof
from detcore.weights.loading import load_backbone

MODELS = {
    "yolof": build_yolof,
    "retinanet": build_retinanet,
    "fcos": build_fcos,
    "atss": build_atss,
    "cornernet": build_cornernet,
    "ssdlite": build_ssdlite,
}


def build_model(cfg: Any, pretrained: bool = True) -> nn.Module:
    """cfg: the recipe's `train.model`. pretrained: load `cfg.backbone.weights`, if it names any; pass
    False where a checkpoint is loaded next."""
    model = MODELS[cfg.name](cfg)
    if pretrained and cfg.backbone.weights:
        load_backbone(model.backbone, cfg.backbone)
    return model
