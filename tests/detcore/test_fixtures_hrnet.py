"""HRNet, HRFPN and FCOS's head on them against mmdetection's numbers; see tests/fixtures/README.md."""

import pytest
import torch
from fixture_files import Fixture, each, read
from torch import Tensor, nn

from detcore.backbones.hrnet import HRNet
from detcore.models.fcos import FCOS
from detcore.models.heads import DenseHead, Predictions
from detcore.necks.hrfpn import HRFPN
from detcore.ops.coder import centerness, to_distances
from detcore.ops.matching import BACKGROUND, learned
from detcore.weights.keys import best_table, rename
from tests.detcore.test_fixtures_dense import MMDET_TERMS, TERMS, maps, regroup, targets_of

TABLE = "mmdet_dense_hrnet"
GRADIENTS = {"backbone": 0.1, "neck": 1e-2, "head": 1e-2}  # relative; the file says it in words
MODES = pytest.mark.parametrize("mode", ["eval", "train"])


def build(fixture: Fixture, mode: str) -> FCOS:
    c = fixture.config
    stages = [c["backbone"]["extra"][f"stage{i}"] for i in (1, 2, 3, 4)]
    assert all(len(set(stage["num_blocks"])) == 1 for stage in stages)
    assert [len(stage["num_blocks"]) for stage in stages] == [1, 2, 3, 4] and stages[0]["num_modules"] == 1
    backbone = HRNet(
        stages[-1]["num_channels"],
        [stage["num_modules"] for stage in stages[1:]],
        [stage["num_blocks"][0] for stage in stages],
        norm="fixed_bn" if c["backbone"].get("norm_eval", True) else "bn",  # mmdetection's default
        stem=fixture["weights/backbone.conv1.weight"].shape[0],
        middle=stages[0]["num_channels"][0],
    )
    neck, head, test = c["neck"], c["head"], c["test_cfg"]
    model = FCOS(
        backbone,
        HRFPN(neck["in_channels"], neck["out_channels"], neck["stride"], neck["num_outs"]),
        DenseHead(
            head["feat_channels"],
            head["num_classes"],
            convs=head["stacked_convs"],
            norm="gn",
            centerness="cls",
            scales=neck["num_outs"],
        ),
        [8 * stride for stride in head["strides"][:-1]],
        distances="exp",
        radius=None,
        box_loss=head["loss_bbox"]["type"].removesuffix("Loss").lower(),
        score=test["score_thr"],
        topk=test["nms_pre"],
        nms_iou=test["nms"]["iou_threshold"],
        max_detections=test["max_per_img"],
    )
    regroup(model, head["norm_cfg"]["num_groups"])
    assert list(model.neck.strides) == head["strides"] and list(backbone.channels) == neck["in_channels"]
    missing, unexpected = model.load_state_dict(fixture.weights(TABLE), strict=False)
    assert not unexpected and all(key.endswith(("num_batches_tracked", ".conv.bias")) for key in missing)
    return model.train(mode == "train")


def predict(model: FCOS, fixture: Fixture) -> Predictions:
    return model.head(model.neck(model.backbone(fixture["input/feat/0"])))


@each("hrnet_fcos_mmdet")
def test_fixture_hrnet_names_are_known_for_what_they_are(name: str) -> None:
    fixture = read(name)
    model, names = build(fixture, "eval"), list(fixture.under("weights"))
    assert best_table(names, set(model.state_dict())) == TABLE
    backbone = [key.removeprefix("backbone.") for key in names if key.startswith("backbone.")]
    assert best_table(backbone, set(model.backbone.state_dict())) == "hrnet"


@each("hrnet_fcos_mmdet")
def test_fixture_hrnet_features(name: str) -> None:
    fixture = read(name)
    model = build(fixture, "eval")
    with torch.no_grad():
        branches = model.backbone(fixture["input/feat/0"])
        levels = model.neck(branches)
    for i, branch in enumerate(branches):
        fixture.close(branch, f"expect/eval/backbone/{i}", "head")
    for i, level in enumerate(levels):
        fixture.close(level, f"expect/eval/neck/{i}", "head")


@each("hrnet_fcos_mmdet")
@MODES
def test_fixture_hrnet_head(name: str, mode: str) -> None:
    fixture, at = read(name), f"expect/{mode}"
    model = build(fixture, mode)
    with torch.no_grad():
        predictions = predict(model, fixture)
    distances = model._distances(predictions.boxes, model.points(predictions)[1])
    wanted = {"cls_logits": predictions.logits, "box_pred": distances}
    wanted["centerness"] = predictions.centerness[..., None]
    for key, rows in wanted.items():
        for i, level in enumerate(maps(rows, model, predictions)):
            fixture.close(level, f"{at}/{key}/{i}", "head")
    buffers = dict(model.named_buffers())
    for key in fixture.under(f"{at}/buffers_after"):
        fixture.close(buffers[rename(key, TABLE)], f"{at}/buffers_after/{key}", "head")


@each("hrnet_fcos_mmdet")
@MODES
def test_fixture_hrnet_assignment(name: str, mode: str) -> None:
    fixture, at = read(name), f"expect/{mode}"
    model, targets = build(fixture, mode), targets_of(fixture)
    with torch.no_grad():
        predictions = predict(model, fixture)
    points, _ = model.points(predictions)
    if f"{at}/points/0" in fixture:
        for i, level in enumerate(points.split(model.level_rows(predictions))):
            fixture.close(level, f"{at}/points/{i}", "boxes")
    assigned = model.assign(predictions, targets)
    foreground = assigned >= 0
    assert foreground.sum() == fixture[f"{at}/num_positive"]
    labels, boxes = learned(assigned, targets, torch.zeros(assigned.shape[1], 4))
    classes = fixture.config["head"]["num_classes"]
    assert labels.where(labels != BACKGROUND, classes).equal(fixture[f"{at}/point_label"])
    distances = to_distances(boxes, points)
    fixture.close(distances.where(foreground[..., None], 0.0), f"{at}/box_target", "boxes")
    fixture.close(centerness(distances).where(foreground, 0.0), f"{at}/centerness_target", "scores")


@each("hrnet_fcos_mmdet")
@MODES
def test_fixture_hrnet_losses_and_gradients(name: str, mode: str) -> None:
    fixture, at = read(name), f"expect/{mode}"
    model = build(fixture, mode)
    losses = model.losses(predict(model, fixture), targets_of(fixture))
    for ours, theirs in zip(TERMS, MMDET_TERMS, strict=True):
        fixture.close(losses[ours], f"{at}/loss/{theirs}", "loss")
    total = torch.stack(list(losses.values())).sum()
    fixture.close(total, f"{at}/loss/total", "loss")

    total.backward()
    parameters = dict(model.named_parameters())
    names = [rename(key, TABLE) for key in fixture.names(f"{at}/grad_norm_names")]
    wanted = zip(names, fixture[f"{at}/grad_norms"], strict=True)
    shares = torch.stack([share_of_error(parameters[key].grad.norm(), norm, key) for key, norm in wanted])
    assert shares.quantile(0.99) <= 1, "a ReLU that rounding flips may spoil single small tensors, no more"
    for key, gradient in fixture.under(f"{at}/grad").items():
        ours = rename(key, TABLE)
        assert share_of_error(parameters[ours].grad, gradient, ours) <= 1, key


def share_of_error(got: Tensor, wanted: Tensor, name: str) -> Tensor:
    """Relative error, as a share of what is tolerated."""
    return (got - wanted).norm() / wanted.norm().clamp(min=1e-7) / GRADIENTS[name.split(".")[0]]


@each("hrnet_fcos_mmdet")
def test_fixture_hrnet_detections(name: str) -> None:
    """The whole way that evaluation takes, behind the normalisation of pixels."""
    fixture = read(name)
    model = build(fixture, "eval")
    image, sizes = fixture["input/feat/0"], fixture["input/image_sizes"]
    model.normalize = Already()
    found = model.detect(image, sizes)
    scale = (fixture["input/output_sizes"] / sizes).flip(1).repeat(1, 2)
    for i, count in enumerate(found.count.tolist()):
        for at, boxes in (("det", found.boxes[i]), ("det_resized", found.boxes[i] * scale[i])):
            fixture.close(boxes[:count].float(), f"expect/eval/{at}/{i}/boxes", "boxes")
            fixture.close(found.scores[i, :count], f"expect/eval/{at}/{i}/scores", "scores")
            fixture.close(found.labels[i, :count], f"expect/eval/{at}/{i}/labels", "det_labels")


class Already(nn.Module):
    """The file's images are normalised."""

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        return images
