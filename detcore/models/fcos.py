"""FCOS: Fully Convolutional One-Stage Object Detection, arXiv:1904.01355, its improvements, and
the variants of detectron2 and torchvision."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detcore.models.dense import DenseDetector
from detcore.models.heads import DenseHead, Predictions, of_rows
from detcore.necks import build_pyramid
from detcore.ops.anchors import grid_points, whole_steps
from detcore.ops.coder import centerness, from_distances, to_distances
from detcore.ops.focal import focal_loss
from detcore.ops.losses import MovingCount, giou_loss, iou_loss, mean_over_ranks
from detcore.ops.matching import learned
from detcore.ops.matching.points import points_match
from detcore.ops.targets import Targets

MAX_LOG_DISTANCE = math.log(1e6)  # beyond any image, and exp() cannot overflow
BOX_LOSSES = {"giou": giou_loss, "iou": iou_loss}


class FCOS(DenseDetector):
    """One point in each cell of P3 to P7, R in all.

    ranges     largest distance, pixels, that each level but the last is for (section 3.2)
    distances  "relu": max(0, x) in strides; "exp": e^x in pixels
    radius     of centre sampling, in strides; None: none
    box_loss   "giou" or "iou"
    style      "original", "detectron2" or "torchvision". detectron2's matches a little otherwise (see
               `points_match`), weighs all boxes alike, and divides all losses by a moving average (see
               `MovingCount`). Its score, by which it also chooses candidates, is sqrt(class * centerness).
               torchvision's is like it, but its points are the cells' first corners (see `whole_steps`), and
               its boxes are cut to the image before NMS.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        head: DenseHead,
        ranges: Sequence[float],
        *,
        distances: Literal["relu", "exp"] = "relu",
        radius: float | None = 1.5,
        box_loss: Literal["giou", "iou"] = "giou",
        style: Literal["original", "detectron2", "torchvision"] = "original",
        **test: Any,
    ) -> None:
        super().__init__(backbone, neck, head, **test)
        self.bounds = (0.0, *ranges, math.inf)
        self.distances, self.radius = distances, math.inf if radius is None else radius
        self.box_loss, self.detectron2 = BOX_LOSSES[box_loss], style != "original"
        self.torchvision = style == "torchvision"
        self.clip_first = style != "detectron2"
        self.normalizer = MovingCount(300.0) if self.detectron2 else None

    def points(self, predictions: Predictions) -> tuple[Tensor, Tensor]:
        """The cells' centres (R, 2), torchvision's corners, and their strides (R,), pixels."""
        strides, offset = self.neck.strides, 0.0 if self.torchvision else 0.5
        steps = whole_steps(predictions.shapes, strides[0]) if self.torchvision else strides
        levels = [
            grid_points(*shape, step, offset, predictions.boxes.device)
            for shape, step in zip(predictions.shapes, steps, strict=True)
        ]
        return torch.cat(levels), self._of_levels(self.neck.strides, predictions)

    def decode(self, predictions: Predictions, rows: Tensor | None = None) -> Tensor:
        raw, points, strides = of_rows(rows, predictions.boxes, *self.points(predictions))
        return from_distances(self._distances(raw, strides), points)

    def assign(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Section 3.2 -> (N, R)."""
        points, strides = self.points(predictions)
        least, most = (self._of_levels(bounds, predictions) for bounds in (self.bounds[:-1], self.bounds[1:]))
        ranges = torch.stack([least, most], dim=-1)
        return points_match(points, self.radius * strides, ranges, targets, self.detectron2)

    def losses(self, predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        """Focal loss over all points; over foreground the box loss, weighted by the centerness that the
        points should have, and the centerness loss. All are sums, that of boxes divided by the sum of its
        weights, the others by the number of foreground points, means over ranks."""
        points, strides = self.points(predictions)
        assigned = self.assign(predictions, targets)
        cells = torch.cat([points - strides[:, None] / 2, points + strides[:, None] / 2], dim=-1)
        labels, boxes = learned(assigned, targets, otherwise=cells)
        foreground = assigned >= 0
        central = centerness(to_distances(boxes, points))
        weight = torch.where(foreground, 1.0 if self.detectron2 else central, 0.0)

        predicted = torch.where(foreground[..., None], self.decode(predictions), cells)
        loss_box = (self.box_loss(predicted, boxes) * weight).sum()
        loss_centerness = F.binary_cross_entropy_with_logits(
            predictions.centerness, central, weight=foreground.float(), reduction="sum"
        )
        if self.detectron2:
            count = weights = self.normalizer(foreground.sum())
        else:
            count, weights = mean_over_ranks(torch.stack([foreground.sum().float(), weight.sum()])).unbind()
            count, weights = count.clamp(min=1), weights.clamp(min=1e-6)
        return {
            "loss_cls": focal_loss(predictions.logits, labels) / count,
            "loss_box_reg": loss_box / weights,
            "loss_centerness": loss_centerness / count,
        }

    def scores(self, predictions: Predictions) -> tuple[Tensor, Tensor | None]:
        classes, quality = super().scores(predictions)
        return ((classes * quality[..., None]).sqrt(), None) if self.detectron2 else (classes, quality)

    def _distances(self, raw: Tensor, strides: Tensor) -> Tensor:
        """Raw predictions (N, R, 4) -> l, t, r, b in pixels."""
        if self.distances == "relu":
            return F.relu(raw) * strides[..., None]
        return raw.clamp(max=MAX_LOG_DISTANCE).exp()

    def _of_levels(self, values: Sequence[float], predictions: Predictions) -> Tensor:
        """One value for each level -> (R,)."""
        counts = zip(values, self.level_rows(predictions), strict=True)
        return torch.cat([predictions.boxes.new_full((count,), value) for value, count in counts])


def build_fcos(cfg: Any) -> FCOS:
    """cfg: the recipe's `train.model`."""
    backbone, neck = build_pyramid(cfg, top="p5")
    head = DenseHead(
        cfg.head.channels,
        cfg.num_classes,
        convs=cfg.head.convs,
        norm="gn",
        centerness=cfg.centerness,
        scales=len(neck.strides) if cfg.style == "original" else 0,
    )
    return FCOS(
        backbone,
        neck,
        head,
        cfg.ranges,
        distances=cfg.distances,
        radius=cfg.radius,
        box_loss=cfg.box_loss,
        style=cfg.style,
        score=cfg.test.score,
        topk=cfg.test.topk,
        nms_iou=cfg.test.nms,
        max_detections=cfg.test.max,
    )
