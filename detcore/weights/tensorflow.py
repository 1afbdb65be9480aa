"""TensorFlow's names and orders: MobileNetV2 and the SSDLite on it, as its object detection API has them.

Batch norm may be there with its statistics, or folded by the graph's optimiser: then `batchnorm/mul` is its
factor, or `merged_input` a convolution already multiplied by it, and `batchnorm/sub` its offset.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from detcore.backbones.mobilenetv2 import BLOCKS
from detcore.weights.classes import COCO, LAST

_NEXT = {"1": "reduce", "2": "pointwise"}

SSDLITE = (
    (r"^FeatureExtractor/MobilenetV2/|^MobilenetV2/", "backbone/"),
    (r"^backbone/Conv/", "backbone/conv1/"),
    (r"^backbone/Conv_1/", "backbone/conv2/"),
    (r"^backbone/expanded_conv/", f"backbone/{BLOCKS[0]}/"),
    (r"^backbone/expanded_conv_(\d+)/", lambda m: f"backbone/{dict(enumerate(BLOCKS)).get(int(m[1]))}/"),
    # layer_19_1_Conv2d_2_1x1_256, layer_19_2_Conv2d_2_3x3_s2_512_depthwise, layer_19_2_Conv2d_2_3x3_s2_512
    (r"^backbone/layer_19_2_Conv2d_(\d)_\w+_depthwise/", lambda m: f"neck/layers/{int(m[1]) - 2}/depthwise/"),
    (r"^backbone/layer_19_([12])_Conv2d_(\d)_\w+?/",
     lambda m: f"neck/layers/{int(m[2]) - 2}/{_NEXT[m[1]]}/"),
    (r"^BoxPredictor_(\d)/ClassPredictor", r"head/cls_score/\1"),
    (r"^BoxPredictor_(\d)/BoxEncodingPredictor", r"head/bbox_pred/\1"),
    (r"^(head/\w+/\d)_depthwise/", r"\1/0/"),
    (r"^(head/\w+/\d)/(weights|biases)$", r"\1/1/\2"),
    (r"/(?:depthwise_weights|Conv2D/merged_input)$", "/conv/weight"),
    (r"^((?:backbone|neck)/.+)/weights$", r"\1/conv/weight"),
    (r"/weights$", "/weight"),
    (r"/biases$", "/bias"),
    (r"/BatchNorm/(?:gamma|batchnorm/mul)$", "/norm/weight"),
    (r"/BatchNorm/(?:beta|batchnorm/sub)$", "/norm/bias"),
    (r"/BatchNorm/moving_mean$", "/norm/running_mean"),
    (r"/BatchNorm/moving_variance$", "/norm/running_var"),
    (r"/", "."),
)  # fmt: skip

MOBILENETV2 = (*SSDLITE, (r"^backbone\.", ""))


def reorder(renamed: dict[str, tuple[str, Tensor]], ours: Mapping[str, Tensor]) -> None:
    """Puts the outputs of each level's predictors, A anchors x D columns, into our order.

    Boxes are (y, x, h, w) there. Class 0 is background there, the last one here. TensorFlow has a column for
    each id up to COCO's last; a model of ours with as many classes as COCO takes those that are classes.
    """
    for name in [name for name in renamed if re.match(r"head\.(cls_score|bbox_pred)\.\d\.1\.", name)]:
        old, values = renamed[name]
        boxes = renamed.get(name.replace("cls_score", "bbox_pred"))
        anchors = len(boxes[1]) // 4 if boxes else 0
        if name not in ours or not anchors or len(values) % anchors:
            continue  # it does not fit, and whoever looks at shapes says so
        columns, wanted = len(values) // anchors, len(ours[name]) // anchors
        order = [1, 0, 3, 2] if "bbox_pred" in name else [*range(1, columns), 0]
        if columns == LAST + 1 and wanted == len(COCO) + 1:
            order = [*COCO, 0]
        renamed[name] = (old, values.unflatten(0, (anchors, columns))[:, torch.tensor(order)].flatten(0, 1))
