"""ResNet 18, 34, 50 and 101 (arXiv:1512.03385), with the stride where the weights expect it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detcore.backbones.layers import CAFFE_PIXELS, TORCHVISION_PIXELS, ConvNorm

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the stride is in the first. `middle` is not used."""

    def __init__(
        self, inputs: int, middle: int, outputs: int, stride: int, stride_in_1x1: bool, norm: str
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, 3, norm=norm, stride=stride, activation=nn.ReLU)
        self.conv2 = ConvNorm(outputs, outputs, 3, norm=norm)
        project = stride != 1 or inputs != outputs
        self.shortcut = ConvNorm(inputs, outputs, 1, norm=norm, stride=stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        out += self.shortcut(x)
        return F.relu_(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside a shortcut; caffe has the stride in the first 1x1, torchvision in the 3x3."""

    def __init__(
        self,
        inputs: int,
        middle: int,
        outputs: int,
        stride: int,
        stride_in_1x1: bool,
        norm: str,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = ConvNorm(inputs, middle, 1, norm=norm, stride=first, activation=nn.ReLU)
        self.conv2 = ConvNorm(
            middle, middle, 3, norm=norm, stride=second, dilation=dilation, activation=nn.ReLU
        )
        self.conv3 = ConvNorm(middle, outputs, 1, norm=norm)
        project = stride != 1 or inputs != outputs
        self.shortcut = ConvNorm(inputs, outputs, 1, norm=norm, stride=stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(self.conv2(self.conv1(x)))
        out += self.shortcut(x)
        return F.relu_(out)


class ResNet(nn.Module):
    """Images to the features named in `taps`, of `channels` and `strides`.

    depth    18, 34, 50 or 101
    style    "caffe" or "torchvision": where the stride is, and which `pixels` it wants
    norm     "frozen_bn", "bn" or "sync_bn"
    freeze   how many stages stay as they are: 1 the stem, 2 the stem and res2, ...
    dilate   from depth 50 on: res5 has dilation 2 and no stride, as in detectron2 ("DC5")
    stem, middle, outputs    channels of the stem, and per stage of the 3x3 convolutions and outputs
    """

    def __init__(
        self,
        depth: int,
        style: str = "torchvision",
        norm: str = "frozen_bn",
        freeze: int = 0,
        taps: Sequence[str] = ("res5",),
        stem: int = 64,
        middle: Sequence[int] = (64, 128, 256, 512),
        outputs: Sequence[int] | None = None,
        dilate: bool = False,
    ) -> None:
        super().__init__()
        block, expansion = (Bottleneck, 4) if depth >= 50 else (BasicBlock, 1)
        outputs = [expansion * channels for channels in middle] if outputs is None else outputs
        norms = ["frozen_bn" if stage < freeze else norm for stage in range(5)]
        self.taps = tuple(taps)
        self.pixels = CAFFE_PIXELS if style == "caffe" else TORCHVISION_PIXELS
        self.stem = ConvNorm(3, stem, 7, norm=norms[0], stride=2, activation=nn.ReLU)
        inputs, strides = stem, []
        for stage, count in enumerate(BLOCKS[depth]):
            dilated, blocks = {"dilation": 2} if dilate and stage == 3 else {}, []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 and not dilated else 1
                at = (inputs, middle[stage], outputs[stage], stride, style == "caffe", norms[stage + 1])
                blocks.append(block(*at, **dilated))
                inputs = outputs[stage]
            strides.append(16 if dilated else 4 * 2**stage)
            self.add_module(f"res{stage + 2}", nn.Sequential(*blocks))
        stages = [int(tap.removeprefix("res")) - 2 for tap in self.taps]
        self.channels = tuple(outputs[stage] for stage in stages)
        self.strides = tuple(strides[stage] for stage in stages)
        self._initialize()
        for frozen in ("stem", "res2", "res3", "res4", "res5")[:freeze]:
            self.get_submodule(frozen).requires_grad_(False)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) normalised by `pixels` -> for each tap (N, channels, H / stride, W / stride)."""
        x = _pooled(self.stem(x))
        features = {}
        for stage in ("res2", "res3", "res4", "res5"):
            features[stage] = x = self.get_submodule(stage)(x)
        return tuple(features[tap] for tap in self.taps)


def _pooled(x: Tensor) -> Tensor:
    """The largest of 3x3 values around every second. On a CPU this is three times as fast with channels last,
    both copies included."""
    planes = x.is_cpu and x.is_contiguous()
    if planes:
        x = x.contiguous(memory_format=torch.channels_last)
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    return x.contiguous() if planes else x
