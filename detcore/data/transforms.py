"""From a file to an image for training: read, looked at through a window, resized, recoloured, moved.

Images are (H, W, 3) uint8 RGB arrays, boxes (G, 4) float32 x1 y1 x2 y2 in pixels, labels (G,) int64.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from detcore.config import Augment, Resize
from detcore.data.colours import jitter, photometric
from detcore.data.geometry import (
    Boxes,
    Labels,
    Pixels,
    Window,
    around,
    cut,
    expand,
    flip,
    flip_vertical,
    overlapping,
    shift,
    view,
)
from detcore.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # of files that are taken for images
BLACK = (0, 0, 0)
MEAN = (124, 116, 104)  # ImageNet's, which normalising makes zero


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An RGB image turned as its EXIF orientation says. Raises InputError, naming the path, if it cannot
    be read, or if it is not (width, height) `size`: its boxes would lie elsewhere."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
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


def resized(size: tuple[int, int], how: Resize) -> tuple[int, int]:
    """(width, height) with the shorter side `how.short`, or the longer one `how.max` if that is smaller."""
    if how.square is not None:
        return how.square, how.square
    if how.short is None:
        return size
    scale = min(how.short / min(size), how.max / max(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def resize(image: Image.Image, boxes: Boxes, how: Resize) -> tuple[Image.Image, Boxes]:
    new = resized(image.size, how)
    scale = np.array([new[0] / image.size[0], new[1] / image.size[1]] * 2, np.float32)
    return (image if new == image.size else image.resize(new, Image.Resampling.BILINEAR)), boxes * scale


def augment(
    image: Image.Image, boxes: Boxes, labels: Labels, how: Augment, rng: np.random.Generator
) -> tuple[Pixels, Boxes, Labels]:
    """An image for training. Each step draws from numbers of its own, so that a setting changes only what
    it is about."""
    windows, sizes, tints, flips, shifts = rng.spawn(5)
    image, boxes, labels = _through_window(image, boxes, labels, how, windows)
    short = how.short[int(sizes.integers(len(how.short)))]
    image, boxes = resize(image, boxes, Resize(short=short, max=how.max, square=how.square))
    boxes = cut(boxes, image.width, image.height)
    if how.photometric:
        image = photometric(image, how.channel_swap, tints)
    if how.jitter or how.lighting:
        image = jitter(image, how.jitter, how.lighting, tints)
    pixels: Pixels = np.asarray(image)
    if flips.random() < how.flip:
        pixels, boxes = flip(pixels, boxes)
    if flips.random() < how.flip_vertical:
        pixels, boxes = flip_vertical(pixels, boxes)
    if how.shift and shifts.random() < how.shift.p:
        dx, dy = np.rint(shifts.uniform(-1, 1, 2) * how.shift.pixels).astype(int)
        pixels, boxes, labels = shift(pixels, boxes, labels, int(dx), int(dy))
    keep = (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(axis=1)
    return pixels, boxes[keep], labels[keep]


def _through_window(
    image: Image.Image, boxes: Boxes, labels: Labels, how: Augment, rng: np.random.Generator
) -> tuple[Image.Image, Boxes, Labels]:
    """What SSD's expansion and crop leave, of which only the outcome is drawn, or CornerNet's crop."""
    if how.corner_crop and how.square:
        window = around(image.size, how.square, how.corner_crop.scales, how.corner_crop.border, rng)
        return view(image, boxes, labels, window, BLACK, central=False)
    window = whole = Window(0, 0, *image.size)
    if how.expand and rng.random() < how.expand.p:
        window = expand(image.size, how.expand.most, rng)
    if how.crop:
        seen = boxes - np.array([window.left, window.top] * 2, np.float32)
        part = overlapping(window.size, seen, how.crop.overlaps, how.crop.least, rng)
        window = part.moved(window.left, window.top)
    if window == whole:
        return image, boxes, labels
    return view(image, boxes, labels, window, MEAN, central=True)
