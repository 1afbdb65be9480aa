"""From scored boxes to detections: candidates of each level, NMS by class over all of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detcore.ops.boxes import clip
from detcore.ops.nms import nms
from detcore.ops.targets import Detections, compact, pick

FIRST = 1000  # candidates that NMS looks at to begin with


@torch.no_grad()
def select(
    best: Tensor,
    scores: Callable[[Tensor], Tensor],
    boxes: Callable[[Tensor], Tensor],
    levels: Sequence[int],
    *,
    score: float,
    topk: int,
    nms_iou: float,
    limit: int,
    quality: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Detections:
    """Of R boxes, `levels` of them on each level, at most `limit` an image.

    best         (N, R), the highest score that a box has for any class
    scores       rows (N, r) -> their scores (N, r, K). Asked of few: a pyramid has millions of scores
    boxes        rows (N, r) -> their boxes (N, r, 4), pixels
    score, topk  of each level the `topk` best pairs of box and class, if above `score`
    quality      (N, R), multiplies the scores of these candidates
    sizes        (N, 2) true (h, w), if the boxes are cut to them before NMS and empty ones dropped, as in
                 mmdetection and the authors' FCOS. detectron2 does so afterwards (see `inside`): other
                 boxes are kept.
    """
    first, candidates = 0, []
    parts = best.split(list(levels), dim=1)
    enough = torch.stack([(part > score).sum(dim=1).amax() for part in parts]).clamp(max=topk).tolist()
    for level, count in zip(parts, enough, strict=True):
        # The best pairs are in the best rows, and no more rows than pairs are needed.
        rows = _best_of(level, count) + first
        level_scores = scores(rows)
        classes, flat = level_scores.shape[-1], level_scores.flatten(1)
        index = _best_of(flat, min(topk, flat.shape[1]))
        candidates.append((flat.gather(1, index), pick(rows, index // classes), index % classes))
        first += level.shape[1]
    values, row, labels = (torch.cat(parts, dim=1) for parts in zip(*candidates, strict=True))

    found, real = boxes(row), values > score
    if quality is not None:
        values = values * pick(quality, row)
    if sizes is not None:
        found = clip(found, sizes)
        real &= _solid(found)
    order = torch.where(real, values, -1.0).argsort(dim=1, descending=True, stable=True)
    ranked = Detections(*(pick(part, order) for part in (found, values, labels)), real.sum(dim=1))
    return compact(ranked, _best(ranked, nms_iou, limit), limit)


def _best_of(scores: Tensor, count: int) -> Tensor:
    """Index (N, count), ascending, of the highest of scores (N, S) float32; of equal ones the first, and last
    of all those that are not numbers. topk alone takes any of equal ones, and others if asked for more: an
    image's detections would depend on its company."""
    bits = scores.nan_to_num(nan=-1.0).view(torch.int32).long()  # floats that are not negative sort as these
    backwards = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    return ((bits << 32) | backwards).topk(count, dim=1).indices.sort(dim=1).values


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
