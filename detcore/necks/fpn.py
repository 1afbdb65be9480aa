"""Feature pyramid (arXiv:1612.03144) with the two coarser levels of RetinaNet (arXiv:1708.02002)."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """C3 to C5 -> P3 to P7, (N, channels, H / stride, W / stride) each.

    in_channels  of C3 to C5
    top          what P6 is made from: "c5" as in RetinaNet, "p5" as in FCOS
    relu         between P6 and P7
    """

    inputs = (8, 16, 32)
    strides = (8, 16, 32, 64, 128)

    def __init__(
        self, in_channels: Sequence[int], channels: int, top: Literal["c5", "p5"], relu: bool = True
    ) -> None:
        super().__init__()
        self.top, self.relu = top, relu
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, channels, 1) for inputs in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        above = in_channels[-1] if top == "c5" else channels
        self.p6 = nn.Conv2d(above, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # Caffe2's Xavier: by fan-in alone
                nn.init.zeros_(module.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
        levels = [output(level) for output, level in zip(self.output, merged, strict=True)]
        p6 = self.p6(features[-1] if self.top == "c5" else levels[-1])
        p7 = self.p7(F.relu(p6) if self.relu else p6)
        return (*levels, p6, p7)
