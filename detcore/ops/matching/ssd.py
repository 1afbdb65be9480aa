"""Prior boxes by their IoU with ground truth, and of the others those that are hardest (SSD,
arXiv:1512.02325, section 2.2)."""

import torch
from torch import Tensor

from detcore.ops.boxes import pairwise_iou
from detcore.ops.matching import BACKGROUND, better, in_chunks
from detcore.ops.targets import Targets


@torch.no_grad()
def ssd_match(priors: Tensor, targets: Targets, positive: float) -> Tensor:
    """Prior boxes (R, 4) -> (N, R): the best ground truth from IoU `positive` on, otherwise BACKGROUND.

    A ground truth's best prior box is its own, however bad it is; where several want the same, the last of
    them has it, as in mmdetection.
    """
    best, claimed = None, targets.labels.new_full((len(targets.labels), len(priors)), BACKGROUND)
    for first, boxes, labels in in_chunks(targets, len(priors)):
        iou = torch.where(labels[:, None, :] >= 0, pairwise_iou(priors, boxes), 0.0)  # (N, R, g)
        best = better(best, iou, first)
        most, prior = iou.max(dim=1)
        index = torch.arange(first, first + labels.shape[1], device=labels.device)
        wanted = torch.where(most > 0, index, BACKGROUND)
        # The maximum, not a plain scatter: that writes in any order on CUDA.
        claimed = claimed.scatter_reduce(1, prior, wanted, reduce="amax")
    assigned = torch.where(best.score >= positive, best.gt, BACKGROUND)
    return torch.where(claimed >= 0, claimed, assigned)


@torch.no_grad()
def hard_negatives(losses: Tensor, positive: Tensor, ratio: int) -> Tensor:
    """Of the rows that are not `positive` (N, R) those with the largest `losses` (N, R), none negative: at
    most `ratio` times as many as are, of each image. -> (N, R) bool."""
    rank = losses.masked_fill(positive, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < ratio * positive.sum(dim=1, keepdim=True)) & ~positive
