"""Anchors by the statistics of the IoU around each ground truth (ATSS, arXiv:1912.02424, algorithm 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detcore.ops.boxes import paired_iou, to_cxcywh
from detcore.ops.coder import to_distances
from detcore.ops.matching import BACKGROUND, in_chunks
from detcore.ops.targets import Targets, at_least_one

INSIDE = 0.01  # pixels that a centre must be from every side of its ground truth


@torch.no_grad()
def atss_match(
    anchors: Tensor, levels: Sequence[int], targets: Targets, candidates: int, margin: float = INSIDE
) -> Tensor:
    """Anchors (R, 4), `levels` of them on each level -> (N, R): a ground truth, or BACKGROUND.

    Of each level the `candidates` nearest centres (lines 3 to 6); of those whose IoU is at least its mean
    plus its standard deviation (7 to 10) the ones inside the box, by `margin` pixels (11 to 15). Where
    several ground truths want an anchor, the one with the highest IoU has it.
    """
    boxes, labels = at_least_one(targets)
    centers = to_cxcywh(anchors)[:, :2]
    chunks = in_chunks(targets, 2 * len(anchors))
    # (N, C, G), whole again: C is small, and means over it round otherwise where G is another.
    candidate = torch.cat([nearest(centers, levels, chunk.boxes, candidates) for chunk in chunks], dim=2)

    iou = paired_iou(anchors[candidate], boxes[:, None])
    threshold = iou.mean(dim=1, keepdim=True) + iou.std(dim=1, keepdim=True)
    inside = to_distances(boxes[:, None], centers[candidate]).amin(dim=-1) > margin
    positive = (iou >= threshold) & inside & (labels[:, None] >= 0)
    wanted, anchor = torch.where(positive, iou, -1.0).flatten(1), candidate.flatten(1)
    best = wanted.new_full((len(labels), len(anchors)), -1).scatter_reduce(1, anchor, wanted, reduce="amax")

    # Of those that tie the lower index has it, in whatever order CUDA writes.
    gt = torch.arange(labels.shape[1], device=labels.device).expand_as(candidate).flatten(1)
    first = torch.where(wanted == best.gather(1, anchor), gt, labels.shape[1])
    assigned = torch.full_like(best, labels.shape[1], dtype=torch.int64)
    assigned = assigned.scatter_reduce(1, anchor, first, reduce="amin")
    return torch.where(best >= 0, assigned, BACKGROUND)


def nearest(centers: Tensor, levels: Sequence[int], boxes: Tensor, candidates: int) -> Tensor:
    """Of each level the rows of `centers` (R, 2) that are nearest to those of boxes (N, g, 4): (N, C, g)."""
    between = centers[:, None] - to_cxcywh(boxes)[:, None, :, :2]
    distance = between.square().sum(dim=-1).sqrt()  # (N, R, g)
    rows, first = [], 0
    for level in distance.split(list(levels), dim=1):
        count = min(candidates, level.shape[1])
        rows.append(level.topk(count, dim=1, largest=False).indices + first)
        first += level.shape[1]
    return torch.cat(rows, dim=1)
