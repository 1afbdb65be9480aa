"""Other projects' names for the same tensors, as tables of substitutions (see `backbones`).

The names of ours that result are the ones of `detcore.backbones` and `detcore.models`; what does not become
one of them is left over.
"""

import re
from collections.abc import Iterable

from detcore.weights import tensorflow, torchvision
from detcore.weights.backbones import (
    CAFFE2_RESNET,
    DETECTRON2_RESNET,
    HRNET,
    MMDET_MOBILENETV2,
    PARTS,
    TORCHVISION_MOBILENETV2,
    TORCHVISION_RESNET,
    Rule,
    apply,
)

_CORNERS = {"tl": "top_left", "br": "bottom_right"}

# chensnathan/YOLOF, which stands on detectron2.
_YOLOF: tuple[Rule, ...] = (
    (r"^backbone\.(.+)$", lambda m: f"backbone.{apply(DETECTRON2_RESNET, m[1])}"),
    (r"^encoder\.(lateral|fpn)_(conv|norm)\.", r"encoder.\1.\2."),
    (
        r"^encoder\.dilated_encoder_blocks\.(\d+)\.(conv\d)\.([01])\.",
        lambda m: f"encoder.blocks.{m[1]}.{m[2]}.{PARTS[int(m[3])]}.",
    ),
    (
        r"^decoder\.(cls|bbox)_subnet\.(\d+)\.",  # conv, norm, ReLU: three to a layer
        lambda m: (
            f"decoder.{'cls' if m[1] == 'cls' else 'reg'}_tower.{int(m[2]) // 3}.{PARTS[int(m[2]) % 3]}."
        ),
    ),
    (r"^decoder\.object_pred\.", "decoder.objectness."),
)

_HOURGLASS: tuple[Rule, ...] = (
    (r"\.up1\.", ".branch."),
    (r"\.low1\.", ".down."),
    (r"\.low2(?=\.)", ".inner"),
    (r"\.low3\.", ".up."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.conv(\d)\.(?=weight$)", r".conv\1.conv."),
    (r"\.bn\.", ".norm."),
)

# princeton-vl/CornerNet; its checkpoints are of a DataParallel-like wrapper.
_CORNERNET: tuple[Rule, ...] = (
    (r"^module\.", ""),
    (r"^(tl|br)_", lambda m: f"{_CORNERS[m[1]]}."),
    (r"^(top_left|bottom_right)\.cnvs\.(\d+)\.", r"\1.\2.pooling."),
    (r"^(top_left|bottom_right)\.(heat|tag|regr)s\.(\d+)\.", r"\1.\3.\2."),
    (r"\.regr\.", ".offset."),
    (r"\.(heat|tag|offset)\.0\.conv\.", r".\1.0."),
    (r"\.(heat|tag|offset)\.1\.", r".\1.2."),  # a ReLU of its own comes between
    (r"\.pooling\.p([12])_conv1\.", r".pooling.branch\1."),
    (r"\.pooling\.p_conv1\.", ".pooling.pooled.conv."),
    (r"\.pooling\.p_bn1\.", ".pooling.pooled.norm."),
    (r"\.pooling\.conv1\.", ".pooling.shortcut.conv."),
    (r"\.pooling\.bn1\.", ".pooling.shortcut.norm."),
    (r"\.pooling\.conv2\.", ".pooling.output."),
    (r"^pre\.", "backbone.stem."),
    (r"^kps\.", "backbone.hourglasses."),
    (r"^cnvs\.", "backbone.outputs."),
    (r"^inters\.(\d+)\.", r"backbone.joints.\1.block."),
    (r"^inters_\.(\d+)\.([01])\.", lambda m: f"backbone.joints.{m[1]}.before.{PARTS[int(m[2])]}."),
    (r"^cnvs_\.(\d+)\.([01])\.", lambda m: f"backbone.joints.{m[1]}.after.{PARTS[int(m[2])]}."),
    (r"\.skip\.([01])\.", lambda m: f".shortcut.{PARTS[int(m[1])]}."),
    *_HOURGLASS,
)

_POOLING = {
    "direction1_conv": "branch1",
    "direction2_conv": "branch2",
    "aftpool_conv": "pooled",
    "conv1": "shortcut",
    "conv2": "output",
}
_MAPS = {"heat": "heat", "emb": "tag", "off": "offset"}

# mmdetection's CornerNet.
_MMDET_CORNERNET: tuple[Rule, ...] = (
    (r"^bbox_head\.(tl|br)_pool\.(\d)\.(\w+)\.",
     lambda m: f"{_CORNERS[m[1]]}.{m[2]}.pooling.{_POOLING.get(m[3], m[3])}."),
    (r"^bbox_head\.(tl|br)_(heat|emb|off)\.(\d)\.([01])\.conv\.",  # a ReLU of its own comes between
     lambda m: f"{_CORNERS[m[1]]}.{m[3]}.{_MAPS[m[2]]}.{2 * int(m[4])}."),
    (r"^backbone\.stem\.1\.0\.", "backbone.stem.1."),
    (r"^backbone\.hourglass_modules\.", "backbone.hourglasses."),
    (r"^backbone\.out_convs\.", "backbone.outputs."),
    (r"^backbone\.inters\.(\d)\.", r"backbone.joints.\1.block."),
    (r"^backbone\.conv1x1s\.(\d)\.", r"backbone.joints.\1.before."),
    (r"^backbone\.remap_convs\.(\d)\.", r"backbone.joints.\1.after."),
    *_HOURGLASS,
    (r"\.downsample\.([01])\.", lambda m: f".shortcut.{PARTS[int(m[1])]}."),
)  # fmt: skip

# detectron2's RetinaNet and FCOS. Its towers are flat lists: convolution, ReLU; or convolution, norm, ReLU.
_DETECTRON2_PYRAMID: tuple[Rule, ...] = (
    (r"^backbone\.fpn_(lateral|output)(\d)\.", lambda m: f"neck.{m[1]}.{int(m[2]) - 3}."),
    (r"^backbone\.top_block\.", "neck."),
    (r"^backbone\.bottom_up\.(.+)$", lambda m: f"backbone.{apply(DETECTRON2_RESNET, m[1])}"),
    (r"^head\.cls_subnet\.", "head.cls_tower."),
    (r"^head\.bbox_subnet\.", "head.reg_tower."),
    (r"^head\.ctrness\.", "head.centerness."),
)
_DETECTRON2_RETINANET: tuple[Rule, ...] = (
    *_DETECTRON2_PYRAMID,
    (r"_tower\.(\d+)\.", lambda m: f"_tower.{int(m[1]) // 2}.conv."),
)
_DETECTRON2_FCOS: tuple[Rule, ...] = (
    *_DETECTRON2_PYRAMID,
    (r"_tower\.(\d+)\.", lambda m: f"_tower.{int(m[1]) // 3}.{PARTS[int(m[1]) % 3]}."),
)

# mmdetection's YOLOF.
_MMDET_YOLOF: tuple[Rule, ...] = (
    (r"^backbone\.(.+)$", lambda m: f"backbone.{apply(TORCHVISION_RESNET, m[1])}"),
    (r"^neck\.(lateral|fpn)_(conv|norm)\.", r"encoder.\1.\2."),
    (r"^neck\.dilated_encoder_blocks\.", "encoder.blocks."),
    (r"^bbox_head\.cls_subnet\.", "decoder.cls_tower."),
    (r"^bbox_head\.bbox_subnet\.", "decoder.reg_tower."),
    (r"^bbox_head\.object_pred\.", "decoder.objectness."),
    (r"^bbox_head\.", "decoder."),
    (r"^((?:encoder|decoder)\..+)\.bn\.", r"\1.norm."),
)

# mmdetection's SSDLite.
_MMDET_SSDLITE: tuple[Rule, ...] = (
    (r"^backbone\.(.+)$", lambda m: f"backbone.{apply(MMDET_MOBILENETV2, m[1])}"),
    (r"^neck\.extra_layers\.(\d)\.0\.", r"neck.layers.\1.reduce."),
    (r"^neck\.extra_layers\.(\d)\.1\.(depthwise|pointwise)_conv\.", r"neck.layers.\1.\2."),
    (r"^bbox_head\.cls_convs\.", "head.cls_score."),
    (r"^bbox_head\.reg_convs\.", "head.bbox_pred."),
    (r"\.bn\.", ".norm."),
)

# mmdetection's FCOS, ATSS and RetinaNet: the head, with FPN on a ResNet, with HRFPN on HRNet. Their tensors
# may have the same shapes; whose they are, the names of the last layers say (see `owner`).
_MMDET_HEADS = {"conv": "fcos", "atss": "atss", "retina": "retinanet"}
_LAST = rf"^bbox_head\.({'|'.join(_MMDET_HEADS)})_"
_MMDET_HEAD: tuple[Rule, ...] = (
    (r"^bbox_head\.(cls|reg)_convs\.(\d+)\.", r"head.\1_tower.\2."),
    (r"^(head\.(?:cls|reg)_tower\.\d+)\.gn\.", r"\1.norm."),
    (rf"{_LAST}cls\.", "head.cls_score."),
    (rf"{_LAST}reg\.", "head.bbox_pred."),
    (rf"{_LAST}centerness\.", "head.centerness."),
    (r"^bbox_head\.scales\.(\d)\.scale$", r"head.scales.\1"),
)
_MMDET_DENSE: tuple[Rule, ...] = (
    (r"^backbone\.(.+)$", lambda m: f"backbone.{apply(TORCHVISION_RESNET, m[1])}"),
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"neck.lateral.\1."),
    (r"^neck\.fpn_convs\.([012])\.conv\.", r"neck.output.\1."),
    (r"^neck\.fpn_convs\.([34])\.conv\.", lambda m: f"neck.p{int(m[1]) + 3}."),
    *_MMDET_HEAD,
)
_MMDET_DENSE_HRNET: tuple[Rule, ...] = (
    (r"^backbone\.(.+)$", lambda m: f"backbone.{apply(HRNET, m[1])}"),
    (r"^neck\.reduction_conv\.conv\.", "neck.reduction."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"neck.output.\1."),
    *_MMDET_HEAD,
)

TABLES: dict[str, tuple[Rule, ...]] = {
    "detcore": (),
    "torchvision_resnet": TORCHVISION_RESNET,
    "detectron2_resnet": DETECTRON2_RESNET,
    "caffe2_resnet": CAFFE2_RESNET,
    "torchvision_mobilenetv2": TORCHVISION_MOBILENETV2,
    "mmdet_mobilenetv2": MMDET_MOBILENETV2,
    "hrnet": HRNET,
    "yolof": _YOLOF,
    "detectron2_retinanet": _DETECTRON2_RETINANET,
    "detectron2_fcos": _DETECTRON2_FCOS,
    "torchvision_retinanet": torchvision.RETINANET,
    "torchvision_fcos": torchvision.FCOS,
    "mmdet_dense": _MMDET_DENSE,
    "mmdet_dense_hrnet": _MMDET_DENSE_HRNET,
    "mmdet_yolof": _MMDET_YOLOF,
    "mmdet_ssdlite": _MMDET_SSDLITE,
    "tensorflow_mobilenetv2": tensorflow.MOBILENETV2,
    "tensorflow_ssdlite": tensorflow.SSDLITE,
    "cornernet": _CORNERNET,
    "mmdet_cornernet": _MMDET_CORNERNET,
}


def rename(name: str, table: str) -> str:
    """`name` in our words, if it comes from the project that `table` is for."""
    return apply(TABLES[table], name)


def best_table(names: Iterable[str], ours: set[str]) -> str:
    """The table under which most of `names` become names of ours."""
    names = list(names)
    return max(TABLES, key=lambda table: _known(names, table, ours))


def owner(names: Iterable[str], table: str) -> str:
    """`table`, or, where several detectors of a project share it, the one of them that has these names:
    mmdet_fcos, mmdet_atss or mmdet_retinanet."""
    found = (re.match(rf"{_LAST}cls\.", name) for name in names if table.startswith("mmdet_dense"))
    return next((f"mmdet_{_MMDET_HEADS[match[1]]}" for match in found if match), table)


def matches(names: Iterable[str], ours: set[str]) -> int:
    """How many that are."""
    names = list(names)
    return max(_known(names, table, ours) for table in TABLES)


def _known(names: Iterable[str], table: str, ours: set[str]) -> int:
    return sum(rename(name, table) in ours for name in names)
