"""As many anchors for every ground truth: YOLOF's uniform matching (arXiv:2103.09460, section 4.2)."""

from typing import NamedTuple

import torch
from torch import Tensor

from detcore.ops.boxes import paired_iou, pairwise_iou, to_cxcywh
from detcore.ops.matching import BACKGROUND, IGNORED
from detcore.ops.targets import Targets, at_least_one, pick


class Matches(NamedTuple):
    """A list of E = 2 * top * G (anchor, ground truth) pairs an image, and what it means for each anchor.

    The list is rank-major: for rank 0, 1, ... first the rank-nearest predicted box of ground truth
    0..G-1, then the rank-nearest anchor of 0..G-1. An anchor may occur more than once.

    anchor    (N, E) int64
    gt        (N, E) int64, index into the padded ground truth
    real      (N, E) bool, the pair is not padding
    positive  (N, E) bool, real and not ignored: the pair takes part in the box loss
    assigned  (N, R) int64, index of the ground truth, BACKGROUND or IGNORED
    """

    anchor: Tensor
    gt: Tensor
    real: Tensor
    positive: Tensor
    assigned: Tensor


@torch.no_grad()
def uniform_match(
    predicted: Tensor, anchors: Tensor, targets: Targets, top: int, pos_ignore: float, neg_ignore: float
) -> Matches:
    """Every ground truth gets its `top` nearest predicted boxes and its `top` nearest anchors.

    predicted (N, R, 4), anchors (R, 4), targets with G boxes an image. Distance is L1 of centre, width
    and height. A pair whose anchor has IoU < pos_ignore with its ground truth is ignored, and so is an
    unpaired anchor whose predicted box has IoU > neg_ignore with some ground truth.
    """
    boxes, labels = at_least_one(targets)
    count, (images, size) = min(top, anchors.shape[0]), labels.shape
    real = labels >= 0

    wanted = to_cxcywh(boxes)
    nearest = [
        torch.cdist(to_cxcywh(source), wanted, p=1).topk(count, dim=1, largest=False).indices
        for source in (predicted, anchors.expand(images, -1, -1))
    ]
    anchor = torch.stack(nearest, dim=2).flatten(1)  # (N, top, 2, G) -> (N, E)
    gt = torch.arange(size, device=boxes.device).expand(images, count, 2, size).flatten(1)
    real_pair = real.gather(1, gt)

    pair_iou = paired_iou(anchors[anchor], pick(boxes, gt))
    positive = real_pair & (pair_iou >= pos_ignore)
    best_iou = torch.where(real[:, None, :], pairwise_iou(predicted, boxes), 0.0).amax(dim=2)
    unpaired = torch.where(best_iou > neg_ignore, IGNORED, BACKGROUND)

    # An anchor that occurs twice keeps its last pair. The reference writes with repeated indices, which
    # CUDA does in any order; the maximum of the positions is the same in every order.
    position = torch.arange(anchor.shape[1], device=boxes.device).expand_as(anchor)
    last = torch.full_like(unpaired, -1).scatter_reduce(
        1, anchor, torch.where(real_pair, position, -1), reduce="amax"
    )
    pair_value = torch.where(positive, gt, IGNORED)
    paired = pair_value.gather(1, last.clamp(min=0))
    return Matches(anchor, gt, real_pair, positive, torch.where(last >= 0, paired, unpaired))
