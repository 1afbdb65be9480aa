"""Boxes x1, y1, x2, y2 in pixels, in the last dimension; any leading dimensions."""

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...), square pixels; boxes turned inside out count as empty."""
    return product((boxes[..., 2:] - boxes[..., :2]).clamp(min=0))


def product(sides: Tensor) -> Tensor:
    """Width times height: (..., 2) -> (...). The gradient of Tensor.prod looks for zeros, and so waits for
    the device."""
    width, height = sides.unbind(-1)
    return width * height


def to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners to centre, width, height: (..., 4) -> (..., 4)."""
    lower, upper = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(lower + upper) / 2, upper - lower], dim=-1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (N, D, 4) cut to images of true sizes (N, 2) as (h, w)."""
    height, width = sizes.to(boxes.dtype)[:, None, None].unbind(-1)
    return torch.minimum(boxes.clamp(min=0), torch.cat([width, height, width, height], dim=-1))


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every box of `a` (..., P, 4) with every box of `b` (..., Q, 4) -> (..., P, Q); 0 where 0/0."""
    ax1, ay1, ax2, ay2 = a[..., :, None, :].unbind(-1)
    bx1, by1, bx2, by2 = b[..., None, :, :].unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    union = area(a)[..., :, None] + area(b)[..., None, :] - intersection
    return torch.where(intersection > 0, intersection / union, 0.0)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of `a` (..., 4) with the box of `b` (..., 4) in the same place -> (...); 0 where 0/0."""
    return pairwise_iou(a[..., None, :], b[..., None, :])[..., 0, 0]
