"""torchvision's detectors next to a torch that its wheel was not built for: what other benches compare with.

The wheel's compiled operators want CUDA's libraries. Its Python wants to find them by name when it is
imported, so here they get names; a training step calls none of them. The one that post-processing calls, NMS,
is written here in C as torchvision's own for the CPU is: greedy, over sorted boxes, in one thread.
"""

import atexit
import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = "0.28.0"
OPERATORS = ["qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align"]
OPERATORS += ["_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "qroi_align"]
OPERATORS += ["deform_conv2d", "_deform_conv2d_backward", "_cuda_version"]
NMS = """
void nms(const float *box, long count, float threshold, unsigned char *gone) {
  for (long i = 0; i < count; i++) {
    if (gone[i]) continue;
    const float *a = box + 4 * i;
    const float own = (a[2] - a[0]) * (a[3] - a[1]);
    for (long j = i + 1; j < count; j++) {
      if (gone[j]) continue;
      const float *b = box + 4 * j;
      const float left = a[0] > b[0] ? a[0] : b[0], right = a[2] < b[2] ? a[2] : b[2];
      const float top = a[1] > b[1] ? a[1] : b[1], bottom = a[3] < b[3] ? a[3] : b[3];
      const float width = right > left ? right - left : 0, height = bottom > top ? bottom - top : 0;
      const float both = width * height;
      if (both / (own + (b[2] - b[0]) * (b[3] - b[1]) - both) > threshold) gone[j] = 1;
    }
  }
}
"""
_kept: list[Any] = []  # registrations end with the object that made them


def bring(folder: Path | None = None) -> Path:
    """Make torchvision importable, unless it is: from `folder`, where another process has brought it, or from
    a new one that goes with this process. Raises CalledProcessError where it cannot be had. -> the folder"""
    if importlib.util.find_spec("torchvision") is not None:
        return folder or Path()
    if folder is None:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", folder, f"torchvision=={VERSION}"], check=True)
    sys.path.append(str(folder))
    with suppress(OSError):  # of CUDA's libraries that are not there
        torch.ops.load_library(folder / "torchvision" / "_C.so")
        return folder
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in OPERATORS:
        library.define(f"{name}(Tensor unused) -> Tensor")
    library.impl("nms", _nms(folder), "CPU")
    _kept.append(library)
    import torchvision.extension

    torchvision.extension._has_ops = lambda: True
    return folder


def _nms(folder: Path) -> Any:
    source, binary = folder / "nms.c", folder / "nms.so"
    if not binary.exists():
        source.write_text(NMS)
        subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", binary, source], check=True)
    run = ctypes.CDLL(str(binary)).nms
    run.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_void_p]

    def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        order = scores.argsort(descending=True, stable=True)
        boxes, gone = dets[order].contiguous(), torch.zeros(len(order), dtype=torch.uint8)
        run(boxes.data_ptr(), len(order), iou_threshold, gone.data_ptr())
        return order[gone == 0]

    return nms


def build(name: str, classes: int, side: tuple[int, int], frozen: bool = True) -> torch.nn.Module:
    """`retinanet` or `fcos` on ResNet-50 as torchvision builds it around pretrained weights: frozen batch
    norm, the last three stages trained. side: (shorter, longer) of the images, which are not resized."""
    from torchvision.models import resnet50
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.detection.fcos import FCOS
    from torchvision.models.detection.retinanet import RetinaNet
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
    from torchvision.ops.misc import FrozenBatchNorm2d

    top = LastLevelP6P7(2048 if name == "retinanet" else 256, 256)
    backbone = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    pyramid = _resnet_fpn_extractor(backbone, 3, returned_layers=[2, 3, 4], extra_blocks=top)
    kind = {"retinanet": RetinaNet, "fcos": FCOS}[name]
    return kind(
        pyramid,
        classes,
        min_size=side[0],
        max_size=side[1],
        detections_per_img=100,
        _skip_resize=True,
    )
