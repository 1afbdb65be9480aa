"""Operations against numbers from the references; see tests/fixtures/README.md."""

import os

import pytest
import torch
from fixture_files import FOLDER, each, read, systems

from detcore.ops.coder import DeltaCoder
from detcore.ops.losses import giou_loss, sigmoid_focal_loss
from detcore.ops.matching import uniform_match
from detcore.ops.nms import nms
from tests.detcore.conftest import pad_targets

KNOWN = {
    "yolof", "op_uniform_matcher", "op_box_coders", "op_losses", "op_nms",
    "backbone_resnet50", "backbone_mobilenetv2", "coco_eval",
}  # fmt: skip


def test_fixture_folder_holds_something_known() -> None:
    known = KNOWN & set(systems())
    assert known, f"{FOLDER} holds no fixture of a known kind"
    if "FIXTURES" not in os.environ:
        assert known == KNOWN


@each("op_uniform_matcher")
def test_fixture_uniform_matcher(name: str) -> None:
    fixture = read(name)
    boxes = fixture.per_image("target/boxes")
    targets = pad_targets(boxes, [torch.zeros(len(b), dtype=torch.int64) for b in boxes])
    config = fixture.config
    matches = uniform_match(
        fixture["input/pred_boxes"],
        fixture["input/anchors"],
        targets,
        config["match_times"],
        config["pos_ignore"],
        config["neg_ignore"],
    )
    for i in range(len(boxes)):
        real = matches.real[i]
        assert matches.anchor[i][real].equal(fixture[f"expect/match_anchor/{i}"])
        assert matches.gt[i][real].equal(fixture[f"expect/match_gt/{i}"])
        assert matches.assigned[i].equal(fixture[f"expect/assigned_gt/{i}"])


@each("op_box_coders")
@pytest.mark.parametrize(
    ("key", "coder", "anchors"),
    [
        ("d2_w1", DeltaCoder(), "input/anchors"),
        ("d2_w10_10_5_5", DeltaCoder((10, 10, 5, 5)), "input/anchors"),
        ("tv_w10_10_5_5", DeltaCoder((10, 10, 5, 5)), "input/anchors"),
        ("yolof", DeltaCoder(center_clamp=32), "input/anchors"),
    ],
)
def test_fixture_box_coders(name: str, key: str, coder: DeltaCoder, anchors: str) -> None:
    fixture = read(name)
    fixture.close(coder.encode(fixture["target/boxes"], fixture[anchors]), f"expect/{key}/encode", "encode")
    fixture.close(coder.decode(fixture["input/deltas"], fixture[anchors]), f"expect/{key}/decode", "decode")


@each("op_losses")
@pytest.mark.parametrize("key", ["focal", "focal_noalpha", "giou_fvcore"])
def test_fixture_losses(name: str, key: str) -> None:
    fixture = read(name)
    source = fixture["input/pred_boxes" if key.startswith("giou") else "input/logits"].clone()
    source.requires_grad_()
    if key.startswith("giou"):
        loss = giou_loss(source, fixture["target/boxes"])
    else:
        alpha = fixture.config["alpha"] if key == "focal" else -1
        loss = sigmoid_focal_loss(source, fixture["target/onehot"], alpha, fixture.config["gamma"])
    fixture.close(loss, f"expect/{key}", "values")
    (gradient,) = torch.autograd.grad(loss.sum(), source)
    fixture.close(gradient, f"expect/{key}_grad", "grad")


@each("op_nms")
@pytest.mark.parametrize("by_class", [True, False])
def test_fixture_nms(name: str, by_class: bool) -> None:
    fixture = read(name)
    order = fixture["input/scores"].argsort(descending=True)
    boxes, labels = fixture["input/boxes"][order][None], fixture["input/labels"][order][None]
    prefix = "expect/keep_" if by_class else "expect/agnostic_"
    thresholds = [key.removeprefix(prefix) for key in fixture.arrays if key.startswith(prefix)]
    assert thresholds
    for threshold in thresholds:
        keep = nms(boxes, labels if by_class else None, float(threshold))[0]
        assert order[keep].equal(fixture[prefix + threshold])
