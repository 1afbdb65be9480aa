"""mmdetection's CornerNet, made anew under its names, converted, says the same."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detcore.models import build_model
from detcore.ops.corners import bottom_pool, left_pool, right_pool, top_pool
from detcore.weights import WeightsError
from detcore.weights.loading import load
from tests.detcore.conftest import model_section
from tests.detcore.sections import section

DIMS, BLOCKS, POOLED, CLASSES = (8, 12, 16), (2, 1, 2), 8, 3
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB
POOLS = {"tl": (top_pool, left_pool), "br": (bottom_pool, right_pool)}


def conv_module(inputs: int, outputs: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), bn=nn.BatchNorm2d(outputs)
    )
    return nn.Sequential(parts | ({"activate": nn.ReLU()} if relu else {}))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Module(nn.Module):
    """Of the hourglass, one level."""

    def __init__(self, dims: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        outer, inner, count = dims[0], dims[1], blocks[0]
        self.up1 = nn.Sequential(*(Block(outer, outer) for _ in range(count)))
        self.low1 = nn.Sequential(Block(outer, inner, 2), *(Block(inner, inner) for _ in range(count - 1)))
        if len(dims) > 2:
            self.low2: nn.Module = Module(dims[1:], blocks[1:])
        else:
            self.low2 = nn.Sequential(*(Block(inner, inner) for _ in range(blocks[1])))
        self.low3 = nn.Sequential(*(Block(inner, inner) for _ in range(count - 1)), Block(inner, outer))

    def forward(self, x: Tensor) -> Tensor:
        up = self.up1(x)
        return up + F.interpolate(self.low3(self.low2(self.low1(x))), size=up.shape[2:])


class Hourglasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        channels = DIMS[0]
        first = conv_module(3, channels // 2, 7, 2)
        self.stem = nn.Sequential(first, nn.Sequential(Block(channels // 2, channels, 2)))
        self.hourglass_modules = nn.ModuleList(Module(DIMS, BLOCKS) for _ in range(2))
        self.inters = nn.Sequential(Block(channels, channels))
        self.conv1x1s = nn.ModuleList([conv_module(channels, channels, 1, relu=False)])
        self.out_convs = nn.ModuleList(conv_module(channels, channels, 3) for _ in range(2))
        self.remap_convs = nn.ModuleList([conv_module(channels, channels, 1, relu=False)])

    def forward(self, x: Tensor) -> list[Tensor]:
        given = self.stem(x)
        first = self.out_convs[0](self.hourglass_modules[0](given))
        given = self.inters[0](F.relu(self.conv1x1s[0](given) + self.remap_convs[0](first)))
        return [first, self.out_convs[1](self.hourglass_modules[1](given))]


class BiCornerPool(nn.Module):
    def __init__(self, channels: int, pools: tuple[Callable[[Tensor], Tensor], ...]) -> None:
        super().__init__()
        self.pools = pools
        self.direction1_conv = conv_module(channels, POOLED, 3)
        self.direction2_conv = conv_module(channels, POOLED, 3)
        self.aftpool_conv = conv_module(POOLED, channels, 3, relu=False)
        self.conv1 = conv_module(channels, channels, 1, relu=False)
        self.conv2 = conv_module(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pools[0](self.direction1_conv(x)) + self.pools[1](self.direction2_conv(x))
        return self.conv2(F.relu(self.aftpool_conv(pooled) + self.conv1(x)))


def predictor(channels: int, outputs: int) -> nn.Module:
    hidden, last = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, outputs, 1)
    one = nn.Sequential(OrderedDict(conv=hidden, activate=nn.ReLU()))
    return nn.Sequential(one, nn.Sequential(OrderedDict(conv=last)))


class Theirs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.bbox_head = Hourglasses(), nn.Module()
        channels = DIMS[0]
        for kind, pools in POOLS.items():
            stacks = nn.ModuleList(BiCornerPool(channels, pools) for _ in range(2))
            setattr(self.bbox_head, f"{kind}_pool", stacks)
            for name, outputs in (("heat", CLASSES), ("off", 2), ("emb", 1)):
                stacks = nn.ModuleList(predictor(channels, outputs) for _ in range(2))
                setattr(self.bbox_head, f"{kind}_{name}", stacks)

    def forward(self, x: Tensor, stack: int, kind: str) -> list[Tensor]:
        head, feature = self.bbox_head, self.backbone(x)[stack]
        pooled = getattr(head, f"{kind}_pool")[stack](feature)
        return [getattr(head, f"{kind}_{name}")[stack](pooled) for name in ("heat", "emb", "off")]


@pytest.fixture
def theirs() -> Theirs:
    torch.manual_seed(0)
    model = Theirs().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)
    return model


def ours(**backbone: str) -> nn.Module:
    hourglass = {"dims": list(DIMS), "blocks": list(BLOCKS), "stem": DIMS[0] // 2, **backbone}
    small = section("cornernet", num_classes=CLASSES, backbone=hourglass, pool_channels=POOLED)
    return build_model(model_section(small)).eval()


def test_mmdetections_cornernet_says_the_same(theirs: Theirs, tmp_path: Path) -> None:
    torch.save({"state_dict": theirs.state_dict(), "meta": {}}, tmp_path / "mmdet.pth")
    model = ours(style="torchvision")
    report = load(model, str(tmp_path / "mmdet.pth"))
    assert (report.table, report.implied, report.unused) == ("mmdet_cornernet", 0, ())
    images, sizes = torch.randint(0, 256, (1, 3, 63, 95), dtype=torch.uint8), torch.tensor([[63, 95]])
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        features = model.backbone(model.normalize(images, sizes))
        for stack in range(2):
            for kind, got in zip(POOLS, model.predict(features, stack), strict=True):
                wanted = theirs((images - mean) / std, stack, kind)
                assert all(one.std() > 0.01 for one in wanted)
                for map, reference in zip(got, wanted, strict=True):
                    torch.testing.assert_close(map, reference, atol=1e-4, rtol=1e-4)


def test_around_an_image_is_the_mean_colour() -> None:
    """Which is nothing, once it is normalised; CornerNet's authors have black there."""
    images, sizes = torch.full((1, 3, 20, 40), 255, dtype=torch.uint8), torch.tensor([[20, 40]])
    for style, least, most in (("torchvision", -0.01, 0.01), ("cornernet", -1.8, -1.3)):
        model, seen = ours(style=style), []
        model.backbone.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.extend(inputs))
        model.detect(images, sizes)
        around, inside = seen[0][0, :, 0, 0], seen[0][0, :, 15, 23]
        assert least < around.min() <= around.max() < most and inside.min() > 1.8


def test_what_does_not_fit_is_named(theirs: Theirs, tmp_path: Path) -> None:
    state = theirs.state_dict()
    del state["bbox_head.br_emb.1.0.conv.bias"]
    torch.save(state, tmp_path / "mmdet.pth")
    with pytest.raises(WeightsError, match=r"1 of \d+ tensors .*: bottom_right\.1\.tag\.0\.bias"):
        load(ours(style="torchvision"), str(tmp_path / "mmdet.pth"))
    with pytest.raises(WeightsError, match=r"they want `train\.model\.backbone\.style: torchvision`"):
        load(ours(), str(tmp_path / "mmdet.pth"))
