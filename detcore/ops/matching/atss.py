"""Anchors by the statistics of the IoU around each ground truth (ATSS, arXiv:1912.02424, algorithm 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detcore.ops.boxes import paired_iou, to_cxcywh
from detcore.ops.coder import to_distances
from detcore.ops.matching import BACKGROUND
from detcore.ops.targets import Targets, at_least_one

INSIDE = 0.01  # pixels that a centre must be from every side of its ground truth


@torch.no_grad()
def atss_match(anchors: Tensor, levels: Sequence[int], targets: Targets, candidates: int) -> Tensor:
    """Anchors (R, 4), `levels` of them on each level -> (N, R): a ground truth, or BACKGROUND.

    Of each level the `candidates` nearest centres (lines 3 to 6); of those whose IoU is at least its mean
    plus its standard deviation (7 to 10) the ones inside the box (11 to 15). Where several ground truths
    want an anchor, the one with the highest IoU has it.
    """
    boxes, labels = at_least_one(targets)
    centers = to_cxcywh(anchors)[:, :2]
    between = centers[:, None] - to_cxcywh(boxes)[:, None, :, :2]
    distance = between.square().sum(dim=-1).sqrt()  # (N, R, G)
    nearest, first = [], 0
    for level in distance.split(list(levels), dim=1):
        count = min(candidates, level.shape[1])
        nearest.append(level.topk(count, dim=1, largest=False).indices + first)
        first += level.shape[1]
    candidate = torch.cat(nearest, dim=1)  # (N, C, G)

    iou = paired_iou(anchors[candidate], boxes[:, None])
    threshold = iou.mean(dim=1, keepdim=True) + iou.std(dim=1, keepdim=True)
    inside = to_distances(boxes[:, None], centers[candidate]).amin(dim=-1) > INSIDE
    positive = (iou >= threshold) & inside & (labels[:, None] >= 0)
    wanted = torch.full_like(distance, -1).scatter(1, candidate, torch.where(positive, iou, -1.0))
    best, gt = wanted.max(dim=2)
    return torch.where(best >= 0, gt, BACKGROUND)
