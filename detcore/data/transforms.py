"""Image and boxes, together: resize, flip, shift, colours. Pure functions of their arguments.

Images are (H, W, 3) uint8 RGB arrays, boxes (G, 4) float32 x1 y1 x2 y2 in pixels, labels (G,) int64.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from detcore.errors import InputError

Pixels = NDArray[np.uint8]
Boxes = NDArray[np.float32]
Labels = NDArray[np.int64]


class Shift(Protocol):
    pixels: int
    p: float


class Augmentation(Protocol):
    """What `augment` reads; `detcore.config.Augment` is one."""

    short: list[int]
    max: int
    flip: float
    flip_vertical: float
    shift: Shift | None
    photometric: bool


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An RGB image turned as its EXIF orientation says. Raises InputError, naming the path, if it cannot
    be read, or if it is not (width, height) `size`: its boxes would lie elsewhere."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"image {path} cannot be read: {error}") from None
    except OSError as error:
        if error.errno is not None:  # the disk, not the file: it may go better next time
            raise
        raise InputError(f"image {path} cannot be read: {error}") from None
    if size is not None and image.size != size:
        raise InputError(
            f"image {path} is {image.size[0]}x{image.size[1]}, its annotations say {size[0]}x{size[1]}"
        )
    return image


def resized(size: tuple[int, int], short: int | None, longest: int) -> tuple[int, int]:
    """(width, height) with the shorter side `short`, or the longer one `longest` if that is smaller; None:
    as it is."""
    if short is None:
        return size
    scale = min(short / min(size), longest / max(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def resize(image: Image.Image, boxes: Boxes, short: int | None, longest: int) -> tuple[Image.Image, Boxes]:
    new = resized(image.size, short, longest)
    scale = np.array([new[0] / image.size[0], new[1] / image.size[1]] * 2, np.float32)
    return (image if new == image.size else image.resize(new, Image.Resampling.BILINEAR)), boxes * scale


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


def cut(boxes: Boxes, width: int, height: int) -> Boxes:
    """Boxes inside the image."""
    return np.clip(boxes, 0, np.array([width, height] * 2, np.float32))


def colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness by up to an eighth, contrast and saturation by up to a half, hue by up to 18 degrees,
    each half of the time: the strengths of SSD (arXiv:1512.02325, 2.2)."""
    for enhance, strength in (
        (ImageEnhance.Brightness, 0.125),
        (ImageEnhance.Contrast, 0.5),
        (ImageEnhance.Color, 0.5),
    ):
        draw, factor = rng.random(), rng.uniform(1 - strength, 1 + strength)
        if draw < 0.5:
            image = enhance(image).enhance(factor)
    draw, turn = rng.random(), int(rng.integers(-13, 14))
    if draw < 0.5:
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point([(level + turn) % 256 for level in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image


def augment(
    image: Image.Image, boxes: Boxes, labels: Labels, how: Augmentation, rng: np.random.Generator
) -> tuple[Pixels, Boxes, Labels]:
    """An image for training. Every draw is made whatever the others were, so that a setting changes only
    what it is about."""
    short = how.short[int(rng.integers(len(how.short)))]
    draws = rng.random(3)
    move = rng.uniform(-1, 1, 2)
    if how.photometric:
        image = colours(image, rng)
    image, boxes = resize(image, boxes, short, how.max)
    pixels: Pixels = np.asarray(image)
    boxes = cut(boxes, image.width, image.height)
    if draws[0] < how.flip:
        pixels, boxes = flip(pixels, boxes)
    if draws[1] < how.flip_vertical:
        pixels, boxes = flip_vertical(pixels, boxes)
    if how.shift and draws[2] < how.shift.p:
        dx, dy = np.rint(move * how.shift.pixels).astype(int)
        pixels, boxes, labels = shift(pixels, boxes, labels, int(dx), int(dy))
    keep = (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(axis=1)
    return pixels, boxes[keep], labels[keep]
