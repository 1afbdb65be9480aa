"""Operations against numbers from the references; see tests/fixtures/README.md."""

import os
from functools import partial
from typing import Any

import pytest
import torch
from fixture_files import FOLDER, each, read, systems

from detcore.ops.anchors import grid_points
from detcore.ops.boxes import clip, to_cxcywh
from detcore.ops.coder import DeltaCoder, centerness, from_distances, to_distances
from detcore.ops.focal import ALPHA, focal_loss
from detcore.ops.losses import giou_loss, iou_loss, smooth_l1_loss
from detcore.ops.matching import BACKGROUND, IGNORED, learned
from detcore.ops.matching.atss import atss_match
from detcore.ops.matching.iou import iou_match
from detcore.ops.matching.points import points_match
from detcore.ops.matching.uniform import uniform_match
from detcore.ops.nms import nms
from detcore.ops.targets import Targets
from tests.detcore.conftest import pad_targets

CPU = torch.device("cpu")
KNOWN = {
    "yolof", "retinanet_detectron2", "fcos_detectron2", "fcos_mmdet", "atss_mmdet",
    "ssdlite_mmdet", "ssdlite_real_weights", "op_ssd_match_and_mining", "op_ssd_priors",
    "op_uniform_matcher", "op_retinanet_matcher", "op_fcos_targets", "op_atss_assigner",
    "op_box_coders", "op_losses", "op_nms",
    "backbone_resnet50", "backbone_mobilenetv2", "coco_eval",
    "cornernet", "op_corner_pool", "op_cornernet_decode", "op_cornernet_losses", "op_cornernet_targets",
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
        ("mmdet_ssd", DeltaCoder((10, 10, 5, 5), symmetric=True), "input/anchors"),
    ],
)
def test_fixture_box_coders(name: str, key: str, coder: DeltaCoder, anchors: str) -> None:
    fixture = read(name)
    fixture.close(coder.encode(fixture["target/boxes"], fixture[anchors]), f"expect/{key}/encode", "encode")
    fixture.close(coder.decode(fixture["input/deltas"], fixture[anchors]), f"expect/{key}/decode", "decode")


@each("op_box_coders")
def test_fixture_clipped_boxes(name: str) -> None:
    """mmdetection's coders decode to boxes inside the image."""
    fixture, size = read(name), read(name)["input/image_size"][None]
    boxes = DeltaCoder((10, 10, 5, 5), symmetric=True).decode(
        fixture["input/deltas"], fixture["input/anchors"]
    )
    fixture.close(clip(boxes[None], size)[0], "expect/mmdet_ssd/decode_clip", "decode")
    boxes = fixture["expect/distance/decode"]
    fixture.close(clip(boxes[None], size)[0], "expect/distance/decode_clip", "decode")


@each("op_box_coders")
def test_fixture_distances(name: str) -> None:
    """From a point in pixels, and from a square's centre in its sides."""
    fixture = read(name)
    boxes, deltas = fixture["target/boxes"], fixture["input/deltas"]
    points = fixture["expect/points"]
    fixture.close(to_distances(boxes, points), "expect/distance/encode", "encode")
    far = deltas.abs() * 40  # the distances that the file was made with
    fixture.close(from_distances(far, points), "expect/distance/decode", "decode")

    centers, sides = to_cxcywh(fixture["input/square_anchors"]).split(2, dim=-1)
    distances = to_distances(boxes, centers) / sides[:, :1]
    fixture.close(distances, "expect/linear/encode", "encode")
    boxes = from_distances(deltas.relu() * sides[:, :1], centers)
    fixture.close(boxes, "expect/linear/decode", "decode")


LOSSES: dict[str, tuple[Any, str, str]] = {
    "giou_fvcore": (giou_loss, "input/pred_boxes", "target/boxes"),
    "giou_mmdet": (giou_loss, "input/pred_boxes", "target/boxes"),
    "iou_log_mmdet": (iou_loss, "input/pred_boxes", "target/boxes"),
    "smooth_l1_beta0.0": (smooth_l1_loss, "input/deltas", "target/deltas"),
    "smooth_l1_beta0.11": (partial(smooth_l1_loss, beta=0.11), "input/deltas", "target/deltas"),
    "smooth_l1_beta1.0": (partial(smooth_l1_loss, beta=1.0), "input/deltas", "target/deltas"),
}


@each("op_losses")
@pytest.mark.parametrize("key", LOSSES)
def test_fixture_losses(name: str, key: str) -> None:
    fixture, (function, source, target) = read(name), LOSSES[key]
    predicted = fixture[source].clone().requires_grad_()
    loss = function(predicted, fixture[target])
    fixture.close(loss, f"expect/{key}", "values")
    (gradient,) = torch.autograd.grad(loss.sum(), predicted)
    fixture.close(gradient, f"expect/{key}_grad", "grad")


@each("op_losses")
def test_fixture_focal_loss(name: str) -> None:
    """Row by row, as ours is a sum; then with rows that do not count."""
    fixture = read(name)
    assert (fixture.config["alpha"], fixture.config["gamma"]) == (ALPHA, 2.0)
    logits, labels = fixture["input/logits"].clone().requires_grad_(), fixture["expect/focal_label"].clone()
    labels[labels == logits.shape[1]] = BACKGROUND
    places = zip(logits[:, None, None], labels[:, None, None], strict=True)
    each_row = torch.stack([focal_loss(*place) for place in places])
    torch.testing.assert_close(each_row, fixture["expect/focal"].sum(dim=1), rtol=1e-5, atol=1e-6)
    loss = focal_loss(logits[None], labels[None])
    (gradient,) = torch.autograd.grad(loss, logits)
    fixture.close(gradient, "expect/focal_grad", "grad")

    labels[::3] = IGNORED
    loss = focal_loss(logits[None], labels[None])
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, fixture["expect/focal"][labels != IGNORED].sum())
    assert gradient[::3].count_nonzero() == 0 and gradient[1].count_nonzero()


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


def boxes_of(name: str) -> Targets:
    """The file's boxes; their classes do not matter, unless it has some."""
    fixture = read(name)
    boxes = fixture.per_image("target/boxes")
    labels = fixture.per_image("target/labels") or [torch.zeros(len(b), dtype=torch.int64) for b in boxes]
    return pad_targets(boxes, labels)


@each("op_retinanet_matcher")
def test_fixture_iou_match(name: str) -> None:
    fixture, targets = read(name), boxes_of(name)
    negative, positive = fixture.config["thresholds"]
    assert fixture.config["low_quality"]
    assigned = iou_match(fixture["input/anchors"], targets, negative, positive)
    for i, own in enumerate(assigned):
        assert own.equal(fixture[f"expect/assigned_gt/{i}"])


@each("op_atss_assigner")
def test_fixture_atss_match(name: str) -> None:
    fixture, targets = read(name), boxes_of(name)
    levels = fixture["input/num_level_anchors"].tolist()
    assigned = atss_match(fixture["input/anchors"], levels, targets, fixture.config["topk"])
    for i, own in enumerate(assigned):
        assert own.equal(fixture[f"expect/assigned_gt/{i}"])


@each("op_fcos_targets")
@pytest.mark.parametrize("key", ["no_center_sampling", "center_sampling", "d2"])
def test_fixture_points_match(name: str, key: str) -> None:
    fixture, targets = read(name), boxes_of(name)
    strides = fixture.config["strides"]
    shapes = fixture["input/level_shapes"].tolist()
    points = torch.cat([grid_points(*s, stride, 0.5, CPU) for s, stride in zip(shapes, strides, strict=True)])
    fixture.close(points, "expect/points", "targets")

    counts = fixture["expect/num_level_points"]
    ends = torch.tensor([0.0, *(8.0 * stride for stride in strides[:-1]), torch.inf])
    ranges = torch.stack([ends[:-1], ends[1:]], dim=1).repeat_interleave(counts, dim=0)
    radius = torch.inf if key == "no_center_sampling" else fixture.config["radius"]
    reach = radius * torch.tensor(strides).repeat_interleave(counts)
    assigned = points_match(points, reach, ranges, targets, detectron2=key == "d2")

    labels, boxes = learned(assigned, targets, otherwise=torch.zeros(len(points), 4))
    classes, foreground = fixture.config["num_classes"], assigned >= 0
    at = f"expect/{key}"
    assert torch.where(foreground, labels, classes).equal(fixture[f"{at}/label"])
    distances = to_distances(boxes, points)
    if key == "d2":
        fixture.close(boxes * foreground[..., None], f"{at}/matched_box", "targets")
    else:
        fixture.close(distances * foreground[..., None], f"{at}/ltrb", "targets")
    central = torch.where(foreground, centerness(distances), 0.0)
    fixture.close(central, f"{at}/centerness", "targets")
