"""Which anchors or points learn which ground truth: a rule a file.

A rule gives (N, R) int64: the index of the ground truth, BACKGROUND, or IGNORED. None depends on how many
boxes are real, so no step waits for the device.
"""

import torch
from torch import Tensor

from detcore.ops.targets import Targets, pick

BACKGROUND, IGNORED = -1, -2


def learned(assigned: Tensor, targets: Targets, otherwise: Tensor) -> tuple[Tensor, Tensor]:
    """What assignments (N, R) mean: classes (N, R), or BACKGROUND, or IGNORED; and boxes (N, R, 4),
    `otherwise` (R, 4) where there is no object, so that the arithmetic stays finite there."""
    foreground, gt = assigned >= 0, assigned.clamp(min=0)
    labels = torch.where(foreground, pick(targets.labels, gt), assigned)
    return labels, torch.where(foreground[..., None], pick(targets.boxes, gt), otherwise)
