"""Adaptive Training Sample Selection (ATSS), arXiv:1912.02424, with mmdetection's numbers."""

from typing import Any

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
from detcore.ops.matching.atss import atss_match
from detcore.ops.targets import Targets

BOX_WEIGHT = 2.0  # of the box loss, against the other two


class ATSS(DenseDetector):
    """One square anchor in each cell of P3 to P7, R in all.

    scale       side of an anchor, in strides
    offset      where in its cell the centre is
    candidates  see `atss_match`
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        head: DenseHead,
        *,
        scale: float = 8.0,
        offset: float = 0.0,
        candidates: int = 9,
        **test: Any,
    ) -> None:
        super().__init__(backbone, neck, head, **test)
        self.scale, self.offset, self.candidates = scale, offset, candidates
        self.coder = DeltaCoder((10.0, 10.0, 5.0, 5.0), symmetric=True)

    def anchors(self, predictions: Predictions) -> Tensor:
        """(R, 4), pixels."""
        device = predictions.boxes.device
        levels = zip(predictions.shapes, self.neck.strides, strict=True)
        return torch.cat(
            [
                grid_anchors(grid_points(*shape, stride, self.offset, device), [self.scale * stride])
                for shape, stride in levels
            ]
        )

    def decode(self, predictions: Predictions, rows: Tensor | None = None) -> Tensor:
        return self.coder.decode(*of_rows(rows, predictions.boxes, self.anchors(predictions)))

    def assign(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Algorithm 1 -> (N, R)."""
        levels = self.level_rows(predictions)
        return atss_match(self.anchors(predictions), levels, targets, self.candidates)

    def losses(self, predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        """Focal loss over all anchors; over foreground GIoU loss, weighted by the centerness that the
        anchors should have, and the centerness loss. All are sums, that of boxes divided by the sum of its
        weights, the others by the number of foreground anchors, means over ranks. As in mmdetection, an
        image without any counts as one anchor."""
        anchors, assigned = self.anchors(predictions), self.assign(predictions, targets)
        labels, boxes = learned(assigned, targets, otherwise=anchors)
        foreground = assigned >= 0
        central = centerness(to_distances(boxes, to_cxcywh(anchors)[:, :2]))
        weight = torch.where(foreground, central, 0.0)
        count = foreground.sum(dim=1).clamp(min=1).sum()
        count, weights = mean_over_ranks(torch.stack([count.float(), weight.sum()])).clamp(min=1).unbind()

        predicted = self.coder.decode(predictions.boxes, anchors)
        loss_box = giou_loss(torch.where(foreground[..., None], predicted, anchors), boxes) * weight
        loss_centerness = F.binary_cross_entropy_with_logits(
            predictions.centerness, central, weight=foreground.float(), reduction="sum"
        )
        return {
            "loss_cls": focal_loss(predictions.logits, labels) / count,
            "loss_box_reg": BOX_WEIGHT * loss_box.sum() / weights,
            "loss_centerness": loss_centerness / count,
        }


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
        offset=cfg.offset,
        candidates=cfg.candidates,
        score=cfg.test.score,
        topk=cfg.test.topk,
        nms_iou=cfg.test.nms,
        max_detections=cfg.test.max,
    )
