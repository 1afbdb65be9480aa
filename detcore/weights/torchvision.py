"""torchvision's RetinaNet and FCOS: their names, classes, and order of what the predictors give."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from detcore.weights.backbones import PARTS, TORCHVISION_RESNET, Rule, apply
from detcore.weights.classes import COCO, LAST

# In files from before 0.13, as the released RetinaNet's, the convolutions of the pyramid and of RetinaNet's
# towers are not wrapped; these are flat lists then: convolution, ReLU. FCOS's are: convolution, norm, ReLU.
_PYRAMID: tuple[Rule, ...] = (
    (r"^backbone\.body\.(.+)$", lambda m: f"backbone.{apply(TORCHVISION_RESNET, m[1])}"),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?", r"neck.lateral.\1."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?", r"neck.output.\1."),
    (r"^backbone\.fpn\.extra_blocks\.", "neck."),
    (r"^head\.classification_head\.conv\.", "head.cls_tower."),
    (r"^head\.regression_head\.conv\.", "head.reg_tower."),
    (r"^head\.classification_head\.cls_logits\.", "head.cls_score."),
    (r"^head\.regression_head\.bbox_reg\.", "head.bbox_pred."),
    (r"^head\.regression_head\.bbox_ctrness\.", "head.centerness."),
)
RETINANET: tuple[Rule, ...] = (
    *_PYRAMID,
    (r"_tower\.(\d+)\.(?=weight$|bias$)", lambda m: f"_tower.{int(m[1]) // 2}.conv."),
    (r"_tower\.(\d+)\.0\.", r"_tower.\1.conv."),
)
FCOS: tuple[Rule, ...] = (
    *_PYRAMID,
    (r"_tower\.(\d+)\.", lambda m: f"_tower.{int(m[1]) // 3}.{PARTS[int(m[1]) % 3]}."),
)


def reorder(renamed: dict[str, tuple[str, Tensor]], ours: Mapping[str, Tensor], ratios: int) -> None:
    """Puts the outputs of the predictors, A anchors x D columns, into our order.

    Anchors of one ratio, of which there are `ratios`, are neighbours there, those of one size here. Class 0
    is background there; a model of ours with one class less does without. Of a column for each id up to
    COCO's last, a model with as many classes as COCO takes those that are classes.
    """
    boxes = renamed.get("head.bbox_pred.weight")
    anchors = len(boxes[1]) // 4 if boxes else 0
    for name in [name for name in renamed if re.match(r"head\.(cls_score|bbox_pred)\.", name)]:
        old, values = renamed[name]
        if name not in ours or not anchors or anchors % ratios or len(values) % anchors:
            continue  # it does not fit, and whoever looks at shapes says so
        columns, wanted = len(values) // anchors, len(ours[name]) // anchors
        kept = list(range(columns))
        if (columns, wanted) == (LAST + 1, len(COCO)):
            kept = list(COCO)
        elif columns == wanted + 1:
            kept = kept[1:]
        grid = values.unflatten(0, (ratios, anchors // ratios, columns)).transpose(0, 1)
        renamed[name] = (old, grid[:, :, torch.tensor(kept)].flatten(0, 2))
