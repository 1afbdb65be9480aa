"""Boxes that move with their pixels: flips, shifts, and windows on an image, of SSD and of CornerNet.

Images are (H, W, 3) uint8 RGB arrays or PIL's, boxes (G, 4) float32 x1 y1 x2 y2 in pixels, labels (G,) int64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Boxes = NDArray[np.float32]
Labels = NDArray[np.int64]

TRIALS = 50  # windows that are looked at for one bound on the overlap


def cut(boxes: Boxes, width: int, height: int) -> Boxes:
    """Boxes inside the image."""
    return np.clip(boxes, 0, np.array([width, height] * 2, np.float32))


def flip(pixels: Pixels, boxes: Boxes) -> tuple[Pixels, Boxes]:
    """Left becomes right."""
    width = pixels.shape[1]
    x1, y1, x2, y2 = boxes.T
    return pixels[:, ::-1], np.stack([width - x2, y1, width - x1, y2], axis=1)


def flip_vertical(pixels: Pixels, boxes: Boxes) -> tuple[Pixels, Boxes]:
    """Top becomes bottom."""
    height = pixels.shape[0]
    x1, y1, x2, y2 = boxes.T
    return pixels[::-1], np.stack([x1, height - y2, x2, height - y1], axis=1)


def shift(
    pixels: Pixels, boxes: Boxes, labels: Labels, dx: int, dy: int
) -> tuple[Pixels, Boxes, Labels]:  # fmt: skip
    """Everything `dx` to the right and `dy` down; what comes in is black (YOLOF, arXiv:2103.09460, 5.1).

    Boxes are cut at the border, and dropped where a pixel or less is left; if none would be left, nothing
    is moved.
    """
    height, width = pixels.shape[:2]
    moved = cut(boxes + np.array([dx, dy, dx, dy], np.float32), width, height)
    keep = (moved[:, 2:] - moved[:, :2] > 1).all(axis=1)
    if not keep.any():
        return pixels, boxes, labels
    canvas = np.zeros_like(pixels)
    source = pixels[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
    top, left = max(0, dy), max(0, dx)
    canvas[top : top + source.shape[0], left : left + source.shape[1]] = source
    return canvas, moved[keep], labels[keep]


class Window(NamedTuple):
    """What of an image is looked at, in its pixels; it may reach beyond the image."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        return self.right - self.left, self.bottom - self.top

    def moved(self, dx: int, dy: int) -> "Window":
        return Window(self.left + dx, self.top + dy, self.right + dx, self.bottom + dy)


def view(
    image: Image.Image,
    boxes: Boxes,
    labels: Labels,
    window: Window,
    fill: tuple[int, int, int],
    central: bool,
) -> tuple[Image.Image, Boxes, Labels]:
    """The window, `fill` where there is no image, and the boxes cut at its border.

    central: only boxes whose centre is in the window are kept.
    """
    canvas = Image.new("RGB", window.size, fill)
    canvas.paste(image, (-window.left, -window.top))
    boxes = boxes - np.array([window.left, window.top] * 2, np.float32)
    keep = _central(np.array([[0, 0, *window.size]]), boxes)[0] if central else slice(None)
    return canvas, cut(boxes, *window.size)[keep], labels[keep]


def expand(size: tuple[int, int], most: float, rng: np.random.Generator) -> Window:
    """An image of `size` (w, h) somewhere on a canvas 1 to `most` times as wide and high (SSD,
    arXiv:1512.02325, 3.6)."""
    factor = rng.uniform(1, most)
    width, height = (int(side * factor) for side in size)
    left, top = (int(rng.uniform(0, side * (factor - 1))) for side in size)
    return Window(-left, -top, width - left, height - top)


def overlapping(
    size: tuple[int, int], boxes: Boxes, overlaps: Sequence[float], least: float, rng: np.random.Generator
) -> Window:
    """SSD's random crop (2.2): with the same chance everything, any part, or a part that each object overlaps
    by one of `overlaps` (IoU) or more. Sides are `least` to 1 of the image's, at a ratio of 1/2 to 2.

    As in mmdetection that is asked of all objects, not of one, and the centre of one must be inside; a bound
    that no window meets is drawn anew.
    """
    width, height = size
    while True:
        choice = int(rng.integers(len(overlaps) + 2))
        if choice == 0:
            return Window(0, 0, width, height)
        bound = (0.0, *overlaps)[choice - 1]
        w, h = (rng.uniform(least * side, side, TRIALS) for side in size)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        windows = np.stack([x, y, x + w, y + h], axis=1).astype(int)
        good = (h <= 2 * w) & (w <= 2 * h) & (windows[:, 2:] > windows[:, :2]).all(axis=1)
        if len(boxes):
            good &= (_iou(windows, boxes) >= bound).all(axis=1) & _central(windows, boxes).any(axis=1)
        if good.any():
            return Window(*windows[good.argmax()].tolist())


def around(
    size: tuple[int, int], side: int, scales: Sequence[float], border: int, rng: np.random.Generator
) -> Window:
    """CornerNet's random crop: a square of `side` times one of `scales`, its centre anywhere but nearer than
    `border` to the image's; in small images half of that, or a quarter, ..."""
    length = int(side * scales[int(rng.integers(len(scales)))])
    corner = []
    for extent in size:
        margin = border
        while extent <= 2 * margin:
            margin //= 2
        corner.append(int(rng.integers(margin, extent - margin)) - length // 2)
    return Window(*corner, corner[0] + length, corner[1] + length)


def _central(windows: NDArray[np.int64], boxes: Boxes) -> NDArray[np.bool_]:
    """Which boxes (G, 4) have their centre inside which windows (M, 4) -> (M, G)."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centres > windows[:, None, :2]) & (centres < windows[:, None, 2:])).all(axis=2)


def _iou(windows: NDArray[np.int64], boxes: Boxes) -> NDArray[np.float64]:
    """(M, 4) and (G, 4) -> (M, G)."""
    top_left = np.maximum(windows[:, None, :2], boxes[:, :2])
    bottom_right = np.minimum(windows[:, None, 2:], boxes[:, 2:])
    common = np.clip(bottom_right - top_left, 0, None).prod(axis=2)
    areas = [(one[:, 2:] - one[:, :2]).prod(axis=1) for one in (windows, boxes)]
    return common / np.maximum(areas[0][:, None] + areas[1] - common, 1e-6)
