"""Non-maximum suppression of whole batches, without compiled extensions."""

import torch
from torch import Tensor

from detcore.ops.boxes import pairwise_iou
from detcore.ops.targets import pick


def nms(boxes: Tensor, labels: Tensor | None, threshold: float) -> Tensor:
    """Greedy NMS over boxes (N, D, 4) that are sorted best first -> keep (N, D) bool.

    A box goes if a kept box before it has IoU > threshold with it and, unless `labels` (N, D) is None,
    the same label.

    keep[j] = not any(keep[i] and S[i, j] for i < j). Since S is triangular this has one solution, and
    iterating it from "keep all" reaches it: after t rounds every box that hangs on a chain of at most t
    suppressions is final. Real chains are short, so this is a handful of small matrix products where a
    loop over boxes would be D steps.
    """
    count = boxes.shape[1]
    before = torch.ones(count, count, dtype=torch.bool, device=boxes.device).triu(diagonal=1)
    suppresses = (pairwise_iou(boxes, boxes) > threshold) & before
    if labels is not None:
        suppresses &= labels[:, :, None] == labels[:, None, :]
    suppresses = suppresses.float()
    keep = boxes.new_ones(boxes.shape[:2])
    while True:
        suppressed = torch.bmm(keep[:, None], suppresses)[:, 0]
        updated = (suppressed == 0).to(keep.dtype)
        if torch.equal(updated, keep):
            return keep.bool()
        keep = updated


def soft_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, limit: int, sigma: float = 0.5, threshold: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The best `limit` of boxes (N, D, 4) after soft NMS by class (arXiv:1704.04503), the Gaussian kind.

    Again and again the best box is taken, and the scores of the others of its label (N, D) are multiplied
    by exp(-IoU^2 / sigma); those that overlap it and fall below `threshold` go. Scores never rise, so they
    come out best first, and no more than `limit` rounds are needed. Boxes include their last pixel, as in
    CornerNet's code. A negative score (N, D) marks what is not there.

    -> their index (N, L) and scores (N, L), -1 in slots that are left.
    """
    inclusive = torch.cat([boxes[..., :2], boxes[..., 2:] + 1], dim=-1)
    left, taken = scores, []
    for _ in range(min(limit, boxes.shape[1])):
        score, index = left.max(dim=1, keepdim=True)
        taken.append((index, score))
        iou = pairwise_iou(pick(inclusive, index), inclusive)[:, 0]
        touched = (iou > 0) & (labels == labels.gather(1, index)) & (score >= 0)
        decayed = left * (-(iou**2) / sigma).exp()
        left = torch.where(touched, torch.where(decayed < threshold, -1.0, decayed), left)
        left = left.scatter(1, index, -1.0)
    order, best = (torch.cat(parts, dim=1) for parts in zip(*taken, strict=True))
    return order, best
