"""Backbones against numbers from detectron2 and mmdetection; see tests/fixtures/README.md."""

import pytest
import torch
from fixture_files import Fixture, each, read
from torch import Tensor, nn

from detcore.backbones.mobilenetv2 import MobileNetV2
from detcore.backbones.resnet import ResNet
from detcore.weights.keys import rename


def check(fixture: Fixture, backbone: nn.Module, table: str, outputs: dict[str, Tensor], mode: str) -> None:
    """Outputs, their total, the norm of every gradient, and the gradients that the file holds."""
    for key, output in outputs.items():
        fixture.close(output, f"{mode}/{key}", "head")
    total = sum(output.square().mean() for output in outputs.values())
    fixture.close(total, f"{mode}/total", "head")
    total.backward()
    parameters = dict(backbone.named_parameters())
    names = fixture.names(f"{mode}/grad_norm_names")
    ours = [rename(name, table) for name in names]
    assert set(ours) == set(parameters)
    norms = torch.stack([parameters[name].grad.norm() for name in ours])
    fixture.close(norms, f"{mode}/grad_norms", "grad")
    for name in fixture.under(f"{mode}/grad"):
        fixture.close(parameters[rename(name, table)].grad, f"{mode}/grad/{name}", "grad")


@each("backbone_resnet50")
@pytest.mark.parametrize(("style", "key"), [("caffe", "stride_in_1x1"), ("torchvision", "stride_in_3x3")])
def test_fixture_resnet(name: str, style: str, key: str) -> None:
    fixture = read(name)
    config = fixture.config
    stages = ("res2", "res3", "res4", "res5")
    backbone = ResNet(
        config["depth"],
        style,
        taps=stages,
        stem=config["stem"],
        middle=config["bottleneck"],
        outputs=config["out"],
    )
    backbone.load_state_dict(fixture.weights("detectron2_resnet"))
    features = backbone(fixture["input/image"])
    check(fixture, backbone, "detectron2_resnet", dict(zip(stages, features, strict=True)), f"expect/{key}")


@each("backbone_mobilenetv2")
def test_fixture_mobilenetv2(name: str) -> None:
    fixture = read(name)
    config = fixture.config["backbone"]
    # mmdet counts the outputs of its stages: 0..6 are layer1..layer7, 7 is conv2.
    taps = ["conv2" if index == 7 else f"layer{index + 1}" for index in config["out_indices"]]
    backbone = MobileNetV2(config["widen_factor"], taps=taps)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = config["norm_cfg"]["eps"], config["norm_cfg"]["momentum"]
    missing, unexpected = backbone.load_state_dict(fixture.weights("mmdet_mobilenetv2"), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    backbone.eval()
    features = backbone(fixture["input/image"])
    outputs = {str(i): feature for i, feature in enumerate(features)}
    check(fixture, backbone, "mmdet_mobilenetv2", outputs, "expect/eval")
