"""Every detector in small: the `train.model` section of a recipe, three classes, milliseconds a step."""

from typing import Any

BACKBONE = {"name": "resnet18", "width": 0.25, "norm": "bn"}
HEAD = {"channels": 16, "convs": 1}
SECTIONS: dict[str, dict[str, Any]] = {
    "yolof": {
        "name": "yolof",
        "encoder": {"channels": 32, "mid_channels": 8, "dilations": [2, 4]},
        "decoder": {"cls_convs": 1, "reg_convs": 2},
    },
    "retinanet": {"name": "retinanet", "head": HEAD},
    "retinanet-torchvision": {"name": "retinanet", "head": HEAD, "style": "torchvision"},
    "fcos": {"name": "fcos", "head": HEAD},
    "fcos-exp": {
        "name": "fcos",
        "head": HEAD,
        "distances": "exp",
        "centerness": "cls",
        "radius": None,
        "box_loss": "iou",
    },
    "fcos-detectron2": {"name": "fcos", "head": HEAD, "style": "detectron2"},
    "fcos-torchvision": {"name": "fcos", "head": HEAD, "style": "torchvision"},
    "fcos-hrfpn": {"name": "fcos", "head": HEAD, "neck": "hrfpn"},
    "atss": {"name": "atss", "head": HEAD},
    "atss-original": {"name": "atss", "head": HEAD, "style": "original"},
    "ssdlite": {"name": "ssdlite", "extra": [16] * 4},
    "ssdlite-tensorflow": {
        "name": "ssdlite",
        "extra": [16] * 4,
        "style": "tensorflow",
        "backbone": {"name": "mobilenetv2", "style": "tensorflow", "width": 0.25, "norm": "bn"},
    },
}
EVERY = SECTIONS | {  # each of these two has a backbone of a kind of its own
    "fcos-hrnet": {
        "name": "fcos",
        "backbone": {"name": "hrnet_w18", "width": 0.25, "norm": "fixed_bn"},
        "head": HEAD,
        "neck": "hrfpn",
    },
    "cornernet": {
        "name": "cornernet",
        "backbone": {"dims": [8, 12, 16], "blocks": [1, 1, 2], "stem": 8},
        "pool_channels": 8,
        "test": {"topk": 20, "pairs": 100},
    },
}


def section(name: str, **changes: Any) -> dict[str, Any]:
    """One of them, whole, with other values for some of its keys."""
    return {"num_classes": 3, "backbone": BACKBONE} | EVERY[name] | changes
