"""Element-wise losses, in float32, and the mean over ranks that normalises their sums."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from detcore.ops.boxes import area

# Keeps 0/0 of empty boxes finite; far below one square pixel.
EPSILON = 1e-7


def sigmoid_focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log(p_t), with p = sigmoid(logits): (...) -> (...).

    RetinaNet (arXiv:1708.02002), equation 5. `target` is 0 or 1, of the logits' shape. alpha < 0: no
    alpha_t.
    """
    p = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = loss * (p + target - 2 * p * target) ** gamma  # 1 - p_t
    if alpha >= 0:
        loss = loss * (alpha * target + (1 - alpha) * (1 - target))
    return loss


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - GIoU of boxes (..., 4) in pairs -> (...). arXiv:1902.09630, algorithm 1."""
    lower = torch.maximum(predicted[..., :2], target[..., :2])
    upper = torch.minimum(predicted[..., 2:], target[..., 2:])
    overlap = (upper > lower).all(dim=-1)
    intersection = torch.where(overlap, (upper - lower).prod(dim=-1), 0.0)
    union = area(predicted) + area(target) - intersection
    outer = torch.maximum(predicted[..., 2:], target[..., 2:]) - torch.minimum(
        predicted[..., :2], target[..., :2]
    )
    hull = outer.prod(dim=-1)
    giou = intersection / (union + EPSILON) - (hull - union) / (hull + EPSILON)
    return 1 - giou


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a scalar over all ranks, without the host waiting for it.

    A sum divided by this has, after DDP's averaging, the gradient of one big batch.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value
