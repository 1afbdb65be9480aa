"""From scored boxes to detections: candidates of each level, NMS by class over all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detcore.ops.boxes import clip
from detcore.ops.nms import nms
from detcore.ops.targets import Detections, compact, pick

FIRST = 1000  # candidates that NMS looks at to begin with


@torch.no_grad()
def select(
    scores: Tensor,
    boxes: Tensor,
    levels: Sequence[int],
    *,
    score: float,
    topk: int,
    nms_iou: float,
    limit: int,
    quality: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Detections:
    """Scores (N, R, K) of boxes (N, R, 4), `levels` of them on each level -> at most `limit` an image.

    score, topk  of each level the `topk` best pairs of box and class, if above `score`
    quality      (N, R), multiplies the scores of these candidates
    sizes        (N, 2) true (h, w), if the boxes are cut to them before NMS and empty ones dropped, as in
                 mmdetection and the authors' FCOS. detectron2 does so afterwards (see `inside`): other
                 boxes are kept.
    """
    classes, first, candidates = scores.shape[-1], 0, []
    for level in scores.split(list(levels), dim=1):
        flat = level.flatten(1)
        best, index = flat.topk(min(topk, flat.shape[1]), dim=1)
        candidates.append((best, index // classes + first, index % classes))
        first += level.shape[1]
    values, row, labels = (torch.cat(parts, dim=1) for parts in zip(*candidates, strict=True))

    boxes, real = pick(boxes, row), values > score
    if quality is not None:
        values = values * pick(quality, row)
    if sizes is not None:
        boxes = clip(boxes, sizes)
        real &= _solid(boxes)
    order = torch.where(real, values, -1.0).argsort(dim=1, descending=True, stable=True)
    found = Detections(*(pick(part, order) for part in (boxes, values, labels)), real.sum(dim=1))
    return compact(found, _best(found, nms_iou, limit), limit)


def _best(found: Detections, threshold: float, limit: int) -> Tensor:
    """Which of the first `count` of each image, sorted, NMS keeps: of those that it keeps at least the first
    `limit`. Its cost is the square of what it looks at, and what comes later changes nothing earlier, so it
    looks at more only where that leaves too few."""
    most, width = int(found.count.max()), FIRST
    rank = torch.arange(found.labels.shape[1], device=found.labels.device)
    real = rank < found.count[:, None]
    while True:
        width = min(width, most)
        keep = torch.zeros_like(real)
        keep[:, :width] = nms(found.boxes[:, :width], found.labels[:, :width], threshold)
        keep &= real
        if bool(((keep.sum(dim=1) >= limit) | (found.count <= width)).all()):
            return keep
        width *= 2


def inside(found: Detections, sizes: Tensor) -> Detections:
    """Detections cut to true sizes (N, 2), without those of which nothing is left."""
    boxes = clip(found.boxes, sizes)
    return compact(found._replace(boxes=boxes), _solid(boxes) & (found.labels >= 0))


def _solid(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
