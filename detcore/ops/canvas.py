"""Images moved onto larger ones."""

from collections.abc import Sequence

import torch
from torch import Tensor


def centered(
    images: Tensor, sizes: Tensor, shape: tuple[int, int], color: Sequence[int] = (0, 0, 0)
) -> tuple[Tensor, Tensor]:
    """Each image in the middle of one of a single color (C,) and of `shape` (height, width).

    images (N, C, H, W), of true sizes (N, 2) (h, w) -> images (N, C, *shape) and their borders at the left
    and above (N, 2) as (x, y), in pixels.
    """
    height, width = shape
    top, left = height // 2 - sizes[:, :1] // 2, width // 2 - sizes[:, 1:] // 2
    row = torch.arange(height, device=sizes.device) - top
    column = torch.arange(width, device=sizes.device) - left
    rows_inside = (row >= 0) & (row < sizes[:, :1])
    columns_inside = (column >= 0) & (column < sizes[:, 1:])
    image = torch.arange(len(images), device=sizes.device)[:, None, None]
    row, column = row.clamp(0, images.shape[-2] - 1), column.clamp(0, images.shape[-1] - 1)
    moved = images.movedim(1, -1)[image, row[:, :, None], column[:, None, :]].movedim(-1, 1)
    inside = rows_inside[:, None, :, None] & columns_inside[:, None, None, :]
    around = images.new_tensor(color)[:, None, None]
    return torch.where(inside, moved, around), torch.cat([left, top], dim=1)
