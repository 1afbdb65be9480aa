"""Stacked hourglass networks (arXiv:1603.06937) as CornerNet has them (arXiv:1808.01244, section 3.5)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detcore.backbones.layers import TORCHVISION_PIXELS, ConvNorm, Pixels
from detcore.backbones.resnet import BasicBlock

CORNERNET_PIXELS = Pixels(
    "BGR",
    (0.40789654 * 255, 0.44719302 * 255, 0.47026115 * 255),
    (0.28863828 * 255, 0.27408164 * 255, 0.27809835 * 255),
)

# What pixels are normalised by, and the colour around an image.
STYLES = {"cornernet": (CORNERNET_PIXELS, (0, 0, 0)), "torchvision": (TORCHVISION_PIXELS, (124, 116, 104))}


def residual(inputs: int, outputs: int, norm: str, stride: int = 1) -> BasicBlock:
    return BasicBlock(inputs, outputs, outputs, stride, stride_in_1x1=False, norm=norm)


class Hourglass(nn.Module):
    """One level: a branch that keeps the resolution, and beside it half of it, the next level, and back.

    dims, blocks: channels, and residual blocks in a row, from this level to the innermost. Strides, not
    pooling, halve the resolution; the nearest value doubles it.
    (N, dims[0], H, W) -> the same; H and W are multiples of 2 to the number of levels inside.
    """

    def __init__(self, dims: Sequence[int], blocks: Sequence[int], norm: str) -> None:
        super().__init__()
        (outer, inner, *_), count = dims, blocks[0]

        def row(length: int) -> list[nn.Module]:
            return [residual(inner, inner, norm) for _ in range(length)]

        self.branch = nn.Sequential(*(residual(outer, outer, norm) for _ in range(count)))
        self.down = nn.Sequential(residual(outer, inner, norm, stride=2), *row(count - 1))
        innermost = len(dims) == 2
        self.inner = nn.Sequential(*row(blocks[1])) if innermost else Hourglass(dims[1:], blocks[1:], norm)
        self.up = nn.Sequential(*row(count - 1), residual(inner, outer, norm))

    def forward(self, x: Tensor) -> Tensor:
        low = self.up(self.inner(self.down(x)))
        return self.branch(x) + F.interpolate(low, scale_factor=2.0)


class Joint(nn.Module):
    """From one stack to the next: what it was given and what it gave, 1x1 each, added; a residual block."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.before = ConvNorm(channels, channels, 1, norm=norm)
        self.after = ConvNorm(channels, channels, 1, norm=norm)
        self.block = residual(channels, channels, norm)

    def forward(self, given: Tensor, gave: Tensor) -> Tensor:
        return self.block(F.relu(self.before(given) + self.after(gave)))


class HourglassNet(nn.Module):
    """A stem of stride 4, then hourglasses, each followed by a 3x3 convolution whose output is a feature.

    Every stack's feature is given, for losses at each of them (intermediate supervision).

    stacks        how many hourglasses
    dims, blocks  see `Hourglass`
    stem          channels of the first convolution
    norm          "bn" or "sync_bn"
    style         of `STYLES`, which gives `pixels` and what is `around` an image
    divisor       height and width of the input must be its multiples, or one pixel less
    """

    def __init__(
        self,
        stacks: int = 2,
        dims: Sequence[int] = (256, 256, 384, 384, 384, 512),
        blocks: Sequence[int] = (2, 2, 2, 2, 2, 4),
        stem: int = 128,
        norm: str = "bn",
        style: str = "cornernet",
    ) -> None:
        super().__init__()
        self.pixels, self.around = STYLES[style]
        channels = dims[0]
        self.channels, self.strides = (channels,) * stacks, (4,) * stacks
        self.divisor = 4 * 2 ** (len(dims) - 1)
        self.stem = nn.Sequential(
            ConvNorm(3, stem, 7, norm=norm, stride=2, activation=nn.ReLU),
            residual(stem, channels, norm, stride=2),
        )
        self.hourglasses = nn.ModuleList(Hourglass(dims, blocks, norm) for _ in range(stacks))
        self.outputs = nn.ModuleList(
            ConvNorm(channels, channels, 3, norm=norm, activation=nn.ReLU) for _ in range(stacks)
        )
        self.joints = nn.ModuleList(Joint(channels, norm) for _ in range(stacks - 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) normalised by `pixels` -> for each stack (N, channels, H / 4, W / 4)."""
        x = self.stem(x)
        features = []
        for stack, (hourglass, output) in enumerate(zip(self.hourglasses, self.outputs, strict=True)):
            features.append(output(hourglass(x)))
            if stack < len(self.joints):
                x = self.joints[stack](x, features[-1])
        return tuple(features)
