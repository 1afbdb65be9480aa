"""Boxes on pictures."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TRUTH = (255, 255, 255)


def colour(label: int) -> tuple[int, int, int]:
    """A colour of its own for each class; neighbours are far apart (golden ratio)."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.61803398875 % 1, 0.85, 1.0)
    return int(255 * red), int(255 * green), int(255 * blue)


def draw_truth(image: Image.Image, boxes: np.ndarray) -> None:
    """Boxes (G, 4) x1 y1 x2 y2 in thin white, into `image`."""
    pen = ImageDraw.Draw(image)
    for box in boxes.tolist():
        pen.rectangle(box, outline=TRUTH, width=1)


def draw_detections(
    image: Image.Image, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> None:
    """Boxes (D, 4) x1 y1 x2 y2 with name and score, into `image`; the best ones on top."""
    pen = ImageDraw.Draw(image)
    size = max(10, min(image.size) // 40)
    font = ImageFont.load_default(size)
    for row in range(len(scores) - 1, -1, -1):
        x1, y1, x2, y2 = boxes[row].tolist()
        ink = colour(int(labels[row]))
        pen.rectangle([x1, y1, max(x1, x2), max(y1, y2)], outline=ink, width=max(1, size // 8))
        text = f"{names[int(labels[row])]} {scores[row]:.2f}"
        top = max(0.0, y1 - 1.2 * size)
        pen.rectangle(pen.textbbox((x1, top), text, font=font), fill=ink)
        pen.text((x1, top), text, fill=(0, 0, 0), font=font)
