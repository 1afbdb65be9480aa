"""What detectors are given and what they give: padded batches, so that no step depends on counts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Targets(NamedTuple):
    """Ground truth of a batch.

    boxes   (N, G, 4) float32, x1 y1 x2 y2 in pixels of the padded images; padding is zero
    labels  (N, G) int64, classes from 0; -1 marks padding. G may be 0.
    """

    boxes: Tensor
    labels: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Targets":
        """Both tensors through `function`: `targets.map(lambda t: t.to(device, non_blocking=True))`."""
        return Targets(function(self.boxes), function(self.labels))


class Detections(NamedTuple):
    """Detections of a batch, best first; slots from `count` on are padding.

    boxes   (N, D, 4) float32, x1 y1 x2 y2 in pixels of the padded images
    scores  (N, D) float32, 0 in padding
    labels  (N, D) int64, -1 in padding
    count   (N,) int64
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor


class Candidates(NamedTuple):
    """All that a network says of a batch, before the best of it is chosen.

    boxes   (N, R, 4) float32, x1 y1 x2 y2 in pixels of the images, not clipped
    scores  (N, R, K) float32, or (N, R) where `labels` (N, R) int64 says which class they are of
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor | None = None


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values (N, S) or (N, S, D), index (N, E) -> (N, E) or (N, E, D); zeros if there is nothing, S = 0."""
    if values.shape[1] == 0:
        return values.new_zeros(index.shape + values.shape[2:])
    if values.dim() == 3:
        index = index[..., None].expand(-1, -1, values.shape[2])
    return values.gather(1, index)


def at_least_one(targets: Targets) -> Targets:
    """The same with one padding box where G is 0: there is nothing to reduce over otherwise."""
    if targets.boxes.shape[1]:
        return targets
    return Targets(F.pad(targets.boxes, (0, 0, 0, 1)), F.pad(targets.labels, (0, 1), value=-1))


def compact(detections: Detections, keep: Tensor, limit: int | None = None) -> Detections:
    """Those of the detections where `keep` (N, D) holds, in their order, at most `limit` an image."""
    order = torch.argsort(keep.logical_not().to(torch.uint8), dim=1, stable=True)[:, :limit]
    kept = keep.gather(1, order)
    return Detections(
        boxes=pick(detections.boxes, order) * kept[..., None],
        scores=pick(detections.scores, order) * kept,
        labels=pick(detections.labels, order).masked_fill(~kept, -1),
        count=kept.sum(dim=1),
    )
