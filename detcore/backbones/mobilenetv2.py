"""MobileNetV2 (arXiv:1801.04381, table 2)."""

from collections.abc import Sequence

from torch import Tensor, nn

from detcore.backbones.layers import TENSORFLOW_PIXELS, TORCHVISION_PIXELS, ConvNorm

# expansion, channels, blocks, stride of layer1 to layer7
LAYERS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
BLOCKS = tuple(f"layer{i}.{j}" for i, layer in enumerate(LAYERS, start=1) for j in range(layer[2]))
# what one more frozen stage adds: everything up to strides 2, 4, 8, 16, 32
STAGES = (("conv1", "layer1"), ("layer2",), ("layer3",), ("layer4", "layer5"), ("layer6", "layer7", "conv2"))


def round_channels(channels: float, divisor: int = 8) -> int:
    """To the nearest multiple of `divisor`, at least one, and not more than a tenth below `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down without activation; added to its input where the shapes agree."""

    def __init__(
        self, inputs: int, outputs: int, expansion: int, stride: int, norm: str, same: bool = False
    ) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand = (
            ConvNorm(inputs, hidden, 1, norm=norm, activation=nn.ReLU6) if expansion != 1 else nn.Identity()
        )
        self.depthwise = ConvNorm(
            hidden, hidden, 3, norm=norm, stride=stride, groups=hidden, same=same, activation=nn.ReLU6
        )
        self.project = ConvNorm(hidden, outputs, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.expand(x), x)

    def narrow(self, expanded: Tensor, x: Tensor) -> Tensor:
        """What follows the expansion of `x`."""
        y = self.project(self.depthwise(expanded))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Images to the features named in `taps`, of `channels` and `strides`: layer1 to layer7, conv2, or
    layer2.expand to layer7.expand, the expansion in a layer's first block, which has the stride of the layer
    before.

    style    "torchvision", or "tensorflow", which pads and wants its `pixels` otherwise
    width    factor on all channels; conv2 keeps its 1280 below 1
    norm     "frozen_bn", "bn" or "sync_bn"
    freeze   how many stages stay as they are: 1 up to stride 2, 2 up to stride 4, ... 5 everything
    """

    def __init__(
        self,
        width: float = 1.0,
        norm: str = "bn",
        freeze: int = 0,
        taps: Sequence[str] = ("conv2",),
        style: str = "torchvision",
    ) -> None:
        super().__init__()
        self.taps = tuple(taps)
        same = style == "tensorflow"
        self.pixels = TENSORFLOW_PIXELS if same else TORCHVISION_PIXELS
        frozen = {name for stage in STAGES[:freeze] for name in stage}
        norms = {name: "frozen_bn" if name in frozen else norm for stage in STAGES for name in stage}

        channels = round_channels(32 * width)
        stride = 2
        shapes = {"conv1": (channels, stride)}
        self.conv1 = ConvNorm(3, channels, 3, norm=norms["conv1"], stride=2, same=same, activation=nn.ReLU6)
        for i, (expansion, base, count, step) in enumerate(LAYERS, start=1):
            name, outputs, blocks = f"layer{i}", round_channels(base * width), []
            shapes[f"{name}.expand"] = (channels * expansion, stride)
            for j in range(count):
                blocks.append(
                    InvertedResidual(channels, outputs, expansion, step if j == 0 else 1, norms[name], same)
                )
                channels = outputs
            stride *= step
            shapes[name] = (channels, stride)
            self.add_module(name, nn.Sequential(*blocks))
        last = round_channels(1280 * max(1.0, width))
        self.conv2 = ConvNorm(channels, last, 1, norm=norms["conv2"], activation=nn.ReLU6)
        shapes["conv2"] = (last, stride)

        self.channels = tuple(shapes[tap][0] for tap in self.taps)
        self.strides = tuple(shapes[tap][1] for tap in self.taps)
        self._initialize()
        for name in frozen:
            self.get_submodule(name).requires_grad_(False)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) normalised by `pixels` -> for each tap (N, channels, H / stride, W / stride)."""
        features = {}
        for name in ("conv1", *(f"layer{i}" for i in range(1, 8)), "conv2"):
            layer, expansion = self.get_submodule(name), f"{name}.expand"
            if expansion in self.taps:
                features[expansion] = layer[0].expand(x)
                x = layer[1:](layer[0].narrow(features[expansion], x))
            else:
                x = layer(x)
            features[name] = x
        return tuple(features[tap] for tap in self.taps)
