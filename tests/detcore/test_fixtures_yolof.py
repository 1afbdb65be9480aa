"""YOLOF against numbers from its reference implementation; see tests/fixtures/README.md."""

import pytest
import torch
from fixture_files import Fixture, each, read
from torch import Tensor, nn

from detcore.backbones.layers import TORCHVISION_PIXELS
from detcore.models.yolof import YOLOF, Decoder, DilatedEncoder
from detcore.ops.boxes import clip
from detcore.ops.coder import MAX_LOG_SCALE, DeltaCoder
from detcore.ops.matching import BACKGROUND, IGNORED
from detcore.ops.targets import Targets
from detcore.weights.keys import rename
from tests.detcore.conftest import pad_targets

MODES = pytest.mark.parametrize("mode", ["eval", "train"])


class C5(nn.Module):
    """Stands where the backbone does; the tests give C5 itself."""

    pixels = TORCHVISION_PIXELS


def build(fixture: Fixture, mode: str) -> YOLOF:
    """The reference's head as the file describes it, in front of nothing: its input is C5."""
    c = fixture.config
    encoder = DilatedEncoder(c["in_channels"], c["encoder_channels"], c["mid_channels"], c["dilations"])
    decoder = Decoder(
        c["encoder_channels"], c["num_classes"], len(c["anchor_sizes"]), c["cls_convs"], c["reg_convs"]
    )
    model = YOLOF(
        C5(),
        encoder,
        decoder,
        c["anchor_sizes"],
        stride=c["stride"],
        top=c["match_times"],
        pos_ignore=c["pos_ignore_thresh"],
        neg_ignore=c["neg_ignore_thresh"],
        score=c["score_thresh"],
        topk=c["topk"],
        nms_iou=c["nms_thresh"],
        max_detections=c["max_dets"],
    )
    model.coder = DeltaCoder(tuple(c["box_weights"]), c["ctr_clamp"])
    assert c["scale_clamp"] == pytest.approx(MAX_LOG_SCALE)  # what YOLOF has no argument for
    assert (c["focal_alpha"], c["focal_gamma"], c["anchor_offset"]) == (0.25, 2.0, 0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = c["bn_eps"], c["bn_momentum"]
    missing, unexpected = model.load_state_dict(fixture.weights("yolof"), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    return model.train(mode == "train")


def targets_of(fixture: Fixture) -> Targets:
    return pad_targets(fixture.per_image("target/boxes"), fixture.per_image("target/labels"))


@each("yolof")
@MODES
def test_fixture_yolof_head(name: str, mode: str) -> None:
    fixture, at = read(name), f"expect/{mode}"
    with torch.no_grad():
        model = build(fixture, mode)
        fixture.close(model.encoder(fixture["input/c5"]), f"{at}/encoder_out", "head")
        model = build(fixture, mode)  # one forward pass: the running statistics are compared below
        logits, deltas = model.predict(fixture["input/c5"])
    fixture.close(logits, f"{at}/cls_logits", "head")
    fixture.close(deltas, f"{at}/box_deltas", "head")
    fixture.close(model.anchors(deltas), "expect/anchors", "boxes")
    fixture.close(model.decode(deltas), f"{at}/decoded_boxes", "boxes")
    buffers = dict(model.named_buffers())
    for key in fixture.under(f"{at}/buffers_after"):
        fixture.close(buffers[rename(key, "yolof")], f"{at}/buffers_after/{key}", "head")


@each("yolof")
@MODES
def test_fixture_yolof_assignment(name: str, mode: str) -> None:
    fixture, at = read(name), f"expect/{mode}"
    model, targets = build(fixture, mode), targets_of(fixture)
    with torch.no_grad():
        _, deltas = model.predict(fixture["input/c5"])
    matches = model.assign(model.decode(deltas), model.anchors(deltas), targets)
    for i in range(len(targets.labels)):
        real = matches.real[i]
        assert matches.anchor[i][real].equal(fixture[f"{at}/match_anchor/{i}"])
        assert matches.gt[i][real].equal(fixture[f"{at}/match_gt/{i}"])
        assert (~matches.positive[i][real]).equal(fixture[f"{at}/match_pos_ignored/{i}"])
    foreground = matches.assigned >= 0
    assert foreground.sum() == fixture[f"{at}/num_foreground"]

    label = torch.empty_like(matches.assigned)  # the file's words: class, K background, -1 ignored
    label[matches.assigned == BACKGROUND] = fixture.config["num_classes"]
    label[matches.assigned == IGNORED] = -1
    image = torch.arange(len(label))[:, None].expand_as(label)[foreground]
    label[foreground] = targets.labels[image, matches.assigned[foreground]]
    assert label.equal(fixture[f"{at}/anchor_label"])


@each("yolof")
@MODES
def test_fixture_yolof_losses_and_gradients(name: str, mode: str) -> None:
    fixture, at = read(name), f"expect/{mode}"
    model = build(fixture, mode)
    c5 = fixture["input/c5"].clone().requires_grad_()
    losses = model.losses(*model.predict(c5), targets_of(fixture))
    total = sum(losses.values())
    for key, loss in losses.items():
        fixture.close(loss, f"{at}/loss/{key}", "loss")
    fixture.close(total, f"{at}/loss/total", "loss")

    total.backward()
    parameters = dict(model.named_parameters())
    names = [rename(key, "yolof") for key in fixture.names(f"{at}/grad_norm_names")]
    assert set(names) == set(parameters)
    fixture.close(torch.stack([parameters[key].grad.norm() for key in names]), f"{at}/grad_norms", "grad")
    for key in fixture.under(f"{at}/grad"):
        fixture.close(parameters[rename(key, "yolof")].grad, f"{at}/grad/{key}", "grad")
    fixture.close(c5.grad, f"{at}/grad_c5", "grad")


@each("yolof")
def test_fixture_yolof_detections(name: str) -> None:
    fixture = read(name)
    model = build(fixture, "eval")
    with torch.no_grad():
        logits, deltas = model.predict(fixture["input/c5"])
    found = model.select(logits, model.decode(deltas))
    resized = resize(found.boxes, fixture["input/image_sizes"], fixture["input/output_sizes"])
    for i, count in enumerate(found.count.tolist()):
        for key, boxes in (("det", found.boxes), ("det_resized", resized)):
            at, rows = f"expect/eval/{key}/{i}", slice(0, count)
            kept = torch.ones(count, dtype=torch.bool)
            if key == "det_resized":  # boxes that the image's edge left without an area are dropped
                kept = (boxes[i, rows, 2:] > boxes[i, rows, :2]).all(dim=1)
            fixture.close(boxes[i, rows][kept], f"{at}/boxes", "boxes")
            fixture.close(found.scores[i, rows][kept], f"{at}/scores", "scores")
            fixture.close(found.labels[i, rows][kept], f"{at}/labels", "det_labels")


@each("yolof")
def test_fixture_yolof_detect(name: str) -> None:
    """The whole way that evaluation takes, with C5 in place of a backbone: inside the image, as stored."""
    fixture = read(name)
    model = build(fixture, "eval")
    model.features = lambda images, sizes: images
    found = model.detect(fixture["input/c5"], fixture["input/image_sizes"])
    scale = fixture["input/output_sizes"] / fixture["input/image_sizes"]
    for i, count in enumerate(found.count.tolist()):
        at = f"expect/eval/det_resized/{i}"
        boxes = found.boxes[i, :count] * scale[i].flip(0).repeat(2)
        fixture.close(boxes.float(), f"{at}/boxes", "boxes")
        fixture.close(found.scores[i, :count], f"{at}/scores", "scores")
        fixture.close(found.labels[i, :count], f"{at}/labels", "det_labels")
        assert (found.labels[i, count:] == -1).all() and not found.boxes[i, count:].any()


def resize(boxes: Tensor, sizes: Tensor, output_sizes: Tensor) -> Tensor:
    scale = (output_sizes / sizes).flip(1).repeat(1, 2)
    return clip(boxes * scale[:, None], output_sizes).float()
