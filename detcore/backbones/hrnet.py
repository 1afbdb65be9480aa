"""HRNetV2 (arXiv:1908.07919): branches of strides 4 to 32 side by side, which exchange what they see."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detcore.backbones.layers import ConvNorm, Pixels
from detcore.backbones.resnet import BasicBlock, Bottleneck

# As mmdetection's FCOS on HRNet sees images. The ImageNet weights saw RGB.
HRNET_PIXELS = Pixels("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395))
STRIDES = (4, 8, 16, 32)
STAGES = ("stem", "stage1", "stage2", "stage3", "stage4")


def halving(inputs: int, outputs: int, norm: str, relu: bool = True) -> ConvNorm:
    return ConvNorm(inputs, outputs, 3, norm=norm, stride=2, activation=nn.ReLU if relu else nn.Identity)


class Fusion(nn.Module):
    """Multi-resolution convolution (figure 4b): each output is the sum of all branches at its resolution.

    channels  of the branches
    outputs   the branches that go on; the others end here

    From branch j to branch i: as it is for i = j, a 1x1 convolution and the nearest value for i < j,
    i - j strided 3x3 convolutions for i > j, of which the last alone changes the channels.
    """

    def __init__(self, channels: Sequence[int], outputs: Sequence[int], norm: str) -> None:
        super().__init__()
        self.paths = nn.ModuleDict(
            {str(i): nn.ModuleList(self._path(channels, j, i, norm) for j in range(len(channels)))
             for i in outputs}
        )  # fmt: skip

    @staticmethod
    def _path(channels: Sequence[int], start: int, end: int, norm: str) -> nn.Sequential:
        own, wanted = channels[start], channels[end]
        if start > end:
            return nn.Sequential(ConvNorm(own, wanted, 1, norm=norm))
        steps = [halving(own, own, norm) for _ in range(end - start - 1)]
        return nn.Sequential(*steps, *([halving(own, wanted, norm, relu=False)] if start < end else []))

    def forward(self, branches: Sequence[Tensor]) -> list[Tensor]:
        fused = []
        for end, paths in self.paths.items():
            size = branches[int(end)].shape[-2:]
            total: Tensor | float = 0.0
            for path, branch in zip(paths, branches, strict=True):
                part = path(branch)
                total = total + (part if part.shape[-2:] == size else F.interpolate(part, size))
            fused.append(F.relu(total))
        return fused


class Module(nn.Module):
    """Residual blocks in each branch, then a fusion of all."""

    def __init__(self, channels: Sequence[int], blocks: int, outputs: Sequence[int], norm: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width, width, width, 1, False, norm) for _ in range(blocks)))
            for width in channels
        )
        self.fusion = Fusion(channels, outputs, norm)

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        return self.fusion([branch(one) for branch, one in zip(self.branches, x, strict=True)])


class Stage(nn.Module):
    """Brings the branches to their channels, makes one of half the resolution from the last, then modules.

    before, channels  of the branches that come and those that go through the modules, one more
    outputs           the branches that are given
    """

    def __init__(
        self,
        before: Sequence[int],
        channels: Sequence[int],
        modules: int,
        blocks: int,
        norm: str,
        outputs: Sequence[int],
    ) -> None:
        super().__init__()
        kept = [
            nn.Identity() if own == wanted else ConvNorm(own, wanted, 3, norm=norm, activation=nn.ReLU)
            for own, wanted in zip(before, channels, strict=False)
        ]
        self.transition = nn.ModuleList([*kept, halving(before[-1], channels[-1], norm)])
        every = range(len(channels))
        self.blocks = nn.Sequential(
            *(Module(channels, blocks, every, norm) for _ in range(modules - 1)),
            Module(channels, blocks, outputs, norm),
        )

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        branches = [change(one) for change, one in zip(self.transition, [*x, x[-1]], strict=True)]
        return self.blocks(branches)


class HRNet(nn.Module):
    """Images to the last stage's branches in `taps` (0 to 3), of `channels` and `strides`.

    widths   channels of the four branches: w, 2w, 4w, 8w for HRNetV2-Ww
    modules  of stages 2 to 4
    blocks   in a row: bottlenecks in stage 1, basic blocks in each branch of stages 2 to 4
    norm     "frozen_bn", "fixed_bn", "bn" or "sync_bn"
    freeze   how many stages stay as they are: 1 the stem, 2 the stem and stage 1, ...
    stem, middle  channels of the stem, and of the 3x3 convolutions in stage 1
    """

    pixels = HRNET_PIXELS

    def __init__(
        self,
        widths: Sequence[int],
        modules: Sequence[int] = (1, 4, 3),
        blocks: Sequence[int] = (4, 4, 4, 4),
        norm: str = "bn",
        freeze: int = 0,
        taps: Sequence[int] = (0, 1, 2, 3),
        stem: int = 64,
        middle: int = 64,
    ) -> None:
        super().__init__()
        norms = ["frozen_bn" if stage < freeze else norm for stage in range(5)]
        self.stem = nn.Sequential(halving(3, stem, norms[0]), halving(stem, stem, norms[0]))
        inputs = (stem, *[4 * middle] * (blocks[0] - 1))
        self.stage1 = nn.Sequential(
            *(Bottleneck(channels, middle, 4 * middle, 1, False, norms[1]) for channels in inputs)
        )
        before: Sequence[int] = (4 * middle,)
        for stage, (count, length) in enumerate(zip(modules, blocks[1:], strict=True), start=2):
            outputs = tuple(taps) if stage == 4 else range(stage)
            layer = Stage(before, widths[:stage], count, length, norms[stage], outputs)
            self.add_module(f"stage{stage}", layer)
            before = widths[:stage]
        self.channels = tuple(widths[tap] for tap in taps)
        self.strides = tuple(STRIDES[tap] for tap in taps)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for frozen in STAGES[:freeze]:
            self.get_submodule(frozen).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) normalised by `pixels` -> for each tap (N, channels, H / stride, W / stride)."""
        branches = [self.stage1(self.stem(x))]
        for stage in STAGES[2:]:
            branches = self.get_submodule(stage)(branches)
        return tuple(branches)
