"""Boxes as offsets from anchors (R-CNN, arXiv:1311.2524, appendix C), or as distances from points (FCOS)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from detcore.ops.boxes import to_cxcywh

# A box may grow to 1000/16 of its anchor, so that exp() cannot overflow (Faster R-CNN's constant).
MAX_LOG_SCALE = math.log(1000.0 / 16)


class DeltaCoder(NamedTuple):
    """dx = wx (x - xa) / wa, dw = ww log(w / wa), likewise y and h.

    center_clamp: the centre may move by at most this many pixels from the anchor's (YOLOF: 32, one
    cell), None for no bound.
    symmetric: a box may not shrink by more than it may grow, as in mmdetection.
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    center_clamp: float | None = None
    symmetric: bool = False

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (..., 4) against anchors that broadcast with them -> deltas (..., 4)."""
        box, anchor = to_cxcywh(boxes), to_cxcywh(anchors)
        shift = (box[..., :2] - anchor[..., :2]) / anchor[..., 2:]
        scale = (box[..., 2:] / anchor[..., 2:]).log()
        deltas = zip((*shift.unbind(-1), *scale.unbind(-1)), self.weights, strict=True)
        return torch.stack([delta * weight for delta, weight in deltas], dim=-1)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., 4) against anchors that broadcast with them -> boxes (..., 4)."""
        anchor = to_cxcywh(anchors)
        wx, wy, ww, wh = self.weights
        dx, dy, dw, dh = deltas.unbind(-1)
        shift = torch.stack([dx / wx, dy / wy], dim=-1) * anchor[..., 2:]
        if self.center_clamp is not None:
            shift = shift.clamp(-self.center_clamp, self.center_clamp)
        center = anchor[..., :2] + shift
        least = -MAX_LOG_SCALE if self.symmetric else None
        scale = torch.stack([dw / ww, dh / wh], dim=-1).clamp(least, MAX_LOG_SCALE)
        half = anchor[..., 2:] * scale.exp() / 2
        return torch.cat([center - half, center + half], dim=-1)


def to_distances(boxes: Tensor, points: Tensor) -> Tensor:
    """How far left, top, right and bottom of boxes (..., 4) are from points (..., 2): (..., 4), pixels.

    FCOS (arXiv:1904.01355), equation 1."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def from_distances(distances: Tensor, points: Tensor) -> Tensor:
    """Distances (..., 4) from points (..., 2) -> boxes (..., 4)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def centerness(distances: Tensor) -> Tensor:
    """Distances (..., 4), none negative -> (...): 1 in the middle, 0 at the edge. FCOS, equation 3."""
    across, down = distances[..., 0::2], distances[..., 1::2]
    ratio = (across.amin(dim=-1) / across.amax(dim=-1)) * (down.amin(dim=-1) / down.amax(dim=-1))
    return ratio.sqrt()
