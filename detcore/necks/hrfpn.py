"""HRFPN: a pyramid from HRNetV2's branches (HRNetV2p, arXiv:1908.07919, section 3.3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HRFPN(nn.Module):
    """All branches at the finest resolution, merged by a 1x1 convolution; averages of it are the levels.

    in_channels  of the branches of `inputs`
    stride       of the last convolutions. 2: levels of strides 8 to 128, as FCOS has them; 1: of 4 to 64
    levels       how many

    The input must be at least 4 * 2^(levels - 1) pixels high and wide.
    """

    inputs = (4, 8, 16, 32)

    def __init__(self, in_channels: Sequence[int], channels: int, stride: int = 2, levels: int = 5) -> None:
        super().__init__()
        self.strides = tuple(self.inputs[0] * stride * 2**i for i in range(levels))
        self.reduction = nn.Conv2d(sum(in_channels), channels, 1)
        self.output = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride, padding=1) for _ in range(levels)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # Caffe2's Xavier: by fan-in alone
                nn.init.zeros_(module.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        size = features[0].shape[-2:]
        same = [features[0], *(F.interpolate(branch, size, mode="bilinear") for branch in features[1:])]
        merged = self.reduction(torch.cat(same, dim=1))
        return tuple(output(F.avg_pool2d(merged, 2**i)) for i, output in enumerate(self.output))
