"""Anchors by their IoU with ground truth (Faster R-CNN, arXiv:1506.01497, section 3.1.2)."""

import torch
from torch import Tensor

from detcore.ops.boxes import pairwise_iou
from detcore.ops.matching import BACKGROUND, IGNORED, better, in_chunks
from detcore.ops.targets import Targets


@torch.no_grad()
def iou_match(anchors: Tensor, targets: Targets, negative: float, positive: float) -> Tensor:
    """Anchors (R, 4) -> (N, R): the best ground truth from IoU `positive` on, BACKGROUND below `negative`.

    A ground truth's best anchors, all that tie, are taken however bad they are. Each keeps the ground truth
    that is best for it, which may be another, as in detectron2. Ties go to the lower index.
    """
    best, needed = None, False
    for first, boxes, labels in in_chunks(targets, len(anchors)):
        iou = torch.where(labels[:, None, :] >= 0, pairwise_iou(anchors, boxes), 0.0)  # (N, R, g)
        best = better(best, iou, first)
        most = iou.amax(dim=1, keepdim=True)
        needed = needed | ((iou == most) & (most > 0)).any(dim=2)
    unsure = torch.where(best.score < negative, BACKGROUND, IGNORED)
    return torch.where(needed | (best.score >= positive), best.gt, unsure)
