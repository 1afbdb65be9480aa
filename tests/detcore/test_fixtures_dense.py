"""RetinaNet, FCOS and ATSS against numbers from their references; see tests/fixtures/README.md."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fixture_files import Fixture, read, systems
from torch import Tensor, nn

from detcore.backbones.layers import TORCHVISION_PIXELS
from detcore.models.atss import ATSS, BOX_WEIGHT
from detcore.models.dense import DenseDetector
from detcore.models.fcos import FCOS
from detcore.models.heads import DenseHead, Predictions
from detcore.models.retinanet import RetinaNet
from detcore.necks.fpn import FPN
from detcore.ops.matching import BACKGROUND, IGNORED, learned
from detcore.ops.targets import Targets
from detcore.weights.keys import rename
from tests.detcore.conftest import pad_targets


class Features(nn.Module):
    """Stands where the backbone does; the tests give C3 to C5 themselves."""

    pixels = TORCHVISION_PIXELS


def detectron2_retinanet(c: dict[str, Any]) -> RetinaNet:
    sizes, ratios = c["anchor_sizes"], c["aspect_ratios"]
    count = len(sizes[0]) * len(ratios)
    assert (c["smooth_l1_beta"], c["anchor_offset"], c["box_weights"]) == (0.0, 0.0, [1.0] * 4)
    model = RetinaNet(
        Features(),
        FPN(c["backbone_channels"], c["fpn_channels"], c["p6p7_from"].lower()),
        DenseHead(c["fpn_channels"], c["num_classes"], anchors=count, convs=c["stacked_convs"]),
        sizes,
        ratios,
        negative=c["iou_thresholds"][0],
        positive=c["iou_thresholds"][1],
        normalizer=c["loss_normalizer_init"],
        **detectron2_test(c),
    )
    model.normalizer.momentum = c["ema_momentum"]
    return model


def detectron2_fcos(c: dict[str, Any]) -> FCOS:
    model = FCOS(
        Features(),
        FPN(c["backbone_channels"], c["fpn_channels"], c["p6p7_from"].lower()),
        DenseHead(c["fpn_channels"], c["num_classes"], convs=c["stacked_convs"], norm="gn", centerness="reg"),
        [8 * stride for stride in c["strides"][:-1]],
        radius=c["center_sampling_radius"],
        style="detectron2",
        **detectron2_test(c),
    )
    regroup(model, c["gn_groups"])
    model.normalizer.momentum = c["ema_momentum"]
    assert model.normalizer.average == c["loss_normalizer_init"]
    return model


def detectron2_test(c: dict[str, Any]) -> dict[str, Any]:
    assert (c["focal_alpha"], c["focal_gamma"]) == (0.25, 2.0)
    return {
        "score": c["score_thresh"],
        "topk": c["topk"],
        "nms_iou": c["nms_thresh"],
        "max_detections": c["max_dets"],
    }


def mmdet(c: dict[str, Any], centerness: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """backbone, neck and head, and what follows at test time."""
    neck, head, test = c["neck"], c["head"], c["test_cfg"]
    assert (neck["add_extra_convs"], neck["num_outs"], test["min_bbox_size"]) == ("on_output", 5, 0)
    assert (head["loss_cls"]["alpha"], head["loss_cls"]["gamma"]) == (0.25, 2.0)
    fpn = FPN(neck["in_channels"], neck["out_channels"], "p5", neck.get("relu_before_extra_convs", False))
    dense = DenseHead(
        head["feat_channels"],
        head["num_classes"],
        convs=head["stacked_convs"],
        norm="gn",
        centerness=centerness,
        scales=5,
    )
    regroup(dense, head["norm_cfg"]["num_groups"])
    return (Features(), fpn, dense), {
        "score": test["score_thr"],
        "topk": test["nms_pre"],
        "nms_iou": test["nms"]["iou_threshold"],
        "max_detections": test["max_per_img"],
    }


def mmdet_fcos(c: dict[str, Any]) -> FCOS:
    head = c["head"]
    parts, test = mmdet(c, "reg" if head.get("centerness_on_reg") else "cls")
    return FCOS(
        *parts,
        [8 * stride for stride in head["strides"][:-1]],
        distances="relu" if head.get("norm_on_bbox") else "exp",
        radius=head["center_sample_radius"] if head.get("center_sampling") else None,
        box_loss=head["loss_bbox"]["type"].removesuffix("Loss").lower(),
        **test,
    )


def mmdet_atss(c: dict[str, Any]) -> ATSS:
    head, anchors = c["head"], c["head"]["anchor_generator"]
    assert (anchors["ratios"], anchors["scales_per_octave"]) == ([1.0], 1)
    assert head["bbox_coder"]["target_stds"] == [0.1, 0.1, 0.2, 0.2]
    assert head["loss_bbox"]["loss_weight"] == BOX_WEIGHT
    parts, test = mmdet(c, "reg")
    candidates = c["train_cfg"]["assigner"]["topk"]
    return ATSS(*parts, scale=anchors["octave_base_scale"], candidates=candidates, **test)


def regroup(model: nn.Module, groups: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = groups


class System(NamedTuple):
    """How a kind of file is read: our model, table of names, and the file's words for what it holds."""

    build: Callable[[dict[str, Any]], DenseDetector]
    table: str
    features: str
    levels: str
    boxes: str
    label: str
    losses: dict[str, str]
    gradient: str


C = ("input/c3", "input/c4", "input/c5")
FEAT = ("input/feat/0", "input/feat/1", "input/feat/2")
FPN_LEVELS = [f"expect/fpn/p{i}" for i in range(3, 8)]
NECK_LEVELS = [f"expect/neck/{i}" for i in range(5)]
TERMS = ("loss_cls", "loss_box_reg", "loss_centerness")
FCOS_TERMS = ("loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr")
MMDET_TERMS = ("loss_cls", "loss_bbox", "loss_centerness")
MMDET = (FEAT, NECK_LEVELS, "box_pred")
SYSTEMS = {
    "retinanet_detectron2": System(
        detectron2_retinanet, "detectron2_retinanet", C, FPN_LEVELS, "box_deltas", "anchor_label",
        dict(zip(TERMS[:2], TERMS[:2], strict=True)), "grad_c5",
    ),
    "fcos_detectron2": System(
        detectron2_fcos, "detectron2_fcos", C, FPN_LEVELS, "box_deltas", "anchor_label",
        dict(zip(TERMS, FCOS_TERMS, strict=True)), "grad_c5",
    ),
    "fcos_mmdet": System(
        mmdet_fcos, "mmdet_dense", *MMDET, "point_label",
        dict(zip(TERMS, MMDET_TERMS, strict=True)), "grad_input",
    ),
    "atss_mmdet": System(
        mmdet_atss, "mmdet_dense", *MMDET, "anchor_label",
        dict(zip(TERMS, MMDET_TERMS, strict=True)), "grad_input",
    ),
}  # fmt: skip


def load(name: str) -> tuple[Fixture, System, DenseDetector]:
    fixture = read(name)
    system = SYSTEMS[fixture.meta["system"]]
    model = system.build(fixture.config)
    assert list(model.neck.strides) == fixture.config.get("strides", [8, 16, 32, 64, 128])
    missing, unexpected = model.load_state_dict(fixture.weights(system.table), strict=False)
    # mmdetection's convolutions have no bias where a norm follows, which is a bias of zero.
    assert not unexpected and all(
        key.endswith(".conv.bias") or key == "normalizer.average" for key in missing
    )
    return fixture, system, model


def predict(fixture: Fixture, system: System, model: DenseDetector) -> Predictions:
    return model.head(model.neck([fixture[key] for key in system.features]))


def targets_of(fixture: Fixture) -> Targets:
    return pad_targets(fixture.per_image("target/boxes"), fixture.per_image("target/labels"))


def maps(rows: Tensor, model: DenseDetector, predictions: Predictions) -> list[Tensor]:
    """(N, R, D) -> of each level (N, A * D, H, W)."""
    levels = rows.split(model.level_rows(predictions), dim=1)
    shapes = zip(levels, predictions.shapes, strict=True)
    return [level.unflatten(1, (*shape, -1)).permute(0, 3, 4, 1, 2).flatten(1, 2) for level, shape in shapes]


NAMES = pytest.mark.parametrize("name", [name for kind in SYSTEMS for name in systems().get(kind, [])])


@NAMES
def test_fixture_dense_head(name: str) -> None:
    fixture, system, model = load(name)
    with torch.no_grad():
        levels = model.neck([fixture[key] for key in system.features])
        predictions = model.head(levels)
    for level, key in zip(levels, system.levels, strict=True):
        if key in fixture:  # some files leave the largest out
            fixture.close(level, key, "head")

    boxes, key = predictions.boxes, system.boxes
    if fixture.meta["system"] == "fcos_mmdet":  # its file has distances
        boxes = model._distances(boxes, model.points(predictions)[1])
        key = "eval_box_pred" if "expect/eval_box_pred/0" in fixture else key
    compared = [(predictions.logits, "cls_logits"), (boxes, key)]
    if predictions.centerness is not None:
        compared.append((predictions.centerness[..., None], "centerness"))
    for rows, key in compared:
        for i, level in enumerate(maps(rows, model, predictions)):
            fixture.close(level, f"expect/{key}/{i}", "head")


@NAMES
def test_fixture_dense_grid(name: str) -> None:
    """Anchors, or points; detectron2's FCOS has the cell around each point."""
    fixture, system, model = load(name)
    predictions = predict(fixture, system, model)
    key = "points" if "expect/points/0" in fixture else "anchors"
    if not isinstance(model, FCOS):
        grid = model.anchors(predictions)
    elif key == "points":
        grid = model.points(predictions)[0]
    else:
        points, strides = model.points(predictions)
        grid = torch.cat([points - strides[:, None] / 2, points + strides[:, None] / 2], dim=1)
    for i, level in enumerate(grid.split(model.level_rows(predictions))):
        fixture.close(level, f"expect/{key}/{i}", "boxes")


@NAMES
def test_fixture_dense_assignment(name: str) -> None:
    fixture, system, model = load(name)
    predictions, targets = predict(fixture, system, model), targets_of(fixture)
    grid = model.anchors(predictions) if isinstance(model, RetinaNet) else predictions
    assigned = model.assign(grid, targets)
    assert (assigned >= 0).sum() == fixture["expect/num_positive"]
    if "expect/anchor_gt" in fixture:
        assert assigned.equal(fixture["expect/anchor_gt"])
    label, _ = learned(assigned, targets, torch.zeros(assigned.shape[1], 4))
    classes = fixture.config.get("num_classes") or fixture.config["head"]["num_classes"]
    words = torch.where(label == BACKGROUND, classes, torch.where(label == IGNORED, -1, label))
    assert words.equal(fixture[f"expect/{system.label}"])


@NAMES
def test_fixture_dense_losses_and_gradients(name: str) -> None:
    fixture, system, model = load(name)
    features = [fixture[key].clone().requires_grad_() for key in system.features]
    losses = model.losses(model.head(model.neck(features)), targets_of(fixture))
    for ours, theirs in system.losses.items():
        fixture.close(losses[ours], f"expect/loss/{theirs}", "loss")
    total = torch.stack(list(losses.values())).sum()
    fixture.close(total, "expect/loss/total", "loss")
    if "expect/loss_normalizer" in fixture:
        fixture.close(model.normalizer.average, "expect/loss_normalizer", "loss")

    total.backward()
    parameters = dict(model.named_parameters())
    names = [rename(key, system.table) for key in fixture.names("expect/grad_norm_names")]
    norms = torch.stack([parameters[key].grad.norm() for key in names])
    fixture.close(norms, "expect/grad_norms", "grad")
    for key in fixture.under("expect/grad"):
        fixture.close(parameters[rename(key, system.table)].grad, f"expect/grad/{key}", "grad")
    fixture.close(features[-1].grad, f"expect/{system.gradient}", "grad")


@NAMES
def test_fixture_dense_detections(name: str) -> None:
    fixture, system, model = load(name)
    sizes = fixture["input/image_sizes"]
    with torch.no_grad():
        predictions = predict(fixture, system, model)
    found = model.select(predictions, sizes)
    for i, count in enumerate(found.count.tolist()):
        at = f"expect/det/{i}"
        fixture.close(found.boxes[i, :count], f"{at}/boxes", "boxes")
        fixture.close(found.scores[i, :count], f"{at}/scores", "scores")
        fixture.close(found.labels[i, :count], f"{at}/labels", "det_labels")


@NAMES
def test_fixture_dense_detect(name: str) -> None:
    """The whole way that evaluation takes, with C3 to C5 in place of a backbone."""
    fixture, system, model = load(name)
    model.features = lambda images, sizes: model.neck([fixture[key] for key in system.features])
    sizes = fixture["input/image_sizes"]
    found = model.detect(fixture[system.features[0]], sizes)
    scale = (fixture["input/output_sizes"] / sizes).flip(1).repeat(1, 2)
    for i, count in enumerate(found.count.tolist()):
        at = f"expect/det_resized/{i}"
        fixture.close((found.boxes[i, :count] * scale[i]).float(), f"{at}/boxes", "boxes")
        fixture.close(found.scores[i, :count], f"{at}/scores", "scores")
        fixture.close(found.labels[i, :count], f"{at}/labels", "det_labels")
