"""Non-maximum suppression of whole batches, without compiled extensions."""

import torch
from torch import Tensor

from detcore.ops.boxes import pairwise_iou


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
