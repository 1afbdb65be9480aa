"""Focal Loss for Dense Object Detection (RetinaNet), arXiv:1708.02002, with detectron2's numbers, and
torchvision's variant."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detcore.models.dense import DenseDetector
from detcore.models.heads import DenseHead, Predictions, of_rows
from detcore.necks import build_pyramid
from detcore.ops.anchors import grid_anchors, grid_points, whole_steps
from detcore.ops.coder import DeltaCoder
from detcore.ops.focal import focal_loss
from detcore.ops.losses import MovingCount, smooth_l1_loss
from detcore.ops.matching import learned
from detcore.ops.matching.iou import iou_match
from detcore.ops.targets import Targets


class RetinaNet(DenseDetector):
    """A = len(sizes[0]) * len(ratios) anchors in each cell of P3 to P7, R in all.

    sizes               of each level, pixels: the roots of its anchors' areas
    ratios              height by width
    negative, positive  see `iou_match`
    normalizer          see `MovingCount`
    style               "detectron2" or "torchvision". The latter's anchors have whole pixels (see
                        `grid_anchors` and `whole_steps`), and its boxes are cut to the image before NMS.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        head: DenseHead,
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float],
        *,
        negative: float = 0.4,
        positive: float = 0.5,
        normalizer: float = 100.0,
        style: Literal["detectron2", "torchvision"] = "detectron2",
        **test: Any,
    ) -> None:
        super().__init__(backbone, neck, head, **test)
        self.sizes, self.ratios = sizes, ratios
        self.coder = DeltaCoder()
        self.match = {"negative": negative, "positive": positive}
        self.normalizer = MovingCount(normalizer)
        self.clip_first = self.torchvision = style == "torchvision"

    def anchors(self, predictions: Predictions) -> Tensor:
        """(R, 4), pixels."""
        device = predictions.boxes.device
        strides = self.neck.strides
        steps = whole_steps(predictions.shapes, strides[0]) if self.torchvision else strides
        levels = zip(predictions.shapes, steps, self.sizes, strict=True)
        return torch.cat(
            [
                grid_anchors(grid_points(*shape, step, 0.0, device), sizes, self.ratios, self.torchvision)
                for shape, step, sizes in levels
            ]
        )

    def decode(self, predictions: Predictions, rows: Tensor | None = None) -> Tensor:
        return self.coder.decode(*of_rows(rows, predictions.boxes, self.anchors(predictions)))

    def assign(self, anchors: Tensor, targets: Targets) -> Tensor:
        """Section 4, "anchors" -> (N, R)."""
        return iou_match(anchors, targets, **self.match)

    def losses(self, predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        """Focal loss over all anchors but the ignored, L1 over the deltas of foreground; both are sums
        divided by the moving average of the number of foreground anchors."""
        anchors = self.anchors(predictions)
        assigned = self.assign(anchors, targets)
        labels, boxes = learned(assigned, targets, otherwise=anchors)
        foreground = assigned >= 0
        normalizer = self.normalizer(foreground.sum())
        distance = smooth_l1_loss(predictions.boxes, self.coder.encode(boxes, anchors))
        return {
            "loss_cls": focal_loss(predictions.logits, labels) / normalizer,
            "loss_box_reg": torch.where(foreground[..., None], distance, 0.0).sum() / normalizer,
        }


def build_retinanet(cfg: Any) -> RetinaNet:
    """cfg: the recipe's `train.model`."""
    anchors = cfg.anchors
    backbone, neck = build_pyramid(cfg, top="p5" if cfg.style == "torchvision" else "c5")
    octaves = [anchors.scale * 2 ** (i / anchors.octave) for i in range(anchors.octave)]
    count = len(octaves) * len(anchors.ratios)
    return RetinaNet(
        backbone,
        neck,
        DenseHead(cfg.head.channels, cfg.num_classes, anchors=count, convs=cfg.head.convs),
        [[stride * octave for octave in octaves] for stride in neck.strides],
        anchors.ratios,
        negative=cfg.match.negative,
        positive=cfg.match.positive,
        normalizer=cfg.normalizer,
        style=cfg.style,
        score=cfg.test.score,
        topk=cfg.test.topk,
        nms_iou=cfg.test.nms,
        max_detections=cfg.test.max,
    )
