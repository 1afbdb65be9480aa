"""Points by where they are in ground truth and how large it is (FCOS, arXiv:1904.01355, section 3.2)."""

import torch
from torch import Tensor

from detcore.ops.boxes import area, to_cxcywh
from detcore.ops.coder import to_distances
from detcore.ops.matching import BACKGROUND, better, in_chunks
from detcore.ops.targets import Targets

QUALITY = 1e8  # from which detectron2 subtracts the area


@torch.no_grad()
def points_match(
    points: Tensor, reach: Tensor, ranges: Tensor, targets: Targets, detectron2: bool = False
) -> Tensor:
    """Points (R, 2) -> (N, R): the smallest ground truth around each, or BACKGROUND.

    reach       (R,), the centre must be nearer than this in x and y; inf for no bound
    ranges      (R, 2), between these the largest distance to a side must be, both included
    detectron2  its ranges include neither end, and areas within about 8 square pixels tie

    Ties go to the lower index.
    """
    best, (least, most) = None, ranges[:, None].unbind(-1)
    for first, boxes, labels in in_chunks(targets, 4 * len(points)):
        distances = to_distances(boxes[:, None], points[:, None])  # (N, R, g, 4)
        away = (points[:, None] - to_cxcywh(boxes)[:, None, :, :2]).abs().amax(dim=-1)
        own = (distances.amin(dim=-1) > 0) & (away < reach[:, None]) & (labels[:, None] >= 0)

        largest, size = distances.amax(dim=-1), area(boxes)
        if detectron2:
            own &= (largest > least) & (largest < most)
            size = QUALITY - (QUALITY - size)  # float32 has steps of 8 up there
        else:
            own &= (largest >= least) & (largest <= most)
        best = better(best, torch.where(own, -size[:, None], -torch.inf), first)
    return torch.where(best.score > -torch.inf, best.gt, BACKGROUND)
