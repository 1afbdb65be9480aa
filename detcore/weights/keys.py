"""Other projects' names for the same tensors, as tables of substitutions.

A table's rules are applied to a name one after the other. The names of ours that result are the ones of
`detcore.backbones` and `detcore.models`; what does not become one of them is left over.
"""

import re
from collections.abc import Callable, Iterable

from detcore.backbones.mobilenetv2 import BLOCKS
from detcore.weights import tensorflow

Rule = tuple[str, str | Callable[[re.Match[str]], str]]

_TORCHVISION_RESNET: tuple[Rule, ...] = (
    (r"^conv1\.", "stem.conv."),
    (r"^bn1\.", "stem.norm."),
    (r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"^(res\d\.\d+)\.conv(\d)\.", r"\1.conv\2.conv."),
    (r"^(res\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)

_DETECTRON2_RESNET: tuple[Rule, ...] = (
    (r"^stem\.conv1\.norm\.", "stem.norm."),
    (r"^stem\.conv1\.", "stem.conv."),
    (r"^(res\d\.\d+\.(?:conv\d|shortcut))\.(?=weight$|bias$)", r"\1.conv."),
)

# Detectron's own: res2_0_branch2a_w, res2_0_branch2a_bn_gamma (or bn_s), res_conv1_bn_beta (or bn_b).
_CAFFE2_RESNET: tuple[Rule, ...] = (
    (r"^conv1_w$", "stem.conv.weight"),
    (r"^res_conv1_bn_", "stem.norm."),
    (r"^res(\d)_(\d+)_branch1_", r"res\1.\2.shortcut."),
    (r"^res(\d)_(\d+)_branch2([abc])_", lambda m: f"res{m[1]}.{m[2]}.conv{'abc'.index(m[3]) + 1}."),
    (r"\.bn_", ".norm."),
    (r"\.norm\.(?:gamma|s)$", ".norm.weight"),
    (r"\.norm\.(?:beta|b)$", ".norm.bias"),
    (r"\.norm\.(?:rm)$", ".norm.running_mean"),
    (r"\.norm\.(?:riv)$", ".norm.running_var"),
    (r"\.w$", ".conv.weight"),
)

_TORCHVISION_MOBILENETV2: tuple[Rule, ...] = (
    (r"^features\.0\.0\.", "conv1.conv."),
    (r"^features\.0\.1\.", "conv1.norm."),
    (r"^features\.18\.0\.", "conv2.conv."),
    (r"^features\.18\.1\.", "conv2.norm."),
    # The first block does not expand, so its parts have other numbers.
    (r"^features\.1\.conv\.0\.0\.", "layer1.0.depthwise.conv."),
    (r"^features\.1\.conv\.0\.1\.", "layer1.0.depthwise.norm."),
    (r"^features\.1\.conv\.1\.", "layer1.0.project.conv."),
    (r"^features\.1\.conv\.2\.", "layer1.0.project.norm."),
    (r"^features\.(\d+)\.", lambda m: f"{BLOCKS[int(m[1]) - 1]}." if int(m[1]) <= len(BLOCKS) else m[0]),
    (r"^(layer\d\.\d)\.conv\.0\.0\.", r"\1.expand.conv."),
    (r"^(layer\d\.\d)\.conv\.0\.1\.", r"\1.expand.norm."),
    (r"^(layer\d\.\d)\.conv\.1\.0\.", r"\1.depthwise.conv."),
    (r"^(layer\d\.\d)\.conv\.1\.1\.", r"\1.depthwise.norm."),
    (r"^(layer\d\.\d)\.conv\.2\.", r"\1.project.conv."),
    (r"^(layer\d\.\d)\.conv\.3\.", r"\1.project.norm."),
)

_MMDET_MOBILENETV2: tuple[Rule, ...] = (
    (r"\.bn\.", ".norm."),
    (r"\.expand_conv\.", ".expand."),
    (r"\.depthwise_conv\.", ".depthwise."),
    (r"\.linear_conv\.", ".project."),
)

_PARTS = ("conv", "norm", "relu")
_CORNERS = {"tl": "top_left", "br": "bottom_right"}

# chensnathan/YOLOF, which stands on detectron2.
_YOLOF: tuple[Rule, ...] = (
    (r"^backbone\.(.+)$", lambda m: f"backbone.{rename(m[1], 'detectron2_resnet')}"),
    (r"^encoder\.(lateral|fpn)_(conv|norm)\.", r"encoder.\1.\2."),
    (
        r"^encoder\.dilated_encoder_blocks\.(\d+)\.(conv\d)\.([01])\.",
        lambda m: f"encoder.blocks.{m[1]}.{m[2]}.{_PARTS[int(m[3])]}.",
    ),
    (
        r"^decoder\.(cls|bbox)_subnet\.(\d+)\.",  # conv, norm, ReLU: three to a layer
        lambda m: (
            f"decoder.{'cls' if m[1] == 'cls' else 'reg'}_tower.{int(m[2]) // 3}.{_PARTS[int(m[2]) % 3]}."
        ),
    ),
    (r"^decoder\.object_pred\.", "decoder.objectness."),
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
    (r"^inters_\.(\d+)\.([01])\.", lambda m: f"backbone.joints.{m[1]}.before.{_PARTS[int(m[2])]}."),
    (r"^cnvs_\.(\d+)\.([01])\.", lambda m: f"backbone.joints.{m[1]}.after.{_PARTS[int(m[2])]}."),
    (r"\.skip\.([01])\.", lambda m: f".shortcut.{_PARTS[int(m[1])]}."),
    (r"\.up1\.", ".branch."),
    (r"\.low1\.", ".down."),
    (r"\.low2(?=\.)", ".inner"),
    (r"\.low3\.", ".up."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.conv(\d)\.(?=weight$)", r".conv\1.conv."),
    (r"\.bn\.", ".norm."),
)

# detectron2's RetinaNet and FCOS. Its towers are flat lists: convolution, ReLU; or convolution, norm, ReLU.
_DETECTRON2_PYRAMID: tuple[Rule, ...] = (
    (r"^backbone\.fpn_(lateral|output)(\d)\.", lambda m: f"neck.{m[1]}.{int(m[2]) - 3}."),
    (r"^backbone\.top_block\.", "neck."),
    (r"^backbone\.bottom_up\.(.+)$", lambda m: f"backbone.{rename(m[1], 'detectron2_resnet')}"),
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
    (r"_tower\.(\d+)\.", lambda m: f"_tower.{int(m[1]) // 3}.{_PARTS[int(m[1]) % 3]}."),
)

# HRNet's own files and mmdetection's, which have the same names.
_HRNET: tuple[Rule, ...] = (
    (r"^(conv|bn)([12])\.", lambda m: f"stem.{int(m[2]) - 1}.{'conv' if m[1] == 'conv' else 'norm'}."),
    (r"^layer1\.", "stage1."),
    (r"^transition(\d)\.(\d)\.(?:0\.)?([01])\.",
     lambda m: f"stage{int(m[1]) + 1}.transition.{m[2]}.{_PARTS[int(m[3])]}."),
    (r"^stage([234])\.(\d)\.", r"stage\1.blocks.\2."),
    (r"\.fuse_layers\.(\d\.\d)\.([01])\.(?=[a-z])",
     lambda m: f".fusion.paths.{m[1]}.0.{_PARTS[int(m[2])]}."),
    (r"\.fuse_layers\.(\d\.\d\.\d)\.([01])\.", lambda m: f".fusion.paths.{m[1]}.{_PARTS[int(m[2])]}."),
    (r"\.conv(\d)\.(?=weight$)", r".conv\1.conv."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.([01])\.", lambda m: f".shortcut.{_PARTS[int(m[1])]}."),
)  # fmt: skip

# mmdetection's YOLOF.
_MMDET_YOLOF: tuple[Rule, ...] = (
    (r"^backbone\.(.+)$", lambda m: f"backbone.{rename(m[1], 'torchvision_resnet')}"),
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
    (r"^backbone\.(.+)$", lambda m: f"backbone.{rename(m[1], 'mmdet_mobilenetv2')}"),
    (r"^neck\.extra_layers\.(\d)\.0\.", r"neck.layers.\1.reduce."),
    (r"^neck\.extra_layers\.(\d)\.1\.(depthwise|pointwise)_conv\.", r"neck.layers.\1.\2."),
    (r"^bbox_head\.cls_convs\.", "head.cls_score."),
    (r"^bbox_head\.reg_convs\.", "head.bbox_pred."),
    (r"\.bn\.", ".norm."),
)

# mmdetection's RetinaNet, FCOS and ATSS: the head, with FPN on a ResNet, with HRFPN on HRNet.
_MMDET_HEAD: tuple[Rule, ...] = (
    (r"^bbox_head\.(cls|reg)_convs\.(\d+)\.", r"head.\1_tower.\2."),
    (r"^(head\.(?:cls|reg)_tower\.\d+)\.gn\.", r"\1.norm."),
    (r"^bbox_head\.(?:conv|atss|retina)_cls\.", "head.cls_score."),
    (r"^bbox_head\.(?:conv|atss|retina)_reg\.", "head.bbox_pred."),
    (r"^bbox_head\.(?:conv|atss)_centerness\.", "head.centerness."),
    (r"^bbox_head\.scales\.(\d)\.scale$", r"head.scales.\1"),
)
_MMDET_DENSE: tuple[Rule, ...] = (
    (r"^backbone\.(.+)$", lambda m: f"backbone.{rename(m[1], 'torchvision_resnet')}"),
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"neck.lateral.\1."),
    (r"^neck\.fpn_convs\.([012])\.conv\.", r"neck.output.\1."),
    (r"^neck\.fpn_convs\.([34])\.conv\.", lambda m: f"neck.p{int(m[1]) + 3}."),
    *_MMDET_HEAD,
)
_MMDET_DENSE_HRNET: tuple[Rule, ...] = (
    (r"^backbone\.(.+)$", lambda m: f"backbone.{rename(m[1], 'hrnet')}"),
    (r"^neck\.reduction_conv\.conv\.", "neck.reduction."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"neck.output.\1."),
    *_MMDET_HEAD,
)

TABLES: dict[str, tuple[Rule, ...]] = {
    "detcore": (),
    "torchvision_resnet": _TORCHVISION_RESNET,
    "detectron2_resnet": _DETECTRON2_RESNET,
    "caffe2_resnet": _CAFFE2_RESNET,
    "torchvision_mobilenetv2": _TORCHVISION_MOBILENETV2,
    "mmdet_mobilenetv2": _MMDET_MOBILENETV2,
    "hrnet": _HRNET,
    "yolof": _YOLOF,
    "detectron2_retinanet": _DETECTRON2_RETINANET,
    "detectron2_fcos": _DETECTRON2_FCOS,
    "mmdet_dense": _MMDET_DENSE,
    "mmdet_dense_hrnet": _MMDET_DENSE_HRNET,
    "mmdet_yolof": _MMDET_YOLOF,
    "mmdet_ssdlite": _MMDET_SSDLITE,
    "tensorflow_mobilenetv2": tensorflow.MOBILENETV2,
    "tensorflow_ssdlite": tensorflow.SSDLITE,
    "cornernet": _CORNERNET,
}


def rename(name: str, table: str) -> str:
    """`name` in our words, if it comes from the project that `table` is for."""
    for pattern, replacement in TABLES[table]:
        name = re.sub(pattern, replacement, name)
    return name


def best_table(names: Iterable[str], ours: set[str]) -> str:
    """The table under which most of `names` become names of ours."""
    names = list(names)
    return max(TABLES, key=lambda table: _known(names, table, ours))


def matches(names: Iterable[str], ours: set[str]) -> int:
    """How many that are."""
    names = list(names)
    return max(_known(names, table, ours) for table in TABLES)


def _known(names: Iterable[str], table: str, ours: set[str]) -> int:
    return sum(rename(name, table) in ours for name in names)
