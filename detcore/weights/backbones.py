"""Other projects' names for the tensors of backbones. A table's rules are applied to a name one after the
other."""

import re
from collections.abc import Callable, Iterable

from detcore.backbones.mobilenetv2 import BLOCKS

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
PARTS = ("conv", "norm", "relu")


def apply(rules: Iterable[Rule], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


TORCHVISION_RESNET: tuple[Rule, ...] = (
    (r"^conv1\.", "stem.conv."),
    (r"^bn1\.", "stem.norm."),
    (r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"^(res\d\.\d+)\.conv(\d)\.", r"\1.conv\2.conv."),
    (r"^(res\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)

DETECTRON2_RESNET: tuple[Rule, ...] = (
    (r"^stem\.conv1\.norm\.", "stem.norm."),
    (r"^stem\.conv1\.", "stem.conv."),
    (r"^(res\d\.\d+\.(?:conv\d|shortcut))\.(?=weight$|bias$)", r"\1.conv."),
)

# Detectron's own: res2_0_branch2a_w, res2_0_branch2a_bn_gamma (or bn_s), res_conv1_bn_beta (or bn_b).
CAFFE2_RESNET: tuple[Rule, ...] = (
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

TORCHVISION_MOBILENETV2: tuple[Rule, ...] = (
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

MMDET_MOBILENETV2: tuple[Rule, ...] = (
    (r"\.bn\.", ".norm."),
    (r"\.expand_conv\.", ".expand."),
    (r"\.depthwise_conv\.", ".depthwise."),
    (r"\.linear_conv\.", ".project."),
)

# HRNet's own files and mmdetection's, which have the same names.
HRNET: tuple[Rule, ...] = (
    (r"^(conv|bn)([12])\.", lambda m: f"stem.{int(m[2]) - 1}.{'conv' if m[1] == 'conv' else 'norm'}."),
    (r"^layer1\.", "stage1."),
    (r"^transition(\d)\.(\d)\.(?:0\.)?([01])\.",
     lambda m: f"stage{int(m[1]) + 1}.transition.{m[2]}.{PARTS[int(m[3])]}."),
    (r"^stage([234])\.(\d)\.", r"stage\1.blocks.\2."),
    (r"\.fuse_layers\.(\d\.\d)\.([01])\.(?=[a-z])",
     lambda m: f".fusion.paths.{m[1]}.0.{PARTS[int(m[2])]}."),
    (r"\.fuse_layers\.(\d\.\d\.\d)\.([01])\.", lambda m: f".fusion.paths.{m[1]}.{PARTS[int(m[2])]}."),
    (r"\.conv(\d)\.(?=weight$)", r".conv\1.conv."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.([01])\.", lambda m: f".shortcut.{PARTS[int(m[1])]}."),
)  # fmt: skip
