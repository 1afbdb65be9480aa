"""Adaptive Training Sample Selection (ATSS), arXiv:1912.02424, as mmdetection and as the authors have it."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detcore.models.dense import DenseDetector
from detcore.models.heads import DenseHead, Predictions, of_rows
from detcore.necks import build_pyramid
from detcore.ops.anchors import grid_anchors, grid_points
from detcore.ops.boxes import to_cxcywh
from detcore.ops.coder import DeltaCoder, centerness, to_distances
from detcore.ops.focal import focal_loss
from detcore.ops.losses import giou_loss, mean_over_ranks
from detcore.ops.matching import learned
from detcore.ops.matching.atss import INSIDE, atss_match
from detcore.ops.targets import Targets

BOX_WEIGHT = 2.0  # of the box loss, against the other two


class ATSS(DenseDetector):
    """One square anchor in each cell of P3 to P7, R in all.

    scale       side of an anchor, in strides
    candidates  see `atss_match`
    style       "mmdet" or "original", as in sfzhang15/ATSS. Boxes end with their last pixel there: x2 and y2
                are 1 less than ours. Where that 1 is added (IoU, deltas, NMS) all is as with our boxes, with
                anchors at (i + 1/2) stride + 1/2; where it is not (centres inside of boxes, centerness,
                GIoU) boxes are ours without half a pixel all around.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        head: DenseHead,
        *,
        scale: float = 8.0,
        candidates: int = 9,
        style: Literal["mmdet", "original"] = "mmdet",
        **test: Any,
    ) -> None:
        super().__init__(backbone, neck, head, **test)
        self.scale, self.candidates, self.original = scale, candidates, style == "original"
        self.rim = 0.5 if self.original else 0.0  # pixels that boxes are without, all around
        self.coder = DeltaCoder((10.0, 10.0, 5.0, 5.0), symmetric=not self.original)

    def anchors(self, predictions: Predictions) -> Tensor:
        """(R, 4), pixels."""
        device, offset = predictions.boxes.device, 0.5 if self.original else 0.0
        levels = zip(predictions.shapes, self.neck.strides, strict=True)
        return torch.cat(
            [
                grid_anchors(grid_points(*shape, stride, offset, device) + self.rim, [self.scale * stride])
                for shape, stride in levels
            ]
        )

    def decode(self, predictions: Predictions, rows: Tensor | None = None) -> Tensor:
        return self.coder.decode(*of_rows(rows, predictions.boxes, self.anchors(predictions)))

    def assign(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Algorithm 1 -> (N, R)."""
        anchors, levels = self.anchors(predictions), self.level_rows(predictions)
        return atss_match(anchors, levels, targets, self.candidates, INSIDE + self.rim)

    def losses(self, predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        """Focal loss over all anchors; over foreground GIoU loss, weighted by the centerness that the
        anchors should have, and the centerness loss. All are sums, that of boxes divided by the sum of its
        weights, the others by the number of foreground anchors, means over ranks. In mmdetection an image
        without any counts as one anchor, and no sum of weights as less than 1."""
        anchors, assigned = self.anchors(predictions), self.assign(predictions, targets)
        labels, boxes = learned(assigned, targets, otherwise=anchors)
        foreground = assigned >= 0
        central = centerness(to_distances(boxes, to_cxcywh(anchors)[:, :2]) - self.rim)
        weight = torch.where(foreground, central, 0.0)
        count = foreground.sum(dim=1).clamp(min=0 if self.original else 1).sum()
        count, weights = mean_over_ranks(torch.stack([count.float(), weight.sum()])).unbind()
        count, weights = count.clamp(min=1), weights.clamp(min=1e-6 if self.original else 1)

        predicted = torch.where(foreground[..., None], self.coder.decode(predictions.boxes, anchors), anchors)
        loss_box = giou_loss(*(self._without_rim(one) for one in (predicted, boxes))) * weight
        loss_centerness = F.binary_cross_entropy_with_logits(
            predictions.centerness, central, weight=foreground.float(), reduction="sum"
        )
        return {
            "loss_cls": focal_loss(predictions.logits, labels) / count,
            "loss_box_reg": BOX_WEIGHT * loss_box.sum() / weights,
            "loss_centerness": loss_centerness / count,
        }

    def _without_rim(self, boxes: Tensor) -> Tensor:
        """Boxes (..., 4), of which those that are nothing but rim have no area."""
        if not self.rim:
            return boxes
        lower, upper = boxes[..., :2] + self.rim, boxes[..., 2:] - self.rim
        return torch.cat([lower, torch.maximum(lower, upper)], dim=-1)


def build_atss(cfg: Any) -> ATSS:
    """cfg: the recipe's `train.model`."""
    backbone, neck = build_pyramid(cfg, top="p5", relu=False)
    head = DenseHead(
        cfg.head.channels,
        cfg.num_classes,
        convs=cfg.head.convs,
        norm="gn",
        centerness="reg",
        scales=len(neck.strides),
    )
    return ATSS(
        backbone,
        neck,
        head,
        scale=cfg.scale,
        candidates=cfg.candidates,
        style=cfg.style,
        score=cfg.test.score,
        topk=cfg.test.topk,
        nms_iou=cfg.test.nms,
        max_detections=cfg.test.max,
    )
