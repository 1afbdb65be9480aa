"""Weights from elsewhere: read without trust, renamed, loaded, and said if not."""

import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixture_files import Fixture
from torch import Tensor, nn

from detcore.backbones import build_backbone
from detcore.backbones.layers import ConvNorm
from detcore.backbones.mobilenetv2 import MobileNetV2
from detcore.backbones.resnet import ResNet
from detcore.config.models import Backbone
from detcore.models import build_model
from detcore.weights import WeightsError
from detcore.weights.keys import best_table, rename
from detcore.weights.loading import _check_style, load, load_backbone
from detcore.weights.reading import read_state
from tests.detcore.conftest import model_section
from tests.detcore.sections import section as section_of

FIXTURES = Path(__file__).parents[1] / "fixtures"


def torchvision_names(depth: int) -> list[str]:
    """The names of torchvision's ResNets, from what is known of their make."""
    blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    names = ["conv1.weight", *norm_names("bn1")]
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            for i in range(1, 3 + (depth == 50)):
                names += [f"{at}.conv{i}.weight", *norm_names(f"{at}.bn{i}")]
            if block == 0 and (stage > 1 or depth == 50):
                names += [f"{at}.downsample.0.weight", *norm_names(f"{at}.downsample.1")]
    return names


def norm_names(prefix: str) -> list[str]:
    return [f"{prefix}.{k}" for k in ("weight", "bias", "running_mean", "running_var")]


def caffe2_names() -> list[str]:
    """Those of detectron2's R-50.pkl, as its own loader lists them."""
    statistics = ("bn_gamma", "bn_beta", "bn_running_mean", "bn_running_var")
    names = ["conv1_w", *(f"res_conv1_{s}" for s in statistics)]
    for stage, count in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        for block in range(count):
            for branch in ("2a", "2b", "2c", *(["1"] if block == 0 else [])):
                at = f"res{stage}_{block}_branch{branch}"
                names += [f"{at}_w", *(f"{at}_{s}" for s in statistics)]
    return names


def in_file_order(resnet: ResNet) -> list[Tensor]:
    """Its tensors, with random values, as others' files list them: a block's projection comes last."""
    state = {k: torch.rand(v.shape) for k, v in resnet.state_dict().items() if v.dim()}

    def place(name: str) -> tuple[str, bool]:
        return (name[:6] if name.startswith("res") else ""), "shortcut" in name

    return [state[name] for name in sorted(state, key=place)]


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_names_are_ours(depth: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"stem": 8, "middle": (8, 16, 24, 32)}
    source, target = ResNet(depth, norm="bn", **small), ResNet(depth, norm="frozen_bn", **small)
    values = in_file_order(source)
    names = torchvision_names(depth)
    state = dict(zip(names, values, strict=True)) | {
        "fc.weight": torch.zeros(3, 3),
        "fc.bias": torch.zeros(3),
    }
    torch.save(state, tmp_path / "resnet.pth")
    report = load(target, str(tmp_path / "resnet.pth"))
    assert (report.table, report.loaded.total(), report.unused) == (
        "torchvision_resnet",
        len(names),
        ("fc.weight", "fc.bias"),
    )
    assert "not used: fc.weight, fc.bias" in capsys.readouterr().out
    assert target.stem.conv.weight.equal(state["conv1.weight"])
    assert target.res3[0].conv2.norm.running_var.equal(state["layer2.0.bn2.running_var"])
    assert target.res5[0].shortcut.norm.bias.equal(state["layer4.0.downsample.1.bias"])
    assert target.res2[1].conv1.conv.weight.equal(state["layer1.1.conv1.weight"])


@pytest.mark.parametrize("folded", [False, True])
def test_detectron_pickles_are_ours(folded: bool, tmp_path: Path) -> None:
    """Both kinds: with statistics, and Detectron's oldest where batch norm is one factor and one offset."""
    backbone = ResNet(50, "caffe", stem=8, middle=(4, 6, 8, 10))
    shapes = dict(zip(caffe2_names(), [t.shape for t in in_file_order(backbone)], strict=True))
    blobs = {name: np.random.default_rng(0).random(shape, np.float32) for name, shape in shapes.items()}
    if folded:
        blobs = {k: v for k, v in blobs.items() if "running" not in k}
        blobs = {k.replace("bn_gamma", "bn_s").replace("bn_beta", "bn_b"): v for k, v in blobs.items()}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs | {"conv1_b": np.zeros(8, np.float32)}}, protocol=2))
    report = load(backbone, str(path))
    assert report.table == "caffe2_resnet" and report.unused == ("conv1_b",)
    assert np.array_equal(backbone.res4[0].shortcut.conv.weight.detach(), blobs["res4_0_branch1_w"])
    gamma = blobs["res2_1_branch2c_bn_s" if folded else "res2_1_branch2c_bn_gamma"]
    assert np.array_equal(backbone.res2[1].conv3.norm.weight, gamma)
    if folded:
        norm, x = backbone.stem.norm, torch.rand(1, 8, 4, 4)
        wanted = x * torch.from_numpy(blobs["res_conv1_bn_s"])[:, None, None]
        wanted += torch.from_numpy(blobs["res_conv1_bn_b"])[:, None, None]
        torch.testing.assert_close(norm(x), wanted)
        with pytest.raises(WeightsError, match="running_mean"):  # folded numbers are no statistics to train
            load(ResNet(50, "caffe", "bn", stem=8, middle=(4, 6, 8, 10)), str(path))


def test_the_real_mobilenet_names_are_ours(tmp_path: Path) -> None:
    """Names and shapes of torchvision's mobilenet_v2-b0353104.pth, written down from the file."""
    backbone = MobileNetV2()
    state = {name: torch.rand(shape) for name, shape in torchvision_mobilenet().items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(1000, 1280)}, tmp_path / "m.pth")
    report = load(backbone, str(tmp_path / "m.pth"))
    assert report.table == "torchvision_mobilenetv2" and report.unused == ("classifier.1.weight",)
    assert backbone.layer1[0].project.conv.weight.equal(state["features.1.conv.1.weight"])
    assert backbone.layer4[3].expand.norm.bias.equal(state["features.10.conv.0.1.bias"])
    assert backbone.layer7[0].depthwise.conv.weight.equal(state["features.17.conv.1.0.weight"])
    assert backbone.conv2.norm.running_mean.equal(state["features.18.1.running_mean"])


def torchvision_mobilenet() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def add(conv: str, norm: str, *shape: int) -> None:
        shapes[f"{conv}.weight"] = shape
        shapes.update(dict.fromkeys(norm_names(norm), shape[:1]))

    add("features.0.0", "features.0.1", 32, 3, 3, 3)
    add("features.1.conv.0.0", "features.1.conv.0.1", 32, 1, 3, 3)
    add("features.1.conv.1", "features.1.conv.2", 16, 32, 1, 1)
    channels = [16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320]
    for i, (before, after) in enumerate(itertools.pairwise(channels), start=2):
        at, hidden = f"features.{i}.conv", 6 * before
        add(f"{at}.0.0", f"{at}.0.1", hidden, before, 1, 1)
        add(f"{at}.1.0", f"{at}.1.1", hidden, 1, 3, 3)
        add(f"{at}.2", f"{at}.3", after, hidden, 1, 1)
    add("features.18.0", "features.18.1", 1280, 320, 1, 1)
    return shapes


def test_a_whole_detector_loads_by_its_own_names(tmp_path: Path) -> None:
    section = {"name": "yolof", "num_classes": 2, "backbone": {"name": "resnet18", "width": 0.25}}
    section |= {"encoder": {"channels": 16, "mid_channels": 4}}
    one, other = (build_model(model_section(section)) for _ in range(2))
    torch.save({"model": one.state_dict()}, tmp_path / "model.pth")
    assert load(other, str(tmp_path / "model.pth")).unused == ()
    assert all(v.equal(other.state_dict()[k]) for k, v in one.state_dict().items())


def test_the_official_yolof_checkpoint_has_our_names() -> None:
    """The reference's names of a head, of a ResNet-50 behind `backbone.`, and what else its files hold."""
    section = {"name": "yolof", "num_classes": 2, "backbone": {"name": "resnet50", "width": 0.25}}
    section |= {"encoder": {"channels": 16, "mid_channels": 4}, "norm": "bn"}
    with torch.device("meta"):
        model = build_model(model_section(section))
    head, resnet = (
        Fixture(FIXTURES / f"{name}.npz").under("weights") for name in ("yolof_normal", "backbone_resnet50")
    )
    theirs = [*head, *(f"backbone.{key}" for key in resnet)]
    ours = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
    assert best_table([*theirs, "pixel_mean", "anchor_generator.cell_anchors.0"], ours) == "yolof"
    assert {rename(key, "yolof") for key in theirs} == ours


def test_yolof_of_mmdetection_loads(tmp_path: Path) -> None:
    """Its names, from what is known of its make: a bias where no norm follows, and of the projections."""
    section = {"name": "yolof", "num_classes": 2, "backbone": {"name": "resnet50", "width": 0.0625}}
    model = build_model(model_section(section | {"encoder": {"channels": 16, "mid_channels": 4}}))
    names = [f"backbone.{name}" for name in torchvision_names(50)]
    for part in ("lateral", "fpn"):
        names += [f"neck.{part}_conv.weight", f"neck.{part}_conv.bias", *norm_names(f"neck.{part}_norm")]
    layers = [f"neck.dilated_encoder_blocks.{i}.conv{j}" for i in range(4) for j in (1, 2, 3)]
    layers += [f"bbox_head.cls_subnet.{i}" for i in range(2)] + [
        f"bbox_head.bbox_subnet.{i}" for i in range(4)
    ]
    for layer in layers:
        names += [f"{layer}.conv.weight", *norm_names(f"{layer}.bn")]
    for layer in ("cls_score", "bbox_pred", "object_pred"):
        names += [f"bbox_head.{layer}.weight", f"bbox_head.{layer}.bias"]
    ours = model.state_dict()
    state = {name: ours[rename(name, "mmdet_yolof")] + 1 for name in names}
    torch.save({"state_dict": state}, tmp_path / "yolof.pth")
    report = load(model, str(tmp_path / "yolof.pth"))
    assert report.table == "mmdet_yolof" and report.implied == len(layers) and report.unused == ()
    assert not any(layer.conv.bias.any() for layer in model.decoder.reg_tower)


def test_a_bias_before_a_norm_moves_into_its_mean(tmp_path: Path) -> None:
    layers = [nn.Sequential(ConvNorm(3, 4, 3, norm="bn", bias=bias)).eval() for bias in (False, True)]
    ours, theirs = layers
    for values in theirs.state_dict().values():
        if values.is_floating_point():
            values.uniform_(0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "biased.pth")
    assert load(ours, str(tmp_path / "biased.pth")).unused == ()
    x = torch.rand(1, 3, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("fixture", "backbone", "table", "section"),
    [
        ("retinanet_hard", "backbone.bottom_up.", "detectron2_retinanet", {"name": "retinanet"}),
        ("fcos_detectron2_hard", "backbone.bottom_up.", "detectron2_fcos", {"name": "fcos"}),
        ("fcos_mmdet_hard", "backbone.", "mmdet_dense", {"name": "fcos"}),
        ("atss_mmdet_hard", "backbone.", "mmdet_dense", {"name": "atss"}),
    ],
)
def test_official_checkpoints_of_detectors_on_a_pyramid_load(
    fixture: str, backbone: str, table: str, section: dict[str, Any], tmp_path: Path
) -> None:
    """The references' names of neck and head, in front of a ResNet-50 by its names there."""
    style = {"style": "detectron2"} if table == "detectron2_fcos" else {}
    resnet = {"name": "resnet50", "width": 0.0625}
    model = build_model(model_section({"num_classes": 2, "backbone": resnet} | section | style))
    ours = model.state_dict()
    if table == "mmdet_dense":
        theirs = torchvision_names(50)
    else:
        theirs = list(Fixture(FIXTURES / "backbone_resnet50.npz").under("weights"))
    names = [*Fixture(FIXTURES / f"{fixture}.npz").under("weights"), *(backbone + key for key in theirs)]
    state = {name: ours[rename(name, table)] + 1 for name in names if rename(name, table) in ours}
    state |= {"pixel_mean": torch.zeros(3), f"{backbone}fc.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "theirs.pth")
    report = load(model, str(tmp_path / "theirs.pth"))
    assert report.table == table and set(report.unused) == {"pixel_mean", f"{backbone}fc.weight"}
    taken = {rename(name, table): value for name, value in state.items()}
    for key, value in model.state_dict().items():
        if key in taken:
            assert value.equal(taken[key])
        else:
            assert key.endswith((".conv.bias", "normalizer.average", "num_batches_tracked")), key


def test_a_recipe_names_its_weights(tmp_path: Path) -> None:
    backbone = {"name": "resnet18", "width": 0.25, "weights": str(tmp_path / "b.pth")}
    section = {"name": "yolof", "num_classes": 2, "backbone": backbone}
    model = build_model(model_section(section), pretrained=False)
    torch.save(model.backbone.state_dict(), tmp_path / "b.pth")
    again = build_model(model_section(section))
    assert again.backbone.stem.conv.weight.equal(model.backbone.stem.conv.weight)


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ({"name": "resnet50", "weights": "msra_r50", "style": "torchvision"}, "style caffe"),
        (
            {"name": "mobilenetv2", "weights": "torchvision_mobilenetv2", "style": "tensorflow"},
            "style torchvision",
        ),
        ({"name": "resnet18", "weights": "torchvision_resnet50"}, "for backbone resnet50, not resnet18"),
    ],
)
def test_weights_of_another_kind_are_refused(backbone: dict[str, str], words: str) -> None:
    cfg = Backbone(**backbone)
    with torch.device("meta"), pytest.raises(WeightsError, match=words):
        load_backbone(build_backbone(cfg), cfg)


def test_cornernets_pixels_are_those_of_its_project() -> None:
    section = section_of("cornernet")
    for project, style in (("cornernet", "torchvision"), ("mmdet_cornernet", "cornernet")):
        model = build_model(model_section(section | {"backbone": section["backbone"] | {"style": style}}))
        with pytest.raises(WeightsError, match="other pixel values"):
            _check_style(model, "weights.pth", project)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    small = ResNet(18, stem=8, middle=(8, 8, 8, 8))
    path = tmp_path / "other.pth"
    torch.save(small.state_dict(), path)
    with pytest.raises(WeightsError, match="tensors have another shape, first stem"):
        load(ResNet(18, stem=16, middle=(16, 16, 16, 16)), str(path))
    before = small.stem.conv.weight.clone()
    torch.save({k: v + 1 for k, v in small.state_dict().items() if "res5.1.conv2" not in k}, path)
    with pytest.raises(
        WeightsError, match=r"5 of \d+ tensors are not in the file.*res5\.1\.conv2\.conv\.weight"
    ):
        load(small, str(path))
    assert small.stem.conv.weight.equal(before)  # nothing is half-loaded


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth"])
def test_a_file_runs_nothing(name: str, tmp_path: Path) -> None:
    path, trace = tmp_path / name, tmp_path / "trace"
    path.write_bytes(pickle.dumps({"model": {"stem.conv.weight": Malice(trace)}}, protocol=2))
    with pytest.raises(WeightsError, match="system"):
        read_state(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # the test's own check: the file would have
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"not weights", pickle.dumps([1, 2], 2), pickle.dumps({"a": 1}, 2)])
@pytest.mark.parametrize("name", ["x.pkl", "x.pth"])
def test_a_file_that_is_no_weights_gets_a_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name):
        read_state(tmp_path / name)
