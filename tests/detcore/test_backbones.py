"""Backbones: shapes, freezing, norms, pixels. Their numbers are compared in test_fixtures_backbones.py."""

import pytest
import torch
from torch import nn

from detcore.backbones import BACKBONES, build_backbone
from detcore.backbones.layers import (
    CAFFE_PIXELS,
    NORMS,
    ConvNorm,
    FrozenBatchNorm2d,
    Normalize,
)
from detcore.backbones.mobilenetv2 import MobileNetV2
from detcore.backbones.resnet import ResNet
from detcore.config.models import Backbone


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_every_backbone_gives_what_it_announces(name: str) -> None:
    backbone = build_backbone(Backbone(name=name, width=0.25, norm="bn"))
    (c5,) = backbone(torch.rand(2, 3, 64, 96))
    assert backbone.strides == (32,) and c5.shape == (2, *backbone.channels, 2, 3)


@pytest.mark.parametrize(
    # Weights without the classifier, as torchvision counts them.
    ("name", "count"),
    [("resnet18", 11_176_512), ("resnet34", 21_284_672), ("resnet50", 23_508_032), ("resnet101", 42_500_160),
     ("mobilenetv2", 2_223_872),
     # HRNet's classifiers, of 21.3, 41.2 and 57.6 million, without what follows the branches
     ("hrnet_w18", 9_562_260), ("hrnet_w32", 29_305_536), ("hrnet_w40", 45_521_216)],
)  # fmt: skip
def test_full_width_is_the_published_network(name: str, count: int) -> None:
    with torch.device("meta"):
        backbone = build_backbone(Backbone(name=name, norm="bn"), (4, 8, 16, 32))
    assert sum(p.numel() for p in backbone.parameters()) == count


def test_taps_give_the_pyramid() -> None:
    resnet = ResNet(18, taps=("res2", "res3", "res4", "res5"), stem=8, middle=(8, 16, 24, 32))
    assert resnet.strides == (4, 8, 16, 32) and resnet.channels == (8, 16, 24, 32)
    assert [f.shape[-1] for f in resnet(torch.rand(1, 3, 64, 64))] == [16, 8, 4, 2]
    mobile = MobileNetV2(0.25, taps=("layer2", "layer3", "layer5", "conv2"))
    assert mobile.strides == (4, 8, 16, 32)
    features = mobile(torch.rand(2, 3, 64, 64))
    assert [f.shape[1] for f in features] == list(mobile.channels)
    assert [f.shape[-1] for f in features] == [16, 8, 4, 2]


def test_a_dilated_stage_computes_the_strided_one_and_what_lies_between() -> None:
    """Where the stride is in the 1x1: that only leaves out every other row and column."""
    x = torch.rand(1, 3, 64, 96)
    strided, dilated = (ResNet(50, "caffe", stem=8, middle=[4, 4, 4, 8], dilate=d) for d in (False, True))
    dilated.load_state_dict(strided.state_dict())
    assert (strided.strides, dilated.strides) == ((32,), (16,))
    ((few,), (many,)) = strided(x), dilated(x)
    assert many.shape[-2:] == (4, 6)
    torch.testing.assert_close(many[..., ::2, ::2], few, atol=1e-4, rtol=1e-4)


def test_a_tap_may_be_an_expansion() -> None:
    x = torch.rand(2, 3, 64, 64)
    plain, tapped = (MobileNetV2(0.25, taps=taps) for taps in (("layer5",), ("layer6.expand", "conv2")))
    tapped.load_state_dict(plain.state_dict())
    assert tapped.channels == (6 * plain.channels[0], 1280) and tapped.strides == (16, 32)
    expansion, last = tapped.eval()(x)
    assert expansion.equal(plain.layer6[0].expand.eval()(plain.eval()(x)[0]))
    whole = MobileNetV2(0.25)
    whole.load_state_dict(plain.state_dict())
    assert last.equal(whole.eval()(x)[0])


@pytest.mark.parametrize(("size", "first"), [(6, 0), (7, -1), (5, -1), (8, 0), (1, -1)])
def test_same_padding_is_tensorflows(size: int, first: int) -> None:
    """An output looks at 3 pixels from `first` on, two further for the next: pad_along of TensorFlow's
    documentation of tf.nn.convolution, for even and odd sizes."""
    layer = ConvNorm(1, 1, 3, norm="none", stride=2, same=True)
    torch.nn.init.ones_(layer.conv.weight)
    row = torch.arange(1.0, size + 1)
    outputs = layer(row.expand(1, 1, size, size))[0, 0]
    assert outputs.shape == (-(-size // 2),) * 2
    starts = [first + 2 * i for i in range(len(outputs))]
    sums = [sum(row[i] for i in range(start, start + 3) if 0 <= i < size) for start in starts]
    covered = [sum(0 <= i < size for i in range(start, start + 3)) for start in starts]
    torch.testing.assert_close(outputs, torch.outer(torch.tensor(covered).float(), torch.tensor(sums)))


@pytest.mark.parametrize("name", ["bn", "sync_bn"])
def test_one_value_a_channel_is_normalised_by_running_statistics(name: str) -> None:
    """PyTorch's batch norm raises there: one image on a rank, and a map of 1x1."""
    norm = NORMS[name](3).train()
    for _ in range(3):
        norm(torch.rand(4, 3, 2, 2) + 5)
    x, state = torch.rand(1, 3, 1, 1), {key: value.clone() for key, value in norm.state_dict().items()}
    y = norm(x)
    assert y.equal(norm.eval()(x)) and y.isfinite().all()
    assert all(value.equal(state[key]) for key, value in norm.state_dict().items())
    assert not norm.train()(x.expand(2, 3, 1, 1)).equal(y.expand(2, 3, 1, 1))


@pytest.mark.parametrize("strides", [(32,), (8, 16, 32), (4, 8, 16, 32)])
def test_every_weight_of_hrnet_has_a_gradient_whichever_branches_are_used(strides: tuple[int, ...]) -> None:
    backbone = build_backbone(Backbone(name="hrnet_w18", width=0.125, norm="bn"), strides)
    features = backbone(torch.rand(2, 3, 64, 96))
    assert [(64 // f.shape[2], 96 // f.shape[3]) for f in features] == [(s, s) for s in strides]
    assert [f.shape[1] for f in features] == list(backbone.channels)
    sum(f.sum() for f in features).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2", "hrnet_w18"])
@pytest.mark.parametrize("freeze", [0, 1, 2, 5])
def test_frozen_stages_do_not_learn_even_statistics(name: str, freeze: int) -> None:
    backbone = build_backbone(Backbone(name=name, width=0.25, norm="bn", freeze=freeze)).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD(
        [p for p in backbone.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))], 0.1
    )
    output = backbone(torch.rand(2, 3, 64, 64))[0].square().mean()
    if output.requires_grad:
        output.backward()
    optimizer.step()
    changed = {
        key.split(".")[0] for key, value in backbone.state_dict().items() if not value.equal(before[key])
    }
    stages = {
        "resnet50": [{"stem"}, {"res2"}, {"res3"}, {"res4"}, {"res5"}],
        "mobilenetv2": [{"conv1", "layer1"}, {"layer2"}, {"layer3"}, {"layer4", "layer5"},
                        {"layer6", "layer7", "conv2"}],
        "hrnet_w18": [{"stem"}, {"stage1"}, {"stage2"}, {"stage3"}, {"stage4"}],
    }[name]  # fmt: skip
    assert changed == set().union(*stages[freeze:])


def test_frozen_batch_norm_is_batch_norm_in_eval_mode() -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        k: torch.rand(6, generator=generator) + 0.5 for k in ("weight", "bias", "running_mean", "running_var")
    }
    frozen, plain = FrozenBatchNorm2d(6), nn.BatchNorm2d(6).eval()
    frozen.load_state_dict(state)
    plain.load_state_dict(state, strict=False)
    x = torch.randn(2, 6, 5, 5, generator=generator)
    torch.testing.assert_close(frozen(x.clone()), plain(x), atol=1e-6, rtol=1e-5)
    assert not list(frozen.parameters())
    assert frozen(x.bfloat16()).dtype == torch.bfloat16


def test_fixed_batch_norm_keeps_its_statistics_and_learns_the_rest() -> None:
    backbone = build_backbone(Backbone(name="resnet18", width=0.25, norm="fixed_bn")).train()
    backbone(torch.rand(2, 3, 64, 64))[0].sum().backward()
    norm = backbone.res5[1].conv2.norm
    assert norm.weight.grad.any() and norm.bias.grad.any()
    assert not norm.running_mean.any() and norm.running_var.eq(1).all()


def test_pixels_are_normalised_and_padding_is_zero_whatever_lies_there() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    got = Normalize(CAFFE_PIXELS)(images, torch.tensor([[8, 5], [3, 8]]))
    wanted = images.flip(1).float() - torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    torch.testing.assert_close(got[0, :, :, :5], wanted[0, :, :, :5])
    torch.testing.assert_close(got[1, :, :3], wanted[1, :, :3])
    assert not got[0, :, :, 5:].any() and not got[1, :, 3:].any()


def test_a_style_brings_its_pixels() -> None:
    assert build_backbone(Backbone(name="resnet18", style="caffe")).pixels.order == "BGR"
    assert build_backbone(Backbone(name="resnet18", style="torchvision")).pixels.std == (
        58.395,
        57.12,
        57.375,
    )
