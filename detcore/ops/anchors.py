"""Anchors on a grid."""

from collections.abc import Sequence

import torch
from torch import Tensor


def square_anchors(
    height: int, width: int, stride: int, sizes: Sequence[float], device: torch.device
) -> Tensor:
    """Squares of side `sizes` (pixels) centred at (column * stride, row * stride).

    -> (height * width * len(sizes), 4) float32, index (row * width + column) * len(sizes) + size.
    The centres have no half-stride offset, as in detectron2's default and in YOLOF.
    """
    y = torch.arange(height, dtype=torch.float32, device=device) * stride
    x = torch.arange(width, dtype=torch.float32, device=device) * stride
    centers = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).reshape(-1, 1, 2)
    # arange, not torch.tensor(sizes, device=...): a copy from the host would wait for the device.
    half = torch.cat([torch.full((1, 1, 2), size / 2, device=device) for size in sizes], dim=1)
    return torch.cat([centers - half, centers + half], dim=-1).reshape(-1, 4)
