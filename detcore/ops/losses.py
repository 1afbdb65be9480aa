"""Element-wise losses of boxes, and what normalises their sums over the ranks. All in float32."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from detcore.ops.boxes import area, paired_iou, product

# Keeps 0/0 of empty boxes finite; far below one square pixel.
EPSILON = 1e-7


def smooth_l1_loss(predicted: Tensor, target: Tensor, beta: float = 0.0) -> Tensor:
    """|x| of the difference x, less beta / 2; below beta x^2 / (2 beta): (...) -> (...).

    Fast R-CNN (arXiv:1504.08083), equation 3, where beta is 1. With 0 it is L1.
    """
    if beta == 0:
        return (predicted - target).abs()
    return F.smooth_l1_loss(predicted, target, reduction="none", beta=beta)


def iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """-log IoU of boxes (..., 4) in pairs -> (...), at most -log 1e-6. UnitBox, arXiv:1608.01471."""
    return -paired_iou(predicted, target).clamp(min=1e-6).log()


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - GIoU of boxes (..., 4) in pairs -> (...). arXiv:1902.09630, algorithm 1."""
    lower = torch.maximum(predicted[..., :2], target[..., :2])
    upper = torch.minimum(predicted[..., 2:], target[..., 2:])
    overlap = (upper > lower).all(dim=-1)
    intersection = torch.where(overlap, product(upper - lower), 0.0)
    union = area(predicted) + area(target) - intersection
    outer = torch.maximum(predicted[..., 2:], target[..., 2:]) - torch.minimum(
        predicted[..., :2], target[..., :2]
    )
    hull = product(outer)
    giou = intersection / (union + EPSILON) - (hull - union) / (hull + EPSILON)
    return 1 - giou


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean over all ranks, without the host waiting for it.

    A sum divided by this has, after DDP's averaging, the gradient of one big batch.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


class MovingCount(nn.Module):
    """Moving average of the number of positives in a batch over all ranks, each rank's share of it.

    start     what the average is before the first batch
    momentum  how much of it stays with each batch; one without positives counts as one

    A sum divided by it has, after DDP's averaging, the gradient of one big batch. The average is a buffer,
    so that a resumed run goes on with it.
    """

    def __init__(self, start: float, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("average", torch.tensor(float(start)))

    def forward(self, count: Tensor) -> Tensor:
        """This rank's number of positives, a scalar -> the normaliser; in eval mode nothing is stored."""
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        total = (mean_over_ranks(count.float()) * ranks).clamp(min=1)
        average = self.average.lerp(total, 1 - self.momentum)
        if self.training:
            self.average.copy_(average)
        return average / ranks
