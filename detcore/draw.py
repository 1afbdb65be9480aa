"""Boxes on pictures."""

import colorsys
from collections.abc import Mapping, Sequence

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


def bars(title: str, counts: Mapping[str, int], most: int = 100) -> Image.Image:
    """A histogram with a bar for each name, of the first `most` of them."""
    rows = list(counts.items())[:most]
    size, left, width = 14, 180, 720
    height = round(1.5 * size)
    picture = Image.new("RGB", (width, (len(rows) + 2) * height), (255, 255, 255))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    more = f" (the first {most} of {len(counts)})" if len(counts) > most else ""
    pen.text((8, 4), title + more, fill=(0, 0, 0), font=font)
    highest = max([1, *(count for _, count in rows)])
    for number, (name, count) in enumerate(rows):
        top = round((number + 1.5) * height)
        pen.text((8, top), name[:24], fill=(0, 0, 0), font=font)
        end = left + (width - left - 90) * count / highest
        pen.rectangle((left, top + 2, end, top + size), fill=colour(number))
        pen.text((end + 8, top), f"{count:,}", fill=(0, 0, 0), font=font)
    return picture
