"""ATSS as its authors have it: what sfzhang15/ATSS computes, box by box in its own terms, from the formulas.

Boxes end with their last pixel there, so that a width is x2 - x1 + 1; ours are those with x2 and y2 one more.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detcore.models.atss import ATSS, build_atss
from detcore.models.heads import Predictions
from detcore.ops.targets import Targets
from tests.detcore.conftest import model_section, pad_targets, total
from tests.detcore.sections import section

SHAPES = ((12, 16), (6, 8), (3, 4), (2, 2), (1, 1))  # of 96 x 128 pixels
STRIDES = (8, 16, 32, 64, 128)
LAST_PIXEL = torch.tensor([0.0, 0, 1, 1])
Box = tuple[float, float, float, float]


def detector(style: str) -> ATSS:
    torch.manual_seed(0)
    return build_atss(model_section(section("atss", style=style)))


def their_anchors() -> list[Box]:
    """Sides of 8 strides, last pixel included, around the middle of each cell."""
    boxes = []
    for (height, width), stride in zip(SHAPES, STRIDES, strict=True):
        reach = (8 * stride - 1) / 2
        for row in range(height):
            for column in range(width):
                x, y = stride / 2 + column * stride, stride / 2 + row * stride
                boxes.append((x - reach, y - reach, x + reach, y + reach))
    return boxes


def center(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def iou(a: Box, b: Box) -> float:
    def size(box: Box) -> float:
        return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)

    common = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1)]
    shared = max(common[0], 0) * max(common[1], 0)
    return shared / (size(a) + size(b) - shared)


def sides(box: Box, point: tuple[float, float]) -> list[float]:
    """How far left, top, right and bottom are, without any 1."""
    (x1, y1, x2, y2), (x, y) = box, point
    return [x - x1, y - y1, x2 - x, y2 - y]


def their_match(anchors: list[Box], objects: list[Box]) -> list[int]:
    """Algorithm 1 -> an object for each anchor, or -1."""
    best = [(-1.0, -1)] * len(anchors)
    for number, box in enumerate(objects):
        candidates, first = [], 0
        for height, width in SHAPES:
            level = range(first, first + height * width)
            near = sorted(level, key=lambda i, box=box: math.dist(center(anchors[i]), center(box)))
            candidates += near[:9]
            first += height * width
        ious = torch.tensor([iou(anchors[i], box) for i in candidates], dtype=torch.float64)
        for i, overlap in zip(candidates, ious.tolist(), strict=True):
            inside = min(sides(box, center(anchors[i]))) > 0.01
            if overlap >= ious.mean() + ious.std() and inside and overlap > best[i][0]:
                best[i] = (overlap, number)
    return [number for _, number in best]


def their_decode(deltas: list[float], anchor: Box) -> Box:
    (x, y), w, h = center(anchor), anchor[2] - anchor[0] + 1, anchor[3] - anchor[1] + 1
    x, y = x + deltas[0] / 10 * w, y + deltas[1] / 10 * h
    w, h = (side * math.exp(min(d / 5, math.log(1000 / 16))) for side, d in ((w, deltas[2]), (h, deltas[3])))
    return (x - (w - 1) / 2, y - (h - 1) / 2, x + (w - 1) / 2, y + (h - 1) / 2)


def giou(a: Box, b: Box) -> float:
    """Without any 1."""
    common = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    shared = common[0] * common[1] if min(common) > 0 else 0.0
    hull = math.prod(max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / union - (hull - union) / hull


@pytest.fixture
def batch() -> tuple[Predictions, Targets]:
    """Predictions near the anchors; many objects, one, and none. One in the first image is 4 pixels wide, so
    that half a pixel matters."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(3, sum(h * w for h, w in SHAPES), *shape, generator=generator)

    corner = torch.rand(12, 2, generator=generator) * torch.tensor([90.0, 60.0])
    size = 4 + torch.rand(12, 2, generator=generator) ** 2 * torch.tensor([70.0, 50.0])
    boxes = torch.cat([corner, corner + size], dim=1)
    boxes[0] = torch.tensor([18.3, 10.1, 22.3, 40.2])
    labels = [torch.arange(12) % 3, torch.tensor([1]), torch.zeros(0, dtype=torch.int64)]
    targets = pad_targets([boxes, torch.tensor([[20.2, 11.3, 99.1, 90.7]]), torch.zeros(0, 4)], labels)
    return Predictions(noise(3), noise(4), noise(), SHAPES), targets


def theirs(targets: Targets) -> list[list[Box]]:
    """The objects of each image in their terms."""
    pairs = zip(targets.boxes - LAST_PIXEL, targets.labels >= 0, strict=True)
    return [[tuple(box) for box in boxes[real].double().tolist()] for boxes, real in pairs]


def test_the_authors_anchors(batch: tuple[Predictions, Targets]) -> None:
    assert their_anchors()[0] == (-27.5, -27.5, 35.5, 35.5)
    found = detector("original").anchors(batch[0]) - LAST_PIXEL
    torch.testing.assert_close(found, torch.tensor(their_anchors()))


def test_the_authors_matches(batch: tuple[Predictions, Targets]) -> None:
    wanted = torch.tensor([their_match(their_anchors(), objects) for objects in theirs(batch[1])])
    assert detector("original").assign(*batch).equal(wanted) and (wanted >= 0).sum() > 20
    assert not detector("mmdet").assign(*batch).equal(wanted)


def test_the_authors_boxes(batch: tuple[Predictions, Targets]) -> None:
    predictions = batch[0]
    predictions.boxes[0, 0] = torch.tensor([1.0, -1, -30, 30])  # bounded where it grows only
    found = detector("original").decode(predictions)[0] - LAST_PIXEL
    pairs = zip(predictions.boxes[0].tolist(), their_anchors(), strict=True)
    torch.testing.assert_close(
        found, torch.tensor([their_decode(*pair) for pair in pairs]), rtol=1e-5, atol=1e-3
    )


def test_the_authors_losses(batch: tuple[Predictions, Targets]) -> None:
    """Divided by the matches and by the sum of their centerness, whatever images have none."""
    predictions, targets = batch
    anchors, box_loss, weights, quality_loss = their_anchors(), 0.0, 0.0, 0.0
    wanted = torch.zeros_like(predictions.logits)
    for image, objects in enumerate(theirs(targets)):
        for row, number in enumerate(their_match(anchors, objects)):
            if number < 0:
                continue
            wanted[image, row, targets.labels[image, number]] = 1
            left, top, right, bottom = sides(objects[number], center(anchors[row]))
            across, down = min(left, right) / max(left, right), min(top, bottom) / max(top, bottom)
            weight = math.sqrt(across * down)
            box = their_decode(predictions.boxes[image, row].tolist(), anchors[row])
            box_loss += weight * (1 - giou(box, objects[number]))
            weights += weight
            logit = predictions.centerness[image, row]
            quality_loss += F.binary_cross_entropy_with_logits(logit, torch.tensor(weight)).item()
    count = wanted.sum()
    p = predictions.logits.sigmoid()
    focal = -0.25 * wanted * (1 - p) ** 2 * p.log() - 0.75 * (1 - wanted) * p**2 * (1 - p).log()
    expected: dict[str, Any] = {
        "loss_cls": focal.sum() / count,
        "loss_box_reg": 2 * box_loss / weights,
        "loss_centerness": quality_loss / count,
    }
    losses = detector("original").losses(predictions, targets)
    others = detector("mmdet").losses(predictions, targets)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], torch.as_tensor(value), rtol=1e-4, atol=0, check_dtype=False)
        assert (others[name] - losses[name]).abs() > 1e-3 * losses[name]


def test_without_any_object_the_authors_losses_are_finite(batch: tuple[Predictions, Targets]) -> None:
    predictions, _ = batch
    predictions = predictions._replace(boxes=predictions.boxes.requires_grad_())
    losses = detector("original").losses(
        predictions, Targets(torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.int64))
    )
    total(losses).backward()
    assert total(losses).isfinite() and losses["loss_box_reg"] == 0 and not predictions.boxes.grad.any()
