"""Points and anchors on a grid; index row * width + column, and an anchor's place in its cell last."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def whole_steps(shapes: Sequence[tuple[int, int]], stride: int) -> list[tuple[int, int]]:
    """From a cell to the next (down, across), pixels, on levels of `shapes` (H, W), as torchvision has it: a
    side of the canvas by the number of cells, rounded down. The first level's `stride` is exact."""
    height, width = (side * stride for side in shapes[0])
    return [(height // down, width // across) for down, across in shapes]


def grid_points(
    height: int, width: int, stride: float | tuple[float, float], offset: float, device: torch.device
) -> Tensor:
    """((column + offset) * stride, (row + offset) * stride) -> (height * width, 2) float32, pixels.
    stride: one, or (down, across).

    An offset of 0 is detectron2's default for anchors, mmdetection's, and YOLOF's; FCOS has 0.5.
    """
    down, across = stride if isinstance(stride, tuple) else (stride, stride)
    y = (torch.arange(height, dtype=torch.float32, device=device) + offset) * down
    x = (torch.arange(width, dtype=torch.float32, device=device) + offset) * across
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).reshape(-1, 2)


def grid_anchors(
    points: Tensor, sizes: Sequence[float], ratios: Sequence[float] = (1.0,), whole: bool = False
) -> Tensor:
    """Boxes around points (P, 2), of areas size^2 and ratios height / width -> (P * A, 4).

    Index point * A + size * len(ratios) + ratio. whole: sizes rounded down to pixels, then halves of sides to
    the nearest, as torchvision has it.
    """
    sizes = [int(size) for size in sizes] if whole else sizes
    widths = [(size / math.sqrt(ratio), ratio) for size in sizes for ratio in ratios]
    shapes = [(width, width * ratio) for width, ratio in widths]
    if whole:
        shapes = [(2.0 * round(width / 2), 2.0 * round(height / 2)) for width, height in shapes]
    return boxes_around(points, shapes)


def boxes_around(points: Tensor, shapes: Sequence[tuple[float, float]]) -> Tensor:
    """Boxes of `shapes` (width, height) around points (P, 2) -> (P * A, 4), index point * A + shape."""
    # full, not torch.tensor(..., device=...): a copy from the host would wait for the device.
    half = [points.new_full((), side / 2) for shape in shapes for side in shape]
    half = torch.stack(half).view(1, -1, 2)
    return torch.cat([points[:, None] - half, points[:, None] + half], dim=-1).reshape(-1, 4)
