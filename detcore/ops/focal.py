"""Focal loss of many classes at many places, in little memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detcore.ops.matching import IGNORED

ALPHA = 0.25  # the exponent gamma is 2; both as in arXiv:1708.02002, table 1


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over logits (N, R, K) of -alpha_t (1 - p_t)^2 log(p_t), p = sigmoid(logits): a scalar.

    RetinaNet (arXiv:1708.02002), equation 5. Labels (N, R): a class, BACKGROUND, or IGNORED, which does not
    count.
    """
    return _FocalLoss.apply(logits, labels)


class _FocalLoss(torch.autograd.Function):
    """The gradient comes with the loss. Autograd would keep a dozen tensors as large as the logits, of which
    RetinaNet has 16 million for an image; this keeps one."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        # Nearly all are of classes that are not there: (1 - alpha) p^2 softplus(x). Its gradient is
        # (1 - alpha) p^2 (p + 2 (1 - p) softplus(x)). As few passes over memory as may be.
        p, surprise = logits.sigmoid(), F.softplus(logits)
        gradient = torch.add(p, surprise, alpha=2).addcmul_(surprise, p, value=-2)
        square = p.mul_(p)
        gradient.mul_(square)
        loss = surprise.mul_(square)

        own, foreground = labels.clamp(min=0)[..., None], (labels >= 0)[..., None]
        x, rate = logits.gather(-1, own), ALPHA / (1 - ALPHA)
        p, miss, surprise = x.sigmoid(), (-x).sigmoid(), F.softplus(-x)
        own_loss = rate * miss.square() * surprise
        own_gradient = -rate * miss.square() * (2 * p * surprise + miss)
        loss.scatter_(-1, own, torch.where(foreground, own_loss, loss.gather(-1, own)))
        gradient.scatter_(-1, own, torch.where(foreground, own_gradient, gradient.gather(-1, own)))

        counts = (labels != IGNORED) * (1 - ALPHA)
        ctx.save_for_backward(gradient.mul_(counts[..., None]))
        return (loss.sum(dim=-1) * counts).sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None
