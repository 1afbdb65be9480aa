"""SSDLite against numbers from mmdetection and TensorFlow's released model; see tests/fixtures/README.md."""

from typing import Any

import pytest
import torch
from fixture_files import Fixture, each, read
from torch import Tensor, nn

from detcore.backbones.layers import TORCHVISION_PIXELS
from detcore.models.ssdlite import ExtraLayers, SSDLite, SSDLiteHead, prior_shapes
from detcore.ops.anchors import boxes_around, grid_points
from detcore.ops.coder import DeltaCoder
from detcore.ops.losses import smooth_l1_loss
from detcore.ops.matching import BACKGROUND, learned
from detcore.ops.matching.ssd import hard_negatives, ssd_match
from detcore.ops.targets import Targets
from detcore.weights.keys import rename
from tests.detcore.conftest import pad_targets

CPU = torch.device("cpu")
MODES = pytest.mark.parametrize("mode", ["eval", "train"])


class Features(nn.Module):
    """Stands where the backbone does; the tests give its two features themselves."""

    pixels = TORCHVISION_PIXELS


def layout(generator: dict[str, Any]) -> tuple[list[float], list[list[tuple[float, float]]]]:
    """Strides and shapes of mmdetection's prior boxes."""
    least, most = generator["min_sizes"], generator["max_sizes"]
    (ratios,) = {tuple(level) for level in generator["ratios"]}
    assert least[1:] == most[:-1] and not generator["scale_major"]
    return generator["strides"], prior_shapes([*least, most[-1]], ratios, "mmdet")


def load(name: str, mode: str) -> tuple[Fixture, SSDLite]:
    fixture = read(name)
    neck, head, train, test = (fixture.config[part] for part in ("neck", "head", "train_cfg", "test_cfg"))
    assert neck["out_channels"][:2] == neck["in_channels"] and set(neck["level_strides"]) == {2}
    strides, shapes = layout(head["anchor_generator"])
    model = SSDLite(
        Features(),
        ExtraLayers(neck["in_channels"], neck["out_channels"][2:], "bn"),
        SSDLiteHead(neck["out_channels"], head["num_classes"], [len(level) for level in shapes], "bn"),
        strides,
        shapes,
        positive=train["assigner"]["pos_iou_thr"],
        negatives=train["neg_pos_ratio"],
        score=test["score_thr"],
        topk=test["nms_pre"],
        nms_iou=test["nms"]["iou_threshold"],
        max_detections=test["max_per_img"],
    )
    norm = neck["norm_cfg"]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (norm["eps"], norm["momentum"])
    missing, unexpected = model.load_state_dict(fixture.weights("mmdet_ssdlite"), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    return fixture, model.train(mode == "train")


def targets_of(fixture: Fixture) -> Targets:
    return pad_targets(fixture.per_image("target/boxes"), fixture.per_image("target/labels"))


def flat(maps: list[Tensor], columns: int) -> Tensor:
    """The file's maps (N, A * D, H, W) as rows (N, R, D)."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, columns) for m in maps], dim=1)


@each("ssdlite_mmdet")
@MODES
def test_fixture_ssdlite_levels_and_predictions(name: str, mode: str) -> None:
    fixture, model = load(name, mode)
    at = f"expect/{mode}"
    levels = model.neck(fixture.per_image("input/feat"))
    for i in fixture.under(f"{at}/neck"):
        fixture.close(levels[int(i)], f"{at}/neck/{i}", "head")
    predictions = model.head(levels)
    columns = fixture.config["head"]["num_classes"] + 1
    for got, key, width in ((predictions.logits, "cls_logits", columns), (predictions.boxes, "box_pred", 4)):
        wanted = flat(fixture.per_image(f"{at}/{key}"), width)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    if mode == "train":
        buffers = dict(model.named_buffers())
        for key in fixture.under(f"{at}/buffers_after"):
            fixture.close(buffers[rename(key, "mmdet_ssdlite")], f"{at}/buffers_after/{key}", "head")


@each("ssdlite_mmdet")
@MODES
def test_fixture_ssdlite_targets_losses_and_gradients(name: str, mode: str) -> None:
    fixture, model = load(name, mode)
    at, targets = f"expect/{mode}", targets_of(fixture)
    features = [feature.clone().requires_grad_() for feature in fixture.per_image("input/feat")]
    predictions = model.head(model.neck(features))
    priors = model.priors(predictions)
    assigned = model.assign(priors, targets)
    positive = assigned >= 0
    assert positive.sum() == fixture[f"{at}/num_positive"]
    assert positive.sum(dim=1).clamp(min=1).sum() == fixture[f"{at}/normaliser"]
    labels, boxes = learned(assigned, targets, otherwise=priors)
    confidence = model.class_losses(predictions.logits, labels)
    assert hard_negatives(confidence, positive, model.negatives).equal(fixture[f"{at}/hard_negative"])
    if mode == "eval":
        torch.testing.assert_close(priors, torch.cat(fixture.per_image(f"{at}/anchors")), atol=1e-3, rtol=0)
        classes = fixture.config["head"]["num_classes"]
        words = torch.where(labels == BACKGROUND, classes, labels)
        assert assigned.equal(fixture[f"{at}/anchor_gt"]) and words.equal(fixture[f"{at}/anchor_label"])
        deltas = model.coder.encode(boxes, priors) * positive[..., None]
        torch.testing.assert_close(deltas, fixture[f"{at}/box_target"], rtol=1e-5, atol=1e-5)

    losses = model.losses(predictions, targets)
    fixture.close(losses["loss_cls"], f"{at}/loss/loss_cls", "loss")
    fixture.close(losses["loss_box_reg"], f"{at}/loss/loss_bbox", "loss")
    loss = torch.stack(list(losses.values())).sum()
    fixture.close(loss, f"{at}/loss/total", "loss")
    loss.backward()
    parameters = dict(model.named_parameters())
    names = [rename(key, "mmdet_ssdlite") for key in fixture.names(f"{at}/grad_norm_names")]
    norms = torch.stack([parameters[key].grad.norm() for key in names])
    fixture.close(norms, f"{at}/grad_norms", "grad")
    for key in fixture.under(f"{at}/grad"):
        fixture.close(parameters[rename(key, "mmdet_ssdlite")].grad, f"{at}/grad/{key}", "grad")
    fixture.close(features[-1].grad, f"{at}/grad_input", "grad")


@each("ssdlite_mmdet")
def test_fixture_ssdlite_detections(name: str) -> None:
    """The whole way that evaluation takes, with two features in place of a backbone."""
    fixture, model = load(name, "eval")
    features = fixture.per_image("input/feat")
    model.features = lambda images, sizes: model.neck(features)
    sizes = fixture["input/image_sizes"]
    found = model.detect(features[0], sizes)
    scale = (fixture["input/output_sizes"] / sizes).flip(1).repeat(1, 2)
    for i, count in enumerate(found.count.tolist()):
        for at, factor in ((f"expect/eval/det/{i}", 1.0), (f"expect/eval/det_resized/{i}", scale[i])):
            fixture.close((found.boxes[i, :count] * factor).float(), f"{at}/boxes", "boxes")
            fixture.close(found.scores[i, :count], f"{at}/scores", "scores")
            fixture.close(found.labels[i, :count], f"{at}/labels", "det_labels")


@each("op_ssd_match_and_mining")
def test_fixture_ssd_match_and_mining(name: str) -> None:
    fixture = read(name)
    config, targets, priors = fixture.config, targets_of(fixture), fixture["input/anchors"]
    logits = fixture["input/cls_logits"]
    assert config["pos_iou"] == config["neg_iou"]
    assigned = ssd_match(priors, targets, config["pos_iou"])
    assert assigned.equal(fixture["expect/assigned_gt"])
    positive = assigned >= 0
    labels, boxes = learned(assigned, targets, otherwise=priors)
    column = torch.where(positive, labels, config["num_classes"])
    losses = nn.functional.cross_entropy(logits.movedim(-1, 1), column, reduction="none")
    hard = hard_negatives(losses, positive, config["neg_pos_ratio"])
    assert hard.equal(fixture["expect/hard_negative"])

    deltas = DeltaCoder(tuple(1 / std for std in config["stds"])).encode(boxes, priors)
    torch.testing.assert_close(
        deltas * positive[..., None], fixture["expect/box_target"], rtol=1e-5, atol=1e-5
    )
    location = smooth_l1_loss(fixture["input/box_deltas"], deltas, config["smooth_l1_beta"]).sum(dim=-1)
    sums = [torch.where(positive | hard, losses, 0.0).sum(1), torch.where(positive, location, 0.0).sum(1)]
    normalizer = positive.sum(dim=1).clamp(min=1).sum()
    fixture.close(normalizer.float(), "expect/normaliser", "loss")
    for own, key in zip(sums, ("cls", "bbox"), strict=True):
        fixture.close(own / normalizer, f"expect/loss_{key}", "loss")
        fixture.close(own.sum() / positive.sum().clamp(min=1), f"expect/tv_loss_{key}", "loss")


@each("op_ssd_priors")
def test_fixture_ssd_priors(name: str) -> None:
    fixture = read(name)
    for key, config in fixture.config["mmdet"].items():
        levels = zip(config["shapes"], *layout(config["gen"]), strict=True)
        for i, (size, stride, shapes) in enumerate(levels):
            priors = boxes_around(grid_points(*size, stride, 0.5, CPU), shapes)
            torch.testing.assert_close(priors, fixture[f"expect/{key}/{i}"], atol=1e-3, rtol=0)

    wanted = fixture["expect/tf_300_ymin_xmin_ymax_xmax"][:, [1, 0, 3, 2]]
    cells = [height for height, _, _ in fixture.config["tf"]["levels"]]
    shapes = prior_shapes([60, 105, 150, 195, 240, 285, 300], (2, 3), "tensorflow")
    levels = zip(cells, shapes, strict=True)
    priors = [boxes_around(grid_points(n, n, 300 / n, 0.5, CPU), level) for n, level in levels]
    torch.testing.assert_close(torch.cat(priors) / 300, wanted, atol=1e-6, rtol=0)
